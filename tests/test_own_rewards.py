"""Rewards that the user brings, from configuration to report on a tiny model: a function, or columns, beside a trained one."""

import json
from pathlib import Path

import pytest
import torch
from test_own_pairs import own_files
from tiny_models import tiny_causal_lm
from tiny_pipeline import MEMBERS, Pipeline, count_loads, run_all, write_configs

import run_pipeline
from prmd.artifacts import io
from prmd.config.loading import load_pipeline
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.errors import DataError, NotFiniteError
from prmd.pairs import read_pairs
from prmd.policies.train import train_pessimistic
from prmd.rewards.reward_model import load_reward_models
from prmd.rewards.train import train_reward_model

pytestmark = pytest.mark.slow
CONCISE = "def concise(prompt, response):\n    return -float(len(response))\n"


def overrides_of(folder: Path, rewards: dict[str, dict[str, str]], *more: str, pairs: int = 60) -> list[str]:
    own = ["data.approach=own_pairs", own_files(folder, ("polite", "length"), pairs)]
    code = [f"data.own_pairs.rewards={json.dumps(rewards)}", "data.own_pairs.allow_code=true"]
    return [*own, *code, *more]


def by_function(folder: Path, *more: str) -> list[str]:
    path = folder / "my_rewards.py"
    if not path.exists():
        path.write_text(CONCISE, encoding="utf-8")
    return overrides_of(folder, {"length": {"function": f"{path.as_posix()}:concise"}}, *more)


def configs_of(folder: Path) -> Path:
    base = tiny_causal_lm(folder / "base", seed=0)
    return write_configs(folder / "configs", folder / "artifacts", base)


SAMPLED = ("calibration.source=reference_samples", "calibration.prompts=6")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Path, list[str]]:
    """A run with one function, calibrated on samples, with every kind of method that reads rewards of samples."""
    folder = tmp_path_factory.mktemp("brought")
    methods = "policy.methods=[hard_min, cvar, maxmin, dpo_length]"
    pairs = ("pairs.reference_samples=4", "training.max_pairs=10", "policy.constraints={length: -9.0}")
    overrides = by_function(folder, *SAMPLED, methods, *pairs)
    return run_all(folder / "artifacts", configs_of(folder), overrides), folder, overrides


def test_a_function_from_configuration_to_report(finished: tuple[Pipeline, Path, list[str]]) -> None:
    pipeline, _, overrides = finished
    config = load_pipeline(pipeline.configs, overrides)[PolicyConfig]
    paths = config.paths
    folder = paths.reward_model("length")
    assert {p.name for p in folder.iterdir()} >= {
        "reward.json",
        "calibration.json",
        "metrics.json",
        "run.json",
    }
    assert not list(folder.glob("*.safetensors")) and list(paths.reward_model("polite").glob("*.safetensors"))
    test = read_pairs(paths, "length", "test")
    metrics = io.read_json(folder / "metrics.json")
    shorter = [(len(p.chosen) < len(p.rejected)) + 0.5 * (len(p.chosen) == len(p.rejected)) for p in test]
    assert metrics["accuracy"]["value"] == pytest.approx(sum(shorter) / len(test)) and metrics["members"] == 1
    calibration = io.read_json(folder / "calibration.json")
    assert calibration["source"] == "reference_samples" and len(calibration["calibration"]["scale"]) == 1
    comparison = io.read_json(paths.metrics / "comparison.json")
    assert {row["method"] for row in comparison["rows"]} >= {"hard_min", "cvar", "maxmin", "dpo_length"}
    assert all(tuple(row["win_rate"]) == ("polite", "length") for row in comparison["rows"])
    reference = io.read_json(paths.metrics / "reference.json")
    assert reference["best_of_n"] and reference["proxy"]  # its rewards of evaluation samples
    page = paths.report.read_text(encoding="utf-8")
    assert "reward model: length" in page and "The reward of length is brought, not trained" in page


