"""Weights spread over several GPUs (FSDP2, ZeRO-3): prepared for our models, and proved to be spread before the first step.

`accelerate` ignores a sharding it cannot give (FSDP2 without GPUs becomes plain data parallelism, without an error), and
then every card holds everything. How the processes are started is in `configs/accelerate/`, the training in `trainer`.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prmd.errors import ConfigError

Sharding = Literal["FSDP", "ZeRO-3"]
Item = TypeVar("Item")


def requested_sharding() -> Sharding | None:
    """What `accelerate launch` was configured with, as it tells the processes it starts; None for data parallelism."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "FSDP"
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    return "ZeRO-3" if deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else None


def prepare_fsdp(accelerator: Accelerator, model: nn.Module) -> None:
    """Let FSDP2 shard our wrapper layer by layer and compute as one GPU would.

    Without the names of the layers, all weights would be gathered at once. And accelerate's own policy for bfloat16
    returns bfloat16 outputs, in which a log-probability of -100 is known to 0.5; autocast leaves them in float32.

    Args:
        accelerator: before it prepares the model; nothing is done where it does not use FSDP.
        model: `SequenceRewards` or `SequenceLogps`.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy  # absent from torch without distributed

    layers = set(getattr(model.unwrapped, "_no_split_modules", None) or ())
    model._no_split_modules = sorted(layers & {type(module).__name__ for module in model.modules()})
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    # a cached bfloat16 copy of every gathered weight would undo the sharding until the end of the forward pass
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)


def check_sharded(model: nn.Module, *, sharding: Sharding, processes: int) -> None:
    """Refuse a prepared model of which a process holds more than its share.

    Args:
        model: after `accelerator.prepare`.
        processes: number of processes; a single one has nothing to share.

    Raises:
        ConfigError: a parameter is not spread over all processes; the first and largest such are named.
    """
    if processes < 2:
        return
    held = {name: own_part(parameter).numel() for name, parameter in model.named_parameters()}
    wanted = {name: _share(parameter, processes) for name, parameter in model.named_parameters()}
    whole = [name for name in held if held[name] > wanted[name]]
    if not whole:
        return
    largest = max(whole, key=lambda name: held[name])
    total = _elements(dict(model.named_parameters())[largest])
    raise ConfigError(
        f"{sharding} was asked for, but the model is not sharded: parameter {largest} holds {held[largest]:,} of "
        f"{total:,} elements on each of {processes} processes, wanted at most {wanted[largest]:,} "
        f"({len(whole)} of {len(held)} parameters are like it); accelerate shards on GPUs alone, and FSDP needs "
        "fsdp_version: 2; without them launch with configs/accelerate/ddp.yaml"
    )


def own_part(tensor: Any) -> Tensor:
    """What this process keeps between steps of a parameter or gradient that may be spread over several; it may be empty."""
    if hasattr(tensor, "to_local"):  # a DTensor
        return tensor.to_local()
    return tensor.ds_tensor if hasattr(tensor, "ds_id") else tensor


def _elements(parameter: Any) -> int:
    return parameter.ds_numel if hasattr(parameter, "ds_id") else parameter.numel()


def _share(parameter: Any, processes: int) -> int:
    """Most elements a process may hold: FSDP2 deals out rows of the first dimension, ZeRO-3 single elements."""
    if hasattr(parameter, "to_local") and parameter.dim():
        return math.ceil(parameter.shape[0] / processes) * math.prod(parameter.shape[1:])
    return math.ceil(_elements(parameter) / processes)


class RefuseUnsharded(TrainerCallback):
    """Checks the prepared model once, before the first step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if sharding := requested_sharding():
            check_sharded(kwargs["model"], sharding=sharding, processes=args.world_size)


def in_step(items: Sequence[Item], *, rank: int, processes: int) -> list[tuple[Item, bool]]:
    """This process's items, and whether each counts; all processes get equally many.

    A sharded model gathers its weights in every forward pass, and a process that has one pass less than the others
    would leave them waiting: it repeats an item, which does not count. Where there are fewer items than processes,
    every process takes all, and means over all processes stay the same.
    """
    if len(items) < processes:
        return [(item, True) for item in items]
    own = items[rank::processes]
    rounds = math.ceil(len(items) / processes)
    return [(item, True) for item in own] + [(own[-1], False)] * (rounds - len(own))
