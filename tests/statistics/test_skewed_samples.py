"""Few, skewed values: how often intervals hold the truth and tests reject what is true, by simulation from fixed seeds.

Found with 600 to 3000 simulations each (n = 15, nominal .95 and .05). Means, expanded percentiles / studentized: normal .946 /
.972, lognormal with sd 1 .875 / .940, lognormal with 30 % of zeros .863 / .937, exponential .910 / .968, t with 4 degrees .945
/ .955, difference of two lognormals .940 / .950; widths in those of Student's t 1.0 / 1.19 for normal values and 1.0 / 1.5 for
lognormal ones. False positives, sign flips / the larger p: normal .045 / .027, lognormal .133 / .055, with zeros .147 / .057;
at n = 50 lognormal .112 / .048. Volumes of normal means, joint boxes / resampled volumes: one policy .998 / .976 at n = 60, 1.000 /
.989 at 15, four axes 1.000 / .949; three policies 1.000 / .987, five exactly equal ones 1.000 / .949. The simulations here are smaller.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from prmd.statistics.intervals import studentized_ratio
from prmd.statistics.outcomes import dominated_volumes, hypervolume
from prmd.statistics.paired_tests import paired_mean_test, sign_flip_test, skewness_note
from prmd.statistics.resampling import Resampling

SIMULATIONS = 600
Draw = Callable[[np.random.Generator, int], np.ndarray]
LOGNORMAL: tuple[Draw, float] = (lambda rng, n: np.exp(rng.normal(size=n)), math.exp(0.5))
SHAPES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "lognormal": LOGNORMAL,
    "with zeros": (
        lambda rng, n: np.exp(rng.normal(size=n)) * (rng.random(n) < 0.7),
        0.7 * math.exp(0.5),
    ),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
    "heavy tails": (lambda rng, n: rng.standard_t(4, size=n), 0.0),
    "differences": (lambda rng, n: np.exp(rng.normal(size=n)) - np.exp(rng.normal(size=n)), 0.0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_means_of_fifteen_values_are_covered_whatever_their_shape(shape: str) -> None:
    draw, truth = SHAPES[shape]
    rng, hits, widths = np.random.default_rng(0), 0, []
    for seed in range(SIMULATIONS):
        values = draw(rng, 15)
        found = Resampling(600, seed).mean(values)
        hits += found.low <= truth <= found.high
        student = 2 * stats.t.ppf(0.975, 14) * values.std(ddof=1) / math.sqrt(15)
        widths.append((found.high - found.low) / student)
    assert 0.93 <= hits / SIMULATIONS <= 0.99
    assert np.median(widths) < (1.25 if shape in ("normal", "heavy tails", "differences") else 1.7)


def test_a_ratio_of_skewed_sums_is_covered() -> None:
    rng, hits = np.random.default_rng(1), 0
    for seed in range(SIMULATIONS):
        tokens = rng.integers(20, 60, size=15)
        found = Resampling(600, seed).ratio(tokens * np.exp(0.7 * rng.normal(size=15)), tokens)
        hits += found.low <= math.exp(0.7**2 / 2) <= found.high
    assert hits / SIMULATIONS >= 0.93


def test_true_hypotheses_are_rejected_as_often_as_said_also_where_differences_are_skewed() -> None:
    rng, (draw, mean) = np.random.default_rng(2), LOGNORMAL
    flips, larger, said = [], [], []
    for seed in range(SIMULATIONS):
        differences = draw(rng, 15) - mean
        flips.append(sign_flip_test(differences, n_resamples=600, seed=seed) <= 0.05)
        larger.append(paired_mean_test(differences, n_resamples=600, seed=seed) <= 0.05)
        said.append(skewness_note(differences) is not None)
    assert np.mean(flips) > 0.10  # what was wrong
    assert np.mean(larger) <= 0.06
    assert np.mean(said) > 0.7


def test_the_test_still_finds_what_is_there() -> None:
    rng = np.random.default_rng(3)
    found = [paired_mean_test(rng.normal(1.0, 1, size=15), n_resamples=600, seed=i) for i in range(100)]
    assert np.mean(np.array(found) <= 0.05) > 0.8  # Student's t: .94
    assert paired_mean_test(np.ones(15)) == sign_flip_test(np.ones(15)) < 0.001
    assert paired_mean_test(np.zeros(15)) == 1.0
    same = rng.normal(size=400)
    assert paired_mean_test(same) == pytest.approx(stats.ttest_1samp(same, 0).pvalue, abs=0.05)


def test_skewness_is_said_of_few_differences_alone() -> None:
    skewed = np.exp(np.random.default_rng(0).normal(size=60))
    assert skewness_note(skewed) is None and skewness_note(np.ones(15)) is None
    assert skewness_note(np.arange(15.0)) is None
    assert "n = 15" in skewness_note(np.r_[np.zeros(14), 9.0])


def test_few_prompts_keep_percentiles_and_equal_values_their_point() -> None:
    few = studentized_ratio(np.arange(5.0), np.ones(5))
    assert "percentile" in few.method and 0 <= few.low < 2 < few.high <= 4
    flat = studentized_ratio(np.full(15, 2.5), np.ones(15))
    assert (flat.low, flat.value, flat.high) == (2.5, 2.5, 2.5)
    assert studentized_ratio(np.ones(1), np.ones(1)).method.startswith("single")
    with pytest.raises(ValueError, match="one length"):
        studentized_ratio(np.ones(3), np.ones(2))


@pytest.mark.parametrize(
    ("means", "prompts"),
    [
        ([[0.5, 0.4, 0.6]], 60),
        ([[0.1, 0.1, 0.1]], 15),
        ([[0.5, 0.1, 0.1]], 60),
        ([[0.6, 0.2, 0.4], [0.4, 0.4, 0.4], [0.2, 0.6, 0.4]], 60),
        ([[1.0, 1.0, 1.0, 1.0]], 60),
    ],
)
def test_the_volume_is_covered_and_not_always(means: list[list[float]], prompts: int) -> None:
    truth, rng, hits = hypervolume(np.array(means), np.zeros(len(means[0]))), np.random.default_rng(4), 0
    for seed in range(SIMULATIONS):
        shared, own = (rng.normal(size=(p, len(means[0]), prompts)) for p in (1, len(means)))
        found = Resampling(400, seed).volume((shared + own) / math.sqrt(2) + np.array(means)[..., None])
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / SIMULATIONS <= 0.99


def test_volumes_of_many_sets_at_once_equal_counted_cells() -> None:
    """Points on a grid dominate whole cells, which can be counted."""
    points = np.random.default_rng(5).integers(-1, 5, size=(20, 4, 3)).astype(float)
    corners = np.stack(np.meshgrid(*[np.arange(1.0, 6.0)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    counted = [((corners[:, None] <= own).all(-1) & (own > 0).all(-1)).any(1).sum() for own in points]
    np.testing.assert_allclose(dominated_volumes(points), counted)


def test_a_length_controlled_win_rate_of_all_prompts_claims_no_certainty() -> None:
    lengths = np.arange(15.0)
    for share in (0.0, 1.0):
        found = Resampling(200, 0).length_controlled(np.full(15, share), lengths)
        plain = Resampling(200, 0).win_rate(np.full(15, share))
        assert (found.estimate.low, found.estimate.high) == (plain.low, plain.high)
        assert found.estimate.value == share and plain.high - plain.low > 0.15
