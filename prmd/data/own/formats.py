"""One row of people's pairs: from any of the usual forms to prompt, chosen and rejected.

The forms are TRL's (text or messages; the prompt given, or the beginning that both sides share), whole conversations, and
HH-RLHF's transcripts. A row that cannot be a pair is a `RowError` with the reason under which it is counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prmd.data.hh_rlhf import TranscriptError, compare_transcripts
from prmd.pairs import Message, broken_text

_TOOLS = ("tools", "tool_calls", "tool_call_id", "function_call")
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class RowError(ValueError):
    """A row that cannot be a pair.

    Attributes:
        reason: under which it is counted.
        detail: what exactly; may be empty.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Compared:
    """A prompt and two responses to it."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


def form_of(row: Mapping[str, Any]) -> dict[str, str]:
    """What prompt, chosen and rejected of a row are: `text`, `messages` or the name of another type; empty ones are left out."""
    kinds = {str: "text", list: "messages"}
    given = {name: row.get(name) for name in ("prompt", "chosen", "rejected")}
    return {
        name: kinds.get(type(v), type(v).__name__) for name, v in given.items() if v not in (None, "", [])
    }


def compare(row: Mapping[str, Any]) -> Compared:
    """Read a row.

    Args:
        row: columns `prompt`, `chosen`, `rejected`, `system` and `tools`, all but two of which may be missing.

    Raises:
        RowError: it is no pair.
    """
    if row.get("tools"):
        raise RowError("tools", "the row offers tools, which no stage can call")
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if not chosen or not rejected:
        raise RowError("empty_response")
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise RowError("malformed", f"chosen is {type(chosen).__name__}, rejected {type(rejected).__name__}")
    if isinstance(chosen, list):
        found = _of_messages(prompt, _messages(chosen), _messages(rejected))
    elif prompt in (None, ""):
        found = _of_texts(chosen, rejected)
    else:
        found = _of_responses(prompt, chosen, rejected)
    return _checked(_with_system(found, row.get("system")))


def _of_messages(prompt: Any, chosen: list[Message], rejected: list[Message]) -> Compared:
    """Responses as messages: of the assistant alone behind a prompt, or at the end of whole conversations."""
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise RowError("last_speaker_not_assistant")
    context, other = chosen[:-1], rejected[:-1]
    if context != other:
        raise RowError("contexts_differ")
    if isinstance(prompt, list):
        given = _messages(prompt)
        if context and context[: len(given)] != given:
            raise RowError("prompt_differs", "chosen and rejected do not go on from the prompt")
        context = context or given
    elif isinstance(prompt, str) and prompt.strip():
        said = [m["content"].strip() for m in context if m["role"] == "user"]
        if context and prompt.strip() not in said:
            raise RowError("prompt_differs", "chosen and rejected hold another prompt")
        context = context or [{"role": "user", "content": prompt.strip()}]
    return Compared(tuple(context), chosen[-1]["content"], rejected[-1]["content"])


def _of_texts(chosen: str, rejected: str) -> Compared:
    """Texts that hold the prompt: transcripts, or the words in which both begin."""
    if chosen.lstrip().startswith(("Human:", "Assistant:")):
        return _of_transcripts(chosen, rejected)
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = chosen[: next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))]
    words = shared[
        : max(map(shared.rfind, (" ", "\n", "\t"))) + 1
    ]  # cut at a word: "bl" is no beginning of "blue"
    if not words.strip():
        raise RowError("empty_prompt", "no prompt is given and the two texts begin differently")
    return Compared(
        ({"role": "user", "content": words.strip()},),
        chosen[len(words) :].strip(),
        rejected[len(words) :].strip(),
    )


def _of_transcripts(chosen: str, rejected: str) -> Compared:
    try:
        sides = compare_transcripts(chosen, rejected)
    except TranscriptError as error:
        raise RowError(str(error)) from error
    return Compared(sides.chosen.prompt, sides.chosen.response, sides.rejected.response)


def _of_responses(prompt: Any, chosen: str, rejected: str) -> Compared:
    """A prompt, as text, transcript or messages, and two texts."""
    if isinstance(prompt, list):
        return Compared(tuple(_messages(prompt)), chosen.strip(), rejected.strip())
    if not isinstance(prompt, str):
        raise RowError("malformed", f"prompt is {type(prompt).__name__}")
    if prompt.lstrip().startswith("Human:") and prompt.rstrip().endswith("\n\nAssistant:"):
        return _of_transcripts(f"{prompt.rstrip()} {chosen.strip()}", f"{prompt.rstrip()} {rejected.strip()}")
    user = {"role": "user", "content": prompt.strip()}
    return Compared((user,), chosen.strip(), rejected.strip())


def _messages(value: Sequence[Any]) -> list[Message]:
    """Role and content of every message; other keys are left out, but for what the text would lack."""
    found = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError("malformed", f"a message is {message!r:.60}")
        if message["role"] in ("tool", "function") or any(message.get(key) for key in _TOOLS):
            raise RowError("tools", "a message calls a tool or is a tool's answer")
        if any(message.get(key) for key in _THOUGHTS):
            raise RowError("reasoning", "a message holds thoughts beside its content")
        if not isinstance(message.get("content"), str):
            raise RowError("not_text", f"a message's content is {type(message.get('content')).__name__}")
        found.append({"role": message["role"], "content": message["content"]})
    return found


def _with_system(found: Compared, system: Any) -> Compared:
    has_own = found.prompt[:1] and found.prompt[0]["role"] == "system"
    if has_own or not isinstance(system, str) or not system.strip():
        return found
    first = {"role": "system", "content": system.strip()}
    return Compared((first, *found.prompt), found.chosen, found.rejected)


def _checked(found: Compared) -> Compared:
    """The pair, or why it is none, by the rules of a stored row."""
    if broken_text(*(m["content"] for m in found.prompt), found.chosen, found.rejected):
        raise RowError("broken_text")
    roles = [m["role"] for m in found.prompt]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or not all(m["content"].strip() for m in found.prompt):
        raise RowError("empty_prompt")
    if len(turns) % 2 == 0 or turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        raise RowError("roles_not_alternating", f"roles {', '.join(roles)}")
    if not found.chosen.strip() or not found.rejected.strip():
        raise RowError("empty_response")
    if found.chosen.strip() == found.rejected.strip():
        raise RowError("identical_responses")
    return found
