"""Intervals: how sure a measured number is.

Here: Wilson and bootstrap intervals (percentiles for shares, studentized for what has no bounds and may be skewed), the
interval of a minimum over objectives. Not here: the outcome measures
themselves (`outcomes.py`), paired tests (`paired_tests.py`). The unit of resampling is always the prompt (or a
cluster of prompts), never the sample: responses to one prompt are not independent. Read `paired_tests.py` next.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

from prmd.statistics.outcomes import cvar_over_prompts, finite_array

_CHUNK_ELEMENTS = 2**21  # resampled rows held at once
_STUDENTIZED_FROM = (
    8  # with fewer, resamples of nearly one value make the interval several times as wide as Student's
)
_TAIL_VALUES = 5  # fewer in a tail and no interval covers it: 51 % with 1.6 of 16, 94 % with 5 of 50


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: point estimate.
        low: lower end of the interval; NaN, as `high`, where none can be given.
        high: upper end.
        n: independent units behind it (prompts or clusters).
        method: how the interval was made, with its confidence.
    """

    value: float
    low: float
    high: float
    n: int
    method: str

    def to_json(self) -> dict[str, float | int | str | None]:
        """The fields as a plain dictionary; an end that is not defined is None."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson score interval of a share.

    Args:
        successes: number of successes in [0, n]; halves are allowed for ties (the interval is then conservative).
        n: number of trials, >= 1.
        confidence: coverage aimed at, in (0, 1).

    Returns:
        The share with its interval.

    Raises:
        ValueError: n < 1, or successes outside [0, n].

    Source: Wilson 1927.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval: needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = stats.norm.ppf(0.5 + confidence / 2)
    share = float(successes) / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At 0 and n the end is exactly the share; the subtraction above leaves 1e-17.
    low = 0.0 if successes == 0 else float(center - half)
    high = 1.0 if successes == n else float(center + half)
    return Estimate(share, low, high, n, f"Wilson {confidence:.4g}")


def accuracy_with_ties(margins: np.ndarray) -> dict[str, float | int | str | None]:
    """Share of pairs whose margin is positive, ties counted one half and reported.

    Args:
        margins: score(chosen) - score(rejected), [N].

    Returns:
        The fields of an `Estimate` (Wilson's), and `ties`.

    Raises:
        ValueError: no margins, or not finite.
    """
    d = finite_array(margins, "accuracy_with_ties", "margins")
    ties = int((d == 0).sum())
    share = wilson_interval((d > 0).sum() + 0.5 * ties, d.size)
    return {**share.to_json(), "ties": ties}


def bootstrap_statistic(
    fn: Callable[[np.ndarray], np.ndarray],
    matrix: np.ndarray,
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Expanded percentile bootstrap of any statistic of rows.

    Percentile intervals of few rows are too narrow; the percentiles are widened as Student's t and the divisor
    n - 1 would widen a normal interval: ``Phi(-t_{n-1} * sqrt(n / (n - 1)))`` in place of 2.5 %.

    Args:
        fn: maps resamples [b, X, c] to their statistics [b], vectorised.
        matrix: one row per prompt or cluster, [X, c].
        n_resamples: number of resamples.
        seed: of the resampling; the same seed and X give the same resamples, so methods are compared paired.
        confidence: coverage aimed at.

    Returns:
        The statistic of the rows as they are, with its interval; with one row the interval is that value.

    Raises:
        ValueError: no rows, or not finite.

    Source: Hesterberg 2015 (arXiv:1411.5279), section on expanded percentile intervals.
    """
    rows = finite_array(matrix, "bootstrap", "non-empty rows", ndim=2)
    n = len(rows)
    value = float(fn(rows[None])[0])
    if n == 1:
        return Estimate(value, value, value, 1, "single observation, no interval")
    draws = np.concatenate([fn(rows[drawn]) for drawn in _resamples(n, n_resamples, seed, rows.size)])
    tail = widened_tail((1 - confidence) / 2, n)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), n, f"expanded percentile bootstrap {confidence:.4g}")


