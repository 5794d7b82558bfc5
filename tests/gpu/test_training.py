"""Trainings on the device, by `run_training` as the stages call it: an interrupted one, and the bytes that one holds."""

from pathlib import Path

import pytest
import torch
from tiny_training import TRAINING, a_run, loss_of, train
from torch import Tensor

from prmd.config.shared import DataConfig, ModelConfig, RewardModelConfig
from prmd.training.trainer import Columns, PairLoss

RESUMED = TRAINING.model_copy(update={"checkpoints": (0.5, 1.0)})
TWICE = [*range(12), *range(12)]  # six steps of 2 x 2 pairs

pytestmark = pytest.mark.slow


@pytest.fixture
def shared(tiny_base: Path, tmp_path: Path) -> RewardModelConfig:
    return RewardModelConfig(
        artifact_root=str(tmp_path / "root"),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(tiny_base), revision=None, dtype="float32"),
    )


def curve(history: list[dict[str, float]], name: str) -> dict[int, float]:
    return {int(row["step"]): row[name] for row in history if name in row}


def test_a_resumed_training_has_the_losses_of_an_uninterrupted_one(
    device: torch.device, shared: RewardModelConfig, tmp_path: Path
) -> None:
    """The steps after the resume follow from weights, both moments, rate and order of the pairs."""
    whole, _ = train(a_run(shared, tmp_path / "whole", training=RESUMED, stream=TWICE))
    seen: list[str] = []

    def breaks(logps: Tensor, columns: Columns) -> PairLoss:
        seen.append(logps.device.type) if logps.requires_grad else None
        if len(seen) > 6:  # in the fourth step, behind the checkpoint of the third
            raise KeyboardInterrupt
        return loss_of(logps, columns)

    run = a_run(shared, tmp_path / "broken", training=RESUMED, stream=TWICE, loss_function=breaks)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert set(seen) == {device.type}
    resumed, _ = train(a_run(shared, tmp_path / "broken", training=RESUMED, stream=TWICE))
    for name, steps in (
        ("loss", [1, 2, 3, 4, 5, 6]),
        ("grad_norm", [1, 2, 3, 4, 5, 6]),
        ("eval_loss", [3, 6]),
    ):
        wanted, found = curve(whole, name), curve(resumed, name)
        assert sorted(found) == steps
        assert len(set(wanted.values())) == len(steps)
        # a card adds up gradients in an order that differs from run to run
        assert found == pytest.approx(wanted, rel=1e-4 if name == "loss" else 1e-3), name
