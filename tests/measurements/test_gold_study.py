"""The gold-reward study as a whole: families of reward models, other true rewards, which policies are trained, one tiny run."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gold_reward
from benchmarks.gold import heads as gold_heads
from benchmarks.gold import plan as gold_plan
from benchmarks.gold import policies as gold_policies
from benchmarks.gold import run as gold_run
from benchmarks.gold.ensembles import (
    STRENGTHS,
    BackboneKey,
    LengthBias,
    backbone_features,
    fit_backbone,
    heads_folder,
    load_scores,
    pair_rows,
)
from benchmarks.gold.labels import LabelledPairs, label_pairs
from benchmarks.gold.models import Sizes
from benchmarks.gold.page import page
from benchmarks.gold.plan import (
    COMPARED,
    FULL,
    HARM_COST,
    QUICK,
    Preset,
    ablations,
    all_units,
    harm_units,
    main_units,
    shipped,
)
from benchmarks.gold.policies import Unit, evaluate
from benchmarks.gold.reference import World, build_world, truth_of, with_length_cost
from benchmarks.gold.run import reward_models
from benchmarks.gold.summary import DPO, OURS, TODAY
from benchmarks.gold.targets import pooled, training_data
from benchmarks.gold.world import LENGTH_COST, decode
from prmd.pessimism.debias import bias_columns, fit_log_odds, margin_slope
from prmd.rewards import heads as rewards_heads

TINY = Sizes(
    hidden=16,
    prior_pairs=96,
    prior_epochs=1,
    prompts=40,
    samples=6,
    pairs=150,
    reward_epochs=1,
    members=3,
    policy_steps=2,
    policy_rate=3e-3,
    checkpoints=(2,),
    test_prompts=6,
    test_samples=2,
    batch=16,
)


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world of `TINY`, not to be changed."""
    return build_world(TINY, 0, tmp_path_factory.mktemp("world"))


# ------------------------------------------------------------------ families of reward models
def length_pairs(world: World, count: int) -> LabelledPairs:
    """Labels that know nothing but length."""
    return label_pairs(
        np.random.default_rng(0),
        rewards=np.zeros_like(world.rewards[0]),
        lengths=world.lengths,
        objective="helpful",
        bias=0.9,
        count=count,
    )


@pytest.mark.slow
def test_offsets_reach_the_loss_of_a_backbone(tiny_world, tmp_path) -> None:
    world = replace(tiny_world, sizes=replace(TINY, reward_epochs=8, reward_rate=3e-3))
    pairs, rows = length_pairs(world, 250), world.rows(test=False, rewards=True)
    told = LengthBias.fit(pairs, world.lengths)
    offsets = torch.from_numpy(told.offsets(pairs)).float()
    prompt, chosen, rejected = pairs.prompt, pairs.chosen, pairs.rejected
    difference = (world.lengths[prompt, chosen] - world.lengths[prompt, rejected]).astype(float)
    size = bias_columns(difference[:, None], told.rms)[:, 1]

    def slope(offsets: torch.Tensor | None) -> float:
        backbone = fit_backbone(world, pair_rows(rows, pairs), tmp_path, offsets)
        reward = backbone_features(backbone, rows)[0].numpy()
        return margin_slope(reward[prompt, chosen] - reward[prompt, rejected], size)

    plain, debiased = slope(None), slope(offsets)
    assert plain > 0.5 and abs(debiased) < 0.2 * plain


def test_every_head_has_its_share_of_the_offset(tiny_world) -> None:
    pairs = length_pairs(tiny_world, 100)
    told, lengths = LengthBias.fit(pairs, tiny_world.lengths), tiny_world.lengths.astype(float)
    difference = lengths[pairs.prompt, pairs.chosen] - lengths[pairs.prompt, pairs.rejected]
    rms = math.sqrt((difference**2).mean())
    columns = np.stack([np.sign(difference), np.clip(difference / rms, -3, 3)], axis=1)
    expected = np.clip(columns @ fit_log_odds(columns), -3, 3)
    assert expected.mean() > 0.5  # longer is better in these labels
    assert told.offsets(pairs) == pytest.approx(expected)
    found = told.member_offsets(pairs, (0.0, 1.0), 5)
    assert np.allclose(found, np.outer([0, 0.25, 0.5, 0.75, 1], expected), atol=1e-6)


