"""Aggregation operators and named methods: definitions, limits, identities."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prmd.pessimism import aggregation as pessimism_aggregation
from prmd.pessimism import losses
from prmd.pessimism.aggregation import (
    METHODS,
    Aggregation,
    Parameters,
    method_aggregation,
    robust_rewards,
    stack_objectives,
)

UNEVEN = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
RESPONSE_LEVEL = [name for name in METHODS if name != "maxmin"]


def rewards_of(seed: int, n_objectives: int = 3, n_members: int = 20, n: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n_objectives, n_members, n)))


def robust(values: torch.Tensor, method: str | Aggregation, weights: torch.Tensor = UNEVEN) -> torch.Tensor:
    aggregation = METHODS[method] if isinstance(method, str) else method
    return robust_rewards(values, aggregation=aggregation, weights=weights)


def rockafellar_uryasev(values: np.ndarray, weights: np.ndarray, alpha: float) -> float:
    """max over nu of nu - E[(nu - X)_+] / alpha; concave and piecewise linear, so an atom attains it."""
    return max(nu - weights @ np.maximum(nu - values, 0) / alpha for nu in values)


def test_every_method_by_definition():
    values = rewards_of(0)
    v = values.numpy()
    mean, sd, w = v.mean(axis=1), v.std(axis=1), UNEVEN.numpy()
    worst_two = np.sort(v, axis=1)[:, :2].mean(axis=1)
    atom_weights = np.repeat(w / 20, 20)
    expected = {
        "mean": w @ mean,
        "hard_min": v.min(axis=(0, 1)),
        "cvar": [rockafellar_uryasev(v[:, :, i].ravel(), atom_weights, 0.1) for i in range(8)],
        "hierarchical": worst_two.min(axis=0),
        "lcb": w @ (mean - sd),
        "softmin": -np.log(atom_weights @ np.exp(-2 * v.reshape(60, 8))) / 2,
    }
    assert set(expected) == set(RESPONSE_LEVEL)
    for method, reward in expected.items():
        np.testing.assert_allclose(robust(values, method).numpy(), reward, atol=1e-10, err_msg=method)


@pytest.mark.parametrize("method", RESPONSE_LEVEL)
def test_response_level_margins_are_antisymmetric(method):
    values = rewards_of(1, n=2)
    forward, backward = robust(values, method), robust(values.flip(-1), method)
    assert (forward[0] - forward[1]).item() == -(backward[0] - backward[1]).item()


@pytest.mark.parametrize("across", pessimism_aggregation.ACROSS)
def test_one_member_makes_all_within_operators_equal(across):
    values = rewards_of(2, n_members=1)
    results = [
        robust(values, Aggregation(within, across, Parameters(cvar_estimator=estimator)))
        for within in pessimism_aggregation.WITHIN
        for estimator in ("empirical", "gaussian")
        if across != "cvar" or estimator == "empirical"
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-12)


def test_one_objective_makes_hierarchical_cvar_and_all_across_equal():
    values, alone = rewards_of(3, n_objectives=1), torch.ones(1)
    torch.testing.assert_close(robust(values, "hierarchical", alone), robust(values, "cvar", alone))
    across = [
        robust(values, Aggregation(within="lcb", across=name), alone) for name in pessimism_aggregation.ACROSS
    ]
    for result in across[1:]:
        torch.testing.assert_close(result, across[0])


def test_hierarchical_with_minimum_within_is_the_flat_minimum():
    values = rewards_of(4)
    nested = method_aggregation("hierarchical", within="min")
    assert torch.equal(robust(values, nested), robust(values, "hard_min"))
    assert torch.equal(robust(values, "hard_min"), values.flatten(0, 1).amin(dim=0))


@pytest.mark.parametrize("method", list(METHODS))
def test_identical_rewards_make_every_method_the_mean(method):
    shared = rewards_of(5)[:1, :1]
    values = shared.expand(3, 20, 8)
    torch.testing.assert_close(robust(values, method), shared[0, 0], rtol=0, atol=1e-12)


def test_order_of_pessimism():
    values = rewards_of(6)
    equal = torch.full((3,), 1 / 3)
    chain = [robust(values, name, equal) for name in ("hard_min", "cvar", "softmin", "mean")]
    for lower, higher in itertools.pairwise(chain):
        assert (lower <= higher + 1e-12).all()
    assert (robust(values, "hard_min", equal) <= robust(values, "hierarchical", equal)).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), method=st.sampled_from(RESPONSE_LEVEL), shift=st.floats(-5, 5))
def test_robust_rewards_are_equivariant_to_a_common_shift(seed, method, shift):
    values = rewards_of(seed, n=2)
    torch.testing.assert_close(
        robust(values + shift, method), robust(values, method) + shift, rtol=0, atol=1e-9
    )


def test_softmin_goes_from_mean_to_minimum():
    values, equal = rewards_of(7), torch.full((3,), 1 / 3)
    soft = robust(values, method_aggregation("softmin", parameters=Parameters(eta=1e-6)), equal)
    torch.testing.assert_close(soft, robust(values, "mean", equal), rtol=0, atol=1e-5)
    sharp = robust(values, method_aggregation("softmin", parameters=Parameters(eta=2000.0)), equal)
    torch.testing.assert_close(sharp, robust(values, "hard_min"), rtol=0, atol=5e-3)


def test_dtype_is_kept_and_pairs_may_have_any_shape():
    values = rewards_of(8, n=12).float().reshape(3, 20, 6, 2)
    for method in METHODS:
        result = robust(values, method)
        assert result.dtype == torch.float32 and result.shape == (6, 2)
        flat = robust(values.reshape(3, 20, 12), method)
        assert torch.equal(result.reshape(-1), flat)


def targets_of(values: torch.Tensor, method: str) -> torch.Tensor:
    rewards = robust(values, method, torch.full((3,), 1 / 3))
    return losses.target_margins(
        chosen_rewards=rewards[..., 0], rejected_rewards=rewards[..., 1], reward_scale=0.3, margin_clip=5.0
    )


def test_methods_differ_on_the_shipped_ensemble_size():
    """K = 3, M = 20, alpha = .10: hard_min, cvar, hierarchical, mean and the rest give different targets."""
    values = rewards_of(9, n=16).reshape(3, 20, 8, 2)
    targets = {method: targets_of(values, method) for method in RESPONSE_LEVEL}
    for first, second in itertools.combinations(targets, 2):
        assert (targets[first] - targets[second]).abs().max() > 1e-3, (first, second)


@pytest.mark.parametrize("method", RESPONSE_LEVEL)
def test_one_members_score_changes_the_policy_gradient(method):
    """Raising the worst member's score of the chosen response moves the gradient of the squared loss."""
    values = rewards_of(10, n=2).reshape(3, 20, 1, 2)
    changed = values.clone()
    objective, member = divmod(int(values[:, :, 0, 0].argmin()), 20)
    changed[objective, member, 0, 0] += 0.2
    gradients = []
    for table in (values, changed):
        policy_logp = torch.tensor([-4.0], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        implicit = losses.implicit_margins(
            policy_chosen_logps=policy_logp,
            policy_rejected_logps=zero,
            ref_chosen_logps=zero - 4,
            ref_rejected_logps=zero,
            beta=0.1,
        )
        losses.distillation_loss(
            implicit_margins=implicit, target_margins=targets_of(table, method), kind="squared"
        ).sum().backward()
        gradients.append(policy_logp.grad.item())
    assert abs(gradients[0] - gradients[1]) > 1e-5


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0001, math.nan])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\]"):
        Parameters(alpha=alpha)


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.3], [1.2, -0.1, -0.1], [0.5, 0.5], [math.nan, 0.5, 0.5]])
def test_weights_that_are_no_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be"):
        robust(rewards_of(0), "mean", torch.tensor(weights))


def test_missing_scores_are_refused_by_place():
    values = rewards_of(0)
    values[2, 7, 3] = math.nan
    with pytest.raises(ValueError, match="1 rewards are NaN or infinite, the first of objective 2, member 7"):
        robust(values, "mean")


def test_ragged_ensembles_are_refused():
    with pytest.raises(ValueError, match=r"same members.*\[20, 4\], \[19, 4\]"):
        stack_objectives([torch.zeros(20, 4), torch.zeros(19, 4)])
    stacked = stack_objectives([torch.zeros(20, 4), torch.ones(20, 4)])
    assert stacked.shape == (2, 20, 4)


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"hard_min.*'worst'"):
        method_aggregation("worst")
    with pytest.raises(ValueError, match="within must be one of mean, min"):
        Aggregation(within="median", across="min")
    with pytest.raises(ValueError, match="across must be one of"):
        Aggregation(within="mean", across="none")
    with pytest.raises(ValueError, match="cvar_estimator"):
        Parameters(cvar_estimator="kernel")
    with pytest.raises(ValueError, match="eta > 0"):
        Parameters(eta=0.0)
