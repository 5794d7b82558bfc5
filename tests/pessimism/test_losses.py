"""Pair losses against closed forms, numpy, and a tabular policy trained to convergence."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prmd.pessimism import losses

MARGINS = st.floats(-8, 8)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


@given(chosen=MARGINS, rejected=MARGINS, coefficient=st.floats(0, 1))
def test_bradley_terry_loss_is_likelihood_plus_centring(chosen, rejected, coefficient):
    loss = losses.bradley_terry_loss(
        chosen_rewards=tensor(chosen), rejected_rewards=tensor(rejected), centering_coefficient=coefficient
    )
    expected = softplus(rejected - chosen) + coefficient * (chosen + rejected) ** 2
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_centring_alone_decides_the_common_offset():
    rewards = torch.tensor([3.0, 2.0], dtype=torch.float64, requires_grad=True)
    losses.bradley_terry_loss(
        chosen_rewards=rewards[:1], rejected_rewards=rewards[1:], centering_coefficient=0.0
    ).sum().backward()
    assert rewards.grad.sum().item() == pytest.approx(0.0, abs=1e-12)
    rewards.grad = None
    losses.bradley_terry_loss(chosen_rewards=rewards[:1], rejected_rewards=rewards[1:]).sum().backward()
    assert rewards.grad.sum().item() == pytest.approx(4 * 0.01 * 5.0)


def test_implicit_margins_by_hand():
    margins = losses.implicit_margins(
        policy_chosen_logps=tensor(-10.0, -3.0),
        policy_rejected_logps=tensor(-12.0, -5.0),
        ref_chosen_logps=tensor(-11.0, -3.0),
        ref_rejected_logps=tensor(-9.0, -5.0),
        beta=0.1,
    )
    assert margins.tolist() == pytest.approx([0.1 * (1.0 + 3.0), 0.0])


def test_target_margins_scale_and_clip():
    targets = losses.target_margins(
        chosen_rewards=tensor(2.0, 0.0, 9.0),
        rejected_rewards=tensor(1.0, 0.5, -9.0),
        reward_scale=0.5,
        margin_clip=2.0,
    )
    assert targets.tolist() == [0.5, -0.25, 2.0]


@given(chosen=MARGINS, rejected=MARGINS)
def test_target_margins_are_antisymmetric(chosen, rejected):
    options = {"reward_scale": 0.3, "margin_clip": 1.5}
    forward = losses.target_margins(
        chosen_rewards=tensor(chosen), rejected_rewards=tensor(rejected), **options
    )
    backward = losses.target_margins(
        chosen_rewards=tensor(rejected), rejected_rewards=tensor(chosen), **options
    )
    assert forward.item() == -backward.item()


@pytest.mark.parametrize(
    "bad", [{"reward_scale": 0.0, "margin_clip": 1.0}, {"reward_scale": 1.0, "margin_clip": -1}]
)
def test_target_margins_refuse_what_is_not_positive(bad):
    with pytest.raises(ValueError, match="must be > 0"):
        losses.target_margins(chosen_rewards=tensor(1.0), rejected_rewards=tensor(0.0), **bad)


@given(implicit=MARGINS, target=MARGINS, delta=st.floats(0.1, 3))
def test_distillation_losses_by_formula(implicit, target, delta):
    error = abs(target - implicit)
    expected = {
        "squared": error**2,
        "huber": error**2 if error <= delta else delta * (2 * error - delta),
        "bce": softplus(-implicit) / (1 + math.exp(-target)) + softplus(implicit) / (1 + math.exp(target)),
    }
    assert set(expected) == set(losses.PAIR_LOSSES)
    for kind, value in expected.items():
        loss = losses.distillation_loss(
            implicit_margins=tensor(implicit), target_margins=tensor(target), kind=kind, huber_delta=delta
        )
        assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", list(losses.PAIR_LOSSES))
def test_distillation_losses_are_minimal_at_the_target(kind):
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    loss = losses.distillation_loss(
        implicit_margins=grid, target_margins=torch.full_like(grid, 0.7), kind=kind
    )
    assert grid[loss.argmin()].item() == pytest.approx(0.7, abs=1e-9)


def test_bce_becomes_dpo_for_a_certain_label():
    implicit = torch.linspace(-4, 4, 9, dtype=torch.float64)
    soft = losses.distillation_loss(
        implicit_margins=implicit, target_margins=torch.full_like(implicit, 50.0), kind="bce"
    )
    torch.testing.assert_close(soft, losses.dpo_loss(implicit_margins=implicit))


def test_unknown_kind_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"squared, huber, bce.*'mse'"):
        losses.distillation_loss(implicit_margins=tensor(0.0), target_margins=tensor(0.0), kind="mse")


def test_losses_before_the_first_step():
    """Where policy and reference agree: squared is the mean squared target, DPO is log 2."""
    logps = tensor(-5.0, -7.0, -2.0)
    margins = losses.implicit_margins(
        policy_chosen_logps=logps,
        policy_rejected_logps=logps - 1,
        ref_chosen_logps=logps,
        ref_rejected_logps=logps - 1,
        beta=0.1,
    )
    targets = tensor(0.3, -0.2, 1.1)
    squared = losses.distillation_loss(implicit_margins=margins, target_margins=targets, kind="squared")
    assert squared.mean().item() == pytest.approx((0.09 + 0.04 + 1.21) / 3)
    assert losses.dpo_loss(implicit_margins=margins).tolist() == pytest.approx([math.log(2)] * 3)


def test_ipo_targets_a_constant_log_ratio():
    loss = losses.ipo_loss(implicit_margins=tensor(0.1 * 5.0, 0.0), beta=0.1, ipo_beta=0.1)
    assert loss.tolist() == pytest.approx([0.0, 25.0])


def test_modpo_by_hand_and_with_one_objective():
    loss = losses.modpo_loss(implicit_margins=tensor(0.4), other_margins=tensor(0.1), weight=0.5)
    assert loss.item() == pytest.approx(softplus(-0.6))
    alone = losses.modpo_loss(implicit_margins=tensor(0.4), other_margins=tensor(0.0), weight=1.0)
    assert alone.item() == pytest.approx(losses.dpo_loss(implicit_margins=tensor(0.4)).item())
    with pytest.raises(ValueError, match="weights must be > 0"):
        losses.modpo_loss(implicit_margins=tensor(0.4), other_margins=tensor(0.1), weight=0.0)


def test_edpo_against_loops():
    rng = np.random.default_rng(0)
    implicit, targets = rng.normal(size=7), rng.normal(size=(3, 4, 7))
    expected = [[np.mean((targets[k, m] - implicit) ** 2) for m in range(4)] for k in range(3)]
    member_losses = losses.edpo_member_losses(
        implicit_margins=torch.from_numpy(implicit), member_targets=torch.from_numpy(targets)
    )
    np.testing.assert_allclose(member_losses.numpy(), expected, rtol=1e-12)
    selected = losses.edpo_select(member_losses)
    assert selected.tolist() == [int(np.argmin(row)) for row in expected]
    loss = losses.edpo_loss(
        implicit_margins=torch.from_numpy(implicit),
        member_targets=torch.from_numpy(targets),
        selected=selected,
        weights=tensor(0.5, 0.3, 0.2),
    )
    best = [min(row) for row in expected]
    assert loss.mean().item() == pytest.approx(0.5 * best[0] + 0.3 * best[1] + 0.2 * best[2])


def test_edpo_chooses_by_weighted_errors():
    targets = torch.tensor(
        [[[1.0, 0.0], [0.0, 2.0]]]
    )  # member 0 is off on the first pair, member 1 on the second
    members = {"implicit_margins": torch.zeros(2), "member_targets": targets}
    assert losses.edpo_member_losses(**members).tolist() == [[0.5, 2.0]]
    weights = torch.tensor([1.8, 0.2])
    found = losses.edpo_member_losses(**members, pair_weights=weights)
    torch.testing.assert_close(found, torch.tensor([[0.9, 0.4]]))
    assert losses.edpo_select(found).tolist() == [1]


def test_edpo_refuses_targets_of_other_pairs():
    with pytest.raises(ValueError, match=r"\[K, M, 3\]"):
        losses.edpo_member_losses(implicit_margins=torch.zeros(3), member_targets=torch.zeros(2, 2, 4))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(list(losses.PAIR_LOSSES)))
def test_tabular_distillation_recovers_the_tilted_reference(seed, kind):
    """Minimising over all pairs gives pi_ref * exp(scale * R / beta) / Z, computed here in numpy."""
    rng = np.random.default_rng(seed)
    ref, rewards = rng.dirichlet(np.ones(6)), rng.normal(size=6)
    beta, scale = 0.5, 0.7
    expected = ref * np.exp(scale * rewards / beta)
    expected /= expected.sum()

    ref_logps, robust = torch.from_numpy(np.log(ref)), torch.from_numpy(rewards)
    chosen, rejected = torch.triu_indices(6, 6, offset=1)
    targets = losses.target_margins(
        chosen_rewards=robust[chosen],
        rejected_rewards=robust[rejected],
        reward_scale=scale,
        margin_clip=math.inf,
    )
    logits = ref_logps.clone().requires_grad_(True)
    solver = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        logps = logits.log_softmax(dim=0)
        margins = losses.implicit_margins(
            policy_chosen_logps=logps[chosen],
            policy_rejected_logps=logps[rejected],
            ref_chosen_logps=ref_logps[chosen],
            ref_rejected_logps=ref_logps[rejected],
            beta=beta,
        )
        loss = losses.distillation_loss(implicit_margins=margins, target_margins=targets, kind=kind).mean()
        loss.backward()
        return loss

    solver.step(closure)
    np.testing.assert_allclose(logits.detach().softmax(dim=0).numpy(), expected, atol=2e-6)


def test_learning_measures_are_those_of_a_regression() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(0.3, 0.4, size=400)
    implicit = 0.6 * target + 0.1 * rng.normal(size=400) + 0.05
    moments = losses.margin_moments(torch.from_numpy(implicit), torch.from_numpy(target))
    found = losses.learning_measures({"loss": 1.0} | {k: float(v.mean()) for k, v in moments.items()})
    assert set(found) == {"loss", "targets/slope", "targets/sd_ratio", "targets/explained"}
    assert found["targets/slope"] == pytest.approx(np.polyfit(target, implicit, 1)[0])
    assert found["targets/sd_ratio"] == pytest.approx(implicit.std() / target.std())
    share = 1 - ((implicit - target) ** 2).mean() / (target**2).mean()
    assert found["targets/explained"] == pytest.approx(share)
    at_the_start = losses.margin_moments(torch.zeros(400), torch.from_numpy(target))
    begun = losses.learning_measures({k: float(v.mean()) for k, v in at_the_start.items()})
    assert set(begun.values()) == {0.0}
    equal = losses.margin_moments(torch.ones(4), torch.full((4,), 0.7))
    assert losses.learning_measures({k: float(v.mean()) for k, v in equal.items()}) == {}
    assert losses.learning_measures({"loss": 2.0}) == {"loss": 2.0}
