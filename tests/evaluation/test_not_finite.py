"""A policy of NaN does not stop the evaluation of the others: it is named, left out, and its place says why."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_workspace import candidate, write_full_policy, write_lora_policy, write_workspace

import run_pipeline
from prmd.artifacts import io
from prmd.config.evaluation import BenchmarksConfig, EvaluationConfig
from prmd.errors import NotFiniteError
from prmd.evaluation.evaluate import benchmark_eval, compute_metrics
from prmd.inference import generation


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds and have tests of their own."""
    monkeypatch.setattr("prmd.report.page.draw_figures", lambda paths: {
        "data": [], "reward_models": [], "policies": [], "metrics": []
    })  # fmt: skip


def spoil(folder: Path) -> None:
    """All of the first weight file is NaN."""
    file = next(folder.glob("*.safetensors"))
    table = {name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(file).items()}
    save_file(table, file, metadata={"format": "pt"})
    if (folder / "run.json").is_file():  # which vouches for what its training wrote
        io.write_json(folder / "run.json", {"fingerprint": folder.name, "seconds": 1.0})


def with_held_out_pairs(config: EvaluationConfig) -> EvaluationConfig:
    return config.model_copy(update={"benchmarks": BenchmarksConfig(run=("hh_holdout",))})


def test_the_others_are_evaluated_and_every_table_says_who_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_workspace(tmp_path)
    compute_metrics(config)  # of whole weights, whose numbers must not stand for those of NaN
    folder = config.paths.metrics
    whole = (folder / "baseline_dpo.json").read_bytes()
    spoil(config.paths.policy("hard_min"))
    with caplog.at_level(logging.WARNING, logger="prmd"):
        target = compute_metrics(config)
    [warning] = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "policy hard_min is left out" in warning and "its weights are not finite" in warning
    comparison = io.read_json(target)
    assert [row["method"] for row in comparison["rows"]] == ["reference", "baseline_dpo"]
    [missing] = comparison["missing"]
    assert missing["method"] == "hard_min" and "its weights are not finite" in missing["reason"]
    assert (folder / "baseline_dpo.json").read_bytes() == whole and (folder / "run.json").is_file()
    assert not (folder / "hard_min.json").exists() and not (folder / "samples" / "hard_min.jsonl").exists()
    for page in (folder / "comparison.md", config.paths.report, config.paths.report.parent / "tables.md"):
        text = page.read_text(encoding="utf-8")
        assert "hard_min" in text and "not evaluated" in text and "weights are not finite" in text, page
    run_pipeline.conclude(config.paths, {})
    assert "hard_min: not evaluated: " in capsys.readouterr().out
    [*_, result] = sorted(config.paths.step_results.glob("compute_metrics_*.json"))
    assert io.read_json(result)["missing"] == comparison["missing"]


def test_a_policy_that_is_mended_takes_its_place_again(tmp_path: Path) -> None:
    config = write_workspace(tmp_path)
    spoil(config.paths.policy("hard_min"))
    compute_metrics(config)
    write_lora_policy(config.paths.policy("hard_min"), tmp_path / "base")
    comparison = io.read_json(compute_metrics(config))
    assert comparison["missing"] == [] and len(comparison["rows"]) == 3
    assert "not evaluated" not in (config.paths.metrics / "comparison.md").read_text(encoding="utf-8")


def test_where_no_policy_is_left_the_stage_stops(tmp_path: Path) -> None:
    config = write_workspace(tmp_path)
    for method in ("hard_min", "baseline_dpo"):
        spoil(config.paths.policy(method))
    for stage in (compute_metrics, benchmark_eval):
        with pytest.raises(NotFiniteError, match=r"no policy can be evaluated: .*baseline_dpo.*hard_min"):
            stage(with_held_out_pairs(config))
    assert not (config.paths.metrics / "run.json").exists()


def test_a_reference_of_nan_stops_everything(tmp_path: Path) -> None:
    config = write_workspace(tmp_path)
    spoil(tmp_path / "base")
    for stage in (compute_metrics, benchmark_eval):
        with pytest.raises(NotFiniteError, match=r"model\.name: .*base: its weights are not finite"):
            stage(config)


