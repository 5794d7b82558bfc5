"""Which pairs a policy is trained on: splits pooled by objective weights, in the order of training, tokenised once.

What these pairs are worth, their rewards and log-probabilities, is in `scores`, to be read next; pairs made of
reference samples are in `sample_pairs`.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from prmd.config.policy import PolicyConfig
from prmd.models.tokenization import TokenizedPairs, tokenize_pairs
from prmd.objectives import OBJECTIVES
from prmd.pairs import read_pairs

EVAL_SHARE, EVAL_PAIRS = 0.25, 256
"""Held-out pairs watched during training: a quarter of the training pairs, 256 at most."""


@dataclass(frozen=True)
class PolicyPairs:
    """Pairs of one split, tokenised for the policy, and the order in which training sees them.

    Attributes:
        stream: indices into `tokenized.rows` over all epochs.
    """

    tokenized: TokenizedPairs
    stream: list[int]


def pool_order(
    sizes: Mapping[str, int], weights: Mapping[str, float], total: int, seed: int
) -> list[tuple[str, int]]:
    """Draw `total` (objective, index) pairs, round(weight x total) of each objective, in random order.

    An objective with fewer pairs repeats them, one with more is subsampled: data-set size has no say.
    """
    drawn: list[tuple[str, int]] = []
    for objective in OBJECTIVES:
        wanted, indices = round(weights[objective] * total), []
        for repeat in range(-(-wanted // sizes[objective]) if wanted else 0):
            order = list(range(sizes[objective]))
            random.Random(f"{seed}-{objective}-{repeat}").shuffle(order)
            indices += order
        drawn += [(objective, i) for i in indices[:wanted]]
    random.Random(f"{seed}-pool").shuffle(drawn)
    return drawn


def pooled_pairs(
    config: PolicyConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    total: int | None,
    *,
    objective: str | None = None,
) -> PolicyPairs:
    """Pool the pairs of a split by the objective weights and tokenise each once.

    Args:
        total: pairs per epoch; None takes as many as the split holds (and no more than `training.max_pairs`).
        objective: take this one's pairs alone, as many as all together would be.
    """
    by_objective = {objective: read_pairs(config.paths, objective, split) for objective in OBJECTIVES}
    sizes = {objective: len(pairs) for objective, pairs in by_objective.items()}
    if total is None:
        total = min(sum(sizes.values()), config.training.max_pairs or sum(sizes.values()))
    weights = {k: float(k == objective) for k in OBJECTIVES} if objective else config.policy.weights
    epochs = config.training.epochs if split == "train" else 1.0
    seed, drawn = config.shared.seed, []
    for epoch in range(-int(-epochs // 1)):
        drawn += pool_order(sizes, weights, total, seed + epoch)
    drawn = drawn[: round(epochs * total)]
    unique = list(dict.fromkeys(drawn))
    training = config.training
    tokenized = tokenize_pairs(
        [by_objective[k][i] for k, i in unique],
        tokenizer,
        max_length=training.max_length,
        over_length=training.over_length,
        keep_suffix=False,
    )
    position = {pair.id: i for i, pair in enumerate(tokenized.pairs)}
    ids = [by_objective[k][i].id for k, i in drawn]
    return PolicyPairs(tokenized, [position[i] for i in ids if i in position])


def held_out_pairs(
    config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, trained: int, *, objective: str | None = None
) -> TokenizedPairs:
    """A pooled sample of the validation split, to watch the losses on."""
    total = max(3, min(EVAL_PAIRS, int(EVAL_SHARE * trained)))
    return pooled_pairs(config, tokenizer, "val", total, objective=objective).tokenized
