"""Linear reward models, their families and the worth of their optimum, against derivations of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize

from benchmarks.closed_form import letters_summary
from benchmarks.closed_form.families import STRENGTHS, members_of, offsets_of, with_twins
from benchmarks.closed_form.fits import fit_linear
from benchmarks.closed_form.gates import in_reference_units, optimum, outcome
from benchmarks.closed_form.letters import within_prompts
from benchmarks.closed_form.picture import nearest
from benchmarks.closed_form.scenarios import ABOUT_LENGTH, SCENARIOS, UNBIASED
from benchmarks.gold.figures import plot_closed_form
from benchmarks.gold.labels import KAPPA, RATERS, label_pairs, preference_probability
from benchmarks.gold.world import FREE_LENGTH, LENGTH_COST, gold_rewards
from benchmarks.real_text.closed_form import (
    JUDGES,
    MEASURES,
    Objective,
    Responses,
    balanced_weights,
    draw_training,
)
from benchmarks.real_text.closed_form_summary import association_rows, closed_form_rows
from prmd.artifacts import io
from prmd.objectives import OBJECTIVES


def pairs(n: int = 200, d: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Differences of features whose first column the labels follow, and differences of a length."""
    rng = np.random.default_rng(seed)
    x, length = rng.standard_normal((n, d)), rng.integers(-6, 7, n).astype(float)
    sign = np.where(rng.random(n) < 1 / (1 + np.exp(-2 * x[:, 0] - 0.3 * length)), 1, -1)
    return x * sign[:, None], (length * sign)[:, None]


# ------------------------------------------------------------------ fits
@pytest.mark.parametrize("with_all", [False, True])
def test_a_fit_is_the_minimum_that_another_solver_finds(with_all: bool) -> None:
    x, length = pairs()
    rng = np.random.default_rng(1)
    weights = rng.poisson(1.0, len(x)).astype(float) if with_all else np.ones(len(x))
    offset = 0.2 * length[:, 0] if with_all else np.zeros(len(x))
    prior = rng.standard_normal(4) if with_all else np.zeros(4)
    scaled = weights * len(x) / weights.sum()

    def loss(theta: np.ndarray) -> float:
        return float(scaled @ np.logaddexp(0, -(x @ theta + offset)) + 1.5 * np.square(theta - prior).sum())

    found = fit_linear(x, ridge=3.0, weights=weights, offset=offset, prior=prior)
    np.testing.assert_allclose(found, minimize(loss, prior, tol=1e-12).x, atol=1e-4)


def test_separable_pairs_and_a_far_prior_end_at_a_minimum() -> None:
    x = np.abs(np.random.default_rng(2).standard_normal((50, 3)))
    theta = fit_linear(x, ridge=0.1, prior=np.full(3, -80.0))
    p = 1 / (1 + np.exp(x @ theta))
    np.testing.assert_allclose(-x.T @ p + 0.1 * (theta + 80), 0, atol=1e-4)


# ------------------------------------------------------------------ families
def test_families_share_their_draws_and_differ_in_the_offset_alone() -> None:
    x, length = pairs()
    offsets = offsets_of(length)

    def fitted(family: str) -> np.ndarray:
        return members_of(family, x, offsets, members=4, rng=np.random.default_rng(5), ridge=2.0)

    plain, debiased, strengths = (fitted(family) for family in STRENGTHS)
    np.testing.assert_array_equal(strengths[0], plain[0])
    np.testing.assert_allclose(strengths[-1], debiased[-1], atol=1e-9)
    assert not np.allclose(plain, debiased) and not np.allclose(plain[0], plain[1])


def test_the_whole_offset_takes_the_length_out_of_labels_that_were_chosen_by_it() -> None:
    """The margin of a model that sees a length, with and without the offset."""
    _, length = pairs(4000)
    seen = length / np.sqrt(np.square(length).mean())
    plain, debiased = (fit_linear(seen, ridge=0.1, offset=o) for o in (None, offsets_of(length)))
    assert plain[0] > 0.5 and abs(debiased[0]) < 0.05


