"""Which kernel reads rows that share a prompt: `sdpa` with a mask over all pairs of tokens, or `flex_attention`.

Given such a mask, `sdpa` computes every pair of tokens and cannot use its fastest kernels; `flex_attention` skips blocks
that nobody looks at, such as rejected x chosen, but is compiled and costs more to start. Neither wins at every length,
so `auto` times both on the GPU at hand. The switch is an attention function that takes flex for a `BlockMask` and sdpa
for everything else, so generation and TRL run as if it were not there. What a token may look at is in `prefix_rows`;
who asks for a mask is `sequence_models`.
"""

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prmd.errors import ConfigError
from prmd.models.prefix_rows import attention_mask, may_look
from prmd.runtime import get_device, missing_compiler

logger = logging.getLogger(__name__)
Model = TypeVar("Model")

SDPA_OR_FLEX = "sdpa_or_flex"
"""Attention of a model whose shared rows always go to `flex_attention`."""

SDPA_OR_FASTER_FLEX = "sdpa_or_faster_flex"
"""Attention of a model whose shared rows go to `flex_attention` where that is faster."""

BLOCK = 128
"""Side of the blocks that `flex_attention` skips or computes."""

_RECOMPILATIONS = 64
_TIMED_RUNS = 5


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer of one batch, as far as its time depends on it.

    Attributes:
        rows: sequences.
        length: tokens of each.
        dtype: number format it computes in.
        gradients: whether a backward pass follows.
    """

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    gradients: bool


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
    if asked == "sdpa" or plain == "eager":
        return plain
    if obstacle := _obstacle(model_config.get_text_config()):
        if asked == "flex_attention":
            raise ConfigError(
                f"model.attention: flex_attention cannot run here: {obstacle}; set model.attention: auto, or sdpa"
            )
        return plain
    # rows come in many lengths; past the limit, flex_attention would run uncompiled and hold all scores
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILATIONS)
    always = asked == "flex_attention"
    _log_once(
        f"model.attention: rows that share a prompt go to flex_attention{'' if always else ' where it is faster'}"
    )
    return SDPA_OR_FLEX if always else SDPA_OR_FASTER_FLEX


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


def layer_shape(
    model_config: Any, *, rows: int, length: int, dtype: torch.dtype, gradients: bool
) -> AttentionShape:
    """The shape of a model's attention layers for a batch of `rows` sequences of `length` tokens."""
    config = model_config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return AttentionShape(rows, length, heads, kv_heads, _head_dim(config), dtype, gradients)


@functools.cache
def _log_once(line: str) -> None:
    logger.info(line)


# ------------------------------------------------------------------ masks
def rows_mask(model: nn.Module, segment_ids: Tensor) -> Tensor | BlockMask:
    """What the attention of `model` reads a batch by: `prefix_rows.attention_mask`, or the same for `flex_attention`.

    Args:
        model: a transformers model on the device of the batch.
        segment_ids: [B, L] as `prefix_rows.collate_rows` gives them.
    """
    name = model.config._attn_implementation
    if name not in (SDPA_OR_FLEX, SDPA_OR_FASTER_FLEX) or segment_ids.max() <= 1:
        return attention_mask(segment_ids)
    if name == SDPA_OR_FASTER_FLEX and not flex_is_faster(_shape_of(model, segment_ids)):
        return attention_mask(segment_ids)
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


for _name in (SDPA_OR_FLEX, SDPA_OR_FASTER_FLEX):
    AttentionInterface.register(_name, _sdpa_or_flex)
    AttentionMaskInterface.register(_name, sdpa_mask)


# ------------------------------------------------------------------ the measurement
def _shape_of(model: nn.Module, segment_ids: Tensor) -> AttentionShape:
    """The shape to be timed for a batch: few shapes stand for all, so that each is timed once in a run."""
    (rows, length), device = segment_ids.shape, segment_ids.device.type
    return layer_shape(
        model.config,
        rows=1 << (rows - 1).bit_length(),
        length=-(-length // BLOCK) * BLOCK - 1,  # most rows leave their last block unfilled
        dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype,
        gradients=torch.is_grad_enabled(),
    )


@functools.cache
def flex_is_faster(shape: AttentionShape) -> bool:
    """Whether `flex_attention` runs a layer of this shape faster than `sdpa` on this GPU; timed at the first call."""
    if shape.length <= 2 * BLOCK:
        return False  # two blocks a side: little to skip beside what causality alone does
    try:
        flex = attention_seconds(shape, flex=True)
    except TorchDynamoException as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        logger.warning("flex_attention does not compile here (%s); sdpa is used", reason)
        return False
    sdpa = attention_seconds(shape, flex=False)
    logger.info(
        "attention over %d rows of about %d tokens: flex_attention takes %.2f ms a layer, sdpa %.2f ms; %s is used",
        *(shape.rows, shape.length, 1e3 * flex, 1e3 * sdpa, "flex_attention" if flex < sdpa else "sdpa"),
    )
    return flex < sdpa


def attention_seconds(shape: AttentionShape, *, flex: bool) -> float:
    """Seconds of one attention layer, compiled before; with `shape.gradients` forward and backward.

    Rows are half prompt, a quarter chosen and a quarter rejected.
    """
    device = get_device()
    segments = torch.zeros(shape.rows, shape.length, dtype=torch.long, device=device)
    segments[:, shape.length // 2 :] = 1
    segments[:, shape.length * 3 // 4 :] = 2
    mask = block_mask(segments) if flex else attention_mask(segments)
    module = SimpleNamespace(training=shape.gradients, num_key_value_groups=shape.heads // shape.kv_heads)
    with torch.set_grad_enabled(shape.gradients), torch.autocast(device.type, enabled=False):
        # zeros, for the random state of a run must not depend on what was timed
        tensors = [
            torch.zeros(
                *(shape.rows, heads, shape.length, shape.head_dim),
                dtype=shape.dtype,
                device=device,
                requires_grad=shape.gradients,
            )
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        ]

        def run() -> None:
            output, _ = _sdpa_or_flex(module, *tensors, mask, scaling=shape.head_dim**-0.5)
            if shape.gradients:
                torch.autograd.grad(output, tensors, torch.ones_like(output))

        run()
        _time(run)  # warms up
        return _time(run) / _TIMED_RUNS


def _time(run: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(_TIMED_RUNS):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
