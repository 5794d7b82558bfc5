"""How a training holds its weights and steps them, and the proof that this makes progress at its learning rate.

At 5e-7 a weight held in bfloat16 does not move: nearest rounding needs a change of 2^-9 of the weight. So full
fine-tuning keeps float32 master weights, or bfloat16 weights with stochastic rounding and 8-bit AdamW states (torchao),
and LoRA keeps float32 adapters. `arguments.training_arguments` turns the choice into optimiser arguments, `memory` says
what it takes; nothing here loads a model.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from prmd.config.shared import ModelConfig, TuningConfig
from prmd.errors import ConfigError, first_line
from prmd.runtime import get_device, missing_compiler

LEAST_PROGRESS = 0.5
"""Share of float32's progress below which a training is refused; rounding to bfloat16 leaves about 0.01 at 5e-7."""

BLOCK = 64
"""Side of the square blocks the probe steps: 4,096 weights, the least that torchao keeps in 8 bits."""

TORCHAO = "torchao==0.18.0"
"""The optional 8-bit AdamW, of the release that goes with the torch `setup_check` names; docs/hardware.md has the pairs."""

_BLOCKS = 3
_LORA_REMEDY = "set tuning.method: lora (float32 adapters), which needs neither"


@dataclass(frozen=True)
class Precision:
    """What is stored in which precision while training.

    Attributes:
        optimizer: AdamW with float32 states, or torchao's 8-bit AdamW with stochastic rounding of bfloat16 weights.
        master_weights: the model is loaded in float32 whatever `model.dtype` says.
        autocast: forward passes compute in bfloat16.
        learning_rate: peak learning rate of what is trained.
        trained: all weights, or LoRA adapters on frozen weights.
    """

    optimizer: Literal["adamw_float32", "adamw_8bit_stochastic"]
    master_weights: bool
    autocast: bool
    learning_rate: float
    trained: Literal["full", "lora"]

    @property
    def weights_dtype(self) -> torch.dtype:
        """Precision the model's own weights are held in."""
        if self.trained == "lora":
            return torch.bfloat16 if self.autocast else torch.float32
        return torch.float32 if self.master_weights else torch.bfloat16

    @property
    def trained_dtype(self) -> torch.dtype:
        """Precision of the weights the optimiser steps: adapters are float32."""
        return torch.float32 if self.trained == "lora" else self.weights_dtype

    def describe(self) -> str:
        """One line for a log."""
        what = "LoRA adapters" if self.trained == "lora" else "all weights"
        states = (
            "8-bit AdamW, stochastic rounding"
            if self.optimizer == "adamw_8bit_stochastic"
            else "float32 AdamW"
        )
        compute = "bfloat16" if self.autocast or self.weights_dtype == torch.bfloat16 else "float32"
        return (
            f"{what} in {_name(self.trained_dtype)} by {states} at {self.learning_rate:g}; model held in "
            f"{_name(self.weights_dtype)}, computed in {compute}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------ the choice
def resolve_precision(
    tuning: TuningConfig,
    *,
    learning_rate: float,
    model: ModelConfig,
    plan_fits: Callable[[Precision], bool] | None = None,
) -> Precision:
    """The precision of a training, from `tuning` and, for `auto`, from what fits the card.

    Args:
        learning_rate: peak rate of full fine-tuning; LoRA has its own in `tuning.lora`.
        plan_fits: whether the memory plan of a precision fits the card; None where there is no card, and then
            `auto` is float32.

    Raises:
        ConfigError: 8-bit AdamW was asked for, or alone fits, and it cannot run here or has nothing to do (LoRA).
    """
    if tuning.method == "lora":
        if tuning.optimizer == "adamw_8bit_stochastic":
            raise ConfigError(
                "tuning.optimizer: adamw_8bit_stochastic with tuning.method: lora: adapters are float32 and small; set "
                "tuning.optimizer: auto, or tuning.method: full"
            )
        return lora_precision(tuning, bfloat16=model.dtype == "bfloat16")
    float32 = Precision("adamw_float32", True, model.dtype == "bfloat16", learning_rate, "full")
    if tuning.optimizer == "adamw_float32":
        return float32
    if tuning.optimizer == "auto" and (model.dtype == "float32" or plan_fits is None or plan_fits(float32)):
        return float32
    if model.dtype != "bfloat16":
        raise ConfigError(
            f"tuning.optimizer: adamw_8bit_stochastic rounds weights held in bfloat16, got model.dtype: {model.dtype}; "
            "set model.dtype: bfloat16, or tuning.optimizer: adamw_float32"
        )
    _require_8bit(asked=tuning.optimizer != "auto")
    return eight_bit_precision(learning_rate)


def lora_precision(tuning: TuningConfig, *, bfloat16: bool) -> Precision:
    """Frozen weights in the model's dtype, float32 adapters, float32 AdamW at the adapters' own learning rate."""
    return Precision("adamw_float32", False, bfloat16, tuning.lora.learning_rate, "lora")


def eight_bit_precision(learning_rate: float) -> Precision:
    """Weights in bfloat16 with stochastic rounding, AdamW states in 8 bits."""
    return Precision("adamw_8bit_stochastic", False, False, learning_rate, "full")


def _require_8bit(*, asked: bool) -> None:
    """Refuse 8-bit AdamW where torchao is absent or its step cannot be compiled."""
    why = (
        "tuning.optimizer: adamw_8bit_stochastic"
        if asked
        else "tuning.optimizer: auto (float32 does not fit the card)"
    )
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"{why} needs the package torchao, which is missing; run: pip install {TORCHAO}, or {_LORA_REMEDY}"
        )
    if missing := missing_compiler():
        raise ConfigError(
            f"{why} needs torchao (pip install {TORCHAO}) and compiles its step, but {missing} is missing; install it, or "
            f"{_LORA_REMEDY}"
        )


