"""`benchmarks`: held-out pairs against plain scoring, what does not run, files of the stage."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import plain_logp
from tiny_workspace import (
    PAIRS,
    benchmarks_config,
    candidate,
    evaluation_config,
    result_of,
    write_lora_policy,
    write_prepared,
    write_truthfulqa_csv,
    write_workspace,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from prmd.artifacts import io
from prmd.benchmarks import TASKS, benchmark_names
from prmd.benchmarks.base import NotRunError, content_key
from prmd.benchmarks.hh_holdout import held_out_pairs, run_heldout_pairs, run_hh_holdout
from prmd.benchmarks.run import _fingerprint, _is_finished
from prmd.config.evaluation import (
    EvaluationConfig,
    HhHoldoutConfig,
    JudgeConfig,
    MtBenchConfig,
    TextJudgeConfig,
    TruthfulQaBenchmarkConfig,
)
from prmd.config.shared import TruthfulQaConfig
from prmd.errors import DataError
from prmd.evaluation.evaluate import benchmark_eval
from prmd.models.loading import load_policy
from prmd.models.tokenization import tokenize_row
from prmd.objectives import OBJECTIVES


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    root = tmp_path_factory.mktemp("benchmarks")
    write_workspace(root)
    return evaluation_config(root, truthfulqa=write_truthfulqa_csv(root / "truthfulqa"))


# ------------------------------------------------------------------ held-out pairs
def test_implicit_rewards_are_differences_of_logratios(workspace: EvaluationConfig) -> None:
    result = result_of(run_heldout_pairs, workspace, candidate(workspace, "hard_min"))
    tokenizer = AutoTokenizer.from_pretrained(workspace.shared.model.name)
    reference = AutoModelForCausalLM.from_pretrained(workspace.shared.model.name)
    policy = load_policy(workspace.paths.policy("hard_min"), workspace.shared.model, workspace.paths)
    pairs = {p.id: p for p in held_out_pairs(workspace.paths, OBJECTIVES, "", None)}
    right = []
    for item in result.items:
        pair = pairs[item["id"]]
        row = tokenize_row(tokenizer, pair.prompt, (pair.chosen, pair.rejected), keep_suffix=False)
        ratios = [
            plain_logp(policy, list(row.prompt_ids), list(r))
            - plain_logp(reference, list(row.prompt_ids), list(r))
            for r in row.responses
        ]
        right.append(ratios[0] > ratios[1])
        assert item["logratio_margin"] == pytest.approx(ratios[0] - ratios[1], abs=1e-3)
    accuracy = result.metrics["implicit_reward_accuracy"]
    assert accuracy["value"] == pytest.approx(np.mean(right)) and accuracy["n"] == 3 * PAIRS
    assert result.metrics["implicit_reward_accuracy, honest"]["n"] == PAIRS
    assert result.metrics["longer_is_chosen"]["value"] == 0.5  # the fixture alternates
    assert accuracy["chance"] == 0.5


def test_the_reference_has_no_implicit_reward(workspace: EvaluationConfig) -> None:
    result = result_of(run_heldout_pairs, workspace, candidate(workspace, "reference"))
    assert not any(name.startswith("implicit") for name in result.metrics)
    assert result.metrics["reference_free_accuracy"]["n"] == 3 * PAIRS


def test_an_untrained_policy_ties_everywhere(tmp_path: Path) -> None:
    config = write_workspace(tmp_path, policies=False)
    write_lora_policy(config.paths.policy("cvar"), tmp_path / "base", scale=0.0)
    accuracy = result_of(run_heldout_pairs, config, candidate(config, "cvar")).metrics[
        "implicit_reward_accuracy"
    ]
    assert (accuracy["value"], accuracy["ties"]) == (0.5, 3 * PAIRS)


def test_hh_holdout_is_named_for_hh_rows_alone(workspace: EvaluationConfig, tmp_path: Path) -> None:
    refused = result_of(run_hh_holdout, workspace, candidate(workspace, "reference"))
    assert refused.status == "not run" and "holds no HH-RLHF rows" in refused.reason and not refused.metrics
    root = Path(workspace.shared.artifact_root)
    config = evaluation_config(root, approach="hh_truthfulqa")
    write_prepared(config.paths, source="hh_rlhf")
    result = result_of(run_hh_holdout, config, candidate(config, "reference"))
    assert {item["objective"] for item in result.items} == {"helpful", "harmless"}
    assert len(result.items) == 2 * PAIRS
    write_prepared(config.paths, source="truthfulqa")
    assert result_of(run_hh_holdout, config, candidate(config, "reference")).status == "not run"


def test_fewer_pairs_are_shared_evenly(workspace: EvaluationConfig) -> None:
    pairs = held_out_pairs(workspace.paths, OBJECTIVES, "", 6)
    assert [sum(p.objective == k for p in pairs) for k in OBJECTIVES] == [2, 2, 2]
    benchmarks = benchmarks_config(hh_holdout=HhHoldoutConfig(max_pairs=6))
    config = workspace.model_copy(update={"benchmarks": benchmarks})
    items = result_of(run_heldout_pairs, config, candidate(config, "reference")).items
    assert [item["id"] for item in items] == [pair.id for pair in pairs]


# ------------------------------------------------------------------ the stage
def test_every_configured_benchmark_is_known_and_held_out_pairs_go_with_hh() -> None:
    config = EvaluationConfig()
    assert set(config.benchmarks.run) <= set(TASKS)
    assert benchmark_names(config.benchmarks.run) == (
        "hh_holdout", "heldout_pairs", "truthfulqa", "truthfulqa_generation", "realtoxicityprompts", "jailbreakbench",
        "mt_bench",
    )  # fmt: skip


def test_the_stage_writes_every_result_reuses_it_and_says_what_did_not_run(
    workspace: EvaluationConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prmd.evaluation.evaluate.build_report", lambda paths: paths.report)
    with caplog.at_level(logging.INFO):
        assert benchmark_eval(workspace) == workspace.paths.outputs / "benchmarks"
    for name in benchmark_names(workspace.benchmarks.run):
        folder = workspace.paths.benchmark(name)
        assert (folder / "run.json").is_file()
        for method in ("reference", "baseline_dpo", "hard_min"):
            result = io.read_json(folder / f"{method}.json")
            assert (result["benchmark"], result["method"], result["approach"]) == (name, method, "embedded")
            if result["status"] == "done":
                assert result["reason"] is None and result["n"] > 0 and result["data_sha256"]
                assert all(m["low"] <= m["value"] <= m["high"] and m["n"] for m in result["metrics"].values())
                assert len(io.read_jsonl(folder / f"{method}.items.jsonl")) == result["n"]
            else:
                assert result["reason"] and not result["metrics"]
    statuses = {
        n: io.read_json(workspace.paths.benchmark(n) / "reference.json")["status"]
        for n in benchmark_names(workspace.benchmarks.run)
    }
    assert [n for n, s in statuses.items() if s == "done"] == ["heldout_pairs", "truthfulqa"]
    assert caplog.text.count("mt_bench: not run: data missing at benchmarks.mt_bench.path") == 1

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("prmd.inference.candidates.load_policy", no_weights)
    monkeypatch.setattr("prmd.inference.candidates.load_causal_lm", no_weights)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        benchmark_eval(workspace)
    assert caplog.text.count("finished before with the same inputs, reused") == 6
    benchmark_eval(workspace, force=True)  # computed anew, from cached log-probabilities
    whole = io.read_json(workspace.paths.benchmark_comparison)["paired"]
    assert {test["benchmark"] for test in whole} == {"heldout_pairs", "truthfulqa"}
    alone = workspace.benchmarks.model_copy(update={"run": ("truthfulqa",)})
    benchmark_eval(workspace.model_copy(update={"benchmarks": alone}))  # what the others found stays compared
    assert io.read_json(workspace.paths.benchmark_comparison)["paired"] == whole


def test_a_key_sees_files_in_folders_and_below_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mtb" / "reference_answer").mkdir(parents=True)
    (tmp_path / "mtb" / "question.jsonl").write_text("{}", encoding="utf-8")
    answers = tmp_path / "mtb" / "reference_answer" / "gpt-4.jsonl"
    answers.write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = MtBenchConfig(path=str(tmp_path / "mtb"))
    before = content_key(settings)
    assert [name for name, _, _ in before] == ["mtb/question.jsonl", "mtb/reference_answer/gpt-4.jsonl"]
    assert content_key(MtBenchConfig(path="mtb")) == before  # from the folder the command was given in
    answers.write_text("{} ", encoding="utf-8")
    assert content_key(settings) != before
    assert content_key(MtBenchConfig(path="owner/on-the-hub")) == []


def test_a_result_depends_on_its_own_settings_alone(workspace: EvaluationConfig) -> None:
    def key(name: str, **update: Any) -> str:
        config = workspace.model_copy(update=update)
        return _fingerprint(name, config, candidate(config, "reference"))

    fewer = benchmarks_config(hh_holdout=HhHoldoutConfig(max_pairs=6))
    judge = TextJudgeConfig(kind="local_model", model="some/judge")
    for name in TASKS:
        assert (key(name, benchmarks=fewer) != key(name)) == (name in ("hh_holdout", "heldout_pairs"))
        judged = name in ("truthfulqa_generation", "jailbreakbench", "mt_bench")
        assert (key(name, text_judge=judge) != key(name)) == judged
        assert key(name, bootstrap_resamples=321) != key(name)


def test_a_judge_trained_anew_asks_for_new_verdicts(workspace: EvaluationConfig) -> None:
    run, found = workspace.paths.judge("honest") / "run.json", []
    for day in (1, 2):
        io.write_json(run, {"fingerprint": "judge", "started": f"2026-01-0{day}"})
        found.append([_fingerprint(n, workspace, candidate(workspace, "reference")) for n in TASKS])
    run.unlink()
    changed = [name for name, one, two in zip(TASKS, *found, strict=True) if one != two]
    assert changed == ["truthfulqa_generation"]


def test_a_dry_run_names_everything_and_writes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = evaluation_config(tmp_path)
    with caplog.at_level(logging.INFO):
        benchmark_eval(config, dry_run=True)
    assert not list(tmp_path.iterdir())
    assert "split_objectives.py" in caplog.text and "3_policy_training" in caplog.text
    assert all(name in caplog.text for name in benchmark_names(config.benchmarks.run))
    assert "mt_bench: would not run: data missing at benchmarks.mt_bench.path: null" in caplog.text


def said_of(config: EvaluationConfig, caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """What a dry run says of each benchmark."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        benchmark_eval(config, dry_run=True)
    lines = (record.message.partition(": ")[::2] for record in caplog.records)
    return {name: said for name, said in lines if name in (*TASKS, "TruthfulQA")}


