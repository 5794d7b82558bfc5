"""Where the weights of a model go while they are read: on a card straight to it, without a copy of all of them on the host.

transformers puts each tensor on its device in its number format as it reads it, where it is told the device. It then also
draws there what no file holds, a new head, and computes the buffers, such as those of rotary positions. Here both are made on
the host, as for a model that is moved later: equal on every machine, by the generator that was seeded.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

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
