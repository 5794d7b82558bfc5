"""Weights of pairs: brought to mean 1 once, when the splits are written, and what they leave of the number of pairs.

Rows come with whatever numbers people gave them (`own.pairs`); every training then multiplies the whole loss of a pair by
its weight (`training.trainer`, the ensemble's heads in `rewards.heads`).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prmd.data.splits import SplitPairs
from prmd.pairs import PreferencePair

logger = logging.getLogger(__name__)

FEW = 0.5
"""Share of the training pairs below which the number that they count as is warned of."""


def with_mean_one(pairs: SplitPairs) -> SplitPairs:
    """The pairs with their weights divided by the mean weight of the training pairs of their objective.

    That one number divides the weights of all splits of the objective. Equal weights become exactly 1, so that training
    with them is training without, to the last digit. Pairs without weights are left alone.
    """
    return {
        objective: {split: _divided(rows, _mean(splits["train"])) for split, rows in splits.items()}
        if _weights(splits["train"])
        else splits
        for objective, splits in pairs.items()
    }


def _weights(pairs: Sequence[PreferencePair]) -> list[float]:
    return [pair.weight for pair in pairs if pair.weight is not None]


def _mean(pairs: Sequence[PreferencePair]) -> tuple[float, float]:
    """The largest weight, and the mean of the weights divided by it: a sum of these cannot overflow."""
    weights = _weights(pairs)
    largest = max(weights)
    return largest, math.fsum(weight / largest for weight in weights) / len(weights)


def _divided(pairs: Sequence[PreferencePair], mean: tuple[float, float]) -> list[PreferencePair]:
    largest, share = mean
    return [
        pair if pair.weight is None else replace(pair, weight=pair.weight / largest / share) for pair in pairs
    ]


def describe_weights(pairs: SplitPairs) -> dict[str, Any]:
    """The weights of the training pairs of each objective as they were given, logged in a line each.

    Returns:
        `weights` by objective: `pairs`, `mean`, `min`, `max`, and `effective_pairs`, Kish's effective number
        (sum w)^2 / sum w^2: a mean over the weighted pairs is about as certain as one over so many that count alike.
        Nothing where no objective has weights.
    """
    found = {}
    for objective, splits in pairs.items():
        if not (weights := _weights(splits["train"])):
            continue
        largest, share = _mean(splits["train"])
        effective = len(weights) * share**2 / (math.fsum((w / largest) ** 2 for w in weights) / len(weights))
        found[objective] = {
            "pairs": len(weights),
            "mean": largest * share,
            "min": min(weights),
            "max": largest,
        }
        found[objective]["effective_pairs"] = effective
        few = effective < FEW * len(weights)
        logger.log(
            logging.WARNING if few else logging.INFO,
            "%s: weights of %d training pairs from %.3g to %.3g, mean %.3g: they count as about %.0f pairs that weigh alike%s",
            *(objective, len(weights), min(weights), largest, largest * share, effective),
            ", less than half: a few pairs decide what is learned" if few else "",
        )
    return {"weights": found} if found else {}
