"""How good the margins of a reward model and its ensemble are: calibration of probabilities, agreement, errors.

Here: log-odds slope, expected calibration error and its bins, correlation between members, disagreement against
mistakes; all from margins r(chosen) - r(rejected) of held-out pairs. Not here: accuracy and intervals
(`intervals.py`), the units of rewards (`pessimism/calibration.py`, to be read next).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import rankdata
from torch import Tensor

from prmd.statistics.intervals import Estimate, bootstrap_statistic, wilson_interval
from prmd.statistics.outcomes import finite_array

DISAGREEMENT_RESAMPLES = 1000
DISAGREEMENT_BIN_PAIRS = 20
"""Pairs in a bin of disagreement, where there are enough for two to ten bins; Wilson gives 20 of them +-.2."""


def log_odds_slope(margins: Tensor | np.ndarray) -> float:
    """Slope of the logistic regression of the label on the margin, both orders of each pair, no intercept.

    Maximises ``sum_i log sigmoid(slope * d_i)``: 1 for a calibrated reward model, below 1 for an over-confident one.

    Args:
        margins: r(chosen) - r(rejected), [N].

    Returns:
        The slope; +inf (-inf) where no margin is below (above) zero, so that no maximum exists.

    Raises:
        ValueError: no margins, or not finite, or all zero.
    """
    d = finite_array(margins, "log_odds_slope", "margins")
    if not d.any():
        raise ValueError("log_odds_slope: all margins are zero")
    if (d >= 0).all() or (d <= 0).all():
        return math.copysign(math.inf, d.sum())
    unit = np.abs(d).max()  # the search runs on margins of order one, whatever the unit of the rewards

    def score(slope: float) -> float:
        """Derivative of the log-likelihood; strictly decreasing in the slope."""
        return float((d / unit * expit(-slope * d / unit)).sum())

    width = 1.0
    while score(-width) < 0 or score(width) > 0:
        width *= 2.0
    return float(brentq(score, -width, width, xtol=1e-12, rtol=1e-12)) / unit


def reliability_bins(margins: Tensor | np.ndarray, n_bins: int = 10) -> list[dict[str, float | int]]:
    """Confidence against correctness in bins of equal mass.

    The confidence of a pair is ``sigmoid(|d|)``, so that it does not matter which response stands first; a pair is
    correct if d > 0, half correct if d = 0.

    Args:
        margins: r(chosen) - r(rejected), [N].
        n_bins: bins; fewer where there are fewer pairs.

    Returns:
        One dictionary a bin, by rising confidence: confidence, accuracy, low, high (Wilson 95 %), n.

    Source: expected calibration error as in arXiv:1706.04599, with equal-mass bins.
    """
    d = finite_array(margins, "reliability_bins", "margins")
    d = d[np.argsort(np.abs(d), kind="stable")]
    confidence, correct = 1.0 / (1.0 + np.exp(-np.abs(d))), np.where(d == 0, 0.5, d > 0)
    bins = np.array_split(np.arange(len(d)), min(n_bins, len(d)))
    return [_bin_of("confidence", confidence, correct, rows) for rows in bins]


def merged_bins(bins: Sequence[Mapping[str, float]], *, least: int) -> list[dict[str, float]]:
    """Neighboring bins of `reliability_bins` put together until each holds `least` pairs; all in one where there are fewer.

    Means are weighted by pairs, and Wilson's interval is that of the pairs together, as if they had been one bin.
    """
    groups: list[list[Mapping[str, float]]] = []
    for one in bins:
        if groups and sum(b["n"] for b in groups[-1]) < least:
            groups[-1].append(one)
        else:
            groups.append([one])
    if len(groups) > 1 and sum(b["n"] for b in groups[-1]) < least:
        groups[-2:] = [[*groups[-2], *groups[-1]]]
    return [_together(group) for group in groups]


def _together(bins: Sequence[Mapping[str, float]]) -> dict[str, float]:
    n = sum(int(b["n"]) for b in bins)
    confidence, correct = (sum(b[name] * b["n"] for b in bins) for name in ("confidence", "accuracy"))
    found = wilson_interval(correct, n)
    ends = {"accuracy": found.value, "low": found.low, "high": found.high}
    return {"confidence": confidence / n, **ends, "n": n}


def _bin_of(name: str, values: np.ndarray, correct: np.ndarray, rows: np.ndarray) -> dict[str, float | int]:
    """Mean value and accuracy of one bin, with its Wilson interval."""
    accuracy = wilson_interval(correct[rows].sum(), len(rows))
    return {
        name: float(values[rows].mean()),
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "n": len(rows),
    }


def expected_calibration_error(margins: Tensor | np.ndarray, n_bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over equal-mass bins, ``sum_b (n_b/n) |acc_b - conf_b|``.

    Args:
        margins: r(chosen) - r(rejected), [N].
        n_bins: bins.

    Returns:
        A number in [0, 1]; noise alone gives about ``0.4 / sqrt(n / n_bins)``.

    Source: arXiv:1706.04599.
    """
    bins = reliability_bins(margins, n_bins)
    total = sum(bin_["n"] for bin_ in bins)
    return sum(bin_["n"] * abs(bin_["accuracy"] - bin_["confidence"]) for bin_ in bins) / total


