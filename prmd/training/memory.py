"""What a training takes of a card's memory, planned without loading the model, and the precision that fits it.

Weights, gradients and optimizer states are counted parameter by parameter on the meta device; the rest is taken from
`rehearsal`, which runs a few layers on tensors without storage. A plan that does not fit names the first change that
makes it fit.
"""

import bisect
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from prmd.config.shared import LoraConfig, ModelConfig, TrainingConfig, TuningConfig
from prmd.errors import ConfigError, first_line
from prmd.models.card import USABLE
from prmd.models.sequence_models import supports_shared_prompts
from prmd.models.tokenization import PrefixRow
from prmd.runtime import GIB, get_device, get_runtime
from prmd.training.precision import Precision, eight_bit_precision, lora_precision, resolve_precision
from prmd.training.rehearsal import (
    BatchShape,
    StepBytes,
    Task,
    meta_model,
    rehearse_training,
    separate_layers,
)
from prmd.training.sharding import requested_sharding


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device, without sharding over several.

    Attributes:
        parameters, trainable: numbers of weights, not bytes.
        weights, gradients, optimizer: gradients are counted throughout, as in every micro-batch of an optimiser step
            but its first.
        activations: what the layers keep for the backward pass.
        logits: copies of one block of logits and of the head's gradient.
        mask: attention mask and batch.
        rest: what the peak has above these (a recomputed layer, bfloat16 copies of master weights, the embedding's
            gradient, float32 moments inside the 8-bit step).
        device_bytes: memory of the card; None without one.
        layers, recomputed: layers of the model, and how many of them, the first ones, are run again in the backward pass.
        first_change: what to set first where it does not fit, else empty.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    mask: int = 0
    rest: int = 0
    device_bytes: int | None = None
    layers: int = 0
    recomputed: int = 0
    first_change: str = ""

    @property
    def states(self) -> int:
        """Bytes that are held between steps, gradients included."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + self.activations + self.logits + self.mask + self.rest

    @property
    def fits(self) -> bool | None:
        """Whether the card's usable share holds the total; None without a card."""
        return None if self.device_bytes is None else self.total <= USABLE * self.device_bytes

    def rows(self) -> list[str]:
        """Readable lines, sizes in GiB (2^30 bytes)."""
        lines = [
            f"{self.parameters / 1e6:,.1f} million parameters, {self.trainable / 1e6:,.1f} million of them trained"
        ]
        recompute = (
            f"{self.recomputed} of {self.layers} layers recomputed" if self.recomputed else "layers kept"
        )
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            f"activations ({recompute})": self.activations,
            "logits": self.logits,
            "mask": self.mask,
            "rest of the peak": self.rest,
        }
        lines += [f"{name:<42}{size / GIB:9.2f} GiB" for name, size in parts.items() if size]
        lines.append(f"{'total':<42}{self.total / GIB:9.2f} GiB{self._verdict()}")
        return lines + ([f"first change: {self.first_change}"] if self.first_change else [])

    def _verdict(self) -> str:
        if self.device_bytes is None:
            return ""
        verdict = "fits" if self.fits else "does not fit"
        return f", {verdict} a card of {self.device_bytes / GIB:.1f} GiB ({USABLE:.0%} usable)"


def device_memory() -> int | None:
    """Bytes of this process's card; None on a CPU."""
    device = get_device()
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


_LEAST_LENGTH = 256
_MIN_8BIT, _BLOCK_8BIT, _MAP_8BIT = (
    4096,
    256,
    1024,
)  # torchao: least weights, weights per scale, bytes of a code book


# ------------------------------------------------------------------ training
def plan_memory(
    *,
    model_config: Any,
    tuning: TuningConfig,
    training: TrainingConfig,
    precision: Precision,
    task: Task,
    device_bytes: int | None,
    longest: PrefixRow | None = None,
    sampled: Sequence[int] = (),
    rows: Sequence[PrefixRow] = (),
) -> MemoryPlan:
    """Plan the peak of one training step.

    Args:
        model_config: transformers configuration of the base model, as `models.loading.load_model_config` gives it.
        tuning: sizes of the adapters, and what may be changed to.
        training: `pairs_per_device`, `max_length` and `gradient_checkpointing` (`auto` recomputes as few layers as a card
            allows; where it does not hold even all of them recomputed, and in families that know no single ones, all).
        precision: as `precision_for` chose it.
        device_bytes: memory of the card, or None.
        longest: the longest row of the tokenised data; without it two responses of `max_length` are assumed.
        sampled: tokens of each response that every row holds behind these (reference samples).
        rows: those of the largest micro-batch where they are known, whole as they are trained on.

    Returns:
        The plan, with `first_change` where it does not fit and `rows` are not known.

    Raises:
        ConfigError: the family's own code does not run on tensors without storage.
    """
    setting = _Setting(
        *(model_config, tuning, training, precision, task, device_bytes, longest),
        *(tuple(sampled), tuple(rows)),
    )
    try:
        plan = setting.plan
        asked = plan.fits is False and not rows
        return replace(plan, first_change=_first_change(setting)) if asked else plan
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # by code of any family
        raise ConfigError(
            f"the memory of the {model_config.model_type} family cannot be planned ({first_line(error)}); nothing is wrong with the "
            "model: begin with training.pairs_per_device=1"
        ) from error


