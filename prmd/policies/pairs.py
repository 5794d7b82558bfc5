"""Which pairs a policy is trained on: splits mixed by objective weights, in the order of training; their tokens and numbers.

How the numbers come about, rewards and log-probabilities, is in `scores`, to be read next; pairs made of reference samples
are in `sample_pairs`.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prmd.artifacts.paths import ArtifactPaths
from prmd.config.policy import PolicyConfig
from prmd.errors import ConfigError, DataError
from prmd.models.chat_templates import render, template_fingerprint
from prmd.models.tokenization import (
    PrefixRow,
    TokenizedPairs,
    Tokens,
    say_left_out,
    tokenize_pairs,
    tokenize_prompt,
    tokenize_response,
    tokenize_row,
)
from prmd.pairs import Message, PreferencePair, read_pairs

EVAL_SHARE, EVAL_PAIRS = 0.25, 256
"""Held-out pairs watched during training: a quarter of the training pairs, 256 at most."""

Split = Mapping[str, Sequence[PreferencePair]]
"""The pairs of one split by objective."""

Text = tuple[tuple[str, str], ...]


# ------------------------------------------------------------------ which pairs
@dataclass(frozen=True)
class PolicyPairs:
    """Pairs of one split, tokenized for the policy, and the order in which training sees them.

    Attributes:
        stream: indices into `tokenized.rows` over all epochs.
    """

    tokenized: TokenizedPairs
    stream: list[int]


@dataclass(frozen=True)
class Mixture:
    """How the pairs of all objectives are mixed.

    Attributes:
        weights: share of each objective.
        total: pairs of an epoch.
        epochs: passes over them.
        max_repeats: draws of one pair in an epoch at most; None: no limit.
    """

    weights: Mapping[str, float]
    total: int
    epochs: float
    seed: int
    max_repeats: int | None = None


def read_splits(paths: ArtifactPaths) -> dict[str, Split]:
    """The splits `train` and `val` of all objectives, by name.

    Raises:
        DataError: one is missing, empty or malformed.
    """
    splits: dict[str, dict[str, list[PreferencePair]]] = {"train": {}, "val": {}}
    for objective in paths.objectives:
        for split, pairs in splits.items():
            pairs[objective] = read_pairs(paths, objective, split)
    return splits


def training_mixture(config: PolicyConfig, train: Split, objective: str | None = None) -> Mixture:
    """The mixture of a training: as many pairs per epoch as the split holds, and no more than `training.max_pairs`.

    Args:
        objective: take this one's pairs alone, as many as all together would be.
    """
    held, weights = sum(map(len, train.values())), config.policy.weights
    own = {k: float(k == objective) for k in weights} if objective else weights
    total = min(held, config.training.max_pairs or held)
    return Mixture(own, total, config.training.epochs, config.shared.seed, config.pairs.max_repeats)


def objective_draws(
    sizes: Mapping[str, int], weights: Mapping[str, float], total: int, max_repeats: int | None = None
) -> dict[str, int]:
    """How many of the `total` draws of an epoch are of each objective: round(weight x total), as far as its pairs allow.

    An objective whose every pair is drawn `max_repeats` times has its share filled; what is left over is shared by weight
    among those that have draws left, so that an epoch keeps its size as long as there are any.

    Args:
        max_repeats: draws of one pair at most; None: no limit.
    """
    draws = {k: round(weights[k] * total) for k in weights}
    if max_repeats is None:
        return draws
    most = {k: max_repeats * sizes[k] for k in weights}
    left = sum(max(0, draws[k] - most[k]) for k in weights)
    draws = {k: min(draws[k], most[k]) for k in weights}
    while left and (able := [k for k in weights if weights[k] > 0 and draws[k] < most[k]]):
        whole, shared = sum(weights[k] for k in able), left
        for k in able:  # at least one each, so that it ends
            more = min(left, most[k] - draws[k], max(1, int(shared * weights[k] / whole)))
            draws[k], left = draws[k] + more, left - more
    return draws


def binding_repeats(sizes: Mapping[str, int], mixture: Mixture) -> int | None:
    """`max_repeats` where it changes what is drawn, else None: the training is then that of no limit."""
    free, limited = (
        objective_draws(sizes, mixture.weights, mixture.total, most) for most in (None, mixture.max_repeats)
    )
    return None if free == limited else mixture.max_repeats


def describe_draws(sizes: Mapping[str, int], mixture: Mixture) -> dict[str, dict[str, float]]:
    """Of each objective its draws in an epoch, their share of all, and the passes over its pairs in the whole training."""
    draws = objective_draws(sizes, mixture.weights, mixture.total, mixture.max_repeats)
    return {
        k: {
            "draws": n,
            "share": n / max(1, sum(draws.values())),
            "passes": mixture.epochs * n / max(1, sizes[k]),
        }
        for k, n in draws.items()
    }


def draws_line(draws: Mapping[str, Mapping[str, float]]) -> str:
    """`describe_draws` in words."""
    parts = (f"{k} {row['share']:.1%} ({row['passes']:.3g} passes)" for k, row in draws.items())
    return f"pairs drawn: {', '.join(parts)}"


def pool_order(
    sizes: Mapping[str, int],
    weights: Mapping[str, float],
    total: int,
    seed: int,
    max_repeats: int | None = None,
) -> list[tuple[str, int]]:
    """Draw `total` (objective, index) pairs, `objective_draws` of each objective, in random order.

    An objective with fewer pairs repeats them, one with more is subsampled: data-set size has no say.
    """
    drawn: list[tuple[str, int]] = []
    draws = objective_draws(sizes, weights, total, max_repeats)
    for objective in weights:
        wanted, indices = draws[objective], []
        for repeat in range(-(-wanted // sizes[objective]) if wanted else 0):
            order = list(range(sizes[objective]))
            random.Random(f"{seed}-{objective}-{repeat}").shuffle(order)
            indices += order
        drawn += [(objective, i) for i in indices[:wanted]]
    random.Random(f"{seed}-pool").shuffle(drawn)
    return drawn


def _epoch_size(sizes: Mapping[str, int], mixture: Mixture) -> int:
    """Pairs of an epoch: `mixture.total`, or fewer where the limit leaves no objective enough draws."""
    if binding_repeats(sizes, mixture) is None:
        return mixture.total
    draws = objective_draws(sizes, mixture.weights, mixture.total, mixture.max_repeats)
    return min(mixture.total, sum(draws.values()))


def drawn_pairs(sizes: Mapping[str, int], mixture: Mixture) -> list[tuple[str, int]]:
    """The (objective, index) of every pair over all epochs, in the order of training.

    Raises:
        ConfigError: there is none.
    """
    drawn: list[tuple[str, int]] = []
    for epoch in range(-int(-mixture.epochs // 1)):
        drawn += pool_order(sizes, mixture.weights, mixture.total, mixture.seed + epoch, mixture.max_repeats)
    drawn = drawn[: round(mixture.epochs * _epoch_size(sizes, mixture))]
    if not drawn:
        raise ConfigError(
            f"training.max_pairs: {mixture.total} pairs, shared out by policy.weights among {len(sizes)} objectives, for "
            f"training.epochs: {mixture.epochs:g} come to none, wanted at least one; raise max_pairs or epochs, or give more data"
        )
    return drawn


def split_sizes(split: Split) -> dict[str, int]:
    """Pairs of each objective."""
    return {objective: len(pairs) for objective, pairs in split.items()}


def pooled_pairs(split: Split, mixture: Mixture, tokens: "PairTokens") -> PolicyPairs:
    """Pool the pairs of a split by the objective weights and tokenize each once."""
    drawn = drawn_pairs(split_sizes(split), mixture)
    tokenized = tokens.of_pairs([split[k][i] for k, i in dict.fromkeys(drawn)])
    position = {pair.id: i for i, pair in enumerate(tokenized.pairs)}
    ids = [split[k][i].id for k, i in drawn]
    return PolicyPairs(tokenized, [position[i] for i in ids if i in position])


def held_out_pairs(split: Split, mixture: Mixture, tokens: "PairTokens", trained: int) -> TokenizedPairs:
    """A pooled sample of the validation split, to watch the losses on.

    Args:
        mixture: that of the training.
        trained: distinct pairs of the training.
    """
    total = max(3, min(EVAL_PAIRS, int(EVAL_SHARE * trained)))
    while not any(objective_draws(split_sizes(split), mixture.weights, total).values()):
        total += 1  # of many objectives none has a share that rounds to a pair
    return pooled_pairs(split, replace(mixture, total=total, epochs=1.0, max_repeats=None), tokens).tokenized


# ------------------------------------------------------------------ their tokens
class PairTokens:
    """The tokens of a stage: each text is tokenized once, however many methods, reward models and tables read it.

    Args:
        tokenizer: the policy's.
        max_length: tokens of prompt and response together.
        over_length: as for `tokenize_pairs`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, over_length: str) -> None:
        self.tokenizer, self.max_length, self.over_length = tokenizer, max_length, over_length
        self._template, self._suffix = template_fingerprint(tokenizer), _suffix(tokenizer)
        self._pairs: dict[tuple[Text, str, str], TokenizedPairs | None] = {}
        self._reward_rows: dict[tuple[str, Text, str, str], PrefixRow] = {}
        self._whole_prompts: dict[Text, Tokens] = {}
        self._cut_prompts: dict[tuple[Text, int], Tokens] = {}
        self._messages: dict[Tokens, Sequence[Message]] = {}

    def of_pairs(self, pairs: Sequence[PreferencePair]) -> TokenizedPairs:
        """Pairs as policies read them, which end with the end of turn; over-long ones are fitted or dropped.

        Raises:
            DataError: nothing is left.
        """
        found = [(pair, self._of_pair(pair)) for pair in pairs]
        fitting = [(pair, one) for pair, one in found if one is not None]
        kept = [(pair, one) for pair, one in fitting if not _is_tie(one)]
        if pairs and not kept:
            return self._tokenize(pairs)  # which says what is wrong
        say_left_out([pair for pair, one in fitting if _is_tie(one)], len(pairs))
        rows = [one.rows[0] for _, one in kept]
        fitted = [replace(pair, prompt=one.pairs[0].prompt) if one.truncated else pair for pair, one in kept]
        return TokenizedPairs(rows, fitted, len(pairs) - len(kept), sum(one.truncated for _, one in kept))

    def _of_pair(self, pair: PreferencePair) -> TokenizedPairs | None:
        key = (_text(pair.prompt), pair.chosen, pair.rejected)
        if key not in self._pairs:
            try:
                self._pairs[key] = self._tokenize([pair], keep_ties=True)
            except DataError:  # it does not fit
                self._pairs[key] = None
        return self._pairs[key]

    def _tokenize(self, pairs: Sequence[PreferencePair], *, keep_ties: bool = False) -> TokenizedPairs:
        return tokenize_pairs(
            pairs,
            self.tokenizer,
            max_length=self.max_length,
            over_length=self.over_length,
            keep_suffix=False,
            keep_ties=keep_ties,
        )

    def for_rewards(self, tokenizer: PreTrainedTokenizerBase, tokenized: TokenizedPairs) -> list[PrefixRow]:
        """Pairs from `of_pairs` as a reward model reads them, with what its template puts behind the end of turn.

        Args:
            tokenizer: the reward model's; where its template is the policy's, so are the tokens.
        """
        template = template_fingerprint(tokenizer)
        if template == self._template and (suffix := self._suffix) is not None:
            return [
                PrefixRow(row.prompt_ids, tuple((*response, *suffix) for response in row.responses))
                for row in tokenized.rows
            ]
        return [self._reward_row(template, tokenizer, pair) for pair in tokenized.pairs]

    def _reward_row(
        self, template: str, tokenizer: PreTrainedTokenizerBase, pair: PreferencePair
    ) -> PrefixRow:
        key = (template, _text(pair.prompt), pair.chosen, pair.rejected)
        if key not in self._reward_rows:
            responses = (pair.chosen, pair.rejected)
            self._reward_rows[key] = tokenize_row(tokenizer, pair.prompt, responses, keep_suffix=True)
        return self._reward_rows[key]

    def of_prompt(self, messages: Sequence[Message], max_length: int) -> Tokens:
        """A rendered prompt as a policy continues it, cut to `max_length` tokens.

        Raises:
            DataError: as `tokenize_prompt`.
        """
        text = _text(messages)
        if text not in self._whole_prompts:
            rendered = render(self.tokenizer, messages, add_generation_prompt=True)
            self._whole_prompts[text] = tuple(rendered)
        whole, cut = self._whole_prompts[text], (text, max_length)
        if len(whole) > max_length and cut not in self._cut_prompts:
            self._cut_prompts[cut] = tokenize_prompt(self.tokenizer, messages, max_length=max_length)
        found = whole if len(whole) <= max_length else self._cut_prompts[cut]
        self._messages.setdefault(found, messages)
        return found

    def messages_of(self, prompt: Tokens) -> Sequence[Message]:
        """The messages of a prompt from `of_prompt`, uncut; of several that are cut alike, the first."""
        return self._messages[prompt]

    def of_prompts(self, tokenized: TokenizedPairs) -> list[Tokens]:
        """The prompts of pairs, as the policy continues them."""
        return [self.of_prompt(pair.prompt, self.max_length) for pair in tokenized.pairs]


