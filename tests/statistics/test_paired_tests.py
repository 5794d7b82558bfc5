"""Paired tests against enumeration and scipy; length control against a general optimiser."""

import itertools

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit

from prmd.statistics import paired_tests


def test_mcnemar_against_binomial_sums():
    assert paired_tests.mcnemar_exact(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert paired_tests.mcnemar_exact(5, 1) == paired_tests.mcnemar_exact(1, 5)
    assert paired_tests.mcnemar_exact(0, 0) == 1.0 and paired_tests.mcnemar_exact(4, 4) == 1.0
    with pytest.raises(ValueError, match="negative"):
        paired_tests.mcnemar_exact(-1, 2)


def test_sign_flip_enumerates_small_samples():
    differences = np.array([0.5, 1.0, -0.2, 0.7])
    flips = [abs(np.dot(s, differences)) for s in itertools.product((-1, 1), repeat=4)]
    expected = np.mean([flip >= abs(differences.sum()) - 1e-12 for flip in flips])
    assert paired_tests.sign_flip_test(differences) == pytest.approx(expected)
    assert paired_tests.sign_flip_test(np.ones(5)) == 2 / 32
    assert paired_tests.sign_flip_test(np.zeros(6)) == 1.0


def test_sign_flip_of_large_samples_agrees_with_scipy_and_is_never_zero():
    differences = np.random.default_rng(0).normal(0.15, 1, size=120)
    ours = paired_tests.sign_flip_test(differences, seed=1)
    assert ours == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)
    assert paired_tests.sign_flip_test(np.ones(50), n_resamples=999) == 1 / 1000
    with pytest.raises(ValueError, match="finite differences"):
        paired_tests.sign_flip_test([])


def test_sign_flip_rejects_five_percent_under_the_null():
    rng = np.random.default_rng(0)
    p = [paired_tests.sign_flip_test(rng.normal(size=20), n_resamples=400, seed=i) for i in range(400)]
    assert 0.025 < np.mean(np.array(p) <= 0.05) < 0.08


def test_holm_by_hand():
    np.testing.assert_allclose(paired_tests.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(paired_tests.holm([0.9, 0.8]), [1.0, 1.0])
    assert paired_tests.holm([]).size == 0
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        paired_tests.holm([1.2])


def soft_labels(seed: int, n: int, theta: float, phi: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = 40 * rng.normal(size=n) + 25
    return rng.binomial(4, expit(theta + phi * np.tanh(lengths / lengths.std()))) / 4, lengths


def test_length_control_equals_a_general_maximum_likelihood_fit():
    wins, lengths = soft_labels(0, 200, 0.2, 0.8)
    covariate = np.tanh(lengths / lengths.std())

    def negative_log_likelihood(z: np.ndarray) -> float:
        p = expit(z[0] + z[1] * covariate)
        return -(wins * np.log(p) + (1 - wins) * np.log(1 - p)).sum()

    theta, phi = minimize(negative_log_likelihood, np.zeros(2), method="BFGS").x
    fitted = paired_tests.length_controlled_win_rate(wins, lengths, n_resamples=200)
    assert fitted.estimate.value == pytest.approx(expit(theta), abs=1e-4)
    assert fitted.length_effect == pytest.approx(phi, abs=1e-3)
    assert fitted.raw == pytest.approx(wins.mean())


def test_length_control_removes_a_win_that_is_only_length():
    wins, lengths = soft_labels(1, 2000, 0.0, 1.5)
    fitted = paired_tests.length_controlled_win_rate(wins, lengths, n_resamples=200)
    assert fitted.raw > 0.6
    assert fitted.estimate.low < 0.5 < fitted.estimate.high
    assert fitted.length_effect == pytest.approx(1.5, abs=0.2)


def test_length_control_covers_the_truth():
    hits = 0
    for seed in range(100):
        wins, lengths = soft_labels(seed, 60, 0.4, 0.7)
        fitted = paired_tests.length_controlled_win_rate(wins, lengths, n_resamples=200, seed=seed)
        hits += fitted.estimate.low <= expit(0.4) <= fitted.estimate.high
    assert hits >= 89


def test_length_control_with_equal_lengths_or_perfect_separation():
    wins = np.array([1.0, 0.5, 0.0, 1.0, 0.75])
    equal = paired_tests.length_controlled_win_rate(wins, np.zeros(5), n_resamples=100)
    assert equal.estimate.value == pytest.approx(wins.mean(), abs=1e-5) and equal.length_effect == 0.0
    separated = paired_tests.length_controlled_win_rate(
        [0.0, 0.0, 1.0, 1.0], [-2.0, -1.0, 1.0, 2.0], n_resamples=100
    )
    assert separated.estimate.value == pytest.approx(0.5, abs=1e-6)
    assert 0.0 <= separated.estimate.low <= separated.estimate.high <= 1.0
    with pytest.raises(ValueError, match=r"wins in \[0, 1\]"):
        paired_tests.length_controlled_win_rate([1.5], [0.0])
