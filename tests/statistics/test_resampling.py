"""How often every kind of interval covers the truth, by simulation: what a reader is promised is what he gets."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from prmd.statistics import intervals
from prmd.statistics.intervals import Estimate, minimum_band
from prmd.statistics.resampling import Resampling, by_definition, with_chance

SIMULATIONS = 1000


def coverage(make: Callable[[np.random.Generator, Resampling], Estimate], truth: float, n: int) -> float:
    """Share of simulated data sets whose interval holds the truth."""
    rng, hits = np.random.default_rng(0), 0
    for seed in range(n):
        found = make(rng, Resampling(400, seed))
        hits += found.low <= truth <= found.high
    return hits / n


@pytest.mark.parametrize("prompts", [50, 120])
def test_means_and_differences_cover_95_percent(prompts: int) -> None:
    def mean(rng: np.random.Generator, by: Resampling) -> Estimate:
        return by.mean(rng.normal(size=prompts))

    def difference(rng: np.random.Generator, by: Resampling) -> Estimate:
        shared = rng.normal(size=prompts)
        ours, theirs = (shared + rng.normal(size=prompts) for _ in range(2))
        return by.difference(ours + 0.2, theirs)

    assert coverage(mean, 0.0, SIMULATIONS) == pytest.approx(0.95, abs=0.02)
    assert coverage(difference, 0.2, SIMULATIONS) == pytest.approx(0.95, abs=0.02)


def test_win_rates_and_ratios_cover_95_percent() -> None:
    def win_rate(rng: np.random.Generator, by: Resampling) -> Estimate:
        return by.win_rate(rng.binomial(16, 0.6, size=60) / 16)  # 4 x 4 sample pairs a prompt

    def ratio(rng: np.random.Generator, by: Resampling) -> Estimate:
        tokens = rng.integers(5, 60, size=60)
        return by.ratio(0.02 * tokens * rng.gamma(4, 0.25, size=60), tokens)

    assert coverage(win_rate, 0.6, SIMULATIONS) == pytest.approx(0.95, abs=0.02)
    assert coverage(ratio, 0.02, SIMULATIONS) == pytest.approx(0.95, abs=0.02)


def test_clustered_means_cover_95_percent() -> None:
    labels = np.repeat(np.arange(50), 4)

    def clustered(rng: np.random.Generator, by: Resampling) -> Estimate:
        values = rng.normal(size=50)[labels] + rng.normal(size=200)
        return intervals.bootstrap_mean(values, clusters=labels, n_resamples=by.resamples, seed=by.seed)

    assert coverage(clustered, 0.0, SIMULATIONS) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("n", [30, 100])
def test_wilson_covers_95_percent_averaged_over_shares(n: int) -> None:
    ends = [intervals.wilson_interval(k, n) for k in range(n + 1)]
    covered = [
        sum(
            probability
            for probability, end in zip(stats.binom.pmf(range(n + 1), n, share), ends, strict=True)
            if end.low <= share <= end.high
        )
        for share in np.linspace(0.01, 0.99, 197)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("truths", [(0.0, 0.0, 0.0), (0.0, 0.1, 0.4)])
def test_the_minimum_is_covered_where_a_percentile_bootstrap_of_it_fails(truths: tuple[float, ...]) -> None:
    def band(rng: np.random.Generator, by: Resampling) -> Estimate:
        table = rng.normal(size=(60, 3)) + truths
        return minimum_band([by.mean(column, 1 - 0.05 / 3) for column in table.T])

    assert coverage(band, min(truths), 500) >= 0.93


@pytest.mark.parametrize("prompts", [50, 200])
@pytest.mark.parametrize("family", [stats.norm, stats.uniform], ids=["normal", "uniform"])
def test_the_lower_tail_is_covered(prompts: int, family: stats.rv_continuous) -> None:
    cut = family.ppf(0.1)
    truth = family.expect(lambda x: x, lb=family.ppf(1e-12), ub=cut) / 0.1
    found = coverage(lambda rng, by: by.lower_tail(family.rvs(size=prompts, random_state=rng)), truth, 500)
    assert found > 0.92


def test_a_tail_of_fewer_than_five_prompts_has_no_interval() -> None:
    found = Resampling(100, 0).lower_tail(np.arange(49.0))
    assert found.value == pytest.approx((0 + 1 + 2 + 3 + 0.9 * 4) / 4.9)
    assert found.to_json()["low"] is None and "no interval" in found.method
    assert Resampling(100, 0).lower_tail(np.arange(50.0)).to_json()["low"] is not None
    flat = Resampling(100, 0).lower_tail(np.ones(60))
    assert (flat.low, flat.value, flat.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="finite values"):
        intervals.lower_tail_interval(np.array([]), 0.1)


@pytest.mark.parametrize("means", [(0.5, 0.4, 0.6), (0.5, 0.0, 0.4), (0.3, -0.2, 0.3)])
def test_the_volume_is_covered_also_at_zero(means: tuple[float, ...]) -> None:
    def volume(rng: np.random.Generator, by: Resampling) -> Estimate:
        return by.volume((rng.normal(size=(60, 3)) + means).T[None])

    assert coverage(volume, float(np.prod(np.maximum(means, 0))), 400) >= 0.95


def test_the_volume_of_two_points_counts_their_overlap_once() -> None:
    points = np.array([[[2.0], [1.0]], [[1.0], [3.0]]]).repeat(5, axis=2)
    assert Resampling(100, 0).volume(points).value == pytest.approx(2 + 3 - 1)


def test_numbers_that_are_known_say_so() -> None:
    fields = with_chance(by_definition(0.5, 7), 0.5)
    assert fields == {
        "value": 0.5,
        "low": 0.5,
        "high": 0.5,
        "n": 7,
        "method": "by definition",
        "chance": 0.5,
    }