def _is_tie(tokenized: TokenizedPairs) -> bool:
    """Whether the two sides of a single pair are the same tokens."""
    chosen, rejected = tokenized.rows[0].responses
    return chosen == rejected


def _text(messages: Sequence[Message]) -> Text:
    return tuple((message["role"], message["content"]) for message in messages)


def _suffix(tokenizer: PreTrainedTokenizerBase) -> Tokens | None:
    """What the template puts behind the end of the assistant's turn; None where that depends on the conversation."""
    first = [{"role": "user", "content": "a"}]
    longer = [*first, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c d."}]
    found = set()
    for messages, response in ((first, "e f."), (longer, "g")):
        whole, cut = (
            tokenize_response(tokenizer, messages, response, keep_suffix=keep)[1] for keep in (True, False)
        )
        found.add(whole[len(cut) :])
    return found.pop() if len(found) == 1 else None


# ------------------------------------------------------------------ their numbers
@dataclass(frozen=True)
class PairScores:
    """Frozen numbers of n pairs; side 0 is chosen.

    Attributes:
        rewards: calibrated rewards, float64 [K, M, n, 2].
        ref_logps: log pi_ref, float32 [n, 2], nats.
        labelled_for: index of the objective each pair was labelled for, LongTensor [n], or None where none was.
    """

    rewards: Tensor
    ref_logps: Tensor
    labelled_for: Tensor | None = None


@dataclass(frozen=True)
class ScaleResponses:
    """Calibrated rewards of the responses that fix the reward scale: several responses to each of some prompts.

    Attributes:
        rewards: float64 [K, M, R].
        prompt_index: prompt of each response, [R].
        source: what the responses are.
        samples_per_prompt: n where they are n samples of pi_ref for each prompt in turn (R = X n), else 0.
        centred: whether each prompt's rewards are centred on the mean of these samples of it.
    """

    rewards: Tensor
    prompt_index: Tensor
    source: str
    samples_per_prompt: int = 0
    centred: bool = False

    def by_prompt(self) -> Tensor:
        """Rewards of reference samples by prompt, [K, M, X, n]."""
        return self.rewards.unflatten(2, (-1, self.samples_per_prompt))


@dataclass(frozen=True)
class ReferenceSamples:
    """Samples of pi_ref for the prompts of a list of pairs, as the policy reads them: n responses to each of X prompts.

    Attributes:
        rows: prompt and n responses.
        logps: log pi_ref of each, float32 [X, n], nats.
    """

    rows: list[PrefixRow]
    logps: Tensor
