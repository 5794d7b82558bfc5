"""Log-probabilities, rewards and gradients of shared rows on the device against float64 on the CPU, one conversation at a time."""

import copy
import math
from typing import Any

import pytest
import torch
from model_families import family_config, gradients, separate_logps, separate_rewards
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.models.tokenization import PrefixRow

FLOAT32 = 1e-4
"""Of a number and of the whole gradient; the CPU is at most 3e-6 from float64."""

BFLOAT16 = 3 * math.sqrt(27) * 2**-8
"""Of the size of a logit. Between a token and its logit, two layers round 13 times each in a row (norm, query, key, rotation,
probabilities, mixture, output, sum; norm, gate and up, product, down, sum), and the last norm once: 27 independent errors of at
most 2^-8 of what is rounded add up to at most sqrt(27) 2^-8 as a standard deviation, of which this is three. A CPU reaches half
of it. A token that looks where it may not is off by the size of a logit."""


def random_rows() -> list[PrefixRow]:
    """Four rows of two responses, up to 130 tokens."""
    generator = torch.Generator().manual_seed(4)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 61, (count,), generator=generator).tolist())

    return [PrefixRow(tokens(40 + 9 * i), (tokens(60 + i), tokens(31))) for i in range(4)]


def a_model(family: str, task: str) -> nn.Module:
    """Two layers in float32, in evaluation mode, on the CPU."""
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM if task == "policy" else AutoModelForSequenceClassification
    config = family_config(family, head_dim=16, hidden_size=64)
    return auto.from_config(config, attn_implementation="sdpa").eval()


def rms_logit(model: nn.Module) -> float:
    """Root mean square of logits or rewards: rows of the head against hidden states that a norm has given size 1 each."""
    head = model.score if hasattr(model, "score") else model.lm_head
    return float(head.weight.detach().double().square().sum(dim=1).mean().sqrt())


@pytest.mark.parametrize("number_format", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("task", ["policy", "reward_model"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_shared_rows_are_those_of_float64(
    device: torch.device, family: str, task: str, number_format: str
) -> None:
    rows, base = random_rows(), a_model(family, task)
    half = number_format != "float32"
    held = base.to(torch.bfloat16 if number_format == "bfloat16" else torch.float32)
    exact = copy.deepcopy(held).double()
    wanted = (separate_logps if task == "policy" else separate_rewards)(exact, rows)

    model = copy.deepcopy(held).to(device)
    batch = {name: tensor.to(device) for name, tensor in collate_rows(rows, pad_id=0).items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=number_format == "autocast"):
        found = (SequenceLogps if task == "policy" else SequenceRewards)(model)(**batch)
    assert found.dtype == torch.float32 and found.device.type == device.type

    tokens = torch.tensor([len(y) if task == "policy" else 1 for row in rows for y in row.responses])
    allowed = FLOAT32 * (1 + wanted.abs())
    if half:  # errors of the tokens of a response are independent
        allowed = BFLOAT16 * rms_logit(exact) * tokens.double().sqrt()
    difference = (found.detach().cpu().double() - wanted.detach().double()).abs()
    assert bool((difference <= allowed).all()), (difference / allowed).tolist()

    weights = torch.randn(len(wanted), generator=torch.Generator().manual_seed(1))
    ours = gradients(model, (found * weights.to(device)).mean())
    theirs = gradients(exact, (wanted * weights).mean())
    assert ours.keys() == theirs.keys()
    # the backward pass rounds as often again
    assert relative(ours, theirs) <= (math.sqrt(2) * BFLOAT16 if half else FLOAT32)


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Distance of two gradients over the length of the second."""
    apart = sum(float((ours[name].cpu().double() - g).square().sum()) for name, g in theirs.items())
    return math.sqrt(apart / sum(float(g.square().sum()) for g in theirs.values()))
