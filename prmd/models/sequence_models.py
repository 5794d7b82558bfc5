"""What a language model computes for a batch of prefix-shared rows: log-probabilities or rewards of every response.

`SequenceLogps` and `SequenceRewards` wrap a model so that everything happens inside one `forward`: a backbone called
beside its distributed wrapper would train silently wrong. Loading and adapters are in `loading`, batches in `prefix_rows`, masks
in `attention`.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from prmd.models.attention import SDPA_OR_FLEX, rows_mask
from prmd.models.prefix_rows import is_shared
from prmd.runtime import of_all_processes

LOGITS_AT_ONCE = 2**25
"""Elements of one float32 block of logits (128 MiB): 220 tokens at a vocabulary of 151,936."""


class _SequenceModel(nn.Module):
    """A wrapped transformers or PEFT model; subclasses read the backbone's hidden states at chosen positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def unwrapped(self) -> nn.Module:
        """The transformers model itself, below a PEFT wrapper if there is one (its layers hold the adapters)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, *, shared: bool | None = None
    ) -> Tensor:
        """Last hidden states, flat [B*L, d].

        Args:
            shared: as for `prefix_rows.attention_mask`; without it the device is waited for.
        """
        backbone = getattr(self.unwrapped, self.unwrapped.base_model_prefix)
        output = backbone(
            input_ids=input_ids,
            attention_mask=rows_mask(self.unwrapped, segment_ids, shared=shared),
            position_ids=position_ids,
            use_cache=False,
        )
        return output.last_hidden_state.flatten(0, 1)


class SequenceLogps(_SequenceModel):
    """Summed log-probabilities of responses under a causal language model."""

    def forward(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        predict_index: Tensor,
        target_ids: Tensor,
        sequence_index: Tensor,
        last_index: Tensor,
    ) -> Tensor:
        """log pi(y|x) = sum_t log pi(y_t | x, y_<t) of every response.

        Args: as `prefix_rows.collate_rows` returns them.

        Returns:
            [S] nats, float32, the end-of-turn token included where the row holds it.
        """
        shared = is_shared(input_ids=input_ids, last_index=last_index)
        hidden = self.hidden_states(input_ids, position_ids, segment_ids, shared=shared)
        token_logps = self.token_logps(hidden[predict_index], target_ids)
        sums = torch.zeros(last_index.shape[0], dtype=torch.float32, device=hidden.device)
        return sums.index_add(0, sequence_index, token_logps)

    def token_logps(self, hidden: Tensor, target_ids: Tensor) -> Tensor:
        """[N] log-probabilities of `target_ids` from hidden states [N, d], in blocks recomputed in the backward pass.

        No float32 tensor of (all tokens, vocabulary) ever exists: a block holds `LOGITS_AT_ONCE` elements.
        """
        blocks = self._block_count(hidden)
        parts = []
        for arguments in zip(hidden.tensor_split(blocks), target_ids.tensor_split(blocks), strict=True):
            if torch.is_grad_enabled() and hidden.requires_grad:
                parts.append(checkpoint(self._block_logps, *arguments, use_reentrant=False))
            else:
                parts.append(self._block_logps(*arguments))
        return torch.cat(parts)

    def _block_count(self, hidden: Tensor) -> int:
        """Blocks of logits of this batch; under ZeRO-3 as many on every process, for each call gathers the head."""
        head = self.unwrapped.get_output_embeddings()
        block = max(1, LOGITS_AT_ONCE // head.out_features)
        blocks = max(1, -(-hidden.shape[0] // block))
        return of_all_processes(blocks, "MAX") if hasattr(head.weight, "ds_id") else blocks

    def _block_logps(self, hidden: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return logits.gather(-1, target_ids[:, None]).squeeze(-1) - logits.logsumexp(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32 logits, with the scaling and soft cap that some families apply behind the projection."""
        config = self.unwrapped.config.get_text_config()
        logits = self.unwrapped.get_output_embeddings()(hidden).float()
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return logits


class SequenceRewards(_SequenceModel):
    """Rewards r_0(x, y) of responses under a one-logit sequence classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for layer in self.unwrapped.score.modules():
            if isinstance(layer, nn.Linear):
                layer.forward = functools.partial(_float32_linear, layer)

    def forward(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        predict_index: Tensor,
        target_ids: Tensor,
        sequence_index: Tensor,
        last_index: Tensor,
    ) -> Tensor:
        """[S] float32 rewards, read at the last token of each response."""
        shared = is_shared(input_ids=input_ids, last_index=last_index)
        return self.score(self.hidden_states(input_ids, position_ids, segment_ids, shared=shared)[last_index])

    def features_and_rewards(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """Features h(x, y) [S, d] float32 at the rewarded token, and rewards [S] float32."""
        inputs = [batch[name] for name in ("input_ids", "position_ids", "segment_ids")]
        shared = is_shared(input_ids=inputs[0], last_index=batch["last_index"])
        features = self.hidden_states(*inputs, shared=shared)[batch["last_index"]]
        return features.float(), self.score(features)

    def score(self, features: Tensor) -> Tensor:
        """[S] rewards from features [S, d]; the head runs in float32, where bfloat16 would make ties."""
        with torch.autocast(features.device.type, enabled=False):
            return self.unwrapped.score(features.float()).squeeze(-1)


def _float32_linear(layer: nn.Linear, features: Tensor) -> Tensor:
    """A linear layer's `forward` in float32, whatever its weights are held in.

    It replaces the method, not the call, so that whatever gathers sharded weights around a call still does.
    """
    bias = None if layer.bias is None else layer.bias.float()
    return functional.linear(features.float(), layer.weight.float(), bias)


_seen_apart: set[type] = set()
"""Configurations of models that were measured to look past a mask of shared prompts (`agreement`)."""


def share_no_prompts(model_config: Any) -> None:
    """Have `supports_shared_prompts` say no of models of this kind from now on."""
    _seen_apart.add(type(model_config))


def supports_shared_prompts(model_config: Any, longest: int) -> bool:
    """Whether rows of several responses are exact for this model.

    They need full attention under `sdpa` with a 4-D mask, or under `flex_attention`. An attention window shorter than
    the longest conversation is silently wrong with such a mask, and linear or chunked attention cannot take one.

    Args:
        model_config: the transformers configuration of the loaded model.
        longest: tokens of the longest single conversation.
    """
    return not why_not_shared(model_config, longest)


def why_not_shared(model_config: Any, longest: int) -> str:
    """Why rows of several responses are not exact; empty where they are. Arguments as for `supports_shared_prompts`."""
    attention = getattr(model_config, "_attn_implementation", "sdpa")
    if type(model_config) in _seen_apart:
        return "responses were measured to see each other"
    if attention not in ("sdpa", SDPA_OR_FLEX):
        return f"{attention} attention is not used with a mask of shared prompts"
    text_config = model_config.get_text_config()  # of a multimodal model, that of its language part
    layer_types = getattr(text_config, "layer_types", None)
    kinds = set(layer_types or ["full_attention"])
    window = getattr(text_config, "sliding_window", None)
    windowed = window is not None and ("sliding_attention" in kinds or layer_types is None)
    if others := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"layers of {', '.join(others)} take no mask of shared prompts"
    if windowed and window < longest:
        return f"its attention window of {window} tokens is shorter than a conversation of {longest}"
    return ""