def test_a_dry_run_says_what_would_not_run_in_the_words_of_the_run(
    workspace: EvaluationConfig, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = TruthfulQaConfig(path="truthfulqa/truthful_qa")
    data = workspace.shared.data.model_copy(update={"truthfulqa": nowhere})
    shared = workspace.reward_model_config.model_copy(update={"data": data})
    config = workspace.model_copy(update={"reward_model_config": shared, "judges": JudgeConfig()})
    said, warned = said_of(config, caplog), [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert warned == [] and "TruthfulQA" not in said
    assert said["heldout_pairs"].startswith("would write ")
    for name in ("hh_holdout", "truthfulqa"):
        with pytest.raises(NotRunError) as refusal:
            TASKS[name].run(config, candidate(config, "reference"))
        assert said[name] == f"would not run: {refusal.value}"
    assert said["truthfulqa_generation"] == said["truthfulqa"]
    assert "embedded downloads no TruthfulQA" in said["truthfulqa"]


def test_a_dry_run_says_of_truthfulqa_what_is_known(
    workspace: EvaluationConfig, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    own_judges = workspace.model_copy(update={"judges": JudgeConfig()})
    said = said_of(own_judges, caplog)
    assert re.fullmatch(r"\d+ questions, sha256 \w+", said["TruthfulQA"])
    assert said["truthfulqa"].startswith("would write ")
    assert said["truthfulqa_generation"].startswith("would write ")  # its judge is trained before it
    fetched = evaluation_config(tmp_path, approach="hh_truthfulqa")
    said = said_of(fetched, caplog)  # stage 1 is still to fetch them
    assert "download_dataset.py" in said["TruthfulQA"] and said["truthfulqa"].startswith("would write ")
    assert said["hh_holdout"].startswith("would write ")
    strings = workspace.benchmarks.model_copy(
        update={"truthfulqa": TruthfulQaBenchmarkConfig(truth_judge="text_judge")}
    )
    said = said_of(workspace.model_copy(update={"benchmarks": strings}), caplog)
    assert (
        said["truthfulqa_generation"]
        == "would not run: no judge of truth: text_judge.kind is strings, which cannot tell true from false"
    )
    assert said["truthfulqa"].startswith("would write ")


def test_no_judge_of_truth_is_asked_for_that_nobody_would_train(
    workspace: EvaluationConfig, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = evaluation_config(tmp_path, truthfulqa=workspace.shared.data.truthfulqa.path)
    assert "honest" in config.judges.paths and not config.paths.judge("honest").exists()
    said = said_of(config, caplog)["truthfulqa_generation"]
    with pytest.raises(NotRunError) as refusal:
        TASKS["truthfulqa_generation"].run(config, candidate(workspace, "reference"))
    assert said == f"would not run: {refusal.value}" and "compute_metrics" not in said
    assert said.startswith("would not run: judges.paths.honest names a judge that may have learned")


def test_a_result_without_its_items_is_not_finished(tmp_path: Path) -> None:
    path, items = tmp_path / "cvar.json", tmp_path / "cvar.items.jsonl"
    io.write_json(path, {"status": "done", "fingerprint": "key", "n": 2})
    io.write_jsonl(items, [{"id": "a"}, {"id": "b"}])
    assert _is_finished(path, "key") and not _is_finished(path, "other")
    items.unlink()
    assert not _is_finished(path, "key")
    items.mkdir()
    with pytest.raises(DataError, match=r"cvar\.items\.jsonl: is a folder, wanted a file"):
        _is_finished(path, "key")


def test_a_file_that_is_no_result_is_not_finished(tmp_path: Path) -> None:
    assert not _is_finished(io.write_json(tmp_path / "cvar.json", {"started": "2026-11-27"}), "key")
