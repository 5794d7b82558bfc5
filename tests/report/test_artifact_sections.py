"""`report.artifact_sections`: tables of files that a test writes by hand."""

from pathlib import Path

from synthetic_outputs import run_record

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.report.artifact_sections import data_section, load, reward_models_section, runs_section
from prmd.report.policy_sections import policies_section, training_outcome


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


def test_a_policy_far_from_its_targets_is_called_under_trained(tmp_path: Path) -> None:
    paths = ArtifactPaths(tmp_path, "embedded")
    curve = [
        {"step": 1, "loss": 0.9, "rewards/margins": 0.0, "margins/target": 0.8},
        {"step": 6, "eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 0.1}
        | {"eval_margins/target": 0.9},
        {"step": 6, "train_loss": 0.7},
    ]
    for name, ratio in (("cvar", 0.49), ("mean", 0.5)):
        learned = {"slope": 0.5, "sd_ratio": ratio, "explained": 0.4}
        metrics = {"held_out_learning": learned, "kl_target": 4.0, "curve": curve}
        io.write_json(paths.policy(name) / "metrics.json", metrics)
        io.write_json(paths.policy(name) / "run.json", run_record(75.0))
    section = policies_section(paths)
    assert [row[1] for row in section["learning"].rows] == ["under-trained", "spread reached"]
    assert section["under_trained"] == (
        "Under-trained: cvar reached 49% of the spread of its target margins, less than half."
    )
    told = dict(zip(section["training"].columns, section["training"].rows[0], strict=True))
    assert told == {
        "method": "cvar",
        "steps": "6",
        "training loss": "0.700",
        "held-out loss": "0.500",
        "margin reached": "0.10",
        "target margin": "0.90",
        "held-out accuracy": "0.75",
        "time": "1 min 15 s",
        "peak memory": "1.5 GiB",
    }
    assert training_outcome(metrics)["kl_expected"] == 1.0  # 4 nats at half of the spread
    assert training_outcome({"notes": []}) == {}  # a soup


def test_one_mistake_says_nothing_of_disagreement(tmp_path: Path) -> None:
    paths = ArtifactPaths(tmp_path, "embedded")
    auc = {"value": 0.0, "low": 0.0, "high": 0.2, "n": 32}

    def told(right: int) -> str:
        bins = [{"disagreement": 0.1, "accuracy": right / 32, "low": 0.0, "high": 1.0, "n": 32}]
        found = {"disagreement": {"auc": auc, "bins": bins}}
        io.write_json(paths.reward_model("helpful") / "metrics.json", found)
        rows = dict(reward_models_section(paths)["table"].rows)
        return rows["wrong pairs disagree more than right ones, AUC"]

    assert told(31) == "not told: 1 wrong of 32 pairs" and told(2) == "not told: 2 right of 32 pairs"
    assert told(27) == "0.00 [0.00, 0.20] ↓"


def test_weights_of_pairs_are_shown(tmp_path: Path) -> None:
    paths = ArtifactPaths(tmp_path, "embedded")
    stats = {"sizes": {"helpful": {"train": 4}}}
    io.write_json(paths.processed / "stats.json", stats)
    assert data_section(paths)["weights"] is None
    stats["weights"] = {"helpful": {"pairs": 4, "mean": 2.0, "min": 0.5, "max": 5.0, "effective_pairs": 2.5}}
    io.write_json(paths.processed / "stats.json", stats)
    assert data_section(paths)["weights"].rows == (("helpful", "4", "0.500", "2.000", "5.000", "2 (62%)"),)


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
    assert row[:-1] == ("cvar", "spread reached", "0.60", "0.50", "0.40", "4.00", "1.44") and row[
        -1
    ].startswith("1.40")
    assert {r[0]: r[-1] for r in section["table"].rows}["dpo"] == "helpful 90% (2.50)"


def test_json_of_another_kind_is_missing(tmp_path: Path) -> None:
    path = io.write_json(tmp_path / "metrics.json", ["not", "a", "record"])
    assert load(path) is None and load(path, list) == ["not", "a", "record"]
    assert load(io.write_json(path, {"a": 1})) == {"a": 1} and load(tmp_path / "none.json") is None
