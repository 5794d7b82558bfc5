"""LoRA on a loaded model: PEFT's configuration, float32 adapters, and saving them merged into their base.

Loading a model or a saved adapter is in `models`; several adapters that share one base are in `adapters`.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.config.shared import LoraConfig


def lora_config(lora: LoraConfig, *, task: str) -> PeftLoraConfig:
    """PEFT's configuration of LoRA on every linear layer but the head.

    Args:
        task: `CAUSAL_LM` or `SEQ_CLS`; a classifier's `score` head is trained and saved with the adapter.
    """
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def add_lora(model: PreTrainedModel, lora: LoraConfig, *, task: str) -> PeftModel:
    """Wrap `model` with float32 adapters; the base weights are frozen."""
    adapted = get_peft_model(model, lora_config(lora, task=task), autocast_adapter_dtype=True)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def save_merged(model: PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path, *, dtype: str) -> None:
    """Merge an adapter into its base, save what any transformers user can load, and keep the adapter in `adapter/`.

    Args:
        model: base in float32, so that merging adds no rounding of its own.
        dtype: number format of the saved weights.
    """
    model.save_pretrained(directory / "adapter")
    _forget_local_base(directory / "adapter" / "adapter_config.json")
    merged = model.merge_and_unload().to(getattr(torch, dtype))
    merged.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _forget_local_base(adapter_config: Path) -> None:
    """Keep the base's folder name, not the absolute path that holds on this machine alone."""
    values = json.loads(adapter_config.read_text(encoding="utf-8"))
    base = values.get("base_model_name_or_path") or ""
    if Path(base).is_absolute():
        values["base_model_name_or_path"] = Path(base).name
    io.write_json(adapter_config, values)
