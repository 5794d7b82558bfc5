"""Tiny random models of several decoder families, and what they compute for one conversation at a time: the oracle.

The oracle knows nothing of `prmd`: it feeds one unpadded conversation to the plain transformers model, without a mask.
"""

from collections.abc import Sequence
from functools import cache

import torch
from hypothesis import strategies as st
from tiny_models import SMALL
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from prmd.models.tokenization import PrefixRow

VOCABULARY = 61
FAMILIES = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}
SHARED = ("llama", "qwen2", "qwen3", "mistral", "gemma")
"""Families whose rows may hold several responses, with their default attention window."""


def family_config(name: str, **changes: object) -> PreTrainedConfig:
    """The configuration of a family in `SMALL` size."""
    sizes = {"vocab_size": VOCABULARY, "head_dim": 8, "max_position_embeddings": 256}
    values = {"initializer_range": 0.15, "eos_token_id": 1, "num_labels": 1}
    return FAMILIES[name](**(SMALL | sizes | values | changes))


def attention_of(name: str) -> str:
    return "eager" if name == "gemma2" else "sdpa"


@cache
def causal_model(name: str, window: int | None = None) -> nn.Module:
    """A causal model in evaluation mode; `window` is its attention window (None: the family's default)."""
    torch.manual_seed(7)
    changes = {} if window is None else {"sliding_window": window}
    model = AutoModelForCausalLM.from_config(
        family_config(name, **changes), attn_implementation=attention_of(name)
    )
    return _make_norms_matter(model).eval()


@cache
def classifier(name: str, window: int | None = None) -> nn.Module:
    """A one-logit classifier in evaluation mode."""
    torch.manual_seed(8)
    changes = {} if window is None else {"sliding_window": window}
    model = AutoModelForSequenceClassification.from_config(
        family_config(name, **changes), attn_implementation=attention_of(name)
    )
    return _make_norms_matter(model).eval()


def _make_norms_matter(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def rows_of(
    *, max_rows: int = 3, max_responses: int = 4, lowest: int = 2
) -> st.SearchStrategy[list[PrefixRow]]:
    """Rows of random lengths; one-token prompts and one-token responses included, pad and end tokens excluded."""
    token = st.integers(lowest, VOCABULARY - 1)
    tokens = st.lists(token, min_size=1, max_size=9).map(tuple)
    responses = st.lists(tokens, min_size=1, max_size=max_responses).map(tuple)
    return st.lists(st.builds(PrefixRow, tokens, responses), min_size=1, max_size=max_rows)


def separate_logps(model: nn.Module, rows: Sequence[PrefixRow]) -> Tensor:
    """log pi(y|x) of every response by a forward pass of its own, [S] float32 nats."""
    sums = []
    for row in rows:
        for response in row.responses:
            ids = torch.tensor([row.prompt_ids + response])
            table = model(input_ids=ids).logits[0].float().log_softmax(-1)
            begin = len(row.prompt_ids)
            picked = [table[begin + t - 1, token] for t, token in enumerate(response)]
            sums.append(torch.stack(picked).sum())
    return torch.stack(sums)


def separate_rewards(model: nn.Module, rows: Sequence[PrefixRow]) -> Tensor:
    """Score of every conversation by the plain classifier's own `forward`, [S]."""
    scores = [
        model(input_ids=torch.tensor([row.prompt_ids + response])).logits[0, 0]
        for row in rows
        for response in row.responses
    ]
    return torch.stack(scores)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """d loss / d parameter by name; parameters the loss does not reach are left out."""
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to 1e-4 of each parameter's largest gradient, beside float32's rounding of the whole model's largest."""
    assert ours.keys() == expected.keys()
    rounding = 3e-6 * max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        allowed = 1e-4 * float(gradient.abs().max()) + rounding
        assert float((ours[name] - gradient).abs().max()) <= allowed, name
