"""Both optimizers at 5e-7 on the device, made as a training makes them, against the steps that arithmetic gives."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from prmd.config.shared import TrainingConfig
from prmd.runtime import missing_compiler
from prmd.training.arguments import training_arguments
from prmd.training.precision import Precision, eight_bit_precision, refuse_if_stuck

RATE, STEPS = 5e-7, 200
FLOAT32 = Precision("adamw_float32", True, True, RATE, "full")
EIGHT_BIT = eight_bit_precision(RATE)


class _Weights(nn.Module):
    """Three blocks of weights as large as a model's, which a training would step."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        blocks = [0.02 * torch.randn(64, 64, generator=generator) for _ in range(3)]
        self.blocks = nn.ParameterList([nn.Parameter(block.to(dtype)) for block in blocks])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise AssertionError("stepped by hand")


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().cpu().double().flatten() for tensor in tensors])


def progress_by_hand(precision: Precision, directory: Path, device: torch.device) -> float:
    """Progress along -rate x steps x g / (|g| + eps), where AdamW leads under a gradient g that stays as it is."""
    arguments = training_arguments(
        TrainingConfig(lr_scheduler="constant_with_warmup", warmup_ratio=0.0),
        directory=directory,
        learning_rate=RATE,
        optimizer=precision.optimizer,
        bf16=False,
        seed=1,
        steps=STEPS,
        accumulation=1,
    )
    model = _Weights(precision.trained_dtype).to(device)
    trainer = Trainer(model=model, args=arguments)
    optimizer = trainer.create_optimizer()
    weights = list(model.blocks)
    assert {weight.device for weight in weights} == {device}
    assert precision.optimizer != "adamw_float32" or optimizer.defaults["fused"]
    start, generator = flat(weights), torch.Generator().manual_seed(3)
    for weight in weights:
        weight.grad = torch.randn(64, 64, generator=generator).to(weight)
    gradient = flat([weight.grad for weight in weights])
    for _ in range(STEPS):
        optimizer.step()
    wanted = -RATE * STEPS * gradient / (gradient.abs() + 1e-8)
    return float(((flat(weights) - start) * wanted).sum() / wanted.square().sum())


def test_fused_float32_adamw_makes_every_step(device: torch.device, tmp_path: Path) -> None:
    """Each step rounds a weight of 0.02 by at most 1e-9, which is 0.2 % of the step."""
    assert progress_by_hand(FLOAT32, tmp_path, device) == pytest.approx(1.0, abs=3e-3)
    assert refuse_if_stuck(FLOAT32) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.slow
def test_stochastic_eight_bit_adamw_makes_every_step_on_average(device: torch.device, tmp_path: Path) -> None:
    """12,288 weights, each at one of two neighbours 1e-4 apart, know the mean to 1 %; moments in 8 bits add their own error."""
    pytest.importorskip("torchao", reason="torchao is not installed (pip install torchao)")
    if missing := missing_compiler():
        pytest.skip(f"torch.compile lacks {missing}")
    assert progress_by_hand(EIGHT_BIT, tmp_path, device) == pytest.approx(1.0, abs=0.1)
