"""Which kernel reads rows that share a prompt: `sdpa` with a mask over all pairs of tokens, or `flex_attention`.

Given such a mask, `sdpa` computes every pair of tokens and cannot use its fastest kernels; `flex_attention` skips blocks
that nobody looks at, such as rejected x chosen, but is compiled for every shape (11 to 15 s each on an H100) and was
slower there up to 511 tokens. It is a choice for long rows, and `auto` is `sdpa`. The switch is an attention function that
takes flex for a `BlockMask` and sdpa for everything else, so generation and TRL run as if it were not there. What a token
may look at is in `prefix_rows`; who asks for a mask is `sequence_models`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prmd.errors import ConfigError
from prmd.models.prefix_rows import attention_mask, may_look
from prmd.runtime import get_device, missing_compiler

Model = TypeVar("Model")

SDPA_OR_FLEX = "sdpa_or_flex"
"""Attention of a model whose shared rows always go to `flex_attention`."""

BLOCK = 128
"""Side of the blocks that `flex_attention` skips or computes."""

_RECOMPILATIONS = 64


# ------------------------------------------------------------------ the choice
def or_eager(build: Callable[[str], Model], attention: str) -> Model:
    """What `build` makes with this attention, or with eager for an architecture that has no sdpa attention (Gemma 2)."""
    try:
        return build(attention)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return build("eager")


def plain_attention(model_config: Any) -> str:
    """sdpa, or eager where scores have a soft cap, which sdpa leaves out: older releases offer it to Gemma 2 all the same."""
    capped = getattr(model_config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped else "sdpa"


def attention_implementation(asked: str, model_config: Any) -> str:
    """The name of the attention a model is to be loaded with.

    Args:
        asked: `model.attention` of the configuration.
        model_config: the model's transformers configuration.

    Raises:
        ConfigError: `flex_attention` was asked for and cannot run here.
    """
    plain = plain_attention(model_config)
    if asked != "flex_attention" or plain == "eager":
        return plain
    if obstacle := _obstacle(model_config.get_text_config()):
        raise ConfigError(
            f"model.attention: flex_attention cannot run here: {obstacle}; set model.attention: auto, or sdpa"
        )
    # rows come in many lengths; past the limit, flex_attention would run uncompiled and hold all scores
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILATIONS)
    return SDPA_OR_FLEX


def _obstacle(text_config: Any) -> str | None:
    """Why `flex_attention` cannot run for a model on this machine, or None."""
    if get_device().type != "cuda":
        return "it needs a CUDA GPU, and this run has none"
    if missing := missing_compiler():
        return f"it is compiled, and {missing} is missing"
    if (head_dim := _head_dim(text_config)) < 16 or head_dim & (head_dim - 1):
        return f"its heads need a power of two from 16 as their size, and this model's have {head_dim}"
    if getattr(text_config, "attention_dropout", 0.0):
        return f"it has no dropout, and this model's attention_dropout is {text_config.attention_dropout:g}"
    return None


def _head_dim(text_config: Any) -> int:
    own = getattr(text_config, "head_dim", None)
    return own or text_config.hidden_size // text_config.num_attention_heads


# ------------------------------------------------------------------ masks
def rows_mask(model: nn.Module, segment_ids: Tensor, *, shared: bool | None = None) -> Tensor | BlockMask:
    """What the attention of `model` reads a batch by: `prefix_rows.attention_mask`, or the same for `flex_attention`.

    Args:
        model: a transformers model on the device of the batch.
        segment_ids: [B, L] as `prefix_rows.collate_rows` gives them.
        shared: as for `prefix_rows.attention_mask`.
    """
    if shared is None:
        shared = bool(segment_ids.max() > 1)
    if model.config._attn_implementation != SDPA_OR_FLEX or not shared:
        return attention_mask(segment_ids, shared=shared)
    return block_mask(segment_ids)


def block_mask(segment_ids: Tensor) -> BlockMask:
    """The mask of shared rows for `flex_attention`, [B, 1, L, L] in blocks.

    Args:
        segment_ids: [B, L] as `prefix_rows.collate_rows` gives them.
    """
    segments = segment_ids.int()

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_look(
            query=query, key=key, query_segment=segments[row, query], key_segment=segments[row, key]
        )

    rows, length = segments.shape
    return create_block_mask(mask_mod, rows, None, length, length, device=segments.device, BLOCK_SIZE=BLOCK)


# ------------------------------------------------------------------ the attention function
def _sdpa_or_flex(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """`flex_attention` for a `BlockMask`, `sdpa` for any other mask; arguments and result as transformers has them."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    device = query.device.type
    if torch.is_autocast_enabled(device):  # autocast does this for sdpa; rotated queries come in float32
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    return flex_attention_forward(module, query, key, value, attention_mask, **arguments)


AttentionInterface.register(SDPA_OR_FLEX, _sdpa_or_flex)
AttentionMaskInterface.register(SDPA_OR_FLEX, sdpa_mask)
