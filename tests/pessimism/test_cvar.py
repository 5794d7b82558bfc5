"""CVaR against its two optimisation forms, its limits and a normal sample."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import norm

from prmd.pessimism.cvar import cvar, cvar_effective_atoms


def rockafellar_uryasev(values: np.ndarray, weights: np.ndarray, alpha: float) -> float:
    """max over nu of nu - E[(nu - X)_+] / alpha; concave and piecewise linear, so an atom attains it."""
    return max(nu - weights @ np.maximum(nu - values, 0) / alpha for nu in values)


def worst_reweighting(values: np.ndarray, weights: np.ndarray, alpha: float) -> float:
    """The dual form as a linear programme: min over q of q.x with 0 <= q <= w / alpha and sum q = 1."""
    bounds = [(0.0, w / alpha) for w in weights]
    return linprog(values, A_eq=np.ones((1, len(values))), b_eq=[1.0], bounds=bounds).fun


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-100, 100), min_size=1, max_size=40),
    alpha=st.one_of(st.floats(0.01, 1), st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])),
)
def test_cvar_equals_rockafellar_uryasev(values, alpha):
    expected = rockafellar_uryasev(np.array(values), np.full(len(values), 1 / len(values)), alpha)
    computed = cvar(torch.tensor(values, dtype=torch.float64), alpha=alpha).item()
    assert computed == pytest.approx(expected, rel=1e-9, abs=1e-8)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.floats(0.02, 1))
def test_weighted_cvar_equals_its_dual_programme(seed, alpha):
    rng = np.random.default_rng(seed)
    values, weights = rng.normal(size=9), rng.dirichlet(np.ones(9))
    weights[3] = 0.0
    weights /= weights.sum()
    computed = cvar(torch.from_numpy(values), alpha=alpha, weights=torch.from_numpy(weights)).item()
    assert computed == pytest.approx(worst_reweighting(values, weights, alpha), abs=1e-7)
    assert computed == pytest.approx(rockafellar_uryasev(values, weights, alpha), abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 20, 30, 60])
def test_cvar_limits_are_mean_and_minimum(n):
    values = torch.from_numpy(np.random.default_rng(n).normal(size=(n, 5)))
    torch.testing.assert_close(cvar(values, alpha=1.0), values.mean(dim=0), rtol=0, atol=1e-12)
    for alpha in (1 / n, 0.5 / n, 1e-6):
        torch.testing.assert_close(cvar(values, alpha=alpha), values.amin(dim=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("alpha", "n", "worst"), [(0.1, 30, 3), (0.1, 60, 6), (0.3, 10, 3), (0.7, 10, 7)])
def test_cvar_of_whole_atoms_is_their_mean_despite_floating_point(alpha, n, worst):
    """0.1 * 30 is 3.0000000000000004; the fourth atom, huge here, must not leak in."""
    values = torch.cat([torch.arange(worst), torch.full((n - worst,), 1e15)]).double()
    assert cvar(values, alpha=alpha).item() == pytest.approx(np.arange(worst).mean(), abs=1e-9)


def test_cvar_with_a_fractional_last_atom():
    values = torch.tensor([5.0, 1.0, 3.0, 9.0], dtype=torch.float64)
    assert cvar(values, alpha=0.6).item() == pytest.approx((1 + 3 + 0.4 * 5) / 2.4)


@given(seed=st.integers(0, 1000), a=st.floats(0.01, 1), b=st.floats(0.01, 1))
def test_cvar_is_monotone_in_alpha(seed, a, b):
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=13))
    low, high = sorted((a, b))
    for estimator in ("empirical", "gaussian"):
        assert (
            cvar(values, alpha=low, estimator=estimator)
            <= cvar(values, alpha=high, estimator=estimator) + 1e-12
        )


def test_gaussian_cvar_matches_a_large_normal_sample():
    quantiles = torch.from_numpy(norm.ppf((np.arange(200_000) + 0.5) / 200_000) * 2 + 1)
    gaussian = cvar(quantiles, alpha=0.1, estimator="gaussian").item()
    assert gaussian == pytest.approx(1 - 1.755 * 2, abs=2e-3)
    assert gaussian == pytest.approx(cvar(quantiles, alpha=0.1).item(), abs=2e-3)
    assert cvar(quantiles[:1], alpha=0.1, estimator="gaussian") == quantiles[0]


def test_cvar_passes_gradients_to_the_tail_only():
    values = torch.tensor([4.0, 1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    cvar(values, alpha=0.5).backward()
    assert values.grad.tolist() == pytest.approx([0.0, 0.5, 0.5, 0.0])


def test_cvar_effective_atoms():
    assert cvar_effective_atoms(alpha=0.1, weights=torch.tensor([0.8, 0.1, 0.1])) == pytest.approx(0.1 / 0.66)
    assert cvar_effective_atoms(alpha=0.1, weights=torch.full((20,), 0.05)) == pytest.approx(2.0)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0001, math.nan])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\]"):
        cvar(torch.zeros(3), alpha=alpha)
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\]"):
        cvar_effective_atoms(alpha=alpha, weights=torch.full((3,), 1 / 3))


def test_unknown_estimator_and_weights_of_other_atoms_are_refused():
    with pytest.raises(ValueError, match="empirical, gaussian"):
        cvar(torch.zeros(3), alpha=0.1, estimator="kernel")
    with pytest.raises(ValueError, match=r"weights must be \[3\]"):
        cvar(torch.zeros(3), alpha=0.1, weights=torch.tensor([0.5, 0.5]))