def test_twins_keep_what_a_feature_does_not_predict() -> None:
    rng = np.random.default_rng(3)
    length, rest = rng.integers(1, 20, (30, 12)).astype(float), rng.standard_normal((30, 12))
    scores = np.stack([0.7 * length + rest, 0.1 * length - 0.02 * (length - length.mean()) ** 2 + rest] * 2)
    found = with_twins(scores, length[None])
    assert found.shape == scores.shape
    np.testing.assert_array_equal(found[:2], scores[:2])
    for twin in found[2:]:
        centered = [v - v.mean(axis=1, keepdims=True) for v in (twin, length, rest)]
        assert abs(np.corrcoef(centered[0].ravel(), centered[1].ravel())[0, 1]) < 1e-9
        assert np.corrcoef(centered[0].ravel(), centered[2].ravel())[0, 1] > 0.99


# ------------------------------------------------------------------ what an optimum is worth
def test_an_outcome_is_what_enumeration_gives() -> None:
    rng = np.random.default_rng(4)
    truth, length = rng.standard_normal((3, 5, 6)), rng.integers(1, 9, (5, 6)).astype(float)
    robust = torch.from_numpy(truth.min(axis=0))
    weights = optimum(robust, kl=0.4, beta=0.1)
    kl = (weights * np.log(weights * 6)).sum(axis=1).mean()
    assert kl == pytest.approx(0.4, abs=1e-6)
    found, units = outcome(weights, truth, length), in_reference_units(truth[:, None])[:, 0].numpy()
    for x in range(5):
        for k in range(3):
            beaten = [np.mean([(a > b) + 0.5 * (a == b) for b in truth[k, x]]) for a in truth[k, x]]
            assert found.wins[k, x] == pytest.approx(float(weights[x] @ beaten))
        assert found.least[x] == pytest.approx(float(weights[x] @ units[:, x].min(axis=0)))
    summary = found.summary(OBJECTIVES)
    assert summary["worst_win_rate"] == pytest.approx(found.wins.mean(axis=1).min())
    assert summary["length"] == pytest.approx(float((weights * length).sum(axis=1).mean()))


# ------------------------------------------------------------------ scenarios
def test_nine_scenarios_are_about_length_and_every_truth_has_its_unbiased_labels() -> None:
    assert len(ABOUT_LENGTH) == 9 and len(SCENARIOS) == 11
    for scenario in SCENARIOS.values():
        unbiased = SCENARIOS[UNBIASED[scenario.length_cost]]
        assert unbiased.bias == 0.5 and unbiased.length_cost == scenario.length_cost


def test_length_is_truly_good_where_its_cost_is_negative() -> None:
    short, long = "yz" * (FREE_LENGTH // 2), "yz" * FREE_LENGTH
    costs, gains = (
        [gold_rewards("abcd", r, length_cost=c)[0] for r in (short, long)] for c in (LENGTH_COST, -0.12)
    )
    assert costs[1] - costs[0] == pytest.approx(-LENGTH_COST * FREE_LENGTH)
    assert gains[1] - gains[0] == pytest.approx(0.12 * FREE_LENGTH)
    assert gold_rewards("abcd", long, length_cost=-0.12)[1:] == gold_rewards("abcd", long)[1:]


def test_biased_raters_leave_no_pair_out_and_follow_their_log_odds() -> None:
    rng = np.random.default_rng(6)
    lengths = rng.integers(4, 15, (300, 6)).astype(float)
    count = 300 * 15  # every pair there is
    found = label_pairs(
        rng,
        rewards=np.zeros((300, 6)),
        lengths=lengths,
        objective="helpful",
        bias=0.9,
        count=count,
        kind=RATERS,
    )
    difference = lengths[found.prompt, found.chosen] - lengths[found.prompt, found.rejected]
    size = np.abs(difference)
    scaled = size / size.mean()
    expected = preference_probability(np.log(9) / KAPPA * scaled)
    for low, high in ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0)):
        near = (scaled > low) & (scaled <= high)
        share, n = float((difference[near] > 0).mean()), int(near.sum())
        assert abs(share - expected[near].mean()) < 4 * np.sqrt(0.25 / n)


