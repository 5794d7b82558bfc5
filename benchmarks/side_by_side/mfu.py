"""The one definition of model FLOP utilisation (MFU): a training's own operations beside what its card could do.

    MFU = 6 N tokens / (seconds x peak)

N counts every parameter but the input embedding matrix, which is looked up and not multiplied with; a head that is tied to it
is the same matrix and not counted either (ours runs on response tokens alone). Tokens are those that were processed, without
padding: where a prompt is shared between responses it counts once, and twice where it is processed twice. Attention scores
and the layers that are computed again in the backward pass are not counted: they cost time and add no operations.
"""

import re

import torch
from torch import nn

from prmd.runtime import get_device

PEAKS = {
    r"NVIDIA H100 (80GB HBM3|SXM\S*)": 989e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H200": 989e12,
    r"NVIDIA A100\S*( 80GB)?( PCIe)?": 312e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA GeForce RTX 5090": 209.5e12,
    r"NVIDIA GeForce RTX 4090": 165.2e12,
}
"""Dense bfloat16 FLOP/s with float32 accumulation by the whole name of a card, as torch gives it.

Source: NVIDIA's data sheets of H100, H200, A100 and L40S, where figures with sparsity are halved; of the two GeForce cards the
appendices of its Ada and RTX Blackwell architecture papers (a quarter of the sparse float16 figure that is advertised). Cards
of another name (NVL, laptops, parts of a card) have other figures and are not guessed.
"""


def peak_flops(card: str) -> float | None:
    """Dense bfloat16 FLOP/s of a card; None where it is not listed."""
    return next((peak for name, peak in PEAKS.items() if re.fullmatch(name, card)), None)


def own_card() -> str | None:
    """The name of this process's card, as torch gives it; None on a CPU."""
    device = get_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def counted_parameters(model: nn.Module) -> int:
    """N of the definition: parameters of a transformers model without its input embedding matrix."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    return whole - model.get_input_embeddings().weight.numel()


def mfu(
    *, parameters: int, tokens: float, seconds: float, card: str | None, processes: int = 1
) -> float | None:
    """The share of its card's peak that a training's own operations are.

    Args:
        parameters: N, from `counted_parameters`.
        tokens: processed without padding, by all processes together.
        seconds: in which they were.
        card: its name; each process has one of these.

    Returns:
        Between 0 and 1; None for a CPU and for a card that is not listed.
    """
    peak = peak_flops(card) if card else None
    return 6.0 * parameters * tokens / (seconds * peak * processes) if peak else None