def mean_pairwise_correlation(margins: Tensor | np.ndarray) -> float:
    """Mean correlation between the margins of two members.

    Args:
        margins: [M, N].

    Returns:
        Mean off-diagonal entry of the correlation matrix; 1.0 for one member. Above .95 an ensemble is
        effectively one model.

    Raises:
        ValueError: fewer than two pairs, or a member whose margins are all equal.
    """
    d = np.atleast_2d(finite_array(margins, "mean_pairwise_correlation", "margins"))
    if d.shape[1] < 2 or (d.std(axis=1) == 0).any():
        raise ValueError("mean_pairwise_correlation: every member needs at least two different margins")
    if len(d) == 1:
        return 1.0
    matrix = np.corrcoef(d)
    return float(matrix[~np.eye(len(d), dtype=bool)].mean())


@dataclass(frozen=True)
class Disagreement:
    """Whether the spread of the members foretells the mistakes of their mean, each measure with a bootstrap over pairs.

    Attributes:
        mistake_correlation: Spearman correlation of sd_m(d) with 1[mean_m d < 0] (ties one half).
        error_correlation: the same with the probability given to the wrong order, 1 - sigmoid(mean_m d).
        auc: probability that a pair ordered wrong has the larger sd than one ordered right, .5 if sd says nothing;
            pairs whose mean margin is exactly 0 are left out.
        bins: by rising sd, in bins of equal mass: disagreement (mean sd), accuracy of the mean member, low, high
            (Wilson 95 %), n.
    """

    mistake_correlation: Estimate | None
    error_correlation: Estimate | None
    auc: Estimate | None
    bins: list[dict[str, float | int]]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain dictionaries; a measure that is not defined is None."""
        return asdict(self)


def disagreement_measures(
    margins: Tensor | np.ndarray, *, n_resamples: int = DISAGREEMENT_RESAMPLES, seed: int = 0
) -> Disagreement:
    """Disagreement of the members against the mistakes and the error of their mean.

    sd grows with the size of margins, so pairs with larger margins, which are right more often, may well have more of it:
    an AUC below one half is then no fault of the ensemble.

    Args:
        margins: r(chosen) - r(rejected) of each member, [M, N].
        n_resamples: of pairs, for the intervals.
        seed: of the resampling.

    Returns:
        The measures; None where one is not defined (equal sds, a mean member that is always right or always wrong).

    Raises:
        ValueError: no margins, or not finite.
    """
    d = np.atleast_2d(finite_array(margins, "disagreement_measures", "margins"))
    disagreement, mean = d.std(axis=0), d.mean(axis=0)
    wrong = np.where(mean == 0, 0.5, mean < 0)
    decided = mean != 0

    def measured(
        statistic: Callable[[np.ndarray, np.ndarray], np.ndarray], errors: np.ndarray, kept: np.ndarray
    ) -> Any:
        rows = np.stack([disagreement, errors], axis=1)[kept]
        if len(rows) < 2 or (np.ptp(rows, axis=0) == 0).any():
            return None
        return bootstrap_statistic(
            lambda drawn: statistic(drawn[..., 0], drawn[..., 1]), rows, n_resamples=n_resamples, seed=seed
        )

    everything = np.ones_like(decided)
    return Disagreement(
        mistake_correlation=measured(rank_correlation, wrong, everything),
        error_correlation=measured(rank_correlation, expit(-mean), everything),
        auc=measured(area_under_curve, wrong, decided),
        bins=_disagreement_bins(disagreement, 1.0 - wrong),
    )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row of [s, n] and [s, n]; 0 where one does not vary."""
    x, y = (r - r.mean(axis=-1, keepdims=True) for r in (rankdata(a, axis=-1), rankdata(b, axis=-1)))
    scale = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    return np.divide((x * y).sum(axis=-1), scale, out=np.zeros_like(scale), where=scale > 0)


def area_under_curve(scores: np.ndarray, ones: np.ndarray) -> np.ndarray:
    """P(score of a 1 > score of a 0), ties one half, of each row; one half where a row holds one kind only.

    Args:
        scores: [s, n].
        ones: 0 or 1, or booleans, [s, n].

    Source: the Mann-Whitney U statistic from ranks (Hanley and McNeil 1982).
    """
    ranks, positives = rankdata(scores, axis=-1), ones.sum(axis=-1)
    pairs = positives * (scores.shape[-1] - positives)
    wins = (ranks * ones).sum(axis=-1) - positives * (positives + 1) / 2
    return np.divide(wins, pairs, out=np.full_like(wins, 0.5), where=pairs > 0)


def _disagreement_bins(disagreement: np.ndarray, correct: np.ndarray) -> list[dict[str, float | int]]:
    n = len(disagreement)
    order = np.argsort(disagreement, kind="stable")
    bins = np.array_split(order, min(n, max(2, min(10, n // DISAGREEMENT_BIN_PAIRS))))
    return [_bin_of("disagreement", disagreement, correct, rows) for rows in bins]