# ------------------------------------------------------------------ real text
def objective(n: int = 100, longer: int = 60) -> Objective:
    """n made-up pairs, of which the first `longer` have the longer response as the chosen one."""
    rng = np.random.default_rng(7)
    length = np.full((n, 2), 10.0)
    length[:longer, 0], length[longer:, 1] = 15.0, 15.0
    features = rng.standard_normal((n, 2, 3))
    features[:, 0, 0], features[:, 1, 0] = np.arange(n), 0.0  # the difference names its pair
    responses = Responses(features, features, length)
    return Objective(responses, responses)


@pytest.mark.parametrize(("share", "n"), [(0.8, 40), (0.65, 40), (0.5, 40), (0.95, 40)])
def test_training_pairs_have_the_share_and_are_no_others(share: float, n: int) -> None:
    differences, offsets = draw_training(objective(), share, n, [0, 1])
    names = differences[:, 0].round().astype(int)
    assert len(set(names)) == n == len(offsets) and (names < 60).sum() == round(share * n)


def test_fewer_are_drawn_where_one_kind_is_rare_and_seeds_differ() -> None:
    few = draw_training(objective(100, 90), 0.5, 80, [0, 1])[0]
    assert len(few) == 16  # four fifths of the ten pairs whose shorter response won, twice
    one, other = (draw_training(objective(), None, 40, [seed, 0])[0][:, 0] for seed in (0, 1))
    assert len(one) == 40 and not np.array_equal(np.sort(one), np.sort(other))


def test_balanced_weights_make_both_kinds_equal() -> None:
    length = np.array([[5, 3]] * 6 + [[3, 5]] * 2 + [[4, 4]], dtype=float)
    weights = balanced_weights(length)
    assert weights[:6].sum() == pytest.approx(weights[6:8].sum()) and weights[8] == 0
    assert weights.sum() == pytest.approx(len(length))


def test_rows_of_seeds_are_means_paired_with_dpo() -> None:
    rng = np.random.default_rng(8)
    names = [f"0.8/{policy}/0.5/{judge}" for policy in ("strengths/hard_min", "none/dpo") for judge in JUDGES]
    shapes = dict(zip(MEASURES, ((3, 7), (7,), (7,)), strict=True))
    seeds = [
        {f"{name}/{m}": rng.random(shape) for name in names for m, shape in shapes.items()} for _ in range(3)
    ]
    rows = {(row["method"], row["judge"]): row for row in closed_form_rows(seeds)}
    assert len(rows) == 4
    row, dpo = rows["hard_min", JUDGES[0]], rows["dpo", JUDGES[0]]
    wins = np.stack([seed[f"{names[0]}/wins"] for seed in seeds]).mean(axis=(0, 2))
    assert row["worst_win_rate"] == pytest.approx(wins.min())
    assert row["win_rate"] == pytest.approx(dict(zip(OBJECTIVES, wins, strict=True)))
    assert row["worst_less_dpo"] == pytest.approx(row["worst_win_rate"] - dpo["worst_win_rate"])
    assert dpo["worst_less_dpo"] is None
    low, high = row["worst_less_dpo_ci"]
    assert low < row["worst_less_dpo"] < high


def test_associations_have_intervals() -> None:
    [row] = association_rows({"a": (60, 100)})
    assert row["share"] == 0.6 and row["ci"][0] == pytest.approx(0.502, abs=2e-3)


