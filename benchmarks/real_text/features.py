"""Frozen features of real text: what a small language model holds of a response, at two layers, pooled in two ways.

Reward models read one layer and judges the other, so that no judge shares a feature with what it judges. Features are kept
in a table by the content of the tokens (`inference/cache.py`): an interrupted pass goes on where it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.config.shared import SharedConfig
from prmd.inference.cache import ScoreTable
from prmd.inference.reference import reference_key
from prmd.inference.scoring import score_rows
from prmd.models.loading import load_causal_lm, load_model_config
from prmd.models.sequence_models import SequenceLogps, supports_shared_prompts
from prmd.models.tokenization import PrefixRow

JUDGE_LAYER_SHARE = 2 / 3
"""Depth of the judges' layer; reward models read the last one."""
_KEY = "last layer and the one at two thirds, mean and end"


@dataclass(frozen=True)
class Features:
    """Features of S responses, float64 standardized by nothing yet.

    Attributes:
        rewards: of the last layer, [S, 2 d].
        judges: of the layer at two thirds of the depth, [S, 2 d].
    """

    rewards: np.ndarray
    judges: np.ndarray


class _Pooled(SequenceLogps):
    """Mean over the positions that predict a response, and the state at its end, of two layers."""

    def pool(self, batch: dict[str, Tensor]) -> Tensor:
        """[S, 4 d]: (mean, end) of the last layer, then of the other."""
        layers = self.unwrapped.base_model.layers
        seen: list[Tensor] = []
        layer = layers[round(JUDGE_LAYER_SHARE * len(layers)) - 1]
        handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(_states(output)))
        try:
            last = self.hidden_states(batch["input_ids"], batch["position_ids"], batch["segment_ids"])
        finally:
            handle.remove()
        return torch.cat([part for states in (last, seen[0]) for part in _pooled(states, batch)], dim=1)


def _states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A decoder layer's states [B*L, d], whether it returns them alone or first of several."""
    return (output if isinstance(output, Tensor) else output[0]).flatten(0, 1)


def _pooled(states: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    index, states = batch["sequence_index"], states.float()
    sums = torch.zeros(len(batch["last_index"]), states.shape[1], device=states.device)
    counts = torch.bincount(index, minlength=len(sums)).clamp_min(1)[:, None]
    return sums.index_add(0, index, states[batch["predict_index"]]) / counts, states[batch["last_index"]]


def features_of(
    shared: SharedConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PrefixRow]
) -> list[Features]:
    """Features of every response of every row, from the table or computed: one `Features` a row.

    Args:
        rows: tokenized for policies.
    """
    width = 4 * load_model_config(shared.model, shared.paths).get_text_config().hidden_size
    key = io.fingerprint([reference_key(shared.model, shared.paths, tokenizer), _KEY])
    table = ScoreTable(shared.paths.cache("features", key), width)
    model = load_causal_lm(shared.model, shared.paths).eval()
    pooled = _Pooled(model)
    found = score_rows(
        rows,
        pooled.pool,
        table=table,
        pad_id=tokenizer.pad_token_id,
        tokens_per_batch=shared.scoring_tokens,
        share_prompt=supports_shared_prompts(model.config, max(row.longest for row in rows)),
        device=model.device,
        description="features",
    )
    halves = [values.double().numpy() for values in found]
    return [Features(v[:, : width // 2], v[:, width // 2 :]) for v in halves]


@dataclass(frozen=True)
class Projection:
    """Standardization, principal components, and these standardized again.

    Fitted without labels on the responses of the pairs; the components that carry the least are left out, which makes a
    Newton step 20 times faster.
    """

    mean: np.ndarray
    scale: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, components: int) -> "Projection":
        """Of features [S, d], to at most `components` directions."""
        mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-9
        standard = (features - mean) / spread
        values, vectors = np.linalg.eigh(standard.T @ standard / len(standard))
        kept = np.argsort(values)[::-1][: min(components, int((values > 1e-9).sum()))]
        return cls(mean, spread, vectors[:, kept] / np.sqrt(values[kept]))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """[S, components], each of unit variance on what was fitted."""
        return (features - self.mean) / self.scale @ self.components