def memory_planner(
    model_config: Any, tuning: TuningConfig, training: TrainingConfig, task: Task, sampled: Sequence[int] = ()
) -> Callable[..., MemoryPlan]:
    """`plan_memory` of one training, all but its precision and the card."""
    return partial(
        plan_memory,
        model_config=model_config,
        tuning=tuning,
        training=training,
        task=task,
        sampled=sampled,
    )


def precision_for(
    plan: Callable[..., MemoryPlan],
    model: ModelConfig,
    tuning: TuningConfig,
    training: TrainingConfig,
    device_bytes: int | None,
) -> Precision:
    """The optimiser and number formats of a training: what the YAML says, or for `auto` what fits the card.

    Args:
        plan: `memory_planner` of this model and training.
        device_bytes: memory of the card, or None, without which nothing need be planned.

    Raises:
        ConfigError: as `resolve_precision` and `plan_memory`.
    """

    def fits(precision: Precision) -> bool:
        return plan(precision=precision, device_bytes=device_bytes).fits is not False

    chosen = fits if device_bytes else None
    return resolve_precision(tuning, learning_rate=training.learning_rate, model=model, plan_fits=chosen)


@dataclass(frozen=True)
class _Setting:
    """The arguments of `plan_memory`, to be changed one at a time."""

    model_config: Any
    tuning: TuningConfig
    training: TrainingConfig
    precision: Precision
    task: Task
    device_bytes: int | None
    longest: PrefixRow | None
    sampled: tuple[int, ...]
    rows: tuple[PrefixRow, ...] = ()

    def training_with(self, **changes: Any) -> "_Setting":
        return replace(self, training=self.training.model_copy(update=changes))

    @property
    def layers(self) -> int:
        return self.model_config.num_hidden_layers

    @property
    def lora(self) -> LoraConfig | None:
        return self.tuning.lora if self.precision.trained == "lora" else None

    @cached_property
    def states(self) -> MemoryPlan:
        """The plan without what a step adds."""
        precision = self.precision
        model = meta_model(self.model_config, task=self.task, dtype=precision.weights_dtype, lora=self.lora)
        trained = [p for p in model.parameters() if p.requires_grad]
        return MemoryPlan(
            parameters=sum(p.numel() for p in model.parameters()),
            trainable=sum(p.numel() for p in trained),
            weights=weight_bytes(model),
            gradients=_gradient_copies() * sum(p.numel() * p.element_size() for p in trained),
            optimizer=sum(state_bytes(p, precision.optimizer) for p in trained),
            device_bytes=self.device_bytes,
            layers=self.layers,
        )

    @cached_property
    def scratch(self) -> int:
        """Most bytes an optimiser step needs for itself, when activations are gone.

        The compiled 8-bit step holds both moments of one weight in float32; a fused float32 step holds nothing.
        """
        if self.precision.optimizer != "adamw_8bit_stochastic":
            return 0
        model = meta_model(self.model_config, task=self.task, dtype=self.precision.weights_dtype, lora=None)
        return 2 * torch.float32.itemsize * max(p.numel() for p in model.parameters())

    @cached_property
    def step(self) -> Callable[[int], StepBytes]:
        return rehearse_training(
            self.model_config,
            self.batch,
            task=self.task,
            dtype=self.precision.weights_dtype,
            lora=self.lora,
            autocast=self.precision.autocast,
        )

    @property
    def batch(self) -> BatchShape:
        """The largest micro-batch: where its rows are not known, of the longest one, or of a prompt token and full responses."""
        if self.rows:
            return _shape(self.model_config, self.rows)
        row = self.longest or PrefixRow((0,), ((0,) * (self.training.max_length - 1),) * 2)
        row = PrefixRow(row.prompt_ids, (*row.responses, *((0,) * tokens for tokens in self.sampled)))
        return _shape(self.model_config, [row] * self.training.pairs_per_device)

    def recomputing(self, layers: int) -> MemoryPlan:
        """The plan with so many layers recomputed."""
        return replace(_add_step(self.states, self.step(layers), self.scratch), recomputed=layers)

    @cached_property
    def plan(self) -> MemoryPlan:
        """With the layers recomputed that `training` says, for `auto` the fewest that fit a card."""
        chosen, card = self.training.gradient_checkpointing, self.device_bytes is not None
        if chosen is not True and (chosen is False or not card):
            return self.recomputing(0)
        most = self.recomputing(self.layers)
        if chosen is True or not most.fits:
            return most
        if (none := self.recomputing(0)).fits:
            return none
        some = meta_model(self.model_config, task=self.task, dtype=torch.float32, lora=None, layers=1)
        if not separate_layers(some):
            return most
        numbers = range(1, self.layers)
        fewest = bisect.bisect_left(numbers, True, key=lambda layers: bool(self.recomputing(layers).fits))
        return self.recomputing(numbers[fewest]) if fewest < len(numbers) else most

    @property
    def fits(self) -> bool:
        """Whether it fits; a step is not rehearsed where the states alone do not."""
        return bool(self.states.fits) and bool(self.plan.fits)


