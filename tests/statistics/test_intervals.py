"""Intervals: published values, closed forms, and how often they cover the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from prmd.statistics import intervals


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 100, 0.0, 3.70),
        (3, 100, 1.03, 8.45),
        (20, 100, 13.3, 28.9),
        (50, 100, 40.4, 59.6),
        (186, 817, 20.0, 25.8),
    ],
)
def test_wilson_against_published_values(successes, n, low, high):
    interval = intervals.wilson_interval(successes, n)
    assert 100 * interval.low == pytest.approx(low, abs=0.05)
    assert 100 * interval.high == pytest.approx(high, abs=0.05)
    assert interval.value == successes / n and interval.n == n


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_wilson_covers_as_promised(share):
    """Exact coverage over all outcomes of 60 trials, by the binomial probabilities."""
    covered = 0.0
    for successes in range(61):
        interval = intervals.wilson_interval(successes, 60)
        covered += stats.binom.pmf(successes, 60, share) * (interval.low <= share <= interval.high)
    assert 0.92 < covered < 0.985


def test_wilson_refuses_impossible_counts():
    for successes, n in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="wilson_interval"):
            intervals.wilson_interval(successes, n)


def test_accuracy_counts_ties_apart():
    row = intervals.accuracy_with_ties([1.0, 2.0, 0.0, -1.0])
    assert (row["value"], row["ties"], row["n"]) == (0.625, 1, 4)
    assert row["low"] < 0.625 < row["high"]
    with pytest.raises(ValueError, match="finite margins"):
        intervals.accuracy_with_ties([1.0, math.nan])


def coverage(draw, truth: float, *, seed: int, simulations: int = 400) -> float:
    rng = np.random.default_rng(seed)
    hits = 0
    for i in range(simulations):
        interval = intervals.bootstrap_mean(draw(rng), n_resamples=500, seed=i)
        hits += interval.low <= truth <= interval.high
    return hits / simulations


@pytest.mark.parametrize("n", [8, 16, 60])
def test_bootstrap_mean_covers_for_few_prompts(n):
    assert coverage(lambda rng: rng.normal(size=n), 0.0, seed=n) > 0.92


def test_bootstrap_mean_covers_win_rates():
    """Win probabilities of 2 x 2 sample pairs are lumpy: 0, .25, .5, .75, 1."""
    assert coverage(lambda rng: rng.binomial(4, 0.6, size=16) / 4, 0.6, seed=0) > 0.92


def test_bootstrap_interval_agrees_with_student_for_normal_data():
    values = np.random.default_rng(0).normal(size=40)
    interval = intervals.bootstrap_mean(values)
    low, high = stats.t.interval(0.95, 39, loc=values.mean(), scale=stats.sem(values))
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(low, abs=0.03) and interval.high == pytest.approx(high, abs=0.03)


def test_bootstrap_is_reproducible_and_does_not_depend_on_chunks(monkeypatch):
    values = np.random.default_rng(0).normal(size=30)
    first = intervals.bootstrap_mean(values, seed=3)
    assert intervals.bootstrap_mean(values, seed=3) == first
    assert intervals.bootstrap_mean(values, seed=4) != first
    monkeypatch.setattr(intervals, "_CHUNK_ELEMENTS", 700)
    assert intervals.bootstrap_mean(values, seed=3) == first


def test_clusters_widen_the_interval_and_keep_the_mean():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(30, 1)) + 0.1 * rng.normal(size=(30, 8))).ravel()
    clusters = np.repeat(np.arange(30), 8)
    naive, honest = intervals.bootstrap_mean(values), intervals.bootstrap_mean(values, clusters=clusters)
    assert honest.value == pytest.approx(naive.value) and honest.n == 30
    assert honest.high - honest.low > 2 * (naive.high - naive.low)
    means = intervals.bootstrap_mean(values.reshape(30, 8).mean(axis=1))
    assert honest.low == pytest.approx(means.low, abs=1e-9)


def test_clusters_of_different_size_weigh_every_item_the_same():
    interval = intervals.bootstrap_mean([1.0, 1.0, 1.0, 5.0], clusters=["a", "a", "a", "b"], n_resamples=200)
    assert interval.value == 2.0
    with pytest.raises(ValueError, match="4 values but 2 cluster labels"):
        intervals.bootstrap_mean([1.0, 1.0, 1.0, 5.0], clusters=[0, 1])


def test_paired_bootstrap_is_narrow_where_methods_share_their_prompts():
    rng = np.random.default_rng(0)
    prompt = 5 * rng.normal(size=50)
    a, b = prompt + 0.3 + 0.1 * rng.normal(size=50), prompt + 0.1 * rng.normal(size=50)
    difference = intervals.paired_bootstrap(a, b)
    assert difference.value == pytest.approx((a - b).mean())
    assert 0.2 < difference.low < difference.high < 0.4
    assert intervals.bootstrap_mean(a).high - intervals.bootstrap_mean(a).low > 1.0
    with pytest.raises(ValueError, match="align by prompt id"):
        intervals.paired_bootstrap(a, b[:-1])


def test_bootstrap_statistic_takes_any_vectorised_function():
    rows = np.random.default_rng(0).normal(size=(50, 2))
    ratio = intervals.bootstrap_statistic(
        lambda r: r[..., 0].mean(axis=1) - r[..., 1].max(axis=1), rows, n_resamples=300
    )
    assert ratio.value == pytest.approx(rows[:, 0].mean() - rows[:, 1].max())
    assert ratio.low < ratio.value
    with pytest.raises(ValueError, match="non-empty"):
        intervals.bootstrap_mean([])


def test_single_prompt_has_no_interval_and_says_so():
    interval = intervals.bootstrap_mean([0.7])
    assert (interval.low, interval.high, interval.n) == (0.7, 0.7, 1)
    assert "no interval" in interval.method


def test_minimum_band_by_hand():
    rows = [intervals.Estimate(0.6, 0.5, 0.7, 20, "m"), intervals.Estimate(0.55, 0.4, 0.8, 10, "m")]
    band = intervals.minimum_band(rows)
    assert (band.value, band.low, band.high, band.n) == (0.55, 0.4, 0.7, 10)
    with pytest.raises(ValueError, match="at least one"):
        intervals.minimum_band([])


@pytest.mark.parametrize("truths", [(0.0, 0.0, 0.0), (0.0, 0.3, 1.0)])
def test_minimum_band_covers_the_true_minimum(truths):
    """Also where all objectives are equal, the case in which the plain minimum is biased most."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        table = rng.normal(size=(25, 3)) + truths
        rows = [
            intervals.bootstrap_mean(column, n_resamples=600, seed=i, confidence=1 - 0.05 / 3)
            for column in table.T
        ]
        band = intervals.minimum_band(rows)
        hits += band.low <= min(truths) <= band.high
    assert hits / 300 > 0.93
