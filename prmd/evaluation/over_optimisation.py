"""Over-optimisation: what the judges gain while the proxy gains, as responses are selected harder.

    d = sqrt(KL),   best of n:  KL <= log n - (n - 1)/n,   gold(d) ~ d (alpha - beta d)

The best of n is estimated without bias from reference samples already drawn and scored, so that nothing is sampled again.
Proxy: the ensemble that policies were trained on. Gold: the judges, which no policy saw. What lives here: arrays and
results in, the `over_optimisation` part of `comparison.json` out; sampling is in `inference.candidates`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prmd.statistics.outcomes import best_of_n_expectation, best_of_n_kl
from prmd.statistics.resampling import Resampling

MIN_POINTS = 3
"""Selections from fewer than this many n fix no curve of two parameters."""


def best_of_n_curves(proxy: np.ndarray, gold: np.ndarray, resampling: Resampling) -> dict[str, Any]:
    """Proxy and gold gains of the best of n reference samples, by the mean reward and by the worst one.

    Args:
        proxy: calibrated rewards of the reference samples by every member, [K, M, X, m].
        gold: the same by the judges, [K, X, m].

    Returns:
        For `mean` (average over objectives and members) and `hard_min` (the lowest of all): `points`, `fit`, and `units`,
        the within-prompt standard deviations in which the gains of proxy and gold are given.
    """
    choosers = {
        "mean": (proxy.mean(axis=(0, 1)), gold.mean(axis=0)),
        "hard_min": (proxy.min(axis=(0, 1)), gold.min(axis=0)),
    }
    return {name: _curve(*scores, resampling) for name, scores in choosers.items()}


def _curve(proxy: np.ndarray, gold: np.ndarray, resampling: Resampling) -> dict[str, Any]:
    units = {"proxy": _within_prompt_sd(proxy), "gold": _within_prompt_sd(gold)}
    sizes = range(1, proxy.shape[1] + 1)
    gains = {
        name: [(best_of_n_expectation(proxy, scores, k) - scores.mean(axis=1)) / units[name] for k in sizes]
        for name, scores in (("proxy", proxy), ("gold", gold))
    }
    points = [
        {"n": k, "kl": best_of_n_kl(k), "distance": math.sqrt(best_of_n_kl(k))}
        | {name: resampling.mean(values[k - 1]).to_json() for name, values in gains.items()}
        for k in sizes
    ]
    return {"points": points, "fit": _fit(points[1:], gains["gold"][1:], resampling), "units": units}


def _within_prompt_sd(scores: np.ndarray) -> float:
    """Standard deviation of scores [X, m] around the mean of their prompt; 1 where nothing varies."""
    return float(np.sqrt(scores.var(axis=1, ddof=1).mean())) or 1.0


def _fit(
    points: Sequence[dict[str, Any]], gains: Sequence[np.ndarray], resampling: Resampling
) -> dict[str, Any] | None:
    """Weighted least squares of gold(d) = d (alpha - beta d) with intervals over prompts; None with too few points.

    Source: the best-of-n form of arXiv:2210.10760.
    """
    if len(points) < MIN_POINTS:
        return None
    distances = np.array([p["distance"] for p in points])
    design = np.stack([distances, -np.square(distances)], axis=1)
    weights = 1.0 / np.maximum([np.var(values) for values in gains], 1e-12)
    # Linear in the gains: one coefficient per prompt, whose mean is the fit.
    solution = np.linalg.solve(design.T @ (weights[:, None] * design), design.T * weights)
    alpha, beta = (resampling.mean(row) for row in solution @ np.stack(gains))
    peak = alpha.value / (2 * beta.value) if beta.value > 0 else None
    return {"alpha": alpha.to_json(), "beta": beta.to_json(), "peak_distance": peak}


def policy_points(
    metrics: Sequence[dict[str, Any]], curves: dict[str, Any], resampling: Resampling
) -> list[dict[str, Any]]:
    """Where trained policies lie on the curve of the mean reward: the same gains in the same units.

    Args:
        metrics: contents of the method files that have proxies, policies only.
        curves: from `best_of_n_curves`.
    """
    units = curves["mean"]["units"]
    points = []
    for found in metrics:
        rewards = {"gold": found["per_prompt"], "proxy": found["proxy"]["per_prompt"]}
        gains = {
            name: resampling.mean(np.mean(list(part["mean_reward"].values()), axis=0) / units[name]).to_json()
            for name, part in rewards.items()
        }
        kl = found["kl"]["per_response"]["value"]
        points.append({"method": found["method"], "kl": kl, "distance": math.sqrt(max(kl, 0.0)), **gains})
    return points
