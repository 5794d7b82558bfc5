"""The robust reward R of a method with everything that is solved for before training: weights, multipliers, scale.

Here: from the configuration and the scored responses to one function R(x, y) and its reward scale. Not here: the
operators (`pessimism.aggregation`), the solvers (`pessimism.maxmin`), how target margins are made of R (`targets`, to be read next).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prmd.config.policy import PolicySection
from prmd.errors import ConfigError
from prmd.pessimism.aggregation import Aggregation, robust_rewards
from prmd.pessimism.calibration import (
    can_cross_fit,
    cross_fitted_variance,
    scale_of_variance,
    within_prompt_variance,
)
from prmd.pessimism.kl_budget import usable_kl_target
from prmd.pessimism.maxmin import solve_constraints, solve_maxmin
from prmd.policies.methods import aggregation, method_of
from prmd.policies.pairs import ScaleResponses


@dataclass(frozen=True)
class RobustReward:
    """R(x, y) = aggregate of r[k, m](x, y) + sum_k mu_k mean_m r[k, m](x, y), and the scale that makes margins of it.

    Attributes:
        aggregation: operators and their parameters.
        weights: lambda, or w* of maxmin, float64 [K].
        multipliers: mu of the constraints, float64 [K]; zero without.
        reward_scale: > 0.
        notes: what was solved for, for people.
    """

    aggregation: Aggregation
    weights: Tensor
    multipliers: Tensor
    reward_scale: float
    notes: tuple[str, ...] = ()

    def __call__(self, rewards: Tensor) -> Tensor:
        """Robust rewards [...] of calibrated rewards [K, M, ...]."""
        robust = robust_rewards(rewards, aggregation=self.aggregation, weights=self.weights)
        if not bool(self.multipliers.any()):
            return robust
        return robust + torch.tensordot(self.multipliers, rewards.double().mean(dim=1), dims=1)


def objective_weights(policy: PolicySection) -> Tensor:
    """lambda as configured, float64 [K]."""
    return torch.tensor(list(policy.weights.values()), dtype=torch.float64)


def weighted_objectives(policy: PolicySection) -> list[int]:
    """Indices of the objectives of positive weight, which alone are part of R."""
    return [k for k, weight in enumerate(policy.weights.values()) if weight > 0]


def positive_weights(policy: PolicySection) -> Tensor:
    """lambda of the `weighted_objectives`, float64 [K']."""
    return objective_weights(policy)[weighted_objectives(policy)]


def solve_reward(policy: PolicySection, method: str, scale: ScaleResponses) -> RobustReward:
    """R of a method: its weights, then its multipliers, then its scale, each from the same scored responses.

    Args:
        scale: responses that fix the scale; maxmin and constraints need them to be samples of the reference.

    Raises:
        ConfigError: no such samples, a threshold out of reach, or rewards for which no scale reaches `kl_target`.
    """
    chosen, weights, notes = aggregation(policy, method), objective_weights(policy), []
    if method == "maxmin":
        weights, note = _maxmin_weights(policy, chosen, scale)
        notes.append(note)
    multipliers = torch.zeros(len(weights), dtype=torch.float64)
    reward = RobustReward(chosen, weights, multipliers, 1.0)
    if policy.constraints and method_of(method).loss == "distil":
        multipliers, note = _multipliers(policy, method, reward, scale)
        reward = replace(reward, multipliers=multipliers)
        notes.append(note)
    if policy.reward_scale != "auto":
        return replace(reward, reward_scale=policy.reward_scale, notes=tuple(notes))
    try:
        found = scale_of_variance(_variance(reward, scale), beta=policy.beta, kl_target=policy.kl_target)
    except ValueError as error:
        raise ConfigError(f"policy.reward_scale: auto failed for {method} ({error}); set a number") from error
    notes.insert(0, f"reward scale fixed on {scale.source}")
    return replace(reward, reward_scale=found, notes=tuple(notes))


def _variance(reward: RobustReward, scale: ScaleResponses) -> float:
    """Variance of R within a prompt, cross-fitted where samples are centred on their own mean and there are enough."""
    if scale.centred and can_cross_fit(scale.samples_per_prompt):
        return cross_fitted_variance(reward, scale.by_prompt())
    return within_prompt_variance(reward(scale.rewards), scale.prompt_index)


def objective_rewards(rewards: Tensor, chosen: Aggregation) -> Tensor:
    """Rewards of each objective, its members combined by `within`: [K, M, ...] -> [K, ...]."""
    alone, one = replace(chosen, across="mean"), torch.ones(1, dtype=torch.float64)
    rows = [robust_rewards(rewards[k : k + 1], aggregation=alone, weights=one) for k in range(len(rewards))]
    return torch.stack(rows)


def _maxmin_weights(policy: PolicySection, chosen: Aggregation, scale: ScaleResponses) -> tuple[Tensor, str]:
    samples, kept = _samples(scale, "maxmin"), weighted_objectives(policy)
    budget = usable_kl_target(policy.kl_target, samples.shape[-1])
    try:
        solution = solve_maxmin(objective_rewards(samples[kept], chosen), beta=policy.beta, kl_target=budget)
    except ValueError as error:
        raise ConfigError(f"policy.methods: maxmin: {error}") from error
    weights = torch.zeros(len(policy.weights), dtype=torch.float64)
    weights[kept] = solution.weights
    found = _named(policy, dict(zip(kept, solution.weights.tolist(), strict=True)))
    return weights, f"maxmin weights {found}, {_solved_at(policy, budget, samples)}"


def _multipliers(
    policy: PolicySection, method: str, reward: RobustReward, scale: ScaleResponses
) -> tuple[Tensor, str]:
    samples, objectives = _samples(scale, method), list(policy.weights)
    budget = usable_kl_target(policy.kl_target, samples.shape[-1])
    try:
        solution = solve_constraints(
            base=reward(samples),
            rewards=samples.mean(dim=1),
            thresholds={objectives.index(k): c for k, c in policy.constraints.items()},
            beta=policy.beta,
            kl_target=budget,
            reward_scale=None if policy.reward_scale == "auto" else policy.reward_scale,
        )
    except ValueError as error:
        order = ", ".join(f"{k} {name}" for k, name in enumerate(objectives))
        raise ConfigError(
            f"policy.constraints: {method}: {error} (objectives: {order}); {_solved_at(policy, budget, samples)}"
        ) from error
    found = _named(policy, dict(enumerate(solution.multipliers.tolist())))
    return solution.multipliers, f"multipliers {found}, {_solved_at(policy, budget, samples)}"


def _samples(scale: ScaleResponses, method: str) -> Tensor:
    if not scale.samples_per_prompt:
        raise ConfigError(
            f"{method} needs samples of the reference policy and there are none; set pairs.reference_samples=16 or "
            "calibration.source=reference_samples"
        )
    return scale.by_prompt()


def _named(policy: PolicySection, values: dict[int, float]) -> str:
    """Numbers of objectives, by their position."""
    names = list(policy.weights)
    return ", ".join(f"{names[k]} {value:.3g}" for k, value in values.items())


def _solved_at(policy: PolicySection, budget: float, samples: Tensor) -> str:
    text = f"solved at {budget:.3g} nats on {samples.shape[-1]} samples of {samples.shape[-2]} prompts"
    return text + (
        f" (kl_target {policy.kl_target:g} needs more samples)" if budget < policy.kl_target else ""
    )
