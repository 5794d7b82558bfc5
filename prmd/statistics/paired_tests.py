"""Paired comparisons of two methods on the same prompts.

Here: exact and resampling tests, the correction for several of them, the win rate at equal length. Not here:
intervals of a single method (`intervals.py`), what is compared (`outcomes.py`). Report the difference and its
interval (`intervals.paired_bootstrap`) first and these p-values beside it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import expit

from prmd.statistics.intervals import (
    Estimate,
    bootstrap_statistic,
    narrowed_tail,
    studentized_draws,
    wilson_interval,
)
from prmd.statistics.outcomes import finite_array

_EXACT_SIGN_FLIPS = 13  # 2**13 patterns are fewer than the resamples they replace
_LEAST_DRAWS = 2000  # of one tail; fewer would keep a clear difference from surviving Holm's correction
_RIDGE = 1e-6  # per row; only decides resamples in which length separates wins from losses perfectly


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Exact McNemar test of two methods judged right or wrong on the same items.

    Args:
        only_a: items that only the first method has right.
        only_b: items that only the second has right.

    Returns:
        Two-sided p-value; 1 without discordant items.

    Raises:
        ValueError: negative counts.

    Source: McNemar 1947, binomial form.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"mcnemar_exact: counts must not be negative, got {only_a} and {only_b}")
    discordant = only_a + only_b
    if discordant == 0:
        return 1.0
    return float(stats.binomtest(only_a, discordant, 0.5).pvalue)


def sign_flip_test(differences: np.ndarray, *, n_resamples: int = 10_000, seed: int = 0) -> float:
    """Permutation test that the differences of two methods are symmetric about zero.

    Args:
        differences: one per prompt, [X].
        n_resamples: random sign patterns; all of them are enumerated for up to 13 prompts.
        seed: of the sign patterns.

    Returns:
        Two-sided p-value of the mean; with random patterns ``(1 + count) / (1 + n_resamples)``, never zero.

    Raises:
        ValueError: no differences, or not finite.
    """
    d = finite_array(differences, "sign_flip_test", "differences", ndim=1)
    # Ties with the observed sum belong to the tail; the slack absorbs the order of summation.
    observed = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if d.size <= _EXACT_SIGN_FLIPS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=d.size)))
        return float((np.abs(signs @ d) >= observed).mean())
    rng = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, n_resamples, 1000):
        signs = rng.choice((-1.0, 1.0), size=(min(1000, n_resamples - start), d.size))
        extreme += int((np.abs(signs @ d) >= observed).sum())
    return (1 + extreme) / (1 + n_resamples)


def paired_mean_test(differences: np.ndarray, *, n_resamples: int = 10_000, seed: int = 0) -> float:
    """Test that the mean difference of two methods is zero, also where the differences are skewed.

    The larger p-value of `sign_flip_test`, which is exact for differences that are symmetric about zero and rejects .11
    of true hypotheses at 15 lognormal differences instead of .05, and of a bootstrap of the studentized mean, at the
    tails of `intervals.studentized_ratio`: .06 there. (The sign flips of a studentized mean are those of the mean.)

    Args:
        differences: one per prompt, [X].
        n_resamples: of sign patterns and of prompts.
        seed: of both.

    Returns:
        Two-sided p-value, never zero.

    Raises:
        ValueError: no differences, or not finite.
    """
    flipped = sign_flip_test(differences, n_resamples=n_resamples, seed=seed)
    d = np.asarray(differences, dtype=np.float64)
    if np.ptp(d) == 0:  # nothing to measure a resample in
        return flipped
    draws = max(n_resamples, _LEAST_DRAWS)
    error, _, t = studentized_draws(d, np.ones_like(d), n_resamples=draws, seed=seed)
    observed = d.mean() / error
    beyond = int((t >= observed).sum() if observed > 0 else (t <= observed).sum())
    tail = (1 + beyond) / (1 + t.size)
    return max(flipped, float(min(1.0, 2 * narrowed_tail(tail, d.size))))


SKEWED = 1.0
"""Skewness from which few differences are pointed out: the sample of a lognormal with sd 1 has it, of a normal hardly."""
_ENOUGH_THOUGH_SKEWED = 50


def skewness_note(differences: np.ndarray) -> str | None:
    """What has to be said of a test of few differences that are skewed; None where nothing has."""
    d = np.asarray(differences, dtype=np.float64)
    if np.ptp(d) == 0 or d.size >= _ENOUGH_THOUGH_SKEWED:
        return None
    skewness = float(stats.skew(d))
    if abs(skewness) < SKEWED:
        return None
    return f"skewness {skewness:.1f} is large for n = {d.size}: p may be too small by a quarter"


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction: adjusted p-values that bound the chance of any false finding.

    Args:
        p_values: of one family of hypotheses, [P].

    Returns:
        Adjusted p-values in the same order, [P], at most 1.

    Raises:
        ValueError: a value outside [0, 1].

    Source: Holm 1979.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("holm: p-values must lie in [0, 1]")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


@dataclass(frozen=True)
class LengthControlled:
    """Win rate at equal length.

    Attributes:
        estimate: win rate at a length difference of zero, with its bootstrap interval over prompts.
        raw: win rate as it is.
        length_effect: change of the log-odds as the response grows by many standard deviations; > 0: longer wins.
    """

    estimate: Estimate
    raw: float
    length_effect: float


def length_controlled_win_rate(
    win_probabilities: np.ndarray,
    length_differences: np.ndarray,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> LengthControlled:
    """Win rate the policy would have if its responses were as long as the reference's.

    Fits ``logit P(win) = theta + phi * tanh(dlen / sd(dlen))`` to soft labels by maximum likelihood and reports
    ``sigmoid(theta)``.

    Args:
        win_probabilities: per prompt, [X], in [0, 1].
        length_differences: mean policy length minus mean reference length, [X], any unit.
        n_resamples: bootstrap resamples over prompts; the fit is repeated in each.
        seed: of the bootstrap.
        confidence: coverage aimed at.

    Returns:
        A `LengthControlled`; where all lengths are equal it is the raw win rate, and where all win probabilities are
        equal, of which no fit can tell a length effect, it is that with Wilson's interval, as in `Resampling.win_rate`.

    Raises:
        ValueError: shapes that differ, or win probabilities outside [0, 1].

    Source: the model of arXiv:2404.04475 without its instruction-difficulty term.
    """
    wins, lengths = np.asarray(win_probabilities, np.float64), np.asarray(length_differences, np.float64)
    if wins.shape != lengths.shape or wins.ndim != 1 or not ((wins >= 0) & (wins <= 1)).all():
        raise ValueError(
            f"length_controlled_win_rate: needs wins in [0, 1] and lengths, both [X], "
            f"got {wins.shape} and {lengths.shape}"
        )
    if np.ptp(wins) == 0:  # a bootstrap would claim certainty
        raw = wilson_interval(float(wins.sum()), wins.size, confidence)
        return LengthControlled(raw, raw.value, 0.0)
    matrix = np.stack([wins, lengths], axis=1)
    estimate = bootstrap_statistic(
        lambda rows: expit(_fit_length_model(rows)[:, 0]),
        matrix,
        n_resamples=n_resamples,
        seed=seed,
        confidence=confidence,
    )
    return LengthControlled(estimate, float(wins.mean()), float(_fit_length_model(matrix[None])[0, 1]))


def length_controlled_difference(
    ours: tuple[np.ndarray, np.ndarray],
    theirs: tuple[np.ndarray, np.ndarray],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Difference of two methods' win rates at the reference's length, each as `length_controlled_win_rate`.

    Args:
        ours: win probabilities and length differences to the reference, over the same prompts [X].
        theirs: the same of the other method.
        n_resamples: bootstrap resamples over prompts; both fits are repeated in each.
        seed: of the bootstrap.

    Returns:
        The difference with its 95 % interval.
    """

    def difference(rows: np.ndarray) -> np.ndarray:
        first, second = (expit(_fit_length_model(part)[:, 0]) for part in (rows[..., :2], rows[..., 2:]))
        return first - second

    matrix = np.stack([*ours, *theirs], axis=1).astype(np.float64)
    return bootstrap_statistic(difference, matrix, n_resamples=n_resamples, seed=seed)


