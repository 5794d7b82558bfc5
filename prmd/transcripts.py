"""Parsing HH-RLHF transcripts by a role state machine, without losing a character.

A transcript is text like `\\n\\nHuman: ...\\n\\nAssistant: ...`. `parse_transcript` cuts it at the role markers into
`Turn`s that keep their raw text, so that joining them gives the source back; messages are the stripped turns. Searching
for the last `\\n\\nAssistant:` is not enough: some rows differ before their last turn. Pairs are made in `pair_builders`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from prmd.pairs import Message

_MARKER = re.compile(r"(?:\A\s*|\n\n[ \t]*)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class TranscriptError(ValueError):
    """A transcript that cannot become messages; the text is the quarantine reason."""


@dataclass(frozen=True)
class Turn:
    """One or more consecutive paragraphs of one speaker.

    Attributes:
        role: `user` or `assistant`.
        raw: exact source text, role markers included.
        parts: text behind each marker; more than one where consecutive turns of the speaker were merged.
    """

    role: str
    raw: str
    parts: tuple[str, ...]

    @cached_property
    def content(self) -> str:
        """The parts, stripped and joined by a blank line."""
        return "\n\n".join(part.strip() for part in self.parts)

    @property
    def empty(self) -> bool:
        """Whether any part holds no text (an empty part cannot be merged into its neighbour either)."""
        return not all(part.strip() for part in self.parts)


@dataclass(frozen=True)
class Transcript:
    """Turns that alternate from user to assistant; the last one is the response."""

    turns: tuple[Turn, ...]

    @property
    def prompt_text(self) -> str:
        """Source text before the response's marker."""
        return render_transcript(self.turns[:-1])

    @property
    def response_text(self) -> str:
        """Source text of the response, marker included."""
        return self.turns[-1].raw

    @property
    def prompt(self) -> tuple[Message, ...]:
        return tuple({"role": turn.role, "content": turn.content} for turn in self.turns[:-1])

    @property
    def response(self) -> str:
        return self.turns[-1].content

    @property
    def context(self) -> list[tuple[str, str]]:
        """(role, text) of everything before the last marker, unmerged."""
        parts = [(turn.role, part.strip()) for turn in self.turns for part in turn.parts]
        return parts[:-1]


def render_transcript(turns: Sequence[Turn]) -> str:
    """The exact source text of `turns`."""
    return "".join(turn.raw for turn in turns)


def parse_transcript(text: str) -> Transcript:
    """Cut a transcript into alternating turns.

    A marker counts at the start of a paragraph (blanks before it allowed). Consecutive turns of one speaker become one
    turn unless one of them is empty.

    Raises:
        TranscriptError: with the reason `malformed` (text before the first marker, or no marker),
            `last_speaker_not_assistant`, or `roles_not_alternating`.
    """
    turns = _merge_same_speaker(_cut(text))
    if turns[-1].role != "assistant":
        raise TranscriptError("last_speaker_not_assistant")
    if turns[0].role != "user" or any(len(t.parts) > 1 and t.empty for t in turns):
        raise TranscriptError("roles_not_alternating")
    return Transcript(tuple(turns))


def _cut(text: str) -> list[Turn]:
    markers = list(_MARKER.finditer(text))
    if not markers or markers[0].start() != 0:
        raise TranscriptError("malformed")
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    return [
        Turn(_ROLES[marker[1]], text[marker.start() : end], (text[marker.end() : end],))
        for marker, end in zip(markers, ends, strict=True)
    ]


def _merge_same_speaker(turns: Sequence[Turn]) -> list[Turn]:
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            last = merged.pop()
            turn = Turn(turn.role, last.raw + turn.raw, last.parts + turn.parts)
        merged.append(turn)
    return merged


@dataclass(frozen=True)
class ComparedTranscripts:
    """The two sides of a row: same prompt, two different responses."""

    chosen: Transcript
    rejected: Transcript


def compare_transcripts(chosen: str, rejected: str) -> ComparedTranscripts:
    """Parse both sides of an HH-RLHF row and check that they are two answers to one prompt.

    Turns of one speaker are merged in the prompt only: a response of two turns is no text anybody wrote as one.

    Raises:
        TranscriptError: with the reason of `parse_transcript`, or `contexts_differ`, `roles_not_alternating` (the
            response is two turns), `empty_prompt` (a turn before the response holds no text), `empty_response`,
            `identical_responses`.
    """
    sides = ComparedTranscripts(parse_transcript(chosen), parse_transcript(rejected))
    if sides.chosen.context != sides.rejected.context:
        raise TranscriptError("contexts_differ")
    if any(len(side.turns[-1].parts) > 1 for side in (sides.chosen, sides.rejected)):
        raise TranscriptError("roles_not_alternating")
    if any(turn.empty for turn in sides.chosen.turns[:-1]):
        raise TranscriptError("empty_prompt")
    if sides.chosen.turns[-1].empty or sides.rejected.turns[-1].empty:
        raise TranscriptError("empty_response")
    if sides.chosen.response == sides.rejected.response:
        raise TranscriptError("identical_responses")
    return sides