def test_a_backbone_knows_of_what_its_labels_know_of(tiny_world) -> None:
    assert BackboneKey.of("harmless", 0.9, HARM_COST, "strengths") == BackboneKey(
        "harmless", 0.5, LENGTH_COST, True
    )
    harmful = with_length_cost(tiny_world, HARM_COST)

    def folder(world: World, objective: str, family: str) -> str:
        return (
            heads_folder(world, objective, 0.9, family)
            .relative_to(world.directory / "reward_models")
            .as_posix()
        )

    assert folder(tiny_world, "helpful", "bootstrap") == "helpful-0.9"
    assert (
        folder(tiny_world, "harmless", "bootstrap") == folder(harmful, "harmless", "bootstrap") == "harmless"
    )
    assert folder(tiny_world, "helpful", "strengths") == "helpful-0.9-debiased/strengths"
    assert folder(harmful, "helpful", "debiased") == "helpful-0.9-cost-0.12-debiased/debiased"
    assert folder(harmful, "honest", "debiased") == "honest-0.9-debiased/debiased"


def test_each_backbone_is_made_once_with_all_its_families() -> None:
    found = reward_models(all_units(FULL.with_ablations()))
    assert len(found) == len({(seed, key) for seed, key, _ in found})
    families = {(seed, key): families for seed, key, families in found}
    assert families[0, BackboneKey("helpful", 0.9, LENGTH_COST, True)] == tuple(sorted(STRENGTHS))
    assert families[0, BackboneKey("helpful", 0.9, LENGTH_COST, False)] == ("bootstrap",)
    assert families[5, BackboneKey("harmless", 0.5, LENGTH_COST, True)] == ("debiased", "strengths")
    assert len([key for seed, key in families if seed == 5]) == 2 * (3 + 3 + 1)
    assert [key for seed, key in families if seed == 2 and key.length_cost == HARM_COST] == [
        BackboneKey("helpful", 0.9, HARM_COST, debiased) for debiased in (False, True)
    ]


# ------------------------------------------------------------------ other true rewards
def test_another_truth_changes_help_alone_and_its_units(tiny_world) -> None:
    other = with_length_cost(tiny_world, HARM_COST)
    assert other.length_cost == HARM_COST and other.samples is tiny_world.samples
    raw = truth_of(other.prompts, other.samples, length_cost=HARM_COST)
    test = truth_of(other.test_prompts, other.test_samples, length_cost=HARM_COST)
    scale = np.sqrt(test.var(axis=2, ddof=1).mean(axis=1))
    assert other.rewards == pytest.approx(raw / scale[:, None, None])
    assert np.array_equal(other.rewards[1:], tiny_world.rewards[1:])
    letters = np.array([[len(decode(r.token_ids)) for r in group] for group in tiny_world.samples])
    gained = other.rewards[0] * scale[0] - tiny_world.rewards[0] * tiny_world.truth.scale[0]
    assert gained == pytest.approx(2 * 0.12 * np.maximum(0, letters - 8), abs=1e-9) and gained.any()


def test_a_policy_is_judged_by_the_truth_of_its_world(tiny_world) -> None:
    other = with_length_cost(tiny_world, HARM_COST)
    usual, found = (evaluate(world, tiny_world.reference, seed=3) for world in (tiny_world, other))
    assert found["length"] == usual["length"]  # the same samples
    assert found["win_rate"]["honest"] == usual["win_rate"]["honest"]
    assert found["mean_reward"]["helpful"] != usual["mean_reward"]["helpful"]


def test_length_regularised_dpo_reads_lengths_in_tokens(tiny_world) -> None:
    pairs = pooled(tiny_world, 0.8)
    columns = training_data(pairs, None).columns
    prompt, chosen, rejected = pairs.position
    expected = tiny_world.lengths[prompt, chosen] - tiny_world.lengths[prompt, rejected]
    assert columns["length_difference"].tolist() == expected.tolist()


