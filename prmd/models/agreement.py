"""Whether log-probabilities and rewards are computed here as the model computes them itself, measured on a few short rows.

Here they come from the last hidden states of rows in a common batch (`sequence_models`). A family may do more behind its head
than is known here, look past the mask of a shared prompt, or turn positions by the longest row of a batch. Each is measured
before anything is computed with a model, once in a process for a configuration: the first and the last are refused, and where
a prompt cannot be shared, each response gets a row of its own.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prmd.errors import ConfigError
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import (
    SequenceLogps,
    SequenceRewards,
    share_no_prompts,
    supports_shared_prompts,
)
from prmd.models.tokenization import PrefixRow, Tokens

logger = logging.getLogger(__name__)

_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_ROUNDING = 0.1
"""By which share of the spread of logits, or size of rewards, two ways to compute them may differ, float32 and others."""
_NOISE = 4.0
"""How many times as far as the model's own numbers move when padding is put behind a row."""
_PADDING = 3
_checked: dict[tuple[str, ...], int] = {}
"""The longest row up to which a model was found to agree."""


def check_agreement(model: nn.Module, scorer: SequenceLogps | SequenceRewards, *, longest: int) -> None:
    """Compare what `scorer` computes with the model's own forward pass.

    Args:
        model: the causal model or one-logit classifier that `scorer` wraps, with its adapters.
        longest: tokens of the longest conversation that is going to be computed.

    Raises:
        ConfigError: they differ by more than rounding, or depend on the other rows of a batch; says by how much.
    """
    config, weight = scorer.unwrapped.config, next(model.parameters())
    head = scorer.unwrapped.get_output_embeddings() if isinstance(scorer, SequenceLogps) else None
    key = (
        *(type(scorer.unwrapped).__name__, config.to_json_string(), str(weight.dtype), weight.device.type),
        str(type(head)),  # an adapter may wrap it
    )
    if _checked.get(key, 0) >= longest:
        return
    with _evaluating(model), torch.no_grad():
        _compare(model, scorer, longest)
    _checked[key] = longest


@dataclass(frozen=True)
class Agreement:
    """How far two ways to compute a model's numbers are apart on short rows.

    Attributes:
        apart: the largest difference, in nats a token of log-probabilities, or of a reward.
        allowed: what may be rounding.
    """

    apart: float
    allowed: float


def measure_agreement(
    model: nn.Module, scorer: SequenceLogps | SequenceRewards, *, longest: int
) -> Agreement:
    """The comparison of `check_agreement`, whether or not it was made before; the same arguments and refusals."""
    with _evaluating(model), torch.no_grad():
        return _compare(model, scorer, longest)


def _compare(model: nn.Module, scorer: SequenceLogps | SequenceRewards, longest: int) -> Agreement:
    config, rows = scorer.unwrapped.config, _rows(scorer.unwrapped.config)
    own = torch.tensor([_own(model, scorer, row, r)[0] for row in rows for r in row.responses])
    found = [_own(model, scorer, row, r, _PADDING) for row in rows for r in row.responses]
    noise = float((own - torch.tensor([value for value, _ in found])).abs().max())
    spread = max(spread for _, spread in found)
    allowed = max(_ROUNDING.get(next(model.parameters()).dtype, _HALF_ROUNDING) * spread, _NOISE * noise)

    def apart(share_prompt: bool, beside: int = 0) -> float:
        return float((_ours(scorer, rows, share_prompt=share_prompt, beside=beside) - own).abs().max())

    name = config.name_or_path or config.model_type
    what = "log-probabilities" if isinstance(scorer, SequenceLogps) else "rewards"
    unit = "nats a token" if isinstance(scorer, SequenceLogps) else "of a reward"
    if not (alone := apart(False)) <= allowed:
        raise ConfigError(
            f"{name}: its {what} are not computed here as by the model itself: {alone:.3g} {unit} apart on short rows, "
            f"where {allowed:.1g} may be rounding; the {config.model_type} family does more behind its layers than is known "
            "here, choose a model of another family"
        )
    if supports_shared_prompts(config, max(row.longest for row in rows)) and not apart(True) <= allowed:
        logger.info("%s: its responses see each other where they share a prompt; each gets its own row", name)
        share_no_prompts(config)
    if _has_rope(config) and not (figure := apart(False, beside=longest)) <= allowed:
        raise ConfigError(
            f"{name}: its {what} depend on the longest row of a batch: {figure:.3g} {unit} apart beside one of {longest} "
            f"tokens, where {allowed:.1g} may be rounding, for its RoPE follows lengths ({rope_type(config)}); set "
            f"training.max_length to at most {trained_length(config)}, or another rope_type in its config.json"
        )
    return Agreement(alone, allowed)