def test_the_copies_are_one_member(finished: tuple[Pipeline, Path, list[str]]) -> None:
    pipeline, _, overrides = finished
    config = load_pipeline(pipeline.configs, overrides)[PolicyConfig]
    polite, length = load_reward_models(config.shared)
    assert polite.members == length.members == MEMBERS == len(length.calibration.scale)
    pairs = read_pairs(config.paths, "polite", "val")
    found = torch.stack(length.rewards(length.rows_of_pairs(pairs), description="pairs"))
    wanted = torch.tensor([[-float(len(p.chosen)), -float(len(p.rejected))] for p in pairs]).double()
    assert torch.equal(found, wanted[..., None].expand(-1, -1, MEMBERS))


def test_a_changed_file_is_seen_by_every_stage(
    finished: tuple[Pipeline, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, folder, overrides = finished
    configs = load_pipeline(pipeline.configs, overrides)
    loads = count_loads(monkeypatch)
    run_pipeline.run_stages(configs, force=False, dry_run=False)
    assert not loads  # all is finished
    path = folder / "my_rewards.py"
    path.write_text(CONCISE + "# changed\n", encoding="utf-8")
    try:
        with pytest.raises(
            DataError, match=r"as it is now \(its file has changed since\); run .*objective=length --force"
        ):
            train_pessimistic(configs[PolicyConfig])
        with pytest.raises(Exception, match=r"length reward model: .* other settings or data; give --force"):
            train_reward_model(configs[RewardModelConfig], objective="length")
        assert not loads
    finally:
        path.write_text(CONCISE, encoding="utf-8")


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        ("return 1 / len(response)", DataError, "raised ZeroDivisionError .* for sample 0 of the prompt"),
        ("return float('nan')", NotFiniteError, r"returned nan for .* \(chosen\), wanted a finite number"),
        ("return 'good'", DataError, r"returned 'good' \(str\) for .*, wanted a number"),
        ("pass", DataError, r"returned None \(NoneType\)"),
    ],
)
def test_a_function_that_fails_is_one_line_before_anything_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, error: type[Exception], said: str
) -> None:
    (tmp_path / "my_rewards.py").write_text(f"def concise(prompt, response):\n    {body}\n", encoding="utf-8")
    configs = load_pipeline(configs_of(tmp_path), by_function(tmp_path))
    loads = count_loads(monkeypatch)
    for name, stage in ((n, s) for n, s, _ in run_pipeline.stages(("polite", "length"))[:2]):
        run_pipeline.load_stage(stage)(configs[RewardModelConfig])
        assert name
    for objective in ("polite", "length"):  # the trained one is refused too
        with pytest.raises(error, match=rf"my_rewards.py:concise: {said}") as caught:
            train_reward_model(configs[RewardModelConfig], objective=objective)
        assert "\n" not in str(caught.value)
    assert not loads and not configs[RewardModelConfig].paths.reward_model("polite").exists()


def test_columns_from_configuration_to_report(tmp_path: Path) -> None:
    rewards = {"length": {"column_chosen": "good", "column_rejected": "bad"}}
    overrides = overrides_of(tmp_path, rewards, "policy.methods=[hard_min]", "training.max_pairs=10")
    for objective in ("polite", "length"):
        path = tmp_path / f"{objective}.jsonl"
        rows = [
            row | {"good": len(row["chosen"][0]["content"]) / 7, "bad": -i}
            for i, row in enumerate(io.read_jsonl(path))
        ]
        io.write_jsonl(path, rows)
    pipeline = run_kept(tmp_path, overrides)
    config = load_pipeline(pipeline.configs, overrides)[PolicyConfig]
    assert "no proxies" in pipeline.log and "columns, which cannot score samples" in pipeline.log
    _, length = load_reward_models(config.shared)
    for pair in read_pairs(config.paths, "polite", "train"):
        [values] = length.rewards(length.rows_of_pairs([pair]), description="pairs")
        assert values[:, 1].tolist() == list(pair.rewards["length"])
        assert float(values[0, 0]) == len(pair.chosen) / 7
    with pytest.raises(DataError, match="columns, which cannot score samples"):
        length.rewards([length.rows_of_texts(pair.prompt, ["yes"])], description="samples")
    assert io.read_json(config.paths.metrics / "comparison.json")["rows"]
    assert "proxy" not in io.read_json(config.paths.metrics / "hard_min.json")


def run_kept(folder: Path, overrides: list[str]) -> Pipeline:
    return run_all(folder / "artifacts", configs_of(folder), overrides)
