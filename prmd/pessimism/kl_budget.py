"""The closed-form gate: what a robust reward can reach on reference samples, before any training.

Here: the exponential tilt of reference samples at a KL budget and its evaluation. Not here: how rewards become
robust (`aggregation.py`), weights that are solved for (`maxmin.py`, to be read next), sampling and scoring
(`inference/generation.py`, `inference/scoring.py`).

Everything rests on one fact: the policy that maximises ``E[R] - tau * KL`` is ``pi_ref * exp(R / tau) / Z``, which on n
reference samples of a prompt is a softmax over them. n samples cap its KL at log n.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import brentq
from torch import Tensor

_REACHABLE_SHARE = 0.9  # of log n; beyond it the tilt is an argmax over noise and its scale diverges


@dataclass(frozen=True)
class GateRow:
    """What the optimal policy of a robust reward would reach on the reference samples.

    Attributes:
        gains: expected reward minus that of the reference, per objective, in the unit of the rewards given.
        worst_gain: the smallest of them, min_k E.
        mean_of_min: expectation of the smallest objective of each response, E min_k.
        reference_mean_of_min: the same under the reference.
        kl: nats per response.
        reward_scale: at which this KL is met.
        effective_sample_size: mean over prompts of ``1 / sum(w**2)``; below about 4 the row is mostly noise.
        n_samples: samples per prompt.
    """

    gains: tuple[float, ...]
    worst_gain: float
    mean_of_min: float
    reference_mean_of_min: float
    kl: float
    reward_scale: float
    effective_sample_size: float
    n_samples: int

    def to_json(self) -> dict[str, object]:
        """The fields as plain lists and numbers."""
        return asdict(self) | {"gains": list(self.gains)}


def usable_kl_target(kl_target: float, n_samples: int) -> float:
    """KL budget that n samples a prompt can represent: ``min(kl_target, log(n / 4))``.

    Four effective samples remain then. With six samples or fewer that is less than a quarter of log n, which is used instead.

    Args:
        kl_target: wanted, nats per response.
        n_samples: samples per prompt, >= 2.

    Returns:
        Budget to use with these samples; say so where it is lower than the one wanted.

    Raises:
        ValueError: fewer than two samples.
    """
    if n_samples < 2:
        raise ValueError(f"reweighting needs at least two samples of the reference a prompt, got {n_samples}")
    return min(kl_target, max(math.log(n_samples / 4), 0.25 * math.log(n_samples)))


def reweight(robust: Tensor, *, reward_scale: float, beta: float) -> Tensor:
    """Optimal policy of a robust reward over reference samples: ``softmax_i(reward_scale * R_i / beta)``.

    Args:
        robust: robust rewards of n reference samples per prompt, [X, n].
        reward_scale: > 0.
        beta: > 0.

    Returns:
        Weights, float64 [X, n], rows sum to one.

    Source: Eq. 4 of arXiv:2305.18290, with pi_ref replaced by its samples.
    """
    return (reward_scale / beta * robust.double()).softmax(dim=-1)


def matched_kl_scale(robust: Tensor, *, beta: float, kl_target: float) -> float:
    """Reward scale at which the reweighted samples are `kl_target` nats from uniform, mean over prompts.

    Args:
        robust: robust rewards, [X, n].
        beta: > 0.
        kl_target: nats, > 0 and well below log n.

    Returns:
        The scale, > 0.

    Raises:
        ValueError: kl_target near or above log n, rewards that cannot reach it (ties) or are not finite.
    """
    scores = as_scores(robust, "matched_kl_scale", ndim=2)
    check_budget(kl_target, scores.shape[-1], beta)
    tau = matched_temperature(scores, kl_target)
    reached = mean_kl(tilt(scores, tau)[0])
    if abs(reached - kl_target) > 1e-6:
        raise ValueError(
            f"matched_kl_scale: equal rewards cap the KL at {reached:.3g} nats, below kl_target {kl_target:.3g}"
        )
    return beta / tau


def gate_row(*, robust: Tensor, rewards: Tensor, beta: float, kl_target: float) -> GateRow:
    """Evaluate the optimal policy of a robust reward at a KL budget, without training.

    Args:
        robust: robust rewards of the method, [X, n].
        rewards: rewards to evaluate by, per objective, calibrated, [K, X, n].
        beta: > 0.
        kl_target: nats, > 0 and well below log n; see `usable_kl_target`.

    Returns:
        A `GateRow`.

    Raises:
        ValueError: as `matched_kl_scale`, or rewards of other samples.
    """
    table = as_scores(rewards, "gate_row", ndim=3)
    if table.shape[1:] != tuple(robust.shape):
        raise ValueError(
            f"gate_row: rewards {table.shape} and robust rewards {tuple(robust.shape)} do not match"
        )
    scale = matched_kl_scale(robust, beta=beta, kl_target=kl_target)
    policy = reweight(robust, reward_scale=scale, beta=beta).cpu().numpy()
    gains = (policy * table).sum(axis=-1).mean(axis=-1) - table.mean(axis=(1, 2))
    worst = table.min(axis=0)
    return GateRow(
        gains=tuple(float(gain) for gain in gains),
        worst_gain=float(gains.min()),
        mean_of_min=float((policy * worst).sum(axis=-1).mean()),
        reference_mean_of_min=float(worst.mean()),
        kl=mean_kl(policy),
        reward_scale=scale,
        effective_sample_size=float((1.0 / np.square(policy).sum(axis=-1)).mean()),
        n_samples=policy.shape[-1],
    )


def as_scores(rewards: Tensor, caller: str, ndim: int) -> np.ndarray:
    """Rewards as a float64 array; a ValueError in the caller's name where they are not finite or not `ndim` axes."""
    scores = rewards.detach().cpu().double().numpy()
    if scores.ndim != ndim or scores.size == 0 or not np.isfinite(scores).all():
        axes = "[X, n]" if ndim == 2 else "[K, X, n]"
        raise ValueError(
            f"{caller}: needs finite rewards of reference samples, {axes}, got {list(scores.shape)}"
        )
    return scores