def _own(
    model: nn.Module, scorer: nn.Module, row: PrefixRow, response: Tokens, padding: int = 0
) -> tuple[float, float]:
    """The model's own reward, or log-probability per token, of a conversation, and the size or spread of its numbers."""
    device, pad = next(model.parameters()).device, _pad(model)
    if isinstance(scorer, SequenceRewards) and pad is None:
        padding = 0  # a classifier without a pad token reads the last token, whatever it is
    ids = [*row.prompt_ids, *response]
    input_ids = torch.tensor([ids + [pad or 0] * padding], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * padding], device=device)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[0].float().cpu()
    if isinstance(scorer, SequenceRewards):
        return float(logits[0]), float(logits[0].abs())
    logits = logits[len(row.prompt_ids) - 1 : len(ids) - 1]
    logps = logits.log_softmax(dim=-1).gather(1, torch.tensor(response)[:, None])
    return float(logps.mean()), float(logits.std(dim=-1).max())


def _ours(
    scorer: SequenceLogps | SequenceRewards, rows: list[PrefixRow], *, share_prompt: bool, beside: int
) -> Tensor:
    """[S] the same from the project's own path; `beside`: with the positions of a row of so many tokens in the batch."""
    model = scorer.unwrapped
    batch = collate_rows(rows, pad_id=_pad(model) or 0, share_prompt=share_prompt)
    if beside > batch["position_ids"].shape[1]:
        longer = batch["position_ids"][:1] + beside - batch["position_ids"].shape[1]
        batch["position_ids"] = torch.cat([batch["position_ids"], longer])
        for name in ("input_ids", "segment_ids"):
            batch[name] = torch.cat([batch[name], batch[name][:1]])
    device = next(model.parameters()).device
    values = scorer(**{name: tensor.to(device) for name, tensor in batch.items()}).float().cpu()
    counted = [len(response) for row in rows for response in row.responses]
    return values / torch.tensor(counted) if isinstance(scorer, SequenceLogps) else values


def _rows(config: Any) -> list[PrefixRow]:
    """A prompt with two responses and a shorter one with one, of plain tokens."""
    special = set(_special_ids(config.to_dict()))
    plain = [i for i in range(config.get_text_config().vocab_size) if i not in special]
    tokens = tuple(plain[(37 * k + 11) % len(plain)] for k in range(16))
    return [
        PrefixRow(tokens[:5], (tokens[5:8], tokens[8:12])),
        PrefixRow(tokens[12:14], (tokens[14:16],)),
    ]


def _special_ids(values: dict[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            yield from (i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))


def _pad(model: nn.Module) -> int | None:
    pad = model.config.get_text_config().pad_token_id
    return pad if pad is not None and pad >= 0 else None


def _rope(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return next(
        (value for value in found.values() if isinstance(value, dict)), found
    )  # one for each kind of layer


def _has_rope(config: Any) -> bool:
    return bool(_rope(config)) or getattr(config.get_text_config(), "rope_theta", None) is not None


def rope_type(config: Any) -> str:
    """How positions are turned, of a transformers configuration: `default`, `dynamic`, ...; `None` where it does not say."""
    return str(_rope(config).get("rope_type") or _rope(config).get("type"))


def trained_length(config: Any) -> Any:
    """Tokens a model of this configuration was trained on, or words where it does not say."""
    return _rope(config).get("original_max_position_embeddings") or getattr(
        config.get_text_config(), "max_position_embeddings", "the length it was trained on"
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