# ------------------------------------------------------------------ the probe
def probe_progress(
    precision: Precision, *, steps: int = 100, blocks: Sequence[Tensor] | None = None
) -> float:
    """Progress of the configured optimiser along float32 AdamW's, <d, d32> / |d32|^2.

    Copies of a few blocks of weights are stepped at the peak learning rate with one random gradient, held constant,
    and d and d32 are their displacements. Weights that float32 does not move (no gradient) do not enter. The share of
    weights that move would be no test: with stochastic rounding one step moves 2 % of them and is right on average.

    Args:
        steps: optimiser steps; the noise of stochastic rounding falls with their root.
        blocks: weights of equal shape; by default N(0, 0.02^2) in [64, 64], on this run's device.

    Returns:
        1 for float32, near 1 for stochastic rounding, near 0 for an optimiser that is stuck.

    Raises:
        ConfigError: the 8-bit step cannot be compiled.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of gradients and rounding
        if blocks is None:
            blocks = [0.02 * torch.randn(BLOCK, BLOCK, device=get_device()) for _ in range(_BLOCKS)]
        start = [block.detach().to(precision.trained_dtype) for block in blocks]
        gradients = [
            torch.randn(block.shape, device=block.device).to(precision.trained_dtype) for block in start
        ]
        moved = _displacement(precision, start, gradients, steps)
        reference = Precision("adamw_float32", True, False, precision.learning_rate, "full")
        wanted = _displacement(reference, [b.float() for b in start], [g.float() for g in gradients], steps)
    return float((moved * wanted).sum() / wanted.square().sum())


def _displacement(precision: Precision, start: list[Tensor], gradients: list[Tensor], steps: int) -> Tensor:
    """Displacement of all weights after `steps`, flat, float64."""
    weights = [nn.Parameter(block.clone()) for block in start]
    optimizer = _optimizer(precision, weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    try:
        for _ in range(steps):
            optimizer.step()
    except TorchDynamoException as error:
        raise ConfigError(
            f"tuning.optimizer: the 8-bit AdamW step does not compile here ({first_line(error)}); "
            f"{_LORA_REMEDY}"
        ) from error
    moves = [(w.detach().double() - s.double()).flatten() for w, s in zip(weights, start, strict=True)]
    return torch.cat(moves)


def _optimizer(precision: Precision, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    if precision.optimizer == "adamw_8bit_stochastic":
        from torchao.optim import AdamW8bit  # optional dependency, slow to import

        return AdamW8bit(weights, lr=precision.learning_rate, weight_decay=0.0, bf16_stochastic_round=True)
    return torch.optim.AdamW(weights, lr=precision.learning_rate, weight_decay=0.0)


def refuse_if_stuck(precision: Precision, model: nn.Module | None = None) -> float:
    """Probe the configured optimiser on blocks of the model's own trained weights before a training starts.

    Args:
        model: the model to be trained, not yet wrapped for several GPUs; None probes random weights.

    Returns:
        The progress, see `probe_progress`.

    Raises:
        ConfigError: it makes less than half of float32's progress.
    """
    progress = probe_progress(precision, blocks=_trained_blocks(model) if model is not None else None)
    if progress >= LEAST_PROGRESS:
        return progress
    raise ConfigError(
        f"training.learning_rate: at {precision.learning_rate:g} {precision.optimizer} on {_name(precision.trained_dtype)} "
        f"weights makes {progress:.3f} of the progress of float32, wanted at least {LEAST_PROGRESS}; set "
        "tuning.optimizer: adamw_float32 (float32 master weights) or tuning.method: lora (float32 adapters)"
    )


def _trained_blocks(model: nn.Module) -> list[Tensor] | None:
    """Blocks [64, 64] of a few trained weights, spread over the model; None if it has no weight that large."""
    size = BLOCK * BLOCK
    large = [p for p in model.parameters() if p.requires_grad and p.numel() >= size]
    chosen = large[:: max(1, len(large) // _BLOCKS)][:_BLOCKS]
    return [p.detach().flatten()[:size].view(BLOCK, BLOCK) for p in chosen] or None