# ------------------------------------------------------------------ the plan and the whole
def test_the_plan_is_what_is_claimed() -> None:
    assert len(main_units(FULL)) == 126 and FULL.seeds == (0, 1, 2, 3, 4, 5)
    keys = {(unit.method, unit.family, unit.bias, unit.seed) for unit in main_units(FULL)}
    assert keys == {(*c, b, s) for c, b, s in itertools.product(COMPARED, (0.5, 0.8, 0.9), FULL.seeds)}
    assert list(harm_units(FULL)) == [DPO, TODAY, OURS]
    harm = [unit for units in harm_units(FULL).values() for unit in units]
    assert {(unit.bias, unit.length_cost, unit.seed) for unit in harm} == {
        (0.9, -0.12, seed) for seed in range(3)
    }
    assert len(all_units(FULL)) == 126 + 9
    assert len(all_units(FULL.with_ablations())) <= 126 + 9 + 60
    for preset in (FULL, QUICK):
        units = all_units(preset.with_ablations())
        assert len(units) == len(set(units)) and set(main_units(preset)) <= set(units)
        assert preset.ablation_bias in preset.biases
        varied = [
            one for rows in ablations(preset.with_ablations()).values() for _, row in rows for one in row
        ]
        assert {shipped(preset, unit) for unit in varied if not unit.proxy} <= set(main_units(preset))


def test_finished_units_keep_their_files_and_samples() -> None:
    """Literal keys of units from before there were families."""
    units = {
        Unit("dpo", 0.8, 0, family="none"): "seed-0/units/dpo-240ff65b69.json",
        Unit("hard_min", 0.9, 2): "seed-2/units/hard_min-6b742216ae.json",
        Unit(
            "hierarchical", 0.8, 1, (("alpha", 0.05),), 3, raw=True, proxy=True
        ): "seed-1/units/hierarchical-817e70cfd6.json",
    }
    assert {unit.path(Path()).as_posix() for unit in units} == set(units.values())
    assert gold_policies.io.fingerprint([Unit("dpo", 0.8, 0, family="none").facts, 30]) == "15f424b09f0ea217"
    changed = {
        replace(Unit("hard_min", 0.9, 2), **change).path(Path())
        for change in ({"family": "strengths"}, {"length_cost": -0.12})
    }
    assert len(changed) == 2 and Path("seed-2/units/hard_min-6b742216ae.json") not in changed


def test_parts_of_finished_results_are_kept_but_for_an_older_shape(tmp_path) -> None:
    path = tmp_path / "results.json"
    assert gold_reward.kept_parts(path) == {}
    old = {"summary": [{"method": "dpo"}], "ablations": {}, "closed_form": [], "closed_form_setup": {}}
    path.write_text(json.dumps(old), encoding="utf-8")
    assert gold_reward.kept_parts(path) == {"closed_form": [], "closed_form_setup": {}}
    new = old | {"summary": [{"method": "dpo", "family": "none"}], "ablations": []}
    path.write_text(json.dumps(new), encoding="utf-8")
    assert gold_reward.kept_parts(path) == new


