"""Sampling noise that belongs to a token, not to a batch: Gumbel-max with the output of a counter-based generator.

    next token = argmax_v (z_v + g_v),   g_v = -log(-log(1 - u_v)),   u_v uniform on (0, 1)

is a draw from softmax(z). Here u_v is a function of (seed, prompt, number of the sample, position, v) alone, so a response does
not depend on what is sampled beside it, before it or by which process; what remains are the rounding of the model's own logits,
which batches of other shapes may change, and ties by it. The generator is SplitMix64 in integer arithmetic, equal on every device.
"""

import hashlib

import torch
from torch import Tensor
from transformers import LogitsProcessor

_GAMMA = 0x9E3779B97F4A7C15
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""Shifts and factors of SplitMix64."""

_BLOCK = {"cpu": 2**17}
_BLOCK_ELSEWHERE = 2**23
"""Numbers made at a time: what fits a core's cache, and elsewhere 64 MiB of integers."""


def sample_key(seed: int, prompt: str, sample: int) -> int:
    """The signed 64-bit key of one sample's noise.

    Args:
        prompt: the key of its tokens (`cache.tokens_key`), hexadecimal.
        sample: its number among those of the prompt.
    """
    digest = hashlib.sha256(f"{seed}-{prompt}-{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def splitmix64(seeds: Tensor, count: int, *, start: int = 0) -> Tensor:
    """Outputs `start` to `start + count - 1` of SplitMix64 from each seed.

    Args:
        seeds: int64 [R], read as unsigned.

    Returns:
        int64 [R, count], read as unsigned.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014).
    """
    steps = torch.arange(start + 1, start + count + 1, device=seeds.device)
    # Products of int64 tensors wrap around, which is multiplication modulo 2^64; a shift to the right copies the sign, which
    # the mask takes away again.
    bits = seeds[:, None] + steps * _signed(_GAMMA)
    for shift, factor in _MIXING:
        bits ^= (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        if factor != 1:
            bits *= _signed(factor)
    return bits


def gumbel(seeds: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise, float32 [R, count], from int64 seeds [R].

    The largest g belong to the smallest u, which float32 holds to 24 binary digits down to 2^-63: a token of probability 1e-17
    is still drawn as often as it should be.
    """
    uniform = splitmix64(seeds, count).bitwise_and_(2**63 - 1).to(torch.float32).mul_(2.0**-63)
    # Neither u = 0, a g of +inf, nor the u that float32 rounds to 1, a g of -inf that no only possible token may have.
    uniform.clamp_(2.0**-64, 1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


class KeyedGumbel(LogitsProcessor):
    """Adds its noise to the logits of the next token, so that greedy decoding of the sum samples from their softmax.

    It stands behind every processor that changes the distribution (temperature, top-p).

    Args:
        keys: int64 [R], the `sample_key` of each row of the batch.
        prompt_width: columns of the batch that are prompt.
    """

    def __init__(self, keys: Tensor, prompt_width: int) -> None:
        self.keys, self.prompt_width = keys, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits with noise, [R, V]; entries of -inf stay."""
        position = input_ids.shape[1] - self.prompt_width
        seeds = splitmix64(self.keys, 1, start=position)[:, 0]
        count = scores.shape[1]
        rows = max(1, _BLOCK.get(scores.device.type, _BLOCK_ELSEWHERE) // count)
        blocks = zip(seeds.split(rows), scores.split(rows), strict=True)
        return torch.cat([gumbel(own, count).add_(part) for own, part in blocks])


def _signed(number: int) -> int:
    """The int64 of the same bits."""
    return number - 2**64 if number >= 2**63 else number
