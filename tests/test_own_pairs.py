"""`data.approach: own_pairs` from configuration to report on a tiny model: two objectives and five, each from people's files."""

import json
from pathlib import Path

import pytest
from tiny_models import tiny_causal_lm
from tiny_pipeline import Pipeline, run_all, write_configs

from prmd.artifacts import io
from prmd.artifacts.paths import EMBEDDED_DIR
from prmd.config.loading import load_pipeline
from prmd.config.policy import PolicyConfig

pytestmark = pytest.mark.slow


def own_files(folder: Path, objectives: tuple[str, ...], pairs: int) -> str:
    """A file of embedded pairs for each objective, other ones each, as `data.own_pairs.objectives=...`."""
    rows = [
        row
        for name in ("helpful", "harmless", "honest")
        for row in io.read_jsonl(EMBEDDED_DIR / f"{name}.jsonl")
    ]
    section = {}
    for k, objective in enumerate(objectives):
        path = folder / f"{objective}.jsonl"
        own = [
            {k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows[k * pairs : (k + 1) * pairs]
        ]
        if objective == "polite":  # its pairs have weights, those of the others none
            own = [row | {"weight": 1 + i % 3} for i, row in enumerate(own)]
        io.write_jsonl(path, own)
        section[objective] = {"path": path.as_posix()}
    return f"data.own_pairs.objectives={json.dumps(section)}"


def run_own(folder: Path, objectives: tuple[str, ...], *overrides: str, pairs: int = 60) -> Pipeline:
    configs = write_configs(folder / "configs", folder / "artifacts", tiny_causal_lm(folder / "base", seed=0))
    everything = ["data.approach=own_pairs", own_files(folder, objectives, pairs), *overrides]
    return run_all(folder / "artifacts", configs, everything)


def check_follows(pipeline: Pipeline, objectives: tuple[str, ...], overrides: list[str]) -> None:
    """Data, reward models, judges, comparison, figures and page are of these objectives, in this order, and of no other."""
    config = load_pipeline(pipeline.configs, overrides)[PolicyConfig]
    paths = config.paths
    assert paths.objectives == objectives and paths.approach == "own_pairs"
    assert sorted(p.name for p in paths.processed.iterdir() if p.is_dir()) == sorted(objectives)
    assert sorted(p.name for p in paths.reward_model("x").parent.iterdir()) == sorted(
        f"{k}_rm" for k in objectives
    )
    assert sorted(p.name for p in paths.judge("x").parent.iterdir()) == sorted(objectives)
    comparison = io.read_json(paths.metrics / "comparison.json")
    for row in comparison["rows"]:
        assert tuple(row["win_rate"]) == objectives
        assert all(0 <= estimate["value"] <= 1 for estimate in row["win_rate"].values())
    assert comparison["hypervolume"]["value"] >= 0
    page = paths.report.read_text(encoding="utf-8")
    assert all(f"reward model: {k}" in page for k in objectives) and "reward model: harmless" not in page
    assert "no objective named honest" in page


def test_two_objectives_with_weights_and_a_soup(tmp_path: Path) -> None:
    objectives = ("concise", "polite")
    overrides = [
        "policy.methods=[hard_min, dpo_concise, dpo_polite, soup]",
        "policy.weights={polite: 0.75, concise: 0.25}",
    ]
    pipeline = run_own(tmp_path, objectives, *overrides)
    files = own_files(tmp_path, objectives, 60)
    overrides = ["data.approach=own_pairs", files, *overrides]
    check_follows(pipeline, objectives, overrides)
    config = load_pipeline(pipeline.configs, overrides)[PolicyConfig]
    assert config.policy.weights == {"concise": 0.25, "polite": 0.75}
    soup = io.read_json(config.paths.policy("soup") / "metrics.json")
    assert "0.25 dpo_concise, 0.75 dpo_polite" in soup["notes"][0]
    stats = io.read_json(config.paths.processed / "stats.json")
    for row in stats["rows"].values():
        assert row["read"] == 60 == sum(sum(row[key].values()) for key in ("refused", "left_out", "kept"))
    assert "test pairs" in stats["can_be_told"]["polite"]
    assert list(stats["weights"]) == ["polite"] and 1 < stats["weights"]["polite"]["mean"] < 3
    assert (
        "no weights of pairs"
        in io.read_json(config.paths.policy("baseline_dpo") / "metrics.json")["notes"][0]
    )


def test_five_objectives(tmp_path: Path) -> None:
    objectives = ("concise", "polite", "correct", "clear", "kind")
    small = [
        "policy.methods=[mean]",
        "training.max_pairs=10",
        "calibration.prompts=5",
        "generation.prompts=5",
    ]
    pipeline = run_own(tmp_path, objectives, *small)
    files = own_files(tmp_path, objectives, 60)
    check_follows(pipeline, objectives, ["data.approach=own_pairs", files])
    config = load_pipeline(pipeline.configs, ["data.approach=own_pairs", files])[PolicyConfig]
    assert config.policy.weights == pytest.approx(dict.fromkeys(objectives, 0.2))