def length_share(
    win_probabilities: np.ndarray, length_differences: np.ndarray, *, n_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Win rate minus the one at equal length, the part of it that length makes, with its 95 % interval over prompts.

    Args:
        win_probabilities, length_differences: as for `length_controlled_win_rate`, [X].
    """

    def share(rows: np.ndarray) -> np.ndarray:
        return rows[..., 0].mean(axis=1) - expit(_fit_length_model(rows)[:, 0])

    matrix = np.stack([win_probabilities, length_differences], axis=1).astype(np.float64)
    return bootstrap_statistic(share, matrix, n_resamples=n_resamples, seed=seed)


def _fit_length_model(rows: np.ndarray) -> np.ndarray:
    """Newton's method for (theta, phi) of every resample at once: rows [b, X, 2] to parameters [b, 2]."""
    wins, lengths = rows[..., 0], rows[..., 1]
    spread = lengths.std(axis=1, keepdims=True)
    covariate = np.tanh(lengths / np.where(spread > 0, spread, 1.0)) * (spread > 0)
    design = np.stack([np.ones_like(covariate), covariate], axis=-1)
    ridge = _RIDGE * rows.shape[1] * np.eye(2)
    parameters = np.zeros((len(rows), 2))
    for _ in range(50):
        p = expit(np.einsum("bxc,bc->bx", design, parameters))
        gradient = np.einsum("bxc,bx->bc", design, wins - p) - parameters @ ridge
        hessian = np.einsum("bxc,bx,bxd->bcd", design, p * (1 - p), design) + ridge
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        # A step of at most two log-odds keeps Newton from overshooting where p is close to 0 or 1.
        parameters += np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-10:
            break
    return parameters
