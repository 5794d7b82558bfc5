"""From messages to token rows: one prompt and its responses, tokenised once through the chat template.

The whole conversation is rendered and the response is what lies behind its common prefix with the rendered prompt, so
that no token is ever merged or lost at the boundary. Rows that do not fit `max_length` lose whole turns of the prompt
from the left, then tokens of its last message, never a token of a response. Batches are built in `prefix_rows`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from prmd.errors import ConfigError, DataError
from prmd.pairs import Message, PreferencePair

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class PrefixRow:
    """One prompt and n responses to it, as token ids; the responses continue the prompt.

    Raises:
        ValueError: an empty prompt, whose first response token nothing predicts, or an empty response.
    """

    prompt_ids: Tokens
    responses: tuple[Tokens, ...]

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.responses or not all(self.responses):
            raise ValueError("a row needs a prompt and at least one response, none of them empty")

    @property
    def shared_length(self) -> int:
        """Tokens of the row when the prompt is stored once."""
        return len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def longest(self) -> int:
        """Tokens of the longest single conversation in the row."""
        return len(self.prompt_ids) + max(map(len, self.responses))


@dataclass(frozen=True)
class TokenizedPairs:
    """Rows of (chosen, rejected), the pairs they came from (prompts as fitted), and what did not fit."""

    rows: list[PrefixRow]
    pairs: list[PreferencePair]
    dropped: int
    truncated: int


def check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a tokenizer whose chat template cannot serve both a policy and a reward model.

    Raises:
        ConfigError: no chat template, no pad token, or a template that ends in the pad token (a plain
            sequence classifier would then read the reward before it).
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{where}: the tokenizer has no chat template; choose an instruct model in model.name"
        )
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{where}: the tokenizer has no pad token; choose an instruct model in model.name")
    example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if render(tokenizer, example)[-1] == tokenizer.pad_token_id:
        raise ConfigError(
            f"{where}: the chat template ends in the pad token {tokenizer.pad_token!r}, so a reward would be read one "
            "token early; set another pad token in the tokenizer's folder"
        )


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A key of how this tokenizer renders and splits a fixed conversation, with its template and vocabulary size."""
    example = [
        {"role": "user", "content": "Where is the café? 12+34"},
        {"role": "assistant", "content": "On the  left,\n\nby the river."},
        {"role": "user", "content": "Thanks"},
    ]
    text = (
        f"{tokenizer.chat_template}|{len(tokenizer)}|{render(tokenizer, example, add_generation_prompt=True)}"
    )
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation by the chat template; no token is added in front or behind."""
    return tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase, response: Sequence[int]) -> int:
    """Position of the token that ends the assistant's turn: the last special token of the rendered response.

    Raises:
        ConfigError: the template ends a turn without a special token, so a policy could not learn to stop.
    """
    special = set(tokenizer.all_special_ids)
    for position in range(len(response) - 1, -1, -1):
        if response[position] in special:
            return position
    raise ConfigError(
        "the chat template ends an assistant turn without a special token; choose an instruct model"
    )


def tokenize_response(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], response: str, *, keep_suffix: bool
) -> tuple[int, Tokens]:
    """Length of the prompt's tokens and the response's tokens.

    Args:
        messages: the prompt, ending in a user turn.
        keep_suffix: keep what the template puts behind the end of turn (reward models, which read the reward
            there) or cut behind the end-of-turn token (policies).
    """
    prompt_ids = render(tokenizer, messages, add_generation_prompt=True)
    whole = render(tokenizer, [*messages, {"role": "assistant", "content": response}])
    shared = 0
    while shared < min(len(prompt_ids), len(whole)) and prompt_ids[shared] == whole[shared]:
        shared += 1
    tail = whole[shared:]
    return shared, tuple(tail if keep_suffix else tail[: end_of_turn(tokenizer, tail) + 1])


def tokenize_row(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    responses: Sequence[str],
    *,
    keep_suffix: bool,
) -> PrefixRow:
    """One prompt with its responses; where their boundaries differ, the earliest one serves them all.

    Raises:
        ConfigError: the template renders the conversation unlike its prompt from the first token on.
    """
    parts = [tokenize_response(tokenizer, messages, text, keep_suffix=keep_suffix) for text in responses]
    prompt_ids = render(tokenizer, messages, add_generation_prompt=True)
    shared = min(length for length, _ in parts)
    if shared == 0:
        raise ConfigError(
            "the chat template renders a conversation that shares no token with its own prompt; choose another "
            "instruct model in model.name"
        )
    tails = [tuple(prompt_ids[shared:length]) + tokens for length, tokens in parts]
    return PrefixRow(tuple(prompt_ids[:shared]), tuple(tails))


def tokenize_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    over_length: str,
    keep_suffix: bool,
) -> TokenizedPairs:
    """Tokenise pairs to rows (chosen, rejected) of at most `max_length` tokens per conversation.

    Args:
        over_length: `drop` the pairs that are longer, or `truncate_prompt`.

    Raises:
        DataError: nothing is left.
    """
    rows, kept, dropped, truncated = [], [], 0, 0
    for pair in pairs:
        row = tokenize_row(tokenizer, pair.prompt, (pair.chosen, pair.rejected), keep_suffix=keep_suffix)
        if row.longest > max_length:
            prompt = None if over_length == "drop" else _fit_prompt(tokenizer, pair, max_length, keep_suffix)
            if prompt is None:
                dropped += 1
                continue
            pair, truncated = replace(pair, prompt=prompt), truncated + 1
            row = tokenize_row(tokenizer, prompt, (pair.chosen, pair.rejected), keep_suffix=keep_suffix)
        rows.append(row)
        kept.append(pair)
    if pairs and not rows:
        raise DataError(f"none of {len(pairs)} pairs fits training.max_length={max_length} tokens; raise it")
    return TokenizedPairs(rows, kept, dropped, truncated)


def _fit_prompt(
    tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, max_length: int, keep_suffix: bool
) -> tuple[Message, ...] | None:
    room = max_length - max(
        len(tokenize_response(tokenizer, pair.prompt[-1:], text, keep_suffix=keep_suffix)[1])
        for text in (pair.chosen, pair.rejected)
    )
    return fit_messages(tokenizer, pair.prompt, room)


def fit_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], room: int
) -> tuple[Message, ...] | None:
    """The most recent part of `messages` whose rendered prompt has at most `room` tokens; None if nothing does.

    Whole turns go first, oldest first (a system turn stays); then the last user message loses tokens from its left.
    """

    def fits(candidate: Sequence[Message]) -> bool:
        return len(render(tokenizer, candidate, add_generation_prompt=True)) <= room

    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = list(messages[len(system) :])
    starts = [i for i, m in enumerate(turns) if m["role"] == "user"]
    for start in starts:
        if fits([*system, *turns[start:]]):
            return (*system, *turns[start:])
    content = tokenizer.encode(turns[-1]["content"], add_special_tokens=False)
    overhead = len(render(tokenizer, [*system, turns[-1]], add_generation_prompt=True)) - len(content)
    for keep in range(min(room - overhead, len(content)), 0, -1):
        text = tokenizer.decode(content[-keep:]).strip()
        candidate = (*system, {"role": "user", "content": text})
        if text and fits(candidate):
            return candidate
    return None


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, max_length: int
) -> Tokens:
    """The rendered prompt a policy continues, cut from the left by whole turns to `max_length` tokens.

    Raises:
        DataError: even its last message cannot be cut to fit.
    """
    fitted = fit_messages(tokenizer, messages, max_length)
    if fitted is None:
        raise DataError(f"a prompt cannot be cut to {max_length} tokens; raise training.max_length")
    return tuple(render(tokenizer, fitted, add_generation_prompt=True))