def _resamples(n: int, n_resamples: int, seed: int, elements: int) -> Iterator[np.ndarray]:
    """Rows drawn with replacement, [b, n] at a time, so that b times `elements` numbers fit in memory."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK_ELEMENTS // elements)
    for start in range(0, n_resamples, step):
        yield rng.integers(0, n, size=(min(step, n_resamples - start), n))


def widened_tail(tail: float, n: int) -> float:
    """Tail at which percentiles of resamples of n rows are read for one of `tail`: ``Phi(t_{n-1}(tail) sqrt(n / (n - 1)))``."""
    return float(stats.norm.cdf(stats.t.ppf(tail, n - 1) * math.sqrt(n / (n - 1))))


def narrowed_tail(tail: np.ndarray | float, n: int) -> np.ndarray | float:
    """The tail of which `widened_tail` makes `tail`."""
    return stats.t.cdf(stats.norm.ppf(tail) * math.sqrt((n - 1) / n), n - 1)


def studentized_draws(
    numerators: np.ndarray, denominators: np.ndarray, *, n_resamples: int, seed: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Resampled ratios of sums, as they are and measured from the ratio at hand in their own standard errors.

    Args:
        numerators: [X], one per prompt.
        denominators: [X], > 0; ones for a mean.

    Returns:
        Standard error of the ratio; the resampled ratios [B]; (ratio* - ratio) / error* of those that vary.
    """
    rows = np.stack([numerators, denominators], axis=1)
    value, error = (float(part[0]) for part in _ratios(rows[None]))
    parts = [_ratios(rows[drawn]) for drawn in _resamples(len(rows), n_resamples, seed, rows.size)]
    ratios, errors = (np.concatenate(part) for part in zip(*parts, strict=True))
    varied = errors > 1e-9 * max(error, 1e-300)
    return error, ratios, (ratios[varied] - value) / errors[varied]


