"""From messages to token rows: one prompt and its responses, tokenised once through the chat template (`chat_templates`).

The whole conversation is rendered and the response is what lies behind its common prefix with the rendered prompt, so
that no token is ever merged or lost at the boundary. Rows that do not fit `max_length` lose whole turns of the prompt
from the left, then tokens of its last message, never a token of a response. Batches are built in `prefix_rows`.

One rule says which ids stand for a sampled response. The policy reads the ids that it sampled, control tokens and all: of
these is its log-probability. Whoever judges the response reads its text, tokenised as a message (`tokenize_texts`): the reward
models of stages 2 and 3 as the judges and proxies of stage 4. A text has one tokenisation, in which no control token stands,
so R(x, y) is one function everywhere, and a control token that was sampled within a response forges no turn for any reader.
Nothing is masked out of sampling: that would draw from another distribution than the one whose log-probabilities are measured.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from prmd.errors import ConfigError, DataError
from prmd.models.chat_templates import encode_text, end_of_turn, read_template, render, stop_token
from prmd.pairs import Message, PreferencePair

logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]

_ASKED: tuple[Message, ...] = ({"role": "user", "content": "a"},)
"""A prompt, behind which texts are tokenised that belong behind another one."""


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
    """Rows of (chosen, rejected), the pairs they came from (prompts as fitted), and how many were left out or shortened.

    Attributes:
        dropped: pairs that do not fit, and pairs whose two sides are the same tokens.
        truncated: pairs whose prompt was shortened.
    """

    rows: list[PrefixRow]
    pairs: list[PreferencePair]
    dropped: int
    truncated: int


def tokenize_response(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], response: str, *, keep_suffix: bool
) -> tuple[int, Tokens]:
    """Length of the prompt's tokens and the response's tokens.

    Args:
        messages: the prompt, ending in a user turn.
        keep_suffix: keep what the template puts behind the end of turn (reward models, which read the reward
            there) or cut behind the end-of-turn token (policies), which is added where the template writes it between
            turns alone.
    """
    prompt_ids = render(tokenizer, messages, add_generation_prompt=True)
    whole = render(tokenizer, [*messages, {"role": "assistant", "content": response}])
    shared = 0
    while shared < min(len(prompt_ids), len(whole)) and prompt_ids[shared] == whole[shared]:
        shared += 1
    tail = whole[shared:]
    if not keep_suffix:
        closed = read_template(tokenizer).writes_stop
        tail = tail[: end_of_turn(tokenizer, tail) + 1] if closed else [*tail, stop_token(tokenizer)]
    return shared, tuple(tail)


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
    # An empty response behind which the template writes nothing is the last token of its prompt: a row needs one to read.
    shared = min(length - (not tail) for length, tail in parts)
    if shared == 0:
        raise ConfigError(
            "the chat template renders a conversation that shares no token with its own prompt; choose another "
            "instruct model in model.name"
        )
    tails = [tuple(prompt_ids[shared:length]) + tokens for length, tokens in parts]
    return PrefixRow(tuple(prompt_ids[:shared]), tuple(tails))


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Tokens, responses: Sequence[str]
) -> PrefixRow:
    """A rendered prompt with the texts of its responses, the row that `tokenize_row` makes of its messages for reward models.

    What stands behind a prompt does not depend on its messages, so the texts are rendered behind a short one.

    Args:
        prompt_ids: with the generation prompt (`tokenize_prompt`).

    Raises:
        ConfigError: the texts change the template's rendering of the prompt before them.
    """
    row = tokenize_row(tokenizer, _ASKED, responses, keep_suffix=True)
    asked = tuple(render(tokenizer, _ASKED, add_generation_prompt=True))
    kept = len(prompt_ids) - (len(asked) - len(row.prompt_ids))
    if kept < 1 or prompt_ids[kept:] != asked[len(row.prompt_ids) :]:
        raise ConfigError(
            "the chat template renders a prompt otherwise where a response stands behind it, so the text of a sample cannot "
            "be read behind the prompt that it was sampled to; choose another instruct model in model.name"
        )
    return PrefixRow(prompt_ids[:kept], row.responses)


def tokenize_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    over_length: str,
    keep_suffix: bool,
    keep_ties: bool = False,
) -> TokenizedPairs:
    """Tokenise pairs to rows (chosen, rejected) of at most `max_length` tokens per conversation.

    A pair whose sides become the same tokens, as where the template trims the text, prefers nothing: it is left out and said.

    Args:
        over_length: `drop` the pairs that are longer, or `truncate_prompt`.
        keep_ties: keep pairs whose sides are the same tokens, for a measure that counts ties.

    Raises:
        DataError: nothing is left, or the template refuses a pair; names it.
    """
    rows, kept, same, dropped, truncated = [], [], [], 0, 0
    for pair in pairs:
        try:
            fitted = _fit_pair(pair, tokenizer, max_length, over_length, keep_suffix)
        except DataError as error:
            raise DataError(f"{pair.id} ({pair.source}): {error}") from error
        if fitted is None:
            dropped += 1
            continue
        if fitted[0].responses[0] == fitted[0].responses[1] and not keep_ties:
            same.append(pair)
            continue
        rows.append(fitted[0])
        kept.append(fitted[1])
        truncated += fitted[1] is not pair
    say_left_out(same, len(pairs))
    if pairs and not rows:
        if same:
            raise DataError(
                f"none of {len(pairs)} pairs is left: {len(same)} are the same tokens as chosen and rejected, give different "
                f"responses; {dropped} do not fit training.max_length={max_length} tokens"
            )
        raise DataError(f"none of {len(pairs)} pairs fits training.max_length={max_length} tokens; raise it")
    return TokenizedPairs(rows, kept, dropped + len(same), truncated)


def say_left_out(same: Sequence[PreferencePair], total: int) -> None:
    """Warn of the pairs whose sides are the same tokens, if there are any among `total`."""
    if same:
        logger.warning(
            "%d of %d pairs left out: chosen and rejected are the same tokens in the chat template; the first is %s of %s",
            *(len(same), total, same[0].id, same[0].source),
        )


def say_one_prompt(rows: Sequence[PrefixRow], name: str) -> None:
    """Warn where all of several pairs of a training have one and the same prompt: nothing is learned of any other."""
    if len(rows) > 1 and len({row.prompt_ids for row in rows}) == 1:
        logger.warning(
            "%s: all %d pairs have one and the same prompt of %d tokens; give other prompts, or raise training.max_length if "
            "it cuts them to that",
            *(name, len(rows), len(rows[0].prompt_ids)),
        )


def _fit_pair(
    pair: PreferencePair,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    over_length: str,
    keep_suffix: bool,
) -> tuple[PrefixRow, PreferencePair] | None:
    """Its row and the pair, with as much of its prompt as fits; None where it is to be dropped."""
    row = tokenize_row(tokenizer, pair.prompt, (pair.chosen, pair.rejected), keep_suffix=keep_suffix)
    if row.longest <= max_length:
        return row, pair
    prompt = None if over_length == "drop" else _fit_prompt(tokenizer, pair, max_length, keep_suffix)
    if prompt is None:
        return None
    row = tokenize_row(tokenizer, prompt, (pair.chosen, pair.rejected), keep_suffix=keep_suffix)
    return row, replace(pair, prompt=prompt)


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
    content = encode_text(tokenizer, turns[-1]["content"])
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