def check_budget(kl_target: float, n_samples: int, beta: float) -> None:
    """Refuse a KL budget that n samples cannot represent, naming how many would."""
    if not beta > 0 or not kl_target > 0:
        raise ValueError(f"beta and kl_target must be > 0, got {beta} and {kl_target}")
    limit = _REACHABLE_SHARE * math.log(n_samples)
    if kl_target > limit:
        raise ValueError(
            f"kl_target {kl_target:.3g} nats is out of reach of {n_samples} samples a prompt (at most {limit:.3g}); "
            f"draw {math.ceil(4 * math.exp(min(kl_target, 100.0)))} or lower kl_target"
        )


def tilt(scores: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """Softmax policy [X, n] of scores / tau and the log of the mean exponential [X]."""
    shifted = scores / tau
    top = shifted.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted - top)
    totals = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / totals, (top + np.log(totals / scores.shape[-1]))[..., 0]


def mean_kl(policy: np.ndarray) -> float:
    """Mean over prompts of the KL of policies [X, n] from the uniform distribution, nats."""
    entropy_terms = policy * np.log(np.where(policy > 0, policy, 1.0))
    return float((entropy_terms.sum(axis=-1) + math.log(policy.shape[-1])).mean())


def matched_temperature(scores: np.ndarray, kl_target: float) -> float:
    """Temperature at which the tilt is `kl_target` nats from uniform; the coldest one where ties forbid it."""
    spread = float(scores.std(axis=-1).mean())
    if spread <= 1e-12 * max(1.0, float(np.abs(scores).max())):
        return 1.0

    def excess(log_tau: float) -> float:
        return mean_kl(tilt(scores, spread * math.exp(log_tau))[0]) - kl_target

    coldest = -15.0
    if excess(coldest) <= 0:
        return spread * math.exp(coldest)
    warmest = 1.0
    while excess(warmest) > 0:
        warmest += 3.0
    return spread * math.exp(brentq(excess, coldest, warmest, xtol=1e-13, rtol=1e-14))
