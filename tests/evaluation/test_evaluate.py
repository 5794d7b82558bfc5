"""`evaluation.evaluate` with `inference.candidates`, `evaluation.held_out` and `evaluation.metrics`: files, reuse, KL and every number recomputed."""

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import direct_kl
from tiny_workspace import (
    candidate,
    candidates_of,
    evaluation_config,
    prompts_of,
    write_lora_policy,
    write_prepared,
    write_workspace,
)
from transformers import AutoModelForCausalLM

from prmd.artifacts import io
from prmd.config.evaluation import EvaluationConfig
from prmd.errors import ConfigError, DataError
from prmd.evaluation.evaluate import compute_metrics
from prmd.inference.candidates import CandidateModels
from prmd.inference.generation import GeneratedResponse
from prmd.judges.reward_model import judge_folder
from prmd.models.foreign import POLICY_REMEDY, model_folder
from prmd.models.loading import load_policy
from prmd.objectives import OBJECTIVES

METHODS = ("reference", "baseline_dpo", "hard_min")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    config = write_workspace(tmp_path_factory.mktemp("evaluated"))
    compute_metrics(config)
    return config


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing every figure takes seconds and has tests of its own."""
    monkeypatch.setattr("prmd.evaluation.evaluate.build_report", lambda paths: paths.report)


def metrics_of(config: EvaluationConfig, method: str) -> dict[str, Any]:
    return io.read_json(config.paths.metrics / f"{method}.json")


def samples_of(config: EvaluationConfig, method: str) -> list[dict[str, Any]]:
    return io.read_jsonl(config.paths.metrics / "samples" / f"{method}.jsonl")


# ------------------------------------------------------------------ files and numbers of a whole run
def test_every_method_has_its_files_and_the_comparison_all_rows(evaluated: EvaluationConfig) -> None:
    folder = evaluated.paths.metrics
    comparison = io.read_json(folder / "comparison.json")
    assert [row["method"] for row in comparison["rows"]] == list(METHODS)
    assert "hard_min" in (folder / "comparison.md").read_text(encoding="utf-8")
    assert (folder / "run.json").is_file() and evaluated.paths.report.is_file()
    assert list(evaluated.paths.step_results.glob("compute_metrics_*.json"))
    for method in METHODS:
        metrics = metrics_of(evaluated, method)
        rows = samples_of(evaluated, method)
        assert [row["prompt_id"] for row in rows] == metrics["per_prompt"]["ids"] and len(rows) == 7
        assert all(len(row["responses"]) == 3 for row in rows)


def test_win_rates_are_those_of_all_sample_pairs(evaluated: EvaluationConfig) -> None:
    reference = samples_of(evaluated, "reference")
    for method in METHODS[1:]:
        metrics = metrics_of(evaluated, method)
        for objective in OBJECTIVES:
            wins = []
            for ours, theirs in zip(samples_of(evaluated, method), reference, strict=True):
                pairs = itertools.product(ours["responses"], theirs["responses"])
                results = [
                    float(np.sign(a["rewards"][objective] - b["rewards"][objective])) for a, b in pairs
                ]
                wins.append(sum(0.5 + r / 2 for r in results) / 9)
            estimate = metrics["objectives"][objective]["win_rate"]
            assert metrics["per_prompt"]["win_rate"][objective] == pytest.approx(wins)
            assert estimate["value"] == pytest.approx(sum(wins) / 7) and estimate["n"] == 7
            assert estimate["low"] <= estimate["value"] <= estimate["high"]


def test_worst_objective_is_the_smallest_in_a_band_wider_than_its_own_interval(
    evaluated: EvaluationConfig,
) -> None:
    for method in METHODS[1:]:
        metrics = metrics_of(evaluated, method)
        rates = {k: metrics["objectives"][k]["win_rate"] for k in OBJECTIVES}
        worst = metrics["worst_objective"]
        assert worst["win_rate"]["value"] == min(r["value"] for r in rates.values())
        assert rates[worst["objective"]]["value"] == worst["win_rate"]["value"]
        assert worst["win_rate"]["low"] <= min(r["low"] for r in rates.values())
        assert worst["win_rate"]["high"] >= min(r["high"] for r in rates.values())


def test_rewards_are_calibrated_on_the_reference_samples(evaluated: EvaluationConfig) -> None:
    for objective in OBJECTIVES:
        values = np.array(
            [
                [r["rewards"][objective] for r in row["responses"]]
                for row in samples_of(evaluated, "reference")
            ]
        )
        assert values.mean(axis=1) == pytest.approx(np.zeros(7), abs=1e-9)
        assert (values**2).sum() / (7 * 2) == pytest.approx(1.0)  # within-prompt variance, divisor n - 1
        reported = metrics_of(evaluated, "hard_min")["objectives"][objective]["mean_reward"]["value"]
        ours = [
            r["rewards"][objective] for row in samples_of(evaluated, "hard_min") for r in row["responses"]
        ]
        assert reported == pytest.approx(np.mean(ours))


def test_the_reference_row_says_what_holds_by_definition(evaluated: EvaluationConfig) -> None:
    metrics = metrics_of(evaluated, "reference")
    half = {"value": 0.5, "low": 0.5, "high": 0.5, "n": 7, "method": "by definition", "chance": 0.5}
    assert all(metrics["objectives"][k]["win_rate"] == half for k in OBJECTIVES)
    assert metrics["kl"]["per_response"]["value"] == 0.0 and metrics["kl"]["per_response"]["n"] == 7
    assert any("by definition" in note for note in metrics["notes"])


@pytest.mark.parametrize("method", METHODS[1:])
def test_kl_is_the_full_softmax_sum_along_the_samples(evaluated: EvaluationConfig, method: str) -> None:
    shared = evaluated.shared
    models = candidate(evaluated, method)
    prompts = prompts_of(evaluated)
    policy = load_policy(models.candidate.directory, shared.model, shared.paths)
    reference = AutoModelForCausalLM.from_pretrained(shared.model.name)
    exact, k1, k3, tokens = [], [], 0.0, 0
    for prompt, responses in zip(prompts, models.samples(prompts), strict=True):
        results = [direct_kl(policy, reference, prompt.token_ids, r.token_ids) for r in responses]
        exact.append(np.mean([kl for kl, _, _ in results]))
        k1.append(np.mean([ratio for _, ratio, _ in results]))
        k3 += sum(value for _, _, value in results)
        tokens += sum(len(r.token_ids) for r in responses)
    reported = metrics_of(evaluated, method)
    assert reported["per_prompt"]["kl"] == pytest.approx(exact, rel=1e-4, abs=1e-6)
    assert reported["kl"]["per_response"]["value"] == pytest.approx(np.mean(exact), rel=1e-4)
    assert reported["kl"]["k1"]["value"] == pytest.approx(np.mean(k1), rel=1e-3, abs=1e-5)
    assert reported["kl"]["per_token"]["value"] == pytest.approx(sum(exact) * 3 / tokens, rel=1e-4)
    assert reported["kl"]["k3_per_token"]["value"] == pytest.approx(k3 / tokens, rel=1e-3)
    assert reported["kl"]["per_response"]["value"] > 1e-3


def test_lengths_and_truncation_are_those_of_the_samples(evaluated: EvaluationConfig) -> None:
    for method in METHODS:
        metrics = metrics_of(evaluated, method)
        responses = [r for row in samples_of(evaluated, method) for r in row["responses"]]
        assert metrics["length"]["value"] == pytest.approx(np.mean([r["tokens"] for r in responses]))
        assert metrics["truncated_share"] == pytest.approx(np.mean([not r["finished"] for r in responses]))
        assert all(r["tokens"] == 6 for r in responses if not r["finished"])


def test_policies_are_compared_with_the_baseline_pair_by_pair(evaluated: EvaluationConfig) -> None:
    comparison = io.read_json(evaluated.paths.metrics / "comparison.json")
    assert "baseline_dpo" in comparison["declared"] and "4 two-sided" in comparison["declared"]
    assert len(comparison["paired"]) == 4
    ours, theirs = metrics_of(evaluated, "hard_min"), metrics_of(evaluated, "baseline_dpo")
    for test in comparison["paired"]:
        assert (test["method"], test["against"]) == ("hard_min", "baseline_dpo")
        assert test["p"] <= test["p_holm"] <= 1.0
    minimum = next(t for t in comparison["paired"] if t["measure"] == "mean of minimum")
    wanted = ours["mean_of_min"]["value"] - theirs["mean_of_min"]["value"]
    assert minimum["difference"]["value"] == pytest.approx(wanted)


# ------------------------------------------------------------------ reuse, bad input, dry run
@pytest.mark.usefixtures("no_report")
def test_finished_methods_are_reused_and_a_new_policy_is_added(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_workspace(tmp_path, policies=False)
    with caplog.at_level(logging.WARNING):
        compute_metrics(config)
    assert "the reference is evaluated alone" in caplog.text
    before = (config.paths.metrics / "reference.json").read_bytes()
    write_lora_policy(config.paths.policy("cvar"), tmp_path / "base")
    sampled = []
    original = CandidateModels.samples
    monkeypatch.setattr(CandidateModels, "samples", lambda self, p: sampled.append(self) or original(self, p))
    with caplog.at_level(logging.INFO):
        compute_metrics(config)
    assert "reference: evaluated before" in caplog.text
    assert (config.paths.metrics / "reference.json").read_bytes() == before
    assert (
        metrics_of(config, "cvar")["evaluation"]["fingerprint"]
        == metrics_of(config, "reference")["evaluation"]["fingerprint"]
    )
    sampled.clear()
    compute_metrics(config)
    assert sampled == []


@pytest.mark.usefixtures("no_report")
def test_results_exchanged_with_their_record_are_made_again(tmp_path: Path) -> None:
    config = write_workspace(tmp_path)
    compute_metrics(config)
    before, record = metrics_of(config, "hard_min"), config.paths.metrics / "run.json"
    text = record.read_bytes()
    record.write_bytes((config.paths.metrics / "hard_min.json").read_bytes())
    (config.paths.metrics / "hard_min.json").write_bytes(text)
    compute_metrics(config)
    assert metrics_of(config, "hard_min") == before


@pytest.mark.usefixtures("no_report")
def test_another_judge_is_another_evaluation_but_samples_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_workspace(tmp_path)
    compute_metrics(config)
    swapped = dict(config.judges.paths, helpful=config.judges.paths["honest"])
    judges = config.judges.model_copy(update={"paths": swapped})
    before = metrics_of(config, "hard_min")

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("sampled or scored again")

    monkeypatch.setattr("prmd.inference.candidates.load_causal_lm", no_weights)
    monkeypatch.setattr("prmd.inference.candidates.load_policy", no_weights)
    compute_metrics(config.model_copy(update={"judges": judges}))
    after = metrics_of(config, "hard_min")
    assert after["evaluation"]["fingerprint"] != before["evaluation"]["fingerprint"]
    assert after["kl"] == before["kl"]
    assert after["objectives"]["helpful"] == before["objectives"]["honest"] == after["objectives"]["honest"]


def test_unfinished_policies_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = write_workspace(tmp_path, policies=False)
    config.paths.policy("mean").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        found = candidates_of(config)
    assert [c.method for c in found] == ["reference"]
    assert "not finished" in caplog.text


def test_a_judge_that_cannot_tell_samples_apart_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_workspace(tmp_path, policies=False)
    same = [GeneratedResponse("a", (5, 2), True)] * 3
    monkeypatch.setattr(CandidateModels, "samples", lambda self, prompts: [same for _ in prompts])
    with pytest.raises(DataError, match="scores all 3 reference samples of every prompt the same"):
        compute_metrics(config)
    assert not (config.paths.metrics / "run.json").exists()


def test_unprepared_data_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"split_objectives\.py"):
        compute_metrics(evaluation_config(tmp_path))


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = evaluation_config(tmp_path)
    write_prepared(config.paths)
    before = sorted(tmp_path.rglob("*"))
    with caplog.at_level(logging.INFO):
        assert compute_metrics(config, dry_run=True) == config.paths.metrics / "comparison.json"
    assert sorted(tmp_path.rglob("*")) == before
    assert "7 prompts x 3 responses x 1 methods = 21 responses" in caplog.text
    assert "no finished policy" in caplog.text


def test_a_dry_run_says_of_given_models_what_the_run_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, (lost, empty) = evaluation_config(tmp_path), (tmp_path / "lost", tmp_path / "empty")
    empty.mkdir()
    given = {"mine": str(lost), "none": str(empty), "theirs": "org/name@main", "whole": str(tmp_path / "w")}
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "model.safetensors").write_bytes(b"")
    judges = config.judges.model_copy(update={"paths": {"helpful": str(lost), "honest": "org/judge"}})
    generation = config.generation.model_copy(update={"policies": given})
    config = config.model_copy(update={"judges": judges, "generation": generation})
    with caplog.at_level(logging.INFO):
        compute_metrics(config, dry_run=True)
    said = {r.message.partition(": would ")[0]: r.message.partition(": would ")[2] for r in caplog.records}
    policy = "policy {}, not trained here".format
    with pytest.raises(ConfigError) as refusal:
        model_folder(str(lost), "generation.policies.mine", POLICY_REMEDY)
    assert said[policy("mine")] == f"stop the run: {refusal.value}" and "Repo id" in str(refusal.value)
    with pytest.raises(ConfigError) as refusal:
        judge_folder(str(lost), "helpful")
    assert said["helpful judge"] == f"stop the run: {refusal.value}" and f"{lost} is not there" in str(
        refusal.value
    )
    assert said[policy("none")].startswith(f"stop the run: {empty}: no .safetensors weights")
    assert said[policy("theirs")] == "be read from the hub, as org/name@main is no folder here"
    assert said[policy("whole")] == f"be read from {tmp_path / 'w'}"
    assert said["honest judge"] == "be read from the hub, as org/judge is no folder here"


def test_a_dry_run_says_of_data_that_are_not_prepared_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compute_metrics(evaluation_config(tmp_path), dry_run=True)
    said = [record.message for record in caplog.records if "split_objectives.py" in record.message]
    assert len([line for line in said if line.startswith("the prepared data")]) == 1