def _gradient_copies() -> int:
    """Data parallelism holds gradients a second time, in the buckets it sends."""
    return 2 if get_runtime().world_size > 1 and not requested_sharding() else 1


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def state_bytes(parameter: nn.Parameter, optimizer: str) -> int:
    """Bytes of both moments and the step count of one parameter."""
    count = parameter.numel()
    if optimizer == "adamw_8bit_stochastic" and count >= _MIN_8BIT and count % _BLOCK_8BIT == 0:
        return 2 * (count + 4 * count // _BLOCK_8BIT + _MAP_8BIT) + 4
    return 2 * count * parameter.element_size() + 4


def _shape(model_config: Any, rows: Sequence[PrefixRow]) -> BatchShape:
    """Sizes of the micro-batch of these rows."""
    longest, responses = max(row.longest for row in rows), sum(len(row.responses) for row in rows)
    predicted = sum(row.shared_length - len(row.prompt_ids) for row in rows)
    loaded = copy.deepcopy(model_config)
    loaded._attn_implementation = _attention(model_config)
    if supports_shared_prompts(loaded, longest):
        return BatchShape(len(rows), max(row.shared_length for row in rows), responses, predicted)
    return BatchShape(responses, longest, responses, predicted)


def _attention(model_config: Any) -> str:
    """As `models.loading` loads it: sdpa, or eager for an architecture that has no other."""
    return meta_model(
        model_config, task="policy", dtype=torch.bfloat16, lora=None, layers=1
    ).config._attn_implementation


def _add_step(states: MemoryPlan, step: StepBytes, scratch: int = 0) -> MemoryPlan:
    logits = max(0, step.head_backward - step.kept - step.mask)
    rest = max(step.peak, scratch) - step.mask - step.kept - logits
    return replace(states, activations=step.kept, logits=logits, mask=step.mask, rest=rest)


# ------------------------------------------------------------------ the first change to make
def _first_change(setting: _Setting) -> str:
    """The first single change, in the order of what it costs, that makes the plan fit."""
    for change, changed in _changes(setting):
        if changed.fits:
            return f"{change} ({changed.plan.total / GIB:.2f} GiB)"
    last = _smallest(setting)
    needed = f"{last.plan.total / GIB:.2f} GiB"
    together = (
        "tuning.method: lora, training.gradient_checkpointing: true and training.pairs_per_device: 1 together"
    )
    if last.fits:
        return f"{together} ({needed})"
    return f"a smaller model.name or a larger card: even {together} take {needed}"


def _changes(setting: _Setting) -> Iterator[tuple[str, _Setting]]:
    training, precision = setting.training, setting.precision
    if setting.plan.recomputed < setting.layers:
        yield "training.gradient_checkpointing: true", setting.training_with(gradient_checkpointing=True)
    for pairs in _halvings(training.pairs_per_device, 1):
        steps = math.ceil(training.gradient_accumulation_steps * training.pairs_per_device / pairs)
        change = f"training.pairs_per_device: {pairs} with training.gradient_accumulation_steps: {steps}"
        yield change, setting.training_with(pairs_per_device=pairs)
    for length in _halvings(training.max_length, _LEAST_LENGTH):
        shorter = setting.training_with(max_length=length)
        yield f"training.max_length: {length}", replace(shorter, longest=None)
    if precision.trained == "full" and precision.optimizer == "adamw_float32" and _bfloat16(precision):
        eight_bit = eight_bit_precision(precision.learning_rate)
        yield "tuning.optimizer: adamw_8bit_stochastic", replace(setting, precision=eight_bit)
    if precision.trained == "full":
        lora = lora_precision(setting.tuning, bfloat16=_bfloat16(precision))
        yield "tuning.method: lora", replace(setting, precision=lora)


def _halvings(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _bfloat16(precision: Precision) -> bool:
    """Whether `model.dtype` is bfloat16."""
    return precision.autocast or precision.weights_dtype == torch.bfloat16


def _smallest(setting: _Setting) -> _Setting:
    precision = lora_precision(setting.tuning, bfloat16=_bfloat16(setting.precision))
    smallest = setting.training_with(gradient_checkpointing=True, pairs_per_device=1)
    return replace(smallest, precision=precision)
