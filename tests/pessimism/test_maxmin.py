"""Solved weights and multipliers against optimality conditions and a general solver that knows no dual."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from prmd.pessimism.maxmin import solve_constraints, solve_maxmin


def conflicting_rewards(seed: int, n_objectives: int = 3, n_prompts: int = 10, n: int = 32) -> torch.Tensor:
    """Objectives that pull against each other along one axis, with offsets and scales of their own."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=(n_prompts, n))
    signs = np.array([1, -1, 0.3, -0.2])[:n_objectives, None, None]
    rewards = signs * axis + 0.6 * rng.normal(size=(n_objectives, n_prompts, n))
    return torch.from_numpy(rewards + 3 * rng.normal(size=(n_objectives, n_prompts, 1)))


def centred(rewards: torch.Tensor) -> np.ndarray:
    return (rewards - rewards.mean(dim=-1, keepdim=True)).numpy()


def policy_search(objectives: list, n_prompts: int, n: int, kl_target: float, constraints: list) -> float:
    """Largest t and policy logits with every objective >= t and mean KL <= kl_target, by brute force."""

    def policy(z: np.ndarray) -> np.ndarray:
        logits = z[1:].reshape(n_prompts, n)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def kl(z: np.ndarray) -> float:
        p = policy(z)
        return float((p * np.log(p * n)).sum() / n_prompts)

    conditions = [{"type": "ineq", "fun": lambda z: kl_target - kl(z)}]
    for table in objectives:
        conditions.append(
            {"type": "ineq", "fun": lambda z, t=table: (policy(z) * t).sum() / n_prompts - z[0]}
        )
    for table, least in constraints:
        conditions.append(
            {"type": "ineq", "fun": lambda z, t=table, c=least: (policy(z) * t).sum() / n_prompts - c}
        )
    start = np.concatenate([[-1.0], 0.01 * np.random.default_rng(0).normal(size=n_prompts * n)])
    found = minimize(
        lambda z: -z[0],
        start,
        method="SLSQP",
        constraints=conditions,
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    assert found.success, found.message
    return float(found.x[0])


@pytest.mark.parametrize("kl_target", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("n_objectives", [2, 3, 4])
def test_optimality_conditions(n_objectives, kl_target):
    solution = solve_maxmin(conflicting_rewards(0, n_objectives), beta=0.1, kl_target=kl_target)
    weights, gains = solution.weights.numpy(), solution.gains.numpy()
    assert weights.sum() == pytest.approx(1.0) and (weights >= 0).all()
    assert solution.kl == pytest.approx(kl_target, abs=1e-8)
    assert solution.dual == pytest.approx(solution.primal, abs=1e-6)
    active = weights > 1e-6
    np.testing.assert_allclose(gains[active], gains.min(), atol=1e-5)
    assert (gains[~active] >= gains.min() - 1e-6).all()
    tau = 0.1 / solution.reward_scale
    assert solution.primal == pytest.approx(gains.min() - tau * kl_target, abs=1e-8)


def test_dual_value_by_its_formula():
    rewards = conflicting_rewards(1)
    solution = solve_maxmin(rewards, beta=0.1, kl_target=0.7)
    tau = 0.1 / solution.reward_scale
    scores = np.tensordot(solution.weights.numpy(), centred(rewards), axes=1)
    assert solution.dual == pytest.approx(float((tau * np.log(np.exp(scores / tau).mean(axis=1))).mean()))


def test_no_policy_found_by_brute_force_does_better():
    rewards = conflicting_rewards(2, n_prompts=2, n=8)
    solution = solve_maxmin(rewards, beta=0.1, kl_target=0.6)
    best = policy_search(list(centred(rewards)), 2, 8, 0.6, [])
    assert solution.gains.min().item() == pytest.approx(best, abs=1e-5)


def test_no_other_weights_do_better_at_the_same_kl():
    rewards = conflicting_rewards(3)
    solution = solve_maxmin(rewards, beta=0.1, kl_target=1.0)
    table = centred(rewards)
    rng = np.random.default_rng(0)
    for weights in [*rng.dirichlet(np.ones(3), size=20), np.full(3, 1 / 3)]:
        scores = np.tensordot(weights, table, axes=1)
        low, high = 1e-3, 1e3
        for _ in range(80):
            tau = math.sqrt(low * high)
            p = np.exp((scores - scores.max(axis=1, keepdims=True)) / tau)
            p /= p.sum(axis=1, keepdims=True)
            kl = (p * np.log(np.maximum(p, 1e-300) * 32)).sum(axis=1).mean()
            low, high = (tau, high) if kl > 1.0 else (low, tau)
        assert (p * table).sum(axis=-1).mean(axis=-1).min() <= solution.gains.min().item() + 1e-6


def test_an_objective_that_gains_anyway_gets_no_weight():
    rng = np.random.default_rng(4)
    hard = rng.normal(size=(10, 32))
    rewards = torch.from_numpy(np.stack([hard, 3 * hard + 0.1 * rng.normal(size=(10, 32))]))
    solution = solve_maxmin(rewards, beta=0.1, kl_target=1.0)
    assert solution.weights[1].item() == pytest.approx(0.0, abs=1e-6)
    assert solution.gains[1] > solution.gains[0]


def test_one_objective_is_its_own_tilt_and_units_do_not_matter():
    rewards = conflicting_rewards(5)
    alone = solve_maxmin(rewards[:1], beta=0.1, kl_target=1.0)
    assert alone.weights.tolist() == [1.0]
    base = solve_maxmin(rewards, beta=0.1, kl_target=1.0)
    scaled = solve_maxmin(1000 * rewards, beta=0.1, kl_target=1.0)
    np.testing.assert_allclose(scaled.weights.numpy(), base.weights.numpy(), atol=1e-4)
    assert scaled.reward_scale == pytest.approx(base.reward_scale / 1000, rel=1e-4)


def test_exact_opposites_are_refused():
    axis = conflicting_rewards(6, n_objectives=1)
    with pytest.raises(ValueError, match="exact opposites"):
        solve_maxmin(torch.cat([axis, -axis]), beta=0.1, kl_target=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_target": 3.4}, "out of reach of 32 samples.*draw 120"),
        ({"kl_target": 0.0}, "must be > 0"),
        ({"beta": -0.1}, "must be > 0"),
    ],
)
def test_budgets_the_samples_cannot_hold_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        solve_maxmin(conflicting_rewards(0), **({"beta": 0.1, "kl_target": 1.0} | change))


def test_missing_scores_are_refused():
    rewards = conflicting_rewards(0)
    rewards[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="finite rewards of reference samples"):
        solve_maxmin(rewards, beta=0.1, kl_target=1.0)


# Constraints


def constrained(seed: int, thresholds: dict[int, float], **options):
    rewards = torch.from_numpy(centred(conflicting_rewards(seed)))
    settings = {"beta": 0.1, "kl_target": 1.0} | options
    return solve_constraints(base=rewards[0], rewards=rewards, thresholds=thresholds, **settings)


@pytest.mark.parametrize("reward_scale", [None, 0.08])
def test_thresholds_are_held_and_slack_ones_cost_nothing(reward_scale):
    """Complementary slackness: a multiplier is positive exactly where its threshold binds."""
    free = constrained(0, {}, reward_scale=reward_scale)
    assert free.multipliers.tolist() == [0.0, 0.0, 0.0]
    binding, slack = free.values[1].item() + 0.5, free.values[2].item() - 1.0
    held = constrained(0, {1: binding, 2: slack}, reward_scale=reward_scale)
    assert held.values[1].item() == pytest.approx(binding, abs=1e-5)
    assert held.multipliers[1] > 0.01
    assert held.multipliers[2].item() == pytest.approx(0.0, abs=1e-6)
    assert held.values[0] < free.values[0]
    if reward_scale is None:
        assert held.kl == pytest.approx(1.0, abs=1e-8)
    else:
        assert held.reward_scale == pytest.approx(reward_scale)


def test_constrained_optimum_equals_brute_force():
    rewards = torch.from_numpy(centred(conflicting_rewards(7, n_prompts=2, n=8)))
    solution = solve_constraints(
        base=rewards[0], rewards=rewards, thresholds={1: 0.1}, beta=0.1, kl_target=0.6
    )
    best = policy_search([rewards[0].numpy()], 2, 8, 0.6, [(rewards[1].numpy(), 0.1)])
    assert solution.multipliers[1] > 0
    assert solution.values[0].item() == pytest.approx(best, abs=1e-4)


def test_unreachable_threshold_names_the_best_value():
    rewards = conflicting_rewards(0)
    best = solve_maxmin(rewards[1:2], beta=0.1, kl_target=1.0).gains.item()
    with pytest.raises(ValueError, match=f"of objective 1 is out of reach.*best value is {best:.4g}"):
        constrained(0, {1: 2.5})
    constrained(0, {1: best - 0.01})


def test_thresholds_that_exclude_one_another_are_refused_as_such():
    rewards = conflicting_rewards(0)
    worst = solve_maxmin(rewards[:2], beta=0.1, kl_target=1.0).gains.min().item()
    with pytest.raises(ValueError, match="cannot be held together"):
        constrained(0, {0: worst + 0.05, 1: worst + 0.05})
    solution = constrained(0, {0: worst - 0.05, 1: worst - 0.05})
    assert (solution.values[:2] >= worst - 0.05 - 1e-4).all()


def test_thresholds_of_unknown_objectives_are_refused():
    with pytest.raises(ValueError, match=r"thresholds of \[3\] do not fit"):
        constrained(0, {3: 0.1})