# ------------------------------------------------------------------ the letters' world over seeds
def letters_rows(seed: int) -> list[dict[str, object]]:
    """What one seed's file holds, with made-up numbers."""
    rng = np.random.default_rng(seed)
    policies = [(family, "hard_min") for family in (*STRENGTHS, "twins", "unbiased labels")]
    policies += [("none", "dpo"), ("none", "dpo_debiased")]
    return [
        {"seed": seed, "scenario": name, "family": family, "method": method, "kl": 0.75}
        | {measure: float(rng.random()) for measure in ("worst_win_rate", "mean_of_min", "length")}
        for name in SCENARIOS
        for family, method in policies
    ]


def test_rows_of_worlds_are_paired_and_the_worst_is_each_worlds_own() -> None:
    seeds = [letters_rows(seed) for seed in range(3)]
    rows = {(r["scenario"], r["family"], r["method"]): r for r in letters_summary.closed_form_rows(seeds)}
    value = {(s, r["scenario"], r["family"]): r["worst_win_rate"] for s, own in enumerate(seeds) for r in own}
    value |= {
        (s, r["scenario"], "dpo"): r["worst_win_rate"]
        for s, own in enumerate(seeds)
        for r in own
        if r["method"] == "dpo"
    }
    less = [value[s, "L90", "strengths"] - value[s, "L90", "dpo"] for s in range(3)]
    row = rows["L90", "strengths", "hard_min"]
    assert row["worst_less_dpo"] == pytest.approx(np.mean(less)) and row["seeds"] == 3
    half = stats.t.ppf(0.975, 2) * np.std(less, ddof=1) / np.sqrt(3)
    assert row["worst_less_dpo_ci"] == pytest.approx([np.mean(less) - half, np.mean(less) + half])
    worst = [min(value[s, name, "strengths"] for name in ABOUT_LENGTH) for s in range(3)]
    assert rows["worst of nine", "strengths", "hard_min"]["worst_per_world"] == pytest.approx(np.mean(worst))
    assert rows["L90", "none", "dpo"]["worst_less_dpo"] is None


def test_page_and_figure_show_every_scenario(tmp_path: Path) -> None:
    rows = letters_summary.closed_form_rows([letters_rows(seed) for seed in range(3)])
    setup = {"members": 10, "samples": 48, "seeds": [0, 1, 2], "commit": "abcdef0123"}
    text = letters_summary.closed_form_page(rows, setup, "study")
    assert all(f"| {scenario.title} |" in text for scenario in SCENARIOS.values())
    assert "3 worlds (seeds), commit abcdef0" in text and "study_closed_form.png" in text
    results = {"closed_form": rows, "closed_form_members": [members_of_a_world(seed) for seed in range(3)]}
    drawn = plot_closed_form(io.write_json(tmp_path / "study.json", results))
    assert [p.name for p in drawn] == ["study_closed_form.png", "study_members.png"]
    assert all(path.name in text and path.stat().st_size > 5000 for path in drawn)


def members_of_a_world(seed: int) -> dict[str, Any]:
    return {"seed": seed, "truth": [0.1], "bootstrap": [0.9, 0.8], "debiased": [0.3], "strengths": [0.9, 0.2]}


def test_members_are_as_far_from_the_truth_as_the_nearest_of_them() -> None:
    worlds = [members_of_a_world(0), {**members_of_a_world(1), "truth": [0.4]}]
    assert nearest(worlds, "bootstrap") == pytest.approx((0.7 + 0.4) / 2)
    assert nearest(worlds, "strengths") == pytest.approx((0.1 + 0.2) / 2)


def test_correlation_with_length_is_within_prompts() -> None:
    length = np.array([[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]])
    assert within_prompts(-length + np.array([[0.0], [50.0]]), length) == pytest.approx(-1)
    rewards = np.random.default_rng(0).normal(size=(2, 3))
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    assert within_prompts(rewards, length) == pytest.approx(
        np.corrcoef(centered.ravel(), np.tile([-1, 0, 1], 2))[0, 1]
    )
