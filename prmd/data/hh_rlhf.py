"""HH-RLHF: its files, its transcripts and its pairs.

A transcript is text like `\\n\\nHuman: ...\\n\\nAssistant: ...`. `parse_transcript` cuts it at the role markers into
`Turn`s that keep their raw text, so that joining them gives the source back; messages are the stripped turns. Searching
for the last `\\n\\nAssistant:` is not enough: some rows differ before their last turn.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from prmd.config.shared import DataConfig, HhRlhfConfig
from prmd.data.collection import PairCollection, RawFile, SourcedPair
from prmd.data.readers import (
    HUB_ID,
    SourceFile,
    first_existing,
    hub_file,
    local_file,
    local_path,
    split_rows,
)
from prmd.errors import ConfigError
from prmd.pairs import Message, broken_text, make_pair
from prmd.runtime import progress

_MARKER = re.compile(r"(?:\A\s*|\n\n[ \t]*)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class TranscriptError(ValueError):
    """A transcript that cannot become messages; the text is the quarantine reason."""


@dataclass(frozen=True)
class Turn:
    """One or more consecutive paragraphs of one speaker.

    Attributes:
        role: `user` or `assistant`.
        parts: text behind each marker; more than one where consecutive turns of the speaker were merged.
    """

    role: str
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
        Turn(_ROLES[marker[1]], (text[marker.end() : end],))
        for marker, end in zip(markers, ends, strict=True)
    ]


def _merge_same_speaker(turns: Sequence[Turn]) -> list[Turn]:
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            last = merged.pop()
            turn = Turn(turn.role, last.parts + turn.parts)
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


# ------------------------------------------------------------------ one function per source
def plan_hh_rlhf(data: DataConfig) -> list[SourceFile]:
    """Train and test file of every subset that an objective names."""
    settings = data.hh_rlhf
    key = "data.hh_rlhf.path"
    folder = local_path(settings.path, key)
    files = []
    for subset in dict.fromkeys(settings.helpful_subsets + settings.harmless_subsets):
        if not HUB_ID.fullmatch(subset) or subset.startswith("red-team"):
            raise ConfigError(
                f"data.hh_rlhf: {subset!r} is no preference subset (the bare repository would mix in red-team rows); "
                "name folders such as helpful-base or harmless-base"
            )
        for split in ("train", "test"):
            label = f"{subset}/{split}"
            if folder is None:
                read = partial(split_rows, key, settings.path, settings.revision, split, subset=subset)
                files.append(hub_file("hh_rlhf", label, split, settings, read))
            else:
                path = first_existing(folder, (f"{label}.jsonl.gz", f"{label}.jsonl"), key)
                files.append(local_file(path, label, split))
    return files


def hh_rlhf_pairs(files: Iterable[RawFile], settings: HhRlhfConfig) -> PairCollection:
    """Pairs of HH-RLHF: `helpful_subsets` for helpful, `harmless_subsets` for harmless."""
    collection = PairCollection()
    subsets = {"helpful": settings.helpful_subsets, "harmless": settings.harmless_subsets}
    for file in files:
        subset = file.label.split("/")[0]
        objectives = [objective for objective, names in subsets.items() if subset in names]
        for index, row in enumerate(progress(file.rows, len(file.rows), f"pairs of {file.label}")):
            for objective in objectives:
                _add_hh_row(collection, row, source=file.where(index), objective=objective, file=file)
    return collection


def _add_hh_row(
    collection: PairCollection, row: dict[str, Any], *, source: str, objective: str, file: RawFile
) -> None:
    try:
        if not isinstance(row.get("chosen"), str) or not isinstance(row.get("rejected"), str):
            raise TranscriptError("malformed")
        if broken_text(row["chosen"], row["rejected"]):
            raise TranscriptError("broken_text")
        sides = compare_transcripts(row["chosen"], row["rejected"])
    except TranscriptError as error:
        collection.refuse(source=source, objective=objective, reason=str(error), row=row)
        return
    pair = make_pair(
        prompt=sides.chosen.prompt,
        chosen=sides.chosen.response,
        rejected=sides.rejected.response,
        source=source,
        objective=objective,
    )
    collection.pairs.append(SourcedPair(pair, file.upstream_split))
