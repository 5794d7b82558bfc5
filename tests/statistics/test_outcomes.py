"""Outcome measures against brute force over pairs, subsets and a fine grid."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prmd.statistics import outcomes


def test_pairwise_win_rate_against_loops():
    rng = np.random.default_rng(0)
    policy, reference = rng.integers(0, 4, size=(5, 3)), rng.integers(0, 4, size=(5, 4))
    for x, rate in enumerate(outcomes.pairwise_win_rate(policy, reference)):
        duels = [(a > b) + 0.5 * (a == b) for a in policy[x] for b in reference[x]]
        assert rate == pytest.approx(np.mean(duels))
    np.testing.assert_array_equal(outcomes.pairwise_win_rate(policy, policy), 0.5)
    with pytest.raises(ValueError, match="5 prompts against 4"):
        outcomes.pairwise_win_rate(policy, reference[:4])
    with pytest.raises(ValueError, match="finite"):
        outcomes.pairwise_win_rate([[math.nan]], [[0.0]])


def test_pareto_dominance_against_loops():
    rng = np.random.default_rng(1)
    policy, reference = rng.integers(0, 3, size=(2, 6, 3)), rng.integers(0, 3, size=(2, 6, 2))
    rates = outcomes.pareto_dominance_rate(policy, reference)
    for x in range(6):
        duels = [
            all(policy[:, x, i] >= reference[:, x, j]) and any(policy[:, x, i] > reference[:, x, j])
            for i in range(3)
            for j in range(2)
        ]
        assert rates[x] == pytest.approx(np.mean(duels))
    assert outcomes.pareto_dominance_rate(policy + 5, reference).tolist() == [1.0] * 6
    assert outcomes.pareto_dominance_rate(reference, reference[:, :, :1]).max() < 1.0


@settings(deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=30), alpha=st.floats(0.01, 1))
def test_cvar_over_prompts_equals_rockafellar_uryasev(values, alpha):
    x = np.array(values)
    # Below one prompt the tail is the worst prompt, as it is at alpha = 1/n.
    level = max(alpha, 1 / len(x))
    expected = max(nu - np.maximum(nu - x, 0).mean() / level for nu in x)
    assert float(outcomes.cvar_over_prompts(x, alpha)) == pytest.approx(expected, abs=1e-9)


def test_cvar_over_prompts_works_on_resamples():
    table = np.random.default_rng(0).normal(size=(4, 20))
    expected = [np.sort(row)[:2].mean() for row in table]
    np.testing.assert_allclose(outcomes.cvar_over_prompts(table, 0.1), expected)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        outcomes.cvar_over_prompts(table, 0.0)


def test_violation_rate_against_loops():
    rng = np.random.default_rng(0)
    rewards, thresholds = rng.normal(size=(2, 3, 4, 5)), np.array([-1.0, -0.5])
    for x, rate in enumerate(outcomes.violation_rate(rewards, thresholds)):
        broken = [any(rewards[k, :, x, i].min() < thresholds[k] for k in range(2)) for i in range(5)]
        assert rate == pytest.approx(np.mean(broken))
    with pytest.raises(ValueError, match="2 objectives"):
        outcomes.violation_rate(rewards, np.zeros(3))


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_order_statistics_equal_the_mean_over_all_subsets(k):
    rng = np.random.default_rng(0)
    values, gold, flags = rng.normal(size=(3, 6)), rng.normal(size=(3, 6)), rng.random((3, 6)) < 0.3
    subsets = [list(s) for s in itertools.combinations(range(6), k)]
    maxima = np.mean([values[:, s].max(axis=1) for s in subsets], axis=0)
    np.testing.assert_allclose(outcomes.best_of_n_expectation(values, values, k), maxima)
    best = [gold[np.arange(3), np.array(s)[values[:, s].argmax(axis=1)]] for s in subsets]
    np.testing.assert_allclose(outcomes.best_of_n_expectation(values, gold, k), np.mean(best, axis=0))
    any_flag = np.mean([flags[:, s].any(axis=1) for s in subsets], axis=0)
    np.testing.assert_allclose(outcomes.best_of_n_expectation(flags, flags, k), any_flag, atol=1e-12)
    counts = flags.sum(axis=1)
    formula = [1 - math.comb(6 - c, k) / math.comb(6, k) for c in counts]
    np.testing.assert_allclose(outcomes.best_of_n_expectation(flags, flags, k), formula, atol=1e-12)


def test_order_statistics_refuse_more_samples_than_there_are():
    with pytest.raises(ValueError, match=r"1\.\.6"):
        outcomes.best_of_n_expectation(np.zeros((2, 6)), np.zeros((2, 6)), 7)
    with pytest.raises(ValueError, match="same shape"):
        outcomes.best_of_n_expectation(np.zeros((2, 6)), np.zeros((2, 5)), 2)


def test_best_of_n_kl_is_the_kl_of_the_maximum_of_uniforms():
    """The density of the best of n uniforms is n u**(n-1); its KL to uniform by quadrature."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    for n in (1, 2, 8):
        density = n * u ** (n - 1)
        assert outcomes.best_of_n_kl(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)


def test_hypervolume_by_hand():
    assert outcomes.hypervolume([[2.0], [5.0]], [1.0]) == 4.0
    staircase = [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.0, 1.0]]
    assert outcomes.hypervolume(staircase, [0.0, 0.0]) == pytest.approx(6.0)
    assert outcomes.hypervolume([[1.0, -1.0]], [0.0, 0.0]) == 0.0
    assert outcomes.hypervolume([[1.0, 2.0, 3.0]], [0.0, 0.0, 0.0]) == pytest.approx(6.0)
    with pytest.raises(ValueError, match="finite"):
        outcomes.hypervolume([[1.0, math.inf]], [0.0, 0.0])


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_hypervolume_equals_inclusion_and_exclusion(objectives):
    """The boxes below a set of points share the box below their worst corner, so their union is an alternating sum."""
    rng = np.random.default_rng(objectives)
    for _ in range(20):
        points, origin = rng.random((8, objectives)), rng.uniform(-0.3, 0.2, size=objectives)
        expected = math.fsum(
            (-1) ** (size + 1) * np.prod(np.maximum(np.min(subset, axis=0) - origin, 0.0))
            for size in range(1, 9)
            for subset in itertools.combinations(points, size)
        )
        assert outcomes.hypervolume(points, origin) == pytest.approx(expected, rel=0, abs=1e-12)
        assert expected > 1e-4


@settings(max_examples=30, deadline=None)
@given(points=st.lists(st.tuples(*[st.integers(-1, 5)] * 3), min_size=1, max_size=8))
def test_hypervolume_in_three_dimensions_counts_unit_cells(points):
    """With integer points the volume is the number of unit cells below some point."""
    cells = itertools.product(range(5), repeat=3)
    expected = sum(
        any(all(p > c for p, c in zip(point, cell, strict=True)) for point in points) for cell in cells
    )
    assert outcomes.hypervolume(np.array(points, dtype=float), np.zeros(3)) == pytest.approx(expected)
