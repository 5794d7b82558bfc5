"""Weights of pairs in the training of a reward model: of its backbone, its heads and its adapters, and of nothing held out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_causal_lm
from tiny_workspace import reward_model_config, write_prepared

from prmd.artifacts import io
from prmd.config.shared import (
    CalibrationConfig,
    EnsembleConfig,
    LoraConfig,
    RewardModelConfig,
    TrainingConfig,
    TuningConfig,
)
from prmd.models.loading import load_tokenizer
from prmd.objectives import OBJECTIVES, SPLITS
from prmd.pairs import read_pairs
from prmd.report import reward_figures
from prmd.rewards import backbone
from prmd.rewards.adapters import resampled
from prmd.rewards.task import RewardTask, read_reward_pairs
from prmd.rewards.train import train_reward_model
from prmd.training.trainer import PAIR_WEIGHT

PAIRS = 8


def config_at(root: Path, **ensemble: Any) -> RewardModelConfig:
    """A tiny reward model of two steps."""
    return reward_model_config(
        root / "artifacts",
        tiny_causal_lm(root / "base"),
        report_to=(),
        tuning=TuningConfig(method="lora", lora=LoraConfig(r=4, alpha=8, learning_rate=1e-2)),
        training=TrainingConfig(
            pairs_per_device=2, gradient_accumulation_steps=1, epochs=1.0, max_length=200, checkpoints=(1.0,)
        ),
        ensemble=EnsembleConfig(**({"members": 2, "fit_fraction": 0.4} | ensemble)),
        calibration=CalibrationConfig(source="validation_responses", prompts=6),
    )


def weigh(config: RewardModelConfig, weight: Any) -> None:
    """Prepared pairs of which pair i of a split has this weight, in every split of every objective."""
    write_prepared(config.paths, pairs=PAIRS)
    for path in (config.paths.split(objective, split) for objective in OBJECTIVES for split in SPLITS):
        rows = io.read_jsonl(path)
        io.write_jsonl(path, [row | {"weight": weight(i)} for i, row in enumerate(rows)])


def of_index(i: int) -> float:
    return 0.25 + 0.2 * i


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_figures, "plot_reward_model", lambda *arguments: [])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {f"{path.name} {name}": value for name, value in io.read_tensors(path).items()}
    return found


def test_weights_of_one_give_the_reward_model_without_any_and_others_another(tmp_path: Path) -> None:
    found, metrics = [], []
    for name, weight in (("none", None), ("ones", lambda i: 1.0), ("others", of_index)):
        config = config_at(tmp_path / name)
        weigh(config, weight) if weight else write_prepared(config.paths, pairs=PAIRS)
        folder = train_reward_model(config, objective="helpful")
        found.append(weights_of(folder))
        metrics.append(io.read_json(folder / "metrics.json"))
    none, ones, others = found
    assert none.keys() == ones.keys() == others.keys() and len(none) > 3
    assert all(torch.equal(none[k], ones[k]) for k in none) and metrics[0] == metrics[1]
    files = {k.split()[0] for k in none if not torch.equal(none[k], others[k])}
    assert files == {k.split()[0] for k in none}


class CaughtError(Exception):
    """Thrown in the place of a training."""


@pytest.mark.parametrize("split", ["train", "judge"])
def test_training_pairs_carry_their_weights_and_held_out_pairs_none(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, runs = config_at(tmp_path, kind="adapters"), []
    weigh(config, of_index)

    def caught(run: Any, tokenizer: Any) -> None:
        runs.append(run)
        raise CaughtError

    monkeypatch.setattr(backbone, "run_training", caught)
    task = RewardTask(config, "helpful", split, tmp_path / "out", ("t",))
    data, tokenizer = read_reward_pairs(task), load_tokenizer(config.model, config.paths)
    for train in (backbone.train_backbone, backbone.train_members):
        with pytest.raises(CaughtError):
            train(task, data, tokenizer, tmp_path / "partial")
    weight = {pair.id: pair.weight for pair in read_pairs(config.paths, "helpful", split)}
    assert sorted(weight.values()) == pytest.approx([of_index(i) for i in range(PAIRS)])
    for run in runs:
        assert run.data.columns[PAIR_WEIGHT].tolist() == pytest.approx([weight[i] for i in run.data.ids])
        assert PAIR_WEIGHT not in run.eval_data.columns
    of_all, of_member = (list(run.data.ids) for run in runs)
    assert sorted(of_all) == sorted(weight)
    first = resampled(data.train, members=2, seed=config.seed)[0]
    assert of_member == [pair.id for pair in first] != of_all
