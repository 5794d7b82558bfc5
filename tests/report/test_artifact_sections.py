"""`report.artifact_sections`: tables of files that a test writes by hand."""

from pathlib import Path

from synthetic_outputs import run_record

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.report.artifact_sections import policies_section, reward_models_section, runs_section


def test_no_second_is_counted_twice(tmp_path: Path) -> None:
    paths = ArtifactPaths(tmp_path, "embedded")
    for folder, seconds in ((paths.processed, 3.0), (paths.judge("helpful"), 50.0), (paths.metrics, 340.0)):
        io.write_json(folder / "run.json", run_record(seconds))
    for name in (
        "hh_holdout",
        "truthfulqa_generation",
    ):  # each run.json: seconds of the pass over all benchmarks
        io.write_json(paths.benchmark(name) / "run.json", run_record(100.0))
        for method in ("reference", "cvar"):
            io.write_json(paths.benchmark(name) / f"{method}.json", {"seconds": 31.0})
    table = runs_section(paths)["table"]
    times = {row[0]: row[1] for row in table.rows}
    assert times["judge: helpful"] == "50 s" and times["benchmark: truthfulqa_generation"] == "1 min 2 s"
    assert table.caption.startswith(
        "Together 7 min 47 s:"
    )  # 3 + 340 + 2 x 62: the judge ran within the evaluation


def test_what_only_the_finished_model_knows_is_in_the_table(tmp_path: Path) -> None:
    paths = ArtifactPaths(tmp_path, "embedded")
    io.write_json(paths.reward_analysis / "helpful.json", {"members": 3})  # written before calibration
    measured = {"members": 3, "member_correlation_reference_samples": 0.26}
    io.write_json(paths.reward_model("helpful") / "metrics.json", measured)
    assert ("the same on reference samples", "0.26") in reward_models_section(paths)["table"].rows


def test_draws_and_how_far_targets_were_reached_stand_beside_the_kl(tmp_path: Path) -> None:
    paths = ArtifactPaths(tmp_path, "embedded")
    learned = {"slope": 0.5, "sd_ratio": 0.6, "explained": 0.4}
    draws = {"helpful": {"draws": 9, "share": 0.9, "passes": 2.5}}
    io.write_json(paths.policy("dpo") / "metrics.json", {"notes": [], "draws": draws})
    io.write_json(
        paths.policy("cvar") / "metrics.json", {"held_out_learning": learned, "kl_target": 4.0, "notes": []}
    )
    kl = {"value": 1.4, "low": 1.1, "high": 1.9, "n": 15}
    io.write_json(paths.metrics / "cvar.json", {"kl": {"per_response": kl}})
    section = policies_section(paths)
    (row,) = section["learning"].rows
    assert row[:-1] == ("cvar", "0.60", "0.50", "0.40", "4.00", "1.44") and row[-1].startswith("1.40")
    assert {r[0]: r[-1] for r in section["table"].rows}["dpo"] == "helpful 90% (2.50)"
