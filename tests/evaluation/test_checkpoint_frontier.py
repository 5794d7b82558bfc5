"""`evaluation.held_out`, policies of another approach, and proxies, on tiny models: which files say what, and reuse."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_workspace import candidates_of, write_lora_policy, write_reward_models, write_workspace

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.evaluation import EvaluationConfig
from prmd.evaluation.evaluate import compute_metrics
from prmd.evaluation.frontier import checkpoint_candidates
from prmd.evaluation.held_out import Evaluation
from prmd.inference.candidates import Candidate
from prmd.judges.cards import CONSTANT_ANSWER
from prmd.models.loading import load_tokenizer
from prmd.objectives import OBJECTIVES
from prmd.report.page import build_report


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    """Everything at once: kept checkpoints, ensembles, and a policy of another approach."""
    root = tmp_path_factory.mktemp("frontier")
    config = write_workspace(root)
    write_reward_models(config)
    for share, scale in (("33", 0.1), ("66", 0.2), ("end", 0.3)):
        folder = config.paths.policy("hard_min") / "checkpoints" / share
        write_lora_policy(folder, root / "base", scale=scale)
    write_lora_policy(ArtifactPaths(root, "pku_safe").policy("cvar"), root / "base", seed=5)
    return with_generation(config, checkpoints="all", checkpoint_prompts=4, other_approaches=("pku_safe",))


@pytest.fixture(scope="module")
def finished(evaluated: EvaluationConfig) -> EvaluationConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prmd.evaluation.evaluate.build_report", lambda paths: paths.report)
        compute_metrics(evaluated)
    return evaluated


def with_generation(config: EvaluationConfig, **changes: object) -> EvaluationConfig:
    return config.model_copy(update={"generation": config.generation.model_copy(update=changes)})


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prmd.evaluation.evaluate.build_report", lambda paths: paths.report)


# ------------------------------------------------------------------ checkpoints
def test_checkpoints_are_those_between_start_and_end_in_order(tmp_path: Path) -> None:
    for name in ("best", "end", "start", "66", "100", "5", ".66.tmp"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        io.write_text(folder / "weights.safetensors", name)
    policy = Candidate("cvar", tmp_path, "p", "embedded")
    found = checkpoint_candidates(policy)
    assert [c.method for c in found] == ["cvar@5", "cvar@66", "cvar@100", "cvar"]
    assert len({c.fingerprint for c in found}) == 4 and found[-1] is policy
    assert checkpoint_candidates(Candidate("reference", None, "r", "embedded")) == []


def test_the_frontier_has_a_point_per_kept_checkpoint(finished: EvaluationConfig) -> None:
    frontier = io.read_json(finished.paths.metrics / "frontier.json")
    stages = [(p["method"], p["checkpoint"]) for p in frontier["points"]]
    assert stages == [
        ("baseline_dpo", "end"),
        ("hard_min", "33"),
        ("hard_min", "66"),
        ("hard_min", "end"),
        ("pku_safe@cvar", "end"),
    ]
    assert frontier["prompts"] == 4 and all(p["kl"]["n"] == 4 for p in frontier["points"])
    kl = {p["checkpoint"]: p["kl"]["value"] for p in frontier["points"] if p["method"] == "hard_min"}
    assert 0 < kl["33"] < kl["66"] < kl["end"]
    whole = io.read_json(finished.paths.metrics / "hard_min.json")["per_prompt"]
    assert kl["end"] == pytest.approx(np.mean(whole["kl"][:4]))


@pytest.mark.usefixtures("no_report")
def test_a_frontier_is_kept_while_it_is_current_and_removed_when_it_is_not(
    finished: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(finished.paths.root, root)
    shared = finished.shared.model_copy(update={"artifact_root": str(root)})
    config = finished.model_copy(update={"reward_model_config": shared})
    path = config.paths.metrics / "frontier.json"
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise AssertionError("sampled again")

    with monkeypatch.context() as patch:
        patch.setattr("prmd.evaluation.held_out.sample", refuse)
        compute_metrics(config)
        compute_metrics(with_generation(config, checkpoints="none"))
    assert path.read_bytes() == before
    compute_metrics(with_generation(config, checkpoints="none", other_approaches=()))
    assert not path.exists()


def test_a_dry_run_counts_checkpoints_and_other_approaches(
    evaluated: EvaluationConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        compute_metrics(evaluated, dry_run=True)
    assert "7 prompts x 3 responses x 4 methods = 84 responses" in caplog.text
    assert "would sample 2 checkpoints on 4 prompts each" in caplog.text


# ------------------------------------------------------------------ another approach in the same table
def test_another_approach_answers_the_same_prompts_before_the_same_judges(finished: EvaluationConfig) -> None:
    folder = finished.paths.metrics
    comparison = io.read_json(folder / "comparison.json")
    rows = {row["method"]: row["approach"] for row in comparison["rows"]}
    assert rows == {
        "reference": "embedded",
        "baseline_dpo": "embedded",
        "hard_min": "embedded",
        "pku_safe@cvar": "pku_safe",
    }
    ours, theirs = (io.read_json(folder / f"{m}.json") for m in ("hard_min", "pku_safe@cvar"))
    assert ours["evaluation"]["compared_on"] == theirs["evaluation"]["compared_on"]
    assert ours["per_prompt"]["ids"] == theirs["per_prompt"]["ids"]
    assert {t["method"] for t in comparison["paired"]} == {"hard_min", "pku_safe@cvar"}
    assert not (finished.paths.metrics.parent / "pku_safe").exists()


def test_the_page_shows_approaches_side_by_side_and_every_figure(finished: EvaluationConfig) -> None:
    page = build_report(finished.paths).read_text(encoding="utf-8")
    section = page[page.index('id="approaches"') : page.index('id="benchmarks"')]
    assert "embedded: hard_min" in section and "pku_safe: cvar" in section
    for text in ("violation rate (P17)", "best of 3, mean", "33 %", "Who beats whom: honest"):
        assert text in page


def test_an_approach_without_policies_is_said(
    finished: EvaluationConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_generation(finished, other_approaches=("hh_truthfulqa", "embedded"))
    with caplog.at_level(logging.WARNING):
        found = candidates_of(config)
    assert [c.method for c in found] == ["reference", "baseline_dpo", "hard_min"]
    assert "hh_truthfulqa: no finished policy" in caplog.text


# ------------------------------------------------------------------ proxies
def test_proxies_are_given_where_the_approach_trained_on_the_ensembles(finished: EvaluationConfig) -> None:
    files = {p.stem: io.read_json(p) for p in finished.paths.metrics.glob("*.json")}
    for method in ("reference", "baseline_dpo", "hard_min"):
        proxy = files[method]["proxy"]
        assert proxy["members"] == 3 and set(proxy["worst_member"]) == set(OBJECTIVES)
        assert 0 <= proxy["violation_rate"]["value"] <= 1 and proxy["violation_rate"]["n"] == 7
        assert files[method]["evaluation"]["reward_models"]
    assert files["reference"]["proxy"]["violation_rate"]["value"] == pytest.approx(
        files["hard_min"]["proxy"]["violation_rate"]["chance"]
    )
    assert "proxy" not in files["pku_safe@cvar"]
    found = files["comparison"]["over_optimisation"]
    assert [p["n"] for p in found["curves"]["hard_min"]["points"]] == [1, 2, 3]
    assert [p["method"] for p in found["policies"]] == ["baseline_dpo", "hard_min"]


@pytest.mark.usefixtures("no_report")
def test_without_ensembles_nothing_is_said_of_them_and_new_ones_are_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_workspace(tmp_path, policies=False)
    with caplog.at_level(logging.INFO):
        compute_metrics(config)
    reference = io.read_json(config.paths.metrics / "reference.json")
    assert "proxy" not in reference and "best_of_n" not in reference
    assert "no proxies" in caplog.text and "train_helpful_rm.py" in caplog.text
    assert io.read_json(config.paths.metrics / "comparison.json")["over_optimisation"] is None
    write_reward_models(config)
    compute_metrics(config)
    assert io.read_json(config.paths.metrics / "reference.json")["proxy"]["members"] == 3


# ------------------------------------------------------------------ judges
def test_judges_are_held_against_a_constant_answer_and_length(finished: EvaluationConfig) -> None:
    judging = io.read_json(finished.paths.metrics / "reference.json")["judging"]
    samples = io.read_jsonl(finished.paths.metrics / "samples" / "reference.jsonl")
    assert judging["answer"] == CONSTANT_ANSWER
    for objective in OBJECTIVES:
        found = judging["objectives"][objective]
        assert 0 <= found["win_rate"]["value"] <= 1 and found["win_rate"]["n"] == 7
        lengths = np.array([[r["tokens"] for r in row["responses"]] for row in samples], dtype=float)
        rewards = np.array([[r["rewards"][objective] for r in row["responses"]] for row in samples])
        within = [(a - a.mean(1, keepdims=True)).ravel() for a in (lengths, rewards)]
        expected = np.corrcoef(*within)[0, 1] if within[0].any() else None
        assert found["length_correlation"] == (None if expected is None else pytest.approx(expected))


def test_what_is_compared_is_named_part_by_part(finished: EvaluationConfig) -> None:
    tokenizer = load_tokenizer(finished.shared.model, finished.paths)
    reference = candidates_of(finished)[0]

    def keys(config: EvaluationConfig) -> dict[str, str]:
        return Evaluation(config, tokenizer, [], [], reference).compared_on

    other = keys(with_generation(finished, max_new_tokens=5))
    assert {part for part, key in keys(finished).items() if other[part] != key} == {"decoding"}
