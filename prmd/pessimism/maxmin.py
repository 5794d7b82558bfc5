"""Weights that are solved for, from cached scores of reference samples.

Here: the objective weights that maximise the worst gain at a KL budget, and the multipliers that hold thresholds.
Not here: how rewards become robust (`aggregation.py`), the tilt of reference samples and what a given reward reaches
(`kl_budget.py`), sampling and scoring (`inference/generation.py`, `inference/scoring.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from prmd.pessimism.kl_budget import as_scores, check_budget, matched_temperature, mean_kl, tilt


@dataclass(frozen=True)
class MaxminSolution:
    """Weights that maximise the worst centred gain at a KL budget.

    Attributes:
        weights: w* on the simplex, float64 [K].
        reward_scale: beta / tau at which the KL is met on these samples; for another KL use
            `calibration.scale_of_variance` on the weighted reward's.
        kl: KL of the solution from the reference, nats.
        gains: centred gain of each objective, float64 [K]; equal over objectives with positive weight.
        dual: ``E_x tau log E_ref exp(sum_k w_k (r_k - E_ref r_k) / tau)``.
        primal: ``min_k gain_k - tau * KL``; equals `dual` at the optimum.
    """

    weights: Tensor
    reward_scale: float
    kl: float
    gains: Tensor
    dual: float
    primal: float


@dataclass(frozen=True)
class ConstraintSolution:
    """Multipliers that hold thresholds.

    Attributes:
        multipliers: mu, float64 [K]; zero for objectives without a threshold or with a slack one.
        reward_scale: beta / tau of the solution.
        kl: KL of the solution from the reference, nats.
        values: expected reward of each objective under it, float64 [K].
    """

    multipliers: Tensor
    reward_scale: float
    kl: float
    values: Tensor


def solve_maxmin(reference_rewards: Tensor, *, beta: float, kl_target: float) -> MaxminSolution:
    """Objective weights that maximise the worst centred gain at a KL budget.

    ``w* = argmin_{w in simplex} E_x tau log E_ref exp(sum_k w_k (r_k - E_ref r_k) / tau)``, tau = beta / reward_scale,
    with tau chosen together with w so that the policy's KL is `kl_target`. Convex in K numbers.

    Args:
        reference_rewards: calibrated rewards of n reference samples per prompt, mean member or aggregated within
            objectives, [K, X, n].
        beta: > 0.
        kl_target: nats, > 0 and well below log n; see `kl_budget.usable_kl_target`.

    Returns:
        A `MaxminSolution`.

    Raises:
        ValueError: kl_target near or above log n, rewards that are not finite, or objectives so opposed that no
            policy raises the worst one.

    Source: Lagrangian dual of ``max_pi min_k gain_k - tau KL``.
    """
    rewards = as_scores(reference_rewards, "solve_maxmin", ndim=3)
    check_budget(kl_target, rewards.shape[-1], beta)
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    weights, tau = _worst_case_weights(centred, kl_target)
    policy, log_normaliser = tilt(np.tensordot(weights, centred, axes=1), tau)
    gains, kl = (policy * centred).sum(axis=-1).mean(axis=-1), mean_kl(policy)
    dual, primal = float(tau * log_normaliser.mean()), float(gains.min() - tau * kl)
    if abs(kl - kl_target) > 1e-6 or dual - primal > 1e-5 * centred.std():
        raise ValueError(
            f"solve_maxmin: no weights found at {kl_target:.3g} nats (gains {np.round(gains, 4).tolist()}, duality gap "
            f"{dual - primal:.2g}); the objectives may be exact opposites, use another method or objectives"
        )
    return MaxminSolution(torch.from_numpy(weights), beta / tau, kl, torch.from_numpy(gains), dual, primal)


def solve_constraints(
    *,
    base: Tensor,
    rewards: Tensor,
    thresholds: Mapping[int, float],
    beta: float,
    kl_target: float,
    reward_scale: float | None = None,
) -> ConstraintSolution:
    """Multipliers with which the optimal policy of ``R + sum_k mu_k r_k`` holds ``E[r_k] >= c_k``.

    ``mu = argmin_{mu >= 0} E_x tau log E_ref exp((R + sum_k mu_k (r_k - c_k)) / tau)``, tau = beta / reward_scale; without
    a reward scale tau is solved for as well, so that the policy's KL is `kl_target`.

    Args:
        base: robust rewards R of n reference samples per prompt, [X, n].
        rewards: calibrated rewards per objective, mean member, [K, X, n].
        thresholds: c_k by index of the objective, in calibrated units.
        beta: > 0.
        kl_target: nats; the budget at which a threshold must be reachable.
        reward_scale: fixed scale, > 0, or None.

    Returns:
        A `ConstraintSolution`.

    Raises:
        ValueError: a threshold that cannot be reached at kl_target, alone or with the others, naming the best value
            reachable; an objective out of range; rewards of other samples.

    Source: Eqs. (P11)-(P12) of the AT-PRMD draft; a fixed hinge penalty, as there, cannot hold a threshold.
    """
    scores, table = _fitting_scores(base, rewards, thresholds)
    check_budget(kl_target, scores.shape[-1], beta)
    held = sorted(thresholds)
    slack = np.stack([table[k] - thresholds[k] for k in held]) if held else table[:0]
    _check_reachable(slack, dict(thresholds), kl_target)
    fixed = None if reward_scale is None else beta / reward_scale
    mu, tau = _solve_multipliers(scores, slack, kl_target, fixed)
    policy = tilt(scores + np.tensordot(mu, slack, axes=1), tau)[0]
    if held and (policy * slack).sum(axis=-1).mean(axis=-1).min() < -1e-4:
        raise ValueError(
            f"solve_constraints: multipliers diverge for thresholds {dict(thresholds)}; lower them"
        )
    multipliers = torch.zeros(len(table), dtype=torch.float64)
    multipliers[held] = torch.from_numpy(mu)
    values = torch.from_numpy((policy * table).sum(axis=-1).mean(axis=-1))
    return ConstraintSolution(multipliers, beta / tau, mean_kl(policy), values)


def _fitting_scores(
    base: Tensor, rewards: Tensor, thresholds: Mapping[int, float]
) -> tuple[np.ndarray, np.ndarray]:
    """(base [X, n], rewards [K, X, n]) as arrays of the same samples, with a row for every threshold."""
    scores = as_scores(base, "solve_constraints", ndim=2)
    table = as_scores(rewards, "solve_constraints", ndim=3)
    if table.shape[1:] != scores.shape or not set(thresholds) <= set(range(len(table))):
        raise ValueError(
            f"solve_constraints: base {scores.shape}, rewards {table.shape}, thresholds of {sorted(thresholds)} do not fit"
        )
    return scores, table


def _worst_case_weights(values: np.ndarray, kl_target: float) -> tuple[np.ndarray, float]:
    """Weights and temperature that minimise ``min_tau tau (E log-mean-exp(w . values / tau) + kl_target)``."""
    weights = _minimise_dual(np.zeros(values.shape[1:]), values, kl_target, tau=None, on_simplex=True)
    return weights, matched_temperature(np.tensordot(weights, values, axes=1), kl_target)


def _solve_multipliers(
    base: np.ndarray, slack: np.ndarray, kl_target: float, fixed: float | None
) -> tuple[np.ndarray, float]:
    """Multipliers >= 0 and temperature of the dual; no search where nothing is constrained."""
    mu = np.zeros(len(slack))
    if len(slack):
        mu = _minimise_dual(base, slack, kl_target, tau=fixed, on_simplex=False)
    return mu, fixed or matched_temperature(base + np.tensordot(mu, slack, axes=1), kl_target)


def _minimise_dual(
    base: np.ndarray, values: np.ndarray, kl_target: float, *, tau: float | None, on_simplex: bool
) -> np.ndarray:
    """Minimise the convex dual over weights; by the envelope theorem its gradient is the gains at the best tau."""
    unit = float(values.std()) or 1.0

    def dual(weights: np.ndarray) -> tuple[float, np.ndarray]:
        scores = base + np.tensordot(weights, values, axes=1)
        best = matched_temperature(scores, kl_target) if tau is None else tau
        policy, log_normaliser = tilt(scores, best)
        gains = (policy * values).sum(axis=-1).mean(axis=-1)
        return float(best * (log_normaliser.mean() + kl_target)) / unit, gains / unit

    return _descend(dual, len(values), on_simplex)


def _descend(dual: Callable[[np.ndarray], tuple[float, np.ndarray]], n: int, on_simplex: bool) -> np.ndarray:
    if on_simplex and n == 1:
        return np.ones(1)
    start = np.full(n, 1.0 / n) if on_simplex else np.zeros(n)
    options = {"ftol": 1e-15, "maxiter": 500}
    if not on_simplex:
        bounds = [(0.0, None)] * n
        return minimize(
            dual, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options | {"gtol": 1e-10}
        ).x
    constraint = {"type": "eq", "fun": lambda w: w.sum() - 1.0, "jac": lambda w: np.ones(n)}
    found = minimize(
        dual,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * n,
        constraints=[constraint],
        options=options,
    ).x
    found = np.clip(found, 0.0, None)
    return found / found.sum()


def _check_reachable(slack: np.ndarray, thresholds: dict[int, float], kl_target: float) -> None:
    if not thresholds:
        return
    held = sorted(thresholds)
    best = {}
    for row, k in zip(slack, held, strict=True):
        policy = tilt(row, matched_temperature(row, kl_target))[0]
        best[k] = float((policy * row).sum(axis=-1).mean()) + thresholds[k]
        if best[k] <= thresholds[k]:
            raise ValueError(
                f"threshold {thresholds[k]:.4g} of objective {k} is out of reach: at kl_target {kl_target:.3g} nats "
                f"the best value is {best[k]:.4g}"
            )
    weights, tau = _worst_case_weights(slack, kl_target)
    policy = tilt(np.tensordot(weights, slack, axes=1), tau)[0]
    gains = (policy * slack).sum(axis=-1).mean(axis=-1)
    if gains.min() <= 0:
        alone = ", ".join(f"{k}: {value:.4g}" for k, value in best.items())
        raise ValueError(
            f"thresholds {thresholds} cannot be held together at kl_target {kl_target:.3g} nats: the best compromise "
            f"misses one by {-gains.min():.4g} (each alone reaches {alone})"
        )
