"""Measures of a reward model's margins against simulation and hand-made cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from prmd.statistics import reliability


def test_log_odds_slope_recovers_the_simulated_slope_and_its_score_is_zero():
    rng = np.random.default_rng(0)
    strength = rng.normal(size=20_000)
    labels = rng.random(20_000) < 1 / (1 + np.exp(-0.4 * strength))
    margins = np.where(labels, strength, -strength)
    slope = reliability.log_odds_slope(margins)
    assert slope == pytest.approx(0.4, abs=0.05)
    assert (margins / (1 + np.exp(slope * margins))).sum() == pytest.approx(0.0, abs=1e-5)
    assert reliability.log_odds_slope(torch.from_numpy(1000 * margins)) == pytest.approx(slope / 1000)


def test_log_odds_slope_where_no_maximum_exists():
    assert reliability.log_odds_slope([1.0, 0.0, 2.0]) == math.inf
    assert reliability.log_odds_slope([-1.0, -2.0]) == -math.inf
    assert reliability.log_odds_slope([1.0, -3.0]) < 0


def test_expected_calibration_error_by_hand_and_bins():
    margins = np.array([0.1, -0.1, 2.0, 2.0])
    low, high = 1 / (1 + math.exp(-0.1)), 1 / (1 + math.exp(-2.0))
    expected = 0.5 * abs(0.5 - low) + 0.5 * abs(1.0 - high)
    assert reliability.expected_calibration_error(margins, n_bins=2) == pytest.approx(expected)
    bins = reliability.reliability_bins(margins, 2)
    assert [bin_["n"] for bin_ in bins] == [2, 2]
    assert bins[0]["confidence"] == pytest.approx(low) and bins[1]["accuracy"] == 1.0
    assert all(bin_["low"] <= bin_["accuracy"] <= bin_["high"] for bin_ in bins)


def test_expected_calibration_error_is_small_when_calibrated_and_large_when_over_confident():
    rng = np.random.default_rng(0)
    strength = 1.5 * rng.normal(size=20_000)
    margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-strength)), strength, -strength)
    assert reliability.expected_calibration_error(margins) < 0.02
    assert reliability.expected_calibration_error(5 * margins) > 0.1


def test_ties_are_half_right():
    assert reliability.reliability_bins([0.0, 0.0], 1)[0]["accuracy"] == 0.5
    assert reliability.expected_calibration_error([0.0, 0.0]) == 0.0


def test_mean_pairwise_correlation():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=40_000)
    members = np.stack([shared + rng.normal(size=40_000) for _ in range(4)])
    assert reliability.mean_pairwise_correlation(members) == pytest.approx(0.5, abs=0.02)
    assert reliability.mean_pairwise_correlation(np.stack([shared, 2 * shared])) == pytest.approx(1.0)
    assert reliability.mean_pairwise_correlation(shared[None]) == 1.0
    with pytest.raises(ValueError, match="two different margins"):
        reliability.mean_pairwise_correlation(np.ones((2, 5)))


def test_disagreement_has_the_sign_of_its_correlation_with_mistakes():
    def correlation(members: np.ndarray) -> float:
        return reliability.disagreement_measures(members, n_resamples=10).mistake_correlation.value

    rng = np.random.default_rng(0)
    spread = np.concatenate([np.full(500, 0.1), np.full(500, 3.0)])
    assert correlation(1.0 + spread * rng.normal(size=(3, 1000))) > 0.3
    # Errors where members agree: the sign turns.
    agreeing_errors = np.where(np.arange(1000) < 500, -1.0, 20.0) + spread * rng.normal(size=(3, 1000))
    assert correlation(agreeing_errors) < -0.5


def test_disagreement_measures_by_hand():
    """Two members, so sd = half their distance: .5, 1, 1.5, 2, 2.5 with mean margins 2, -1, 1, -2, 3."""
    mean, half = np.array([2.0, -1.0, 1.0, -2.0, 3.0]), np.array([0.5, 1.0, 1.5, 2.0, 2.5])
    found = reliability.disagreement_measures(np.stack([mean + half, mean - half]), n_resamples=200)
    # of the 6 (wrong, right) pairs of pairs the wrong one has the larger sd in 1>.5, 2>.5, 2>1.5
    assert found.auc.value == pytest.approx(3 / 6)
    # ranks of 1 - sigmoid(mean): 2, 4, 3, 5, 1 against 1..5; sum d^2 = 1 + 4 + 0 + 1 + 16
    assert found.error_correlation.value == pytest.approx(1 - 6 * 22 / (5 * 24))
    wrong_ranks, ranks = np.array([2, 4.5, 2, 4.5, 2]), np.arange(1.0, 6)
    assert found.mistake_correlation.value == pytest.approx(np.corrcoef(ranks, wrong_ranks)[0, 1])
    assert [bin_["n"] for bin_ in found.bins] == [3, 2]
    assert [bin_["disagreement"] for bin_ in found.bins] == pytest.approx([1.0, 2.25])
    assert [bin_["accuracy"] for bin_ in found.bins] == pytest.approx([2 / 3, 1 / 2])
    assert all(bin_["low"] < bin_["accuracy"] < bin_["high"] for bin_ in found.bins)


def test_disagreement_that_predicts_mistakes_is_told_from_disagreement_that_does_not():
    rng = np.random.default_rng(1)
    spread = np.exp(rng.normal(size=800))
    centre = 0.5 + spread * rng.normal(size=800)  # the mean errs where members differ
    members = centre + spread * rng.normal(size=(8, 800)) / 4
    found = reliability.disagreement_measures(members, n_resamples=300)
    disagreement, mean = members.std(axis=0), members.mean(axis=0)
    wins = (disagreement[mean < 0][:, None] > disagreement[mean > 0]).mean()  # every (wrong, right) couple
    assert found.auc.value == pytest.approx(wins) and found.auc.low > 0.55 > 0.5
    assert found.auc.low < found.auc.value < found.auc.high and found.auc.n == 800
    assert found.mistake_correlation.value == pytest.approx(spearmanr(disagreement, mean < 0).statistic)
    assert found.mistake_correlation.low > 0
    assert found.bins[0]["accuracy"] > found.bins[-1]["accuracy"] + 0.2
    assert sum(bin_["n"] for bin_ in found.bins) == 800 and len(found.bins) == 10
    # The same spreads, dealt to other pairs: sd and mistakes are independent.
    noise = members - members.mean(axis=0)
    noise = noise[:, rng.permutation(800)]
    dealt = reliability.disagreement_measures(members.mean(axis=0) + noise, n_resamples=300)
    assert dealt.auc.low < 0.5 < dealt.auc.high and dealt.auc.high < found.auc.low


def test_interval_of_the_auc_covers_its_population_value():
    """sd of a wrong pair ~ U(0, 1) + .3, of a right one ~ U(0, 1): AUC = 1 - .7^2 / 2."""
    rng, hits = np.random.default_rng(2), 0
    for seed in range(60):
        wrong = rng.random(120) < 0.4
        half = rng.random(120) + 0.3 * wrong
        mean = np.where(wrong, -1.0, 1.0)
        found = reliability.disagreement_measures(
            np.stack([mean + half, mean - half]), n_resamples=200, seed=seed
        )
        hits += found.auc.low <= 1 - 0.7**2 / 2 <= found.auc.high
    assert hits >= 51  # 57 expected of 60; fewer than 51 has probability .004


def test_disagreement_measures_that_are_not_defined_are_none():
    always_right = reliability.disagreement_measures([[1.0, 2.0, 3.0], [2.0, 5.0, 9.0]], n_resamples=10)
    assert always_right.auc is None and always_right.mistake_correlation is None
    assert always_right.error_correlation is not None
    one_model = reliability.disagreement_measures([[1.0, -2.0], [1.0, -2.0]], n_resamples=10)
    assert (one_model.auc, one_model.error_correlation) == (None, None)
    one_pair = reliability.disagreement_measures([[1.0], [2.0]], n_resamples=10)
    assert one_pair.auc is None and [bin_["n"] for bin_ in one_pair.bins] == [1]
    assert one_pair.to_json()["auc"] is None
    ties = reliability.disagreement_measures([[1.0, 2.5, -3.0], [-1.0, 1.0, -2.0]], n_resamples=10)
    assert ties.auc.n == 2  # the pair whose mean is 0 is neither right nor wrong


def test_margins_that_are_no_numbers_are_refused():
    for measure in (reliability.expected_calibration_error, reliability.log_odds_slope):
        for margins in ([], [1.0, math.nan]):
            with pytest.raises(ValueError, match="finite margins"):
                measure(margins)
    with pytest.raises(ValueError, match="all margins are zero"):
        reliability.log_odds_slope([0.0, 0.0])


scores_and_labels = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12)


@given(scores_and_labels)
def test_area_under_the_curve_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    positive, negative = ([s for s, label in rows if label is wanted] for wanted in (True, False))
    pairs = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    found = reliability.area_under_curve(
        np.array([[s for s, _ in rows]]), np.array([[label for _, label in rows]])
    )
    assert found[0] == pytest.approx(np.mean(pairs) if pairs else 0.5)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_rank_correlation_is_spearmans(rows: list[tuple[int, int]]) -> None:
    a, b = (np.array(values) for values in zip(*rows, strict=True))
    varies = np.ptp(a) > 0 and np.ptp(b) > 0
    wanted = spearmanr(a, b)[0] if varies else 0.0
    assert reliability.rank_correlation(np.stack([a, b]), np.stack([b, a])) == pytest.approx([wanted, wanted])
