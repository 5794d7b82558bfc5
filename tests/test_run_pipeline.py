"""Every stage in order, skips and failures said so, and the table at the end; the stages themselves are stand-ins."""

import sys
from pathlib import Path
from typing import Any

import pytest

import run_pipeline
from prmd.artifacts import paths
from prmd.artifacts.io import read_json, write_json
from prmd.artifacts.paths import CONFIG_DIR, PROJECT_ROOT, ArtifactPaths
from prmd.config.evaluation import EvaluationConfig
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.errors import DataError

QUICKSTART = str(CONFIG_DIR / "quickstart")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, bool, bool]]:
    """Replace every stage by one that only notes how it was called."""
    calls: list[tuple[str, Any, bool, bool]] = []

    def load_stand_in(stage: str) -> Any:
        def stand_in(config: Any, *, force: bool, dry_run: bool, **arguments: str) -> Path:
            name = next(n for n, s, given in run_pipeline.stages() if (s, given) == (stage, arguments))
            calls.append((name, config, force, dry_run))
            return Path("made") / name

        return stand_in

    monkeypatch.setattr(run_pipeline, "load_stage", load_stand_in)
    monkeypatch.setattr(run_pipeline, "start_run_log", lambda paths: None)
    return calls


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run_pipeline.py", *arguments])
    run_pipeline.main()


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 16, "method": "bootstrap"}


def write_comparison(root: Path) -> ArtifactPaths:
    paths = ArtifactPaths(root, "embedded")
    rates = {"helpful": estimate(0.5), "harmless": estimate(0.6), "honest": estimate(0.7)}
    row = {
        "method": "hard_min",
        "win_rate": rates,
        "worst": estimate(0.5),
        "kl": {"value": 1.25, "low": None},
    }
    write_json(paths.metrics / "comparison.json", {"rows": [row, {**row, "method": "dpo", "worst": None}]})
    return paths


def test_stages_are_those_of_the_numbered_scripts_in_order() -> None:
    names = [name for name, _, _ in run_pipeline.stages()]
    assert sorted(names) == sorted(
        path.stem for path in PROJECT_ROOT.glob("[0-9]_*/*.py") if path.stem != "train_rm"
    )
    folders = [next(PROJECT_ROOT.glob(f"[0-9]_*/{name}.py")).parent.name for name in names]
    assert folders == sorted(folders)
    assert names.index("download_dataset") < names.index("split_objectives")
    assert names.index("compute_metrics") < names.index("benchmark_eval")


def test_every_stage_gets_its_configuration_and_the_table_comes_last(
    called: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_comparison(tmp_path)
    main(monkeypatch, "--config", QUICKSTART, f"artifact_root={tmp_path}", "policy.beta=0.2", "--force")
    assert [name for name, *_ in called] == [name for name, _, _ in run_pipeline.stages()]
    kinds = {type(config) for _, config, _, _ in called}
    assert kinds == {RewardModelConfig, PolicyConfig, EvaluationConfig}
    assert {config.paths.root for _, config, _, _ in called} == {tmp_path.resolve()}
    assert {(force, dry_run) for _, _, force, dry_run in called} == {(True, False)}
    assert {c.policy.beta for _, c, _, _ in called if isinstance(c, PolicyConfig)} == {0.2}
    shown = capsys.readouterr().out
    assert "[1/10] download_dataset ... " in shown and "[10/10] benchmark_eval ... " in shown
    verdict = "No verdict: the worst objective was not tested against the reference."  # of a version without that test
    assert shown.rstrip().endswith(f"report: {paths.report}\n{verdict}")
    assert "hard_min  0.50 [0.40, 0.60]  0.60 [0.50, 0.70]  0.70 [0.60, 0.80]" in shown
    (record,) = paths.step_results.iterdir()
    assert set(read_json(record)["seconds"]) == {name for name, *_ in called}


def test_dry_run_reaches_every_stage_and_needs_no_results(
    called: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(monkeypatch, "--config", QUICKSTART, f"artifact_root={tmp_path}", "--dry-run")
    assert len(called) == 10 and all(dry_run for *_, dry_run in called)
    assert not list(tmp_path.iterdir()) and "would write made" in capsys.readouterr().out


def test_empty_methods_skip_the_pessimistic_stage_and_say_so(
    called: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_comparison(tmp_path)
    main(monkeypatch, "--config", QUICKSTART, f"artifact_root={tmp_path}", "policy.methods=[]")
    assert "pessimistic_dpo" not in {name for name, *_ in called} and len(called) == 9
    assert "skipped: policy.methods is empty" in capsys.readouterr().out


def test_a_failing_stage_prints_its_line_and_how_to_continue(
    called: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(config: Any, *, force: bool, dry_run: bool) -> Path:
        raise DataError("raw.jsonl:4: not JSON; mend this line")

    load = run_pipeline.load_stage
    second = run_pipeline.stages()[1][1]
    monkeypatch.setattr(run_pipeline, "load_stage", lambda stage: fails if stage == second else load(stage))
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--config", QUICKSTART, f"artifact_root={tmp_path}")
    assert stop.value.code == 2 and [n for n, *_ in called] == ["download_dataset"]
    error = capsys.readouterr().err.splitlines()
    assert error[0] == "raw.jsonl:4: not JSON; mend this line" and "same command again" in error[1]


def test_mistakes_of_all_files_are_said_before_anything_runs(
    called: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--config", QUICKSTART, "policy.bta=1", "generation.prompts=none", "sed=1")
    assert stop.value.code == 2 and called == []
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 3 and all(word in error for word in ("policy.beta", "integer", "seed"))


def test_table_is_aligned_and_shows_gaps_as_dashes(tmp_path: Path) -> None:
    rows = read_json(write_comparison(tmp_path).metrics / "comparison.json")["rows"]
    header, first, second = run_pipeline.comparison_table(rows).splitlines()
    column = header.index("worst objective")
    assert first[column:].startswith("0.50 [0.40, 0.60]") and second[column:].startswith("-  ")
    assert first.endswith("1.25") and header.endswith("KL (nats)")


def test_only_process_zero_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline.say("one")
    monkeypatch.setenv("RANK", "1")
    run_pipeline.say("two")
    assert capsys.readouterr().out == "one\n"


def test_a_script_named_by_a_failure_is_of_the_same_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(config: Any, **_: Any) -> Path:
        raise DataError(f"damaged; make it again with: {paths.stage_command('split_objectives')} --force")

    monkeypatch.setattr(paths, "_options", {})
    monkeypatch.setattr(run_pipeline, "load_stage", lambda stage: fails)
    monkeypatch.setattr(run_pipeline, "start_run_log", lambda paths: None)
    given = ("--config", "configs/own_pairs", f"artifact_root={tmp_path.as_posix()}")
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *given, "training.epochs=2", "policy.methods=[cvar]")
    assert stop.value.code == 2
    command = f"python 1_data_preparation/split_objectives.py {' '.join(given)} training.epochs=2 --force"
    assert f"make it again with: {command}\n{run_pipeline.ADVICE}" in capsys.readouterr().err
