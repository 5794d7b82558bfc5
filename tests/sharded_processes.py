"""Small trainings, started by `test_sharding` alone and in two processes whose weights FSDP2 shards on the CPU.

    python tests/sharded_processes.py DIRECTORY

accelerate shards on accelerators only and ignores FSDP2 on a CPU. With `PRMD_TEST_SHARDS` this script tells it otherwise;
what then runs is accelerate's own code for FSDP2, on gloo. Every process writes what it saw to `rank-<r>.json`, the main
one the parameters it ended with to `<name>.safetensors`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from gloo_processes import only_the_main_process_writes, record_rank
from safetensors.torch import save_file
from tiny_models import tiny_config
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from transformers.training_args import OptimizerNames
from two_processes import train

from prmd.config.shared import LoraConfig
from prmd.errors import ConfigError
from prmd.models.loading import add_lora
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.training.rehearsal import enable_gradient_checkpointing

PAIRS_PER_STEP = 8


def tied_policy() -> nn.Module:
    """All weights, embeddings tied as Qwen2.5's and SmolLM2's, layers recomputed."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=True))
    enable_gradient_checkpointing(model)
    return SequenceLogps(model)


def reward_model() -> nn.Module:
    """The first of two layers recomputed."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1))
    enable_gradient_checkpointing(model, 1)
    return SequenceRewards(model)


def adapters() -> nn.Module:
    """Float32 adapters on weights held in bfloat16."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).to(torch.bfloat16)
    return SequenceLogps(add_lora(model, LoraConfig(r=4, alpha=8, dropout=0.0), task="CAUSAL_LM"))


TRAININGS = {
    "policy": (tied_policy, {"optimizer": OptimizerNames.ADAMW_TORCH_FUSED}),
    "reward_model": (reward_model, {}),
    "lora": (adapters, {"bf16": True}),
}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, gathered from all processes."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name] = value.detach().clone()
    return found


def shard_on_cpu() -> None:
    """Let every `PartialState` (a new one for each training) say that these processes have accelerators."""
    real = PartialState.__init__

    def init(self: PartialState, *arguments: Any, **keywords: Any) -> None:
        real(self, *arguments, **keywords)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def record(directory: Path, name: str, *, resume: bool) -> dict[str, Any]:
    make, options = TRAININGS[name]
    model = make()
    total = sum(p.numel() for p in model.parameters())
    trainer = train(
        directory / name,
        PAIRS_PER_STEP,
        model=model,
        **options,
        resume=resume,
    )
    parameters = list(trainer.model.parameters())
    local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    weights = whole(trainer.model)
    if trainer.args.should_save:
        save_file(weights, directory / f"{name}{'-resumed' if resume else ''}.safetensors")
    layers = trainer.model.unwrapped.model.layers
    return {
        "logs": trainer.state.log_history,
        "share_held": local / total,
        "layers_sharded": all(isinstance(layer, FSDPModule) for layer in layers),
    }


def main(directory: Path) -> None:
    if "PRMD_TEST_SHARDS" in os.environ:
        shard_on_cpu()
    only_the_main_process_writes()
    records: dict[str, Any] = {}
    try:
        for name in TRAININGS:
            records[name] = record(directory, name, resume=False)
        records["policy-resumed"] = record(directory, "policy", resume=True)
    except ConfigError as error:
        records["refused"] = str(error)
    record_rank(directory, records)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