def _ratios(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of the sums of the two columns and its linearised standard error, of every sample [b, X, 2]: two [b]."""
    numerators, denominators = rows[..., 0], rows[..., 1]
    n, mean = rows.shape[1], denominators.mean(axis=1)
    ratio = numerators.mean(axis=1) / mean
    residuals = (numerators - ratio[:, None] * denominators) / mean[:, None]
    return ratio, residuals.std(axis=1) / math.sqrt(max(1, n - 1))


def studentized_ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Ratio of two sums over prompts (a mean where the denominators are ones) that has no bounds and may be skewed.

    A mean of few skewed values, such as the KL of a response, is low exactly where the sample missed the long tail, and its
    standard error with it: percentiles of resampled means then cover it too rarely (.88 of 15 lognormal values with sd 1).
    Each resample is therefore measured in its own standard error, at the widened tails of `bootstrap_statistic`; the
    interval also holds that of the percentiles, which is better where few values leave no error to measure in. It covers
    .94 there and .97 of 15 normal values, a fifth wider than Student's t.

    Args:
        numerators: [X], one per prompt.
        denominators: [X], > 0.
        n_resamples: number of resamples.
        seed: of the resampling; the same draws as `bootstrap_statistic` makes.
        confidence: coverage aimed at.

    Returns:
        The ratio with its interval, of the percentiles alone below eight prompts; with one prompt, or values that are all
        equal, the interval is that value.

    Raises:
        ValueError: no values, or not finite.

    Source: bootstrap-t of Efron 1981; the tails of Hesterberg 2015 (arXiv:1411.5279).
    """
    above, below = (np.asarray(x, dtype=np.float64).reshape(-1) for x in (numerators, denominators))
    if above.size == 0 or above.size != below.size or not np.isfinite([above, below]).all():
        raise ValueError(
            f"bootstrap: needs finite, non-empty values of one length, got {above.size} and {below.size}"
        )
    n, value = above.size, float(above.sum() / below.sum())
    if n == 1:
        return Estimate(value, value, value, 1, "single observation, no interval")
    error, ratios, t = studentized_draws(above, below, n_resamples=n_resamples, seed=seed)
    tail = widened_tail((1 - confidence) / 2, n)
    low, high = (float(end) for end in np.quantile(ratios, [tail, 1 - tail]))
    if n < _STUDENTIZED_FROM:
        return Estimate(value, low, high, n, f"expanded percentile bootstrap {confidence:.4g}")
    if t.size:
        least, most = (float(end) for end in np.quantile(t, [tail, 1 - tail]))
        low, high = min(low, value - most * error), max(high, value - least * error)
    return Estimate(value, low, high, n, f"studentized bootstrap {confidence:.4g}")


def bootstrap_mean(
    values: np.ndarray,
    *,
    clusters: np.ndarray | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Mean with a bootstrap interval over prompts or clusters.

    Args:
        values: [N], one number per prompt, or per item with `clusters`.
        clusters: cluster of each value, [N]; whole clusters are resampled and every item weighs the same.
        n_resamples: number of resamples.
        seed: of the resampling.
        confidence: coverage aimed at.

    Returns:
        The mean with its interval; n counts clusters.

    Raises:
        ValueError: no values, not finite, or clusters of another length.

    Source: Hesterberg 2015 (arXiv:1411.5279).
    """
    items = np.asarray(values, dtype=np.float64).reshape(-1)
    labels = np.arange(items.size) if clusters is None else np.asarray(clusters).reshape(-1)
    if labels.size != items.size:
        raise ValueError(f"bootstrap_mean: {items.size} values but {labels.size} cluster labels")
    groups = np.unique(labels, return_inverse=True)[1].reshape(-1)
    matrix = np.stack([np.bincount(groups, weights=items), np.bincount(groups)], axis=1)
    options = {"n_resamples": n_resamples, "seed": seed, "confidence": confidence}
    return bootstrap_statistic(lambda r: r[..., 0].sum(axis=1) / r[..., 1].sum(axis=1), matrix, **options)


def lower_tail_interval(
    values: np.ndarray, alpha: float, *, n_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Mean of the worst share `alpha` of values, with a studentised bootstrap interval.

    Few values decide a tail, and percentiles of resampled tails cover it too rarely (81 % at 50 values and alpha = .1).
    Each resample is therefore measured in its own standard error, that of ``nu - (nu - x)_+ / alpha`` with nu the alpha
    quantile.

    Args:
        values: one per prompt, [X].
        alpha: share, in (0, 1].
        n_resamples: number of resamples.
        seed: of the resampling.
        confidence: coverage aimed at.

    Returns:
        The tail mean; its interval is NaN where fewer than five values are in the tail, too few for any interval.

    Raises:
        ValueError: no values, or not finite.

    Source: bootstrap-t of Efron 1981; influence function of CVaR from Rockafellar and Uryasev 2000.
    """
    x = finite_array(values, "lower_tail_interval", ndim=1)
    (value,), (error,) = _lower_tails(x[None], alpha)
    if alpha * x.size < _TAIL_VALUES:
        return Estimate(float(value), math.nan, math.nan, x.size, "no interval: the tail is too small")
    drawn = _resamples(x.size, n_resamples, seed, x.size)
    tails = [_lower_tails(x[rows], alpha) for rows in drawn]
    means, errors = (np.concatenate(part) for part in zip(*tails, strict=True))
    defined = errors > 1e-9 * max(float(error), 1e-300)
    t = (means[defined] - value) / errors[defined]
    low, high = np.quantile(t, [(1 - confidence) / 2, (1 + confidence) / 2]) if t.size else (0.0, 0.0)
    ends = (float(value - high * error), float(value - low * error))
    return Estimate(float(value), *ends, x.size, f"studentised bootstrap {confidence:.4g}")


def _lower_tails(rows: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Tail mean and its standard error of every row: [b, X] to two [b]."""
    n, ordered = rows.shape[1], np.sort(rows, axis=1)
    quantile = ordered[:, max(0, math.ceil(alpha * n - 1e-12) - 1), None]
    influence = quantile - np.maximum(quantile - ordered, 0.0) / alpha
    return cvar_over_prompts(ordered, alpha), influence.std(axis=1) / math.sqrt(max(1, n - 1))


def paired_bootstrap(a: np.ndarray, b: np.ndarray, *, n_resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Mean of ``a - b`` with a studentized bootstrap interval, both measured on the same prompts.

    Args:
        a: [N].
        b: [N], aligned with `a`.
        n_resamples: number of resamples.
        seed: of the resampling.

    Returns:
        The mean difference with its interval.

    Raises:
        ValueError: different lengths.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"paired_bootstrap: shapes {first.shape} and {second.shape} differ; align by prompt id"
        )
    return studentized_ratio(first - second, np.ones_like(first), n_resamples=n_resamples, seed=seed)


def minimum_band(estimates: Sequence[Estimate]) -> Estimate:
    """Interval of the minimum over K objectives.

    With every objective's interval at confidence ``1 - .05/K`` all hold jointly with 95 %, and then the true minimum
    lies between the lowest low and the lowest high. The smallest point estimate itself is biased downwards.

    Args:
        estimates: one per objective, each made at confidence 1 - .05/K.

    Returns:
        Smallest value, lowest low, lowest high.

    Raises:
        ValueError: no estimates.
    """
    if not estimates:
        raise ValueError("minimum_band: needs at least one estimate")
    return Estimate(
        value=min(estimate.value for estimate in estimates),
        low=min(estimate.low for estimate in estimates),
        high=min(estimate.high for estimate in estimates),
        n=min(estimate.n for estimate in estimates),
        method=f"minimum of {len(estimates)}: {estimates[0].method} each",
    )
