"""The closed-form gate against exact tilts and against a tabular policy trained by distillation."""

import math

import numpy as np
import pytest
import torch

from prmd.pessimism import kl_budget, losses
from prmd.pessimism.aggregation import METHODS, robust_rewards
from prmd.pessimism.maxmin import solve_maxmin

BETA = 0.1


def world(seed: int, n_prompts: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """True rewards [K, X, n] of conflicting objectives and noisy ensembles of them [K, M, X, n]."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=(n_prompts, n))
    true = np.stack([axis, -0.5 * axis, 0.3 * axis]) + 0.8 * rng.normal(size=(3, n_prompts, n))
    members = true[:, None] + 0.5 * rng.normal(size=(3, 20, n_prompts, n))
    return torch.from_numpy(true), torch.from_numpy(members)


def robust_of(members: torch.Tensor, method: str) -> torch.Tensor:
    weights = torch.full((3,), 1 / 3)
    if method == "maxmin":
        weights = solve_maxmin(members.mean(dim=1), beta=BETA, kl_target=0.8).weights
    return robust_rewards(members, aggregation=METHODS[method], weights=weights)


def test_reweight_is_the_softmax():
    rewards = torch.tensor([[0.0, 0.1], [5.0, 5.0]])
    weights = kl_budget.reweight(rewards, reward_scale=2.0, beta=0.1).numpy()
    np.testing.assert_allclose(weights[0], [1 / (1 + math.e**2), math.e**2 / (1 + math.e**2)], rtol=1e-6)
    np.testing.assert_allclose(weights[1], 0.5)


@pytest.mark.parametrize("kl_target", [0.01, 0.5, 2.0, 3.0])
def test_matched_scale_meets_the_kl(kl_target):
    robust = robust_of(world(0, 10, 64)[1], "cvar")
    scale = kl_budget.matched_kl_scale(robust, beta=BETA, kl_target=kl_target)
    p = np.exp(scale / BETA * (robust.numpy() - robust.numpy().max(axis=1, keepdims=True)))
    p /= p.sum(axis=1, keepdims=True)
    assert (p * np.log(np.maximum(p, 1e-300) * 64)).sum(axis=1).mean() == pytest.approx(kl_target, abs=1e-7)


def test_small_kl_agrees_with_the_gaussian_formula():
    """For a small tilt KL = (scale * sd / beta)**2 / 2, sd with divisor n within prompts."""
    rewards = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 64)))
    scale = kl_budget.matched_kl_scale(rewards, beta=BETA, kl_target=0.01)
    variance = rewards.numpy().var(axis=1).mean()
    assert scale == pytest.approx(BETA * math.sqrt(0.02 / variance), rel=0.01)


def test_gate_row_by_hand():
    rewards = torch.tensor([[[1.0, 0.0]], [[0.0, 0.5]]], dtype=torch.float64)
    row = kl_budget.gate_row(robust=rewards[0], rewards=rewards, beta=BETA, kl_target=0.2)
    p = kl_budget.reweight(rewards[0], reward_scale=row.reward_scale, beta=BETA)[0, 0].item()
    assert p > 0.5
    assert p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)) == pytest.approx(0.2)
    assert row.gains == pytest.approx((p - 0.5, 0.5 * (1 - p) - 0.25))
    assert row.worst_gain == pytest.approx(0.25 - 0.5 * p)
    assert row.mean_of_min == pytest.approx(0.0) and row.reference_mean_of_min == 0.0
    assert row.effective_sample_size == pytest.approx(1 / (p**2 + (1 - p) ** 2))
    assert row.to_json()["n_samples"] == 2 and row.to_json()["gains"] == list(row.gains)


def test_gate_from_samples_agrees_with_the_exact_tabular_optimum():
    """Samples of a non-uniform reference, reweighted, estimate the gains of pi_ref * exp(R / tau) / Z."""
    rng = np.random.default_rng(1)
    ref, table = rng.dirichlet(np.ones(12)), rng.normal(size=(2, 12))
    robust = table.min(axis=0)
    draws = rng.choice(12, size=(40, 4000), p=ref)
    row = kl_budget.gate_row(
        robust=torch.from_numpy(robust[draws]),
        rewards=torch.from_numpy(table[:, draws]),
        beta=BETA,
        kl_target=0.5,
    )
    tilted = ref * np.exp(row.reward_scale / BETA * robust)
    tilted /= tilted.sum()
    assert (tilted * np.log(tilted / ref)).sum() == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(row.gains, table @ (tilted - ref), atol=0.02)
    assert row.mean_of_min == pytest.approx(tilted @ robust, abs=0.02)


@pytest.mark.parametrize("method", list(METHODS))
def test_gate_agrees_with_a_policy_trained_by_distillation(method):
    """Train tabular logits on the same targets; true gains have the sign, and size, the gate predicts."""
    true, members = world(2, 6, 24)
    robust = robust_of(members, method)
    row = kl_budget.gate_row(robust=robust, rewards=true, beta=BETA, kl_target=0.8)
    left, right = torch.triu_indices(24, 24, offset=1)
    targets = losses.target_margins(
        chosen_rewards=robust[:, left],
        rejected_rewards=robust[:, right],
        reward_scale=row.reward_scale,
        margin_clip=math.inf,
    )
    logits = torch.zeros(6, 24, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        implicit = BETA * (logits[:, left] - logits[:, right])
        loss = losses.distillation_loss(
            implicit_margins=implicit, target_margins=targets, kind="squared"
        ).mean()
        loss.backward()
        return loss

    solver.step(closure)
    trained = (logits.detach().softmax(dim=1) * true).sum(dim=-1).mean(dim=-1) - true.mean(dim=(1, 2))
    np.testing.assert_allclose(row.gains, trained.numpy(), atol=1e-3)
    assert np.sign(row.worst_gain) == np.sign(trained.min().item())


def test_pessimism_raises_the_worst_objective_of_each_response():
    """The mechanism the methods exist for: at equal KL, more E min_k than averaging, in a known world."""
    true, members = world(3, 30, 40)
    rows = {
        method: kl_budget.gate_row(robust=robust_of(members, method), rewards=true, beta=BETA, kl_target=1.0)
        for method in ("mean", "hard_min", "cvar", "hierarchical")
    }
    for method in ("hard_min", "cvar", "hierarchical"):
        assert rows[method].mean_of_min > rows["mean"].mean_of_min + 0.05
        assert rows[method].mean_of_min > rows[method].reference_mean_of_min


def test_usable_kl_target():
    assert kl_budget.usable_kl_target(4.0, 256) == pytest.approx(4.0)
    assert kl_budget.usable_kl_target(4.0, 16) == pytest.approx(math.log(4))
    assert kl_budget.usable_kl_target(4.0, 4) == pytest.approx(math.log(4) / 4)
    assert kl_budget.usable_kl_target(0.1, 16) == 0.1
    for n in range(2, 40):
        robust = torch.from_numpy(np.random.default_rng(n).normal(size=(5, n)))
        kl_budget.matched_kl_scale(robust, beta=BETA, kl_target=kl_budget.usable_kl_target(9.0, n))
    with pytest.raises(ValueError, match="at least two samples"):
        kl_budget.usable_kl_target(1.0, 1)


def test_budgets_and_rewards_that_cannot_be_met_are_refused():
    rewards = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 16)))
    with pytest.raises(ValueError, match=r"out of reach of 16 samples.*draw 60"):
        kl_budget.matched_kl_scale(rewards, beta=BETA, kl_target=2.7)
    with pytest.raises(ValueError, match="equal rewards cap the KL at"):
        kl_budget.matched_kl_scale((rewards > 0).double(), beta=BETA, kl_target=2.0)
    with pytest.raises(ValueError, match="equal rewards cap the KL at"):
        kl_budget.matched_kl_scale(torch.ones(5, 16), beta=BETA, kl_target=1.0)
    with pytest.raises(ValueError, match="do not match"):
        kl_budget.gate_row(robust=rewards, rewards=torch.zeros(3, 5, 15), beta=BETA, kl_target=1.0)
    rewards[0, 0] = math.inf
    with pytest.raises(ValueError, match="finite rewards"):
        kl_budget.matched_kl_scale(rewards, beta=BETA, kl_target=1.0)