@pytest.mark.slow
def test_the_whole_study_runs_resumes_and_is_drawn(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(rewards_heads, "FIT_STEPS", 30)
    monkeypatch.setattr(gold_run, "FIT_FRACTIONS", (0.2,))
    monkeypatch.setattr(gold_heads, "ANCHORS", (1.0, 10.0))
    monkeypatch.setattr(gold_plan, "EVERY_ABLATION", ("over_optimisation", "strengths", "calibration"))
    preset = Preset(TINY, (0,), QUICK.biases, 1, 0.9, 1)
    monkeypatch.setattr(gold_reward, "QUICK", preset)
    path = tmp_path / "gold.json"
    path.write_text(json.dumps({"summary": [{"method": "maxmin"}], "heads": []}), encoding="utf-8")
    order = ["--quick", "--workers", "1", "--work", str(tmp_path), "--output", str(path)]
    gold_reward.main(order)
    results = json.loads(path.read_text(encoding="utf-8"))
    assert "heads" not in results  # of the older shape
    check_main(results)
    gold_reward.main([*order, "--ablations"])
    with_ablations = json.loads(path.read_text(encoding="utf-8"))
    assert with_ablations["summary"] == results["summary"]  # nothing is trained twice
    check_ablations(with_ablations)
    monkeypatch.setattr(gold_policies, "fit", lambda *args, **kwargs: pytest.fail("trained twice"))
    gold_reward.main(order)
    again = json.loads(path.read_text(encoding="utf-8"))
    assert {k: v for k, v in again.items() if k != "setup"} == {
        k: v for k, v in with_ablations.items() if k != "setup"
    }
    assert path.with_suffix(".md").read_text(encoding="utf-8") == page(again, "gold")
    check_page(again, page(again, "gold"))
    drawn = {figure.name for figure in tmp_path.glob("*.png")}
    assert drawn == {"gold_bias.png", "gold_overoptimisation.png", "gold_ablations.png"}
    check_truth(tmp_path / TINY.key)


def check_main(results: dict) -> None:
    keys = [(row["method"], row["bias"], row["family"]) for row in results["summary"]]
    assert len(keys) == len(set(keys)) == len(COMPARED) * 2
    assert set(keys) == {(method, bias, family) for method, family in COMPARED for bias in (0.5, 0.9)}
    assert all(0 <= row["worst_win_rate"] <= 1 and row["kl"] > 0 for row in results["summary"])
    assert all(row["seeds"] == 1 for row in results["summary"])
    assert [(row["method"], row["family"]) for row in results["harm"]] == [DPO, TODAY, OURS]
    assert {row["objective"] for row in results["reward_models"]} == {"helpful", "harmless", "honest"}
    assert {row["family"] for row in results["reward_models"]} == {"bootstrap", "debiased", "strengths"}
    assert "benchmarks/gold/plan.py" in results["setup"]["sources"]


def check_ablations(results: dict) -> None:
    assert all("proxy" in point for curve in results["over_optimisation"] for point in curve["points"])
    assert [(row["fit_fraction"], row["anchor"]) for row in results["heads"]] == [(0.2, 1.0), (0.2, 10.0)]
    assert set(results["heads"][0]["gate"]) == {"mean", "hard_min", "hierarchical"}
    rows = {row["label"]: row for row in results["ablations"]}
    assert rows["hard_min, calibrated"]["against_shipped"] == {}
    assert set(rows["hard_min, raw"]["against_shipped"]) == {"worst_per_world", "mean_of_min", "length"}
    assert rows["hard_min, s from 0.5 to 1"]["ablation"] == "strengths"
    assert results["ablations_setup"]["policies"] == len(results["over_optimisation"]) + 3


def check_page(results: dict, text: str) -> None:
    (row,) = (r for r in results["summary"] if (r["method"], r["family"], r["bias"]) == (*OURS, 0.9))
    reached = f"{row['reached']} | {row['worst_win_rate']:.3f}"
    assert f"| hard_min | strengths | 0.9 | {row['kl']:.2f} | {reached} |" in text
    sections = (
        "Main comparison",
        "Within worlds",
        "Where length is truly good",
        "Ablation: strengths",
        "Heads",
        "Reward models",
    )
    assert all(f"## {name}" in text for name in sections)
    assert "| 0.2 | 10 |" in text and "`rdpo` with rdpo_alpha 0.15" in text


def check_truth(root: Path) -> None:
    """Heads of a family differ by their strengths alone, and harm starts from the minimum of its own truth."""
    world = build_world(TINY, 0, root / "seed-0")
    debiased, family = (load_scores(world, 0.9, name, test=True) for name in ("debiased", "strengths"))
    assert torch.equal(debiased[:, 0], family[:, 0]) and not torch.equal(debiased[:, 1], family[:, 1])
    assert torch.allclose(debiased[:, -1], family[:, -1], atol=1e-4)
    other = with_length_cost(world, HARM_COST)
    units = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in (root / "seed-0" / "units").glob("dpo-*.json")
    ]
    starts = {unit["length_cost"]: unit["checkpoints"][0]["mean_of_min"] for unit in units}
    for one in (world, other):
        least = one.truth.mean_of_min(one.truth.raw, is_reference=True).mean()
        assert starts[one.length_cost] == pytest.approx(float(least))
    assert starts[LENGTH_COST] != starts[HARM_COST]
