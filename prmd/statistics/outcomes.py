"""Outcome measures: numbers that say how good sampled responses are, one per prompt or per point.

Here: win rates, violations, lower tails, order statistics over several samples of a prompt, Pareto dominance,
hypervolume. Not here: intervals and tests for these numbers (`intervals.py`, to be read next), the lower tail inside the training target (`pessimism/aggregation.py`).
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln


def finite_array(
    values: ArrayLike, caller: str, what: str = "values", *, ndim: int | None = None
) -> np.ndarray:
    """Values as float64; a ValueError in the caller's name where there is none, one is not finite or the axes are not `ndim`."""
    array = np.asarray(values, dtype=np.float64)
    if ndim not in (None, array.ndim) or array.size == 0 or not np.isfinite(array).all():
        axes = "" if ndim is None else f" on {ndim} axes"
        raise ValueError(f"{caller}: needs finite {what}{axes}, got shape {array.shape}")
    return array


def pairwise_win_rate(policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Probability that a policy sample beats a reference sample of the same prompt, ties one half.

    Args:
        policy: scores of n policy samples of each prompt, [X, n].
        reference: scores of m reference samples, [X, m].

    Returns:
        Win probability over all n*m pairs, [X].

    Raises:
        ValueError: different numbers of prompts, or scores that are not finite.
    """
    ours, theirs = (finite_array(scores, "pairwise_win_rate", ndim=2) for scores in (policy, reference))
    if len(ours) != len(theirs):
        raise ValueError(
            f"pairwise_win_rate: {len(ours)} prompts against {len(theirs)}; align them by prompt id"
        )
    differences = ours[:, :, None] - theirs[:, None, :]
    return ((differences > 0) + 0.5 * (differences == 0)).mean(axis=(1, 2))


def pareto_dominance_rate(policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Probability that a policy sample is at least as good on every objective and better on one.

    Args:
        policy: scores per objective, prompt and sample, [K, X, n].
        reference: [K, X, m].

    Returns:
        Per prompt over all n*m pairs, [X]; swap the arguments for the rate at which the policy is dominated.

    Raises:
        ValueError: objectives or prompts that do not match.
    """
    ours, theirs = (finite_array(scores, "pareto_dominance_rate", ndim=3) for scores in (policy, reference))
    if ours.shape[:2] != theirs.shape[:2]:
        raise ValueError(f"pareto_dominance_rate: [K, X] differ, {ours.shape[:2]} against {theirs.shape[:2]}")
    differences = ours[:, :, :, None] - theirs[:, :, None, :]
    dominates = (differences >= 0).all(axis=0) & (differences > 0).any(axis=0)
    return dominates.mean(axis=(1, 2))


def cvar_over_prompts(values: np.ndarray, alpha: float = 0.1) -> np.ndarray:
    """Mean of the worst share `alpha` of prompts, with a fractional last prompt.

    Args:
        values: one number per prompt on the last axis, [..., X].
        alpha: share, in (0, 1].

    Returns:
        [...]; a zero-dimensional array for one row.

    Raises:
        ValueError: alpha outside (0, 1].

    Source: Rockafellar and Uryasev 2000, for the lower tail.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"cvar_over_prompts: alpha must lie in (0, 1], got {alpha}")
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=-1)
    tail = alpha * ordered.shape[-1]  # below one prompt, the worst alone
    shares = np.clip(tail - np.arange(ordered.shape[-1]), 0.0, 1.0) / tail
    return ordered @ shares


def violation_rate(member_rewards: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of responses for which some objective's most pessimistic member is below its threshold.

    ``P(exists k: min_m r_km(x, y) < tau_k)``

    Args:
        member_rewards: calibrated rewards, [K, M, X, n].
        thresholds: tau_k, [K]; usually the 10 % quantile of the reference policy's min_m.

    Returns:
        Per prompt over its samples, [X].

    Raises:
        ValueError: one threshold per objective is wanted.

    Source: Eq. (P17) of the AT-PRMD draft.
    """
    rewards = finite_array(member_rewards, "violation_rate", ndim=4)
    limits = np.asarray(thresholds, dtype=np.float64)
    if limits.shape != rewards.shape[:1]:
        raise ValueError(f"violation_rate: {rewards.shape[0]} objectives, thresholds of shape {limits.shape}")
    worst_member = rewards.min(axis=1)
    return (worst_member < limits[:, None, None]).any(axis=0).mean(axis=-1)


def order_statistic_weights(n: int, k: int) -> np.ndarray:
    """Probability that the i-th smallest of n samples is the largest of k drawn without replacement.

    ``C(i - 1, k - 1) / C(n, k)``, i = 1..n

    Args:
        n: samples at hand.
        k: samples drawn, 1 <= k <= n.

    Returns:
        [n], sums to one.

    Raises:
        ValueError: k outside 1..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"order statistic: k must lie in 1..{n} (the samples at hand), got {k}")
    rank = np.arange(k, n + 1)
    log_weights = gammaln(rank) - gammaln(k) - gammaln(rank - k + 1)
    log_total = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return np.concatenate([np.zeros(k - 1), np.exp(log_weights - log_total)])


def best_of_n_expectation(proxy: np.ndarray, gold: np.ndarray, k: int) -> np.ndarray:
    """Expected gold score of the best of k samples by proxy score, unbiased from n >= k samples.

    Args:
        proxy: scores that choose, [X, n].
        gold: scores that count, [X, n]; those that choose, for the expected maximum.
        k: samples to choose from.

    Returns:
        [X].

    Raises:
        ValueError: different shapes, or k outside 1..n.

    Source: best-of-n estimator of arXiv:2210.10760.
    """
    chooser, counted = (finite_array(scores, "best_of_n", ndim=2) for scores in (proxy, gold))
    if chooser.shape != counted.shape:
        raise ValueError(
            f"best_of_n: proxy {chooser.shape} and gold {counted.shape} must have the same shape"
        )
    order = np.argsort(chooser, axis=1, kind="stable")
    return np.take_along_axis(counted, order, axis=1) @ order_statistic_weights(chooser.shape[1], k)


def best_of_n_kl(n: int) -> float:
    """Upper bound ``log n - (n - 1)/n`` on the KL of best-of-n sampling, nats; exact without equal responses.

    Source: arXiv:2401.01879.
    """
    return math.log(n) - (n - 1) / n


def hypervolume(points: np.ndarray, origin: np.ndarray) -> float:
    """Volume dominated by a set of points above an origin; larger is better on every axis.

    Args:
        points: [P, K]; points that are not above the origin on every axis add nothing.
        origin: the worst corner, [K].

    Returns:
        Exact volume for any K; the work grows as P to the power of K.

    Raises:
        ValueError: no points, or points that are not finite.
    """
    above = finite_array(points, "hypervolume", ndim=2) - np.asarray(origin, dtype=np.float64)
    return float(dominated_volumes(above[None])[0])


def dominated_volumes(points: np.ndarray) -> np.ndarray:
    """Volumes above zero that each of b sets of points dominates.

    Args:
        points: [b, P, K]; points that are not above zero on every axis add nothing.

    Returns:
        [b].
    """
    above = np.where((points > 0).all(axis=-1, keepdims=True), points, 0.0)
    if above.shape[-1] == 1:
        return above[..., 0].max(axis=-1)
    # Slices between consecutive values of the last axis, from the highest down; each is a volume in one dimension less,
    # of the points that reach it.
    order = np.argsort(-above[..., -1], axis=-1)
    above = np.take_along_axis(above, order[..., None], axis=-2)
    depths = -np.diff(above[..., -1], axis=-1, append=0.0)
    slices = [dominated_volumes(above[:, : i + 1, :-1]) for i in range(above.shape[1])]
    return (depths * np.stack(slices, axis=-1)).sum(axis=-1)