def test_a_judge_of_nan_stops_everything_and_is_not_blamed_on_a_policy(tmp_path: Path) -> None:
    config = write_workspace(tmp_path)
    spoil(tmp_path / "judges" / "harmless")
    with pytest.raises(NotFiniteError, match="harmless: its weights are not finite"):
        compute_metrics(config)


def test_benchmarks_go_on_with_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = write_workspace(tmp_path)
    spoil(config.paths.policy("hard_min"))
    with caplog.at_level(logging.WARNING, logger="prmd"):
        benchmark_eval(with_held_out_pairs(config))
    assert "policy hard_min is left out" in caplog.text
    folder = config.paths.benchmark("heldout_pairs")
    found = {p.stem: io.read_json(p) for p in folder.glob("*.json") if p.name != "run.json"}
    assert {m: r["status"] for m, r in found.items()} == {
        "reference": "done",
        "baseline_dpo": "done",
        "hard_min": "not run",
    }
    assert "its weights are not finite" in found["hard_min"]["reason"] and found["hard_min"]["not_finite"]
    assert "its weights are not finite" in config.paths.report.read_text(encoding="utf-8")


def test_a_checkpoint_of_nan_is_left_out_of_the_frontier(tmp_path: Path) -> None:
    config = write_workspace(tmp_path)
    checkpoints = config.paths.policy("baseline_dpo") / "checkpoints"
    for name in ("33", "66"):
        write_full_policy(checkpoints / name, tmp_path / "base", noise=0.01)
    spoil(checkpoints / "33")
    sampling = config.generation.model_copy(update={"checkpoints": "all", "checkpoint_prompts": 3})
    compute_metrics(config.model_copy(update={"generation": sampling}))
    points = io.read_json(config.paths.metrics / "frontier.json")["points"]
    assert [(p["method"], p["checkpoint"]) for p in points] == [
        ("baseline_dpo", "66"),
        ("baseline_dpo", "end"),
        ("hard_min", "end"),
    ]


# ------------------------------------------------------------------ finite weights that overflow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_probabilities_that_are_nan_end_a_sampling_by_the_name_of_its_model(
    tmp_path: Path, temperature: float
) -> None:
    config = write_workspace(tmp_path)
    file = config.paths.policy("baseline_dpo") / "model.safetensors"
    table = load_file(file)
    name = next(key for key in sorted(table) if "down_proj" in key)
    table[name] = torch.full_like(table[name], 3e38)
    save_file(table, file, metadata={"format": "pt"})
    models = candidate(config, "baseline_dpo")
    with pytest.raises(
        NotFiniteError, match=r"baseline_dpo: sampling: .* of 2 of 2 responses are not finite"
    ):
        generation.generate(
            models.policy,
            models.tokenizer,
            [(1, 5, 6), (1, 7)],
            samples_per_prompt=1,
            max_new_tokens=4,
            seed=0,
            batch_size=2,
            description="baseline_dpo: sampling",
            temperature=temperature,
        )


def test_tokens_that_cannot_be_said_are_no_fault() -> None:
    guard = generation._RefuseNotFinite()
    scores = torch.tensor([[0.0, float("-inf"), 2.0]])
    assert guard(torch.zeros(1, 4, dtype=torch.long), scores) is scores
    for value in (float("nan"), float("inf")):
        with pytest.raises(NotFiniteError, match="1 of 2 responses are not finite behind 4 tokens"):
            guard(torch.zeros(2, 4, dtype=torch.long), torch.tensor([[0.0, 1.0], [value, 0.0]]))


def test_every_process_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process whose batch is whole must not wait for the others in the next turn."""
    heard = NotFiniteError("policy: not finite")
    monkeypatch.setattr(generation, "gather", lambda items: [heard] if items == [] else items)
    turns = generation._sample_in_turns(lambda batch: [("key", [[1]])], [[("key", (1,))]], "policy")
    with pytest.raises(NotFiniteError, match="policy: not finite"):
        next(turns)
