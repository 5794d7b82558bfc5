"""How far verdicts can be trusted: what a judge gives an answer that says nothing, and how much it likes length.

What lives here: scores of the reference samples and of a constant answer in, the `judging` part of `reference.json` out.
What does not: the judges and their cards (`judges`), what is measured of a method (`policy_metrics`, to be read next).
"""

from typing import Any

import numpy as np

from prmd.reference_scores import ReferenceScores
from prmd.statistics.outcomes import pairwise_win_rate
from prmd.statistics.resampling import Resampling, with_chance


def judging_metrics(
    reference: ReferenceScores, constant: np.ndarray, lengths: np.ndarray, resampling: Resampling
) -> dict[str, Any]:
    """The constant answer's win rate against the reference, and the correlation of reward and length, per judge.

    A judge that prefers one answer to every prompt over the reference rewards something else than answers.

    Args:
        constant: scores of the constant answer, [K, X, 1].
        lengths: tokens of the reference samples, [X, m].

    Returns:
        Per objective `win_rate` and `length_correlation` (None where lengths or scores do not vary).
    """
    found = {}
    for k, objective in enumerate(reference.objectives):
        wins = pairwise_win_rate(constant[k], reference.raw[k])
        found[objective] = {
            "win_rate": with_chance(resampling.win_rate(wins), 0.5),
            "length_correlation": _within_prompt_correlation(reference.raw[k], lengths),
        }
    return found


def _within_prompt_correlation(scores: np.ndarray, lengths: np.ndarray) -> float | None:
    """Correlation of [X, m] and [X, m] after taking each prompt's mean out of both."""
    a, b = (values - values.mean(axis=1, keepdims=True) for values in (scores, lengths))
    spread = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / spread) if spread > 0 else None
