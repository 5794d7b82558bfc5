"""Ctrl-C and SIGTERM in a training, what a second request does, and that the training goes on from there."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_causal_lm
from tiny_training import TRAINING, a_run, adapter, loss_of, train
from torch import Tensor

from prmd.config.shared import DataConfig, ModelConfig, RewardModelConfig
from prmd.errors import StoppedError
from prmd.training.checkpoints import name_checkpoints, newest_complete
from prmd.training.trainer import Columns, PairLoss


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("training") / "base")


@pytest.fixture
def shared(base: Path, tmp_path: Path) -> RewardModelConfig:
    return RewardModelConfig(
        artifact_root=str(tmp_path / "root"),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(base), revision=None, dtype="float32"),
    )


def signalled(number: int, *, at: set[int]) -> Any:
    """The loss, which sends a signal to this process at its n-th calls with gradients."""
    calls = 0

    def loss(logps: Tensor, columns: Columns) -> PairLoss:
        nonlocal calls
        calls += logps.requires_grad
        if logps.requires_grad and calls in at:
            os.kill(os.getpid(), number)
        return loss_of(logps, columns)

    return loss


@pytest.mark.skipif(os.name == "nt", reason="os.kill ends a process on Windows")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_training_goes_on_from_its_step(
    shared: RewardModelConfig,
    tmp_path: Path,
    number: int,
    status: int,
) -> None:
    settings = TRAINING.model_copy(update={"checkpoints": (1.0,)})
    whole, steps = train(a_run(shared, tmp_path / "whole", training=settings))
    name_checkpoints(tmp_path / "whole", steps)
    handler = signal.getsignal(number)
    stopped = tmp_path / "stopped"
    with pytest.raises(StoppedError, match="stopped; the same command continues from step 2") as error:
        loss = signalled(number, at={3})  # the first micro-batch of the second step
        train(a_run(shared, stopped, training=settings, loss_function=loss))
    assert error.value.status == status and signal.getsignal(number) is handler
    assert newest_complete(stopped).name == "checkpoint-2"
    # what shows, logs and recomputes may be edited before the same command is given
    edited = settings.model_copy(update={"pairs_per_device": 1, "gradient_accumulation_steps": 4})
    history, steps = train(a_run(shared, stopped, training=edited))
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3]
    losses = [[row["train_loss"] for row in rows if "train_loss" in row] for rows in (whole, history)]
    assert len(losses[0]) == 1 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    name_checkpoints(stopped, steps)
    assert sorted(path.name for path in stopped.iterdir()) == [".digests.json", "checkpoints", "logs"]
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["end"]
    ours, theirs = (adapter(tmp_path / name / "checkpoints" / "end") for name in ("whole", "stopped"))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)


@pytest.mark.skipif(os.name == "nt", reason="os.kill ends a process on Windows")
def test_a_second_ctrl_c_stops_at_once(shared: RewardModelConfig, tmp_path: Path) -> None:
    run = a_run(shared, tmp_path / "run", loss_function=signalled(signal.SIGINT, at={1, 2}))
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert newest_complete(tmp_path / "run") is None


def test_other_checkpoints_and_logs_do_not_begin_a_training_anew(
    shared: RewardModelConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = 0

    def breaks(logps: Tensor, columns: Columns) -> PairLoss:
        nonlocal calls
        calls += logps.requires_grad
        if calls > 4:
            raise KeyboardInterrupt
        return loss_of(logps, columns)

    settings = TRAINING.model_copy(update={"checkpoints": (0.66, 1.0)})
    with pytest.raises(KeyboardInterrupt):
        train(a_run(shared, tmp_path / "run", training=settings, loss_function=breaks))
    edited = TRAINING.model_copy(update={"logging_steps": 3})  # with shares 0, 0.34, 0.66 and 1
    with caplog.at_level("INFO", logger="prmd"):
        history, steps = train(a_run(shared, tmp_path / "run", training=edited))
    assert "resuming from checkpoint-2" in caplog.text
    assert steps == {2: "66", 3: "end"}  # the start and 34 were left behind before they were asked for
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3]
