"""A model on a card: its weights are read straight to it, and what sampled responses take of its memory beside them.

Told the device, transformers puts each tensor there in its number format as it reads it. It then also draws there what no file
holds, a new head, and computes the buffers, such as those of rotary positions. Here both are made on the host, as for a model
that is moved later: equal on every machine, by the generator that was seeded.

Sampling is counted from the configuration alone, so that a dry run and a sampling give the same number. What a training takes
is planned in `training.memory`.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prmd.config.shared import BatchSize

USABLE = 0.92
"""Share of a card that tensors may fill; the driver's context and the allocator's fragments take the rest."""


# ------------------------------------------------------------------ reading weights
Loaded = tuple[PreTrainedModel, dict[str, Any]]
"""A model and what transformers says of its loading."""
HOST = torch.device("cpu")


def read_onto(device: torch.device, read: Callable[..., Loaded]) -> Loaded:
    """What `read` loads, on `device`.

    Args:
        read: `from_pretrained` with `output_loading_info`, but for the argument that says where.
    """
    loaded, info = _straight(device, read) if _goes_straight(device) else read()
    return loaded.to(device), info


def _goes_straight(device: torch.device) -> bool:
    """Whether it is a card, and no library spreads weights over several."""
    spread = (
        os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")
    )
    return device.type == "cuda" and not any(spread)


def _straight(device: torch.device, read: Callable[..., Loaded]) -> Loaded:
    """Weights on `device`, and what no file holds on the host."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        loaded, info = read(device_map={"": device})
    _make_on_host(loaded, info["missing_keys"])
    return loaded, info


def _make_on_host(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Draw and compute again, on the host, the tensors that no file holds; only they are left there."""
    absent = {*missing, *(name for name, _ in model.named_non_persistent_buffers())}
    for prefix, module in model.named_modules():
        module._is_hf_initialized = (
            False  # a family may set a layer's buffer where it initializes the model, as Falcon-H1
        )
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if f"{prefix}.{key}".lstrip(".") in absent and tensor is not None:
                    fresh = torch.empty_like(tensor, device=HOST)
                    trained = isinstance(tensor, nn.Parameter)
                    held[key] = nn.Parameter(fresh, tensor.requires_grad) if trained else fresh
                elif tensor is not None:
                    tensor._is_hf_initialized = True  # by which transformers leaves it as it was read
    model.initialize_weights()


# ------------------------------------------------------------------ sampling
SEQUENCES_WITHOUT_CARD = 32
"""Responses sampled at once on a CPU, which larger batches do not make faster and which has no memory of its own to fill."""
MOST_SEQUENCES = 1024
"""More are never sampled at once: a tensor of 2^31 elements, from where on some kernels count wrongly, stays out of reach."""


@dataclass(frozen=True)
class SamplingBytes:
    """Bytes beside the weights.

    Attributes:
        cached: keys and values of one token in all layers.
        logits: of the next token of one sequence: as the model gives them, in float32, and with noise.
        read: of one prompt token in a layer while prompts are read: what goes through its MLP, and hidden states.
    """

    cached: int
    logits: int
    read: int

    def of_prompt(self, length: int, *, samples: int, new_tokens: int) -> int:
        """The most that one prompt takes: while it is read, or at the last token of all its samples.

        Args:
            length: its tokens, or those of the longest prompt of its batch.
        """
        reading = length * (self.cached + self.read)
        return max(reading, samples * ((length + new_tokens) * self.cached + self.logits))

    def prompts_in(self, free: int, length: int, *, samples: int, new_tokens: int) -> int:
        """Prompts sampled at once within so many bytes, one at least; arguments as of `of_prompt`."""
        fitting = free // self.of_prompt(length, samples=samples, new_tokens=new_tokens)
        return max(1, min(fitting, MOST_SEQUENCES // samples))


def prompts_at_once(
    batch_size: BatchSize, sizes: SamplingBytes | None, free: int | None, *, samples: int, new_tokens: int
) -> Callable[[int], int]:
    """Prompts of a batch by the tokens of its longest.

    Args:
        batch_size: responses at once, or `auto` for as many as fit.
        sizes: None where nothing is known of the family.
        free: bytes for them; None without a card.
        samples, new_tokens: of each prompt, and at most of each sample.
    """
    if batch_size == "auto" and sizes is not None and free is not None:
        return lambda length: sizes.prompts_in(free, length, samples=samples, new_tokens=new_tokens)
    responses = SEQUENCES_WITHOUT_CARD if batch_size == "auto" else batch_size
    return lambda length: max(1, responses // samples)


def sampling_bytes(model_config: Any, dtype: torch.dtype) -> SamplingBytes | None:
    """Count from a transformers configuration; None where the family has no attention heads that could be counted."""
    try:
        config = model_config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return SamplingBytes(
            cached=2 * config.num_hidden_layers * heads * width * dtype.itemsize,
            logits=config.vocab_size * (dtype.itemsize + 2 * torch.float32.itemsize),
            read=(3 * inner + 8 * config.hidden_size) * dtype.itemsize,
        )
    except AttributeError:
        return None
