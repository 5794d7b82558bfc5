"""Log-probabilities of answers behind one long text that every row begins with, such as the primer of a benchmark.

The keys and values of the shared beginning are computed once and read by every batch; what follows it, a question once with
all its answers, is scored as in `scoring`, with the same results and the same table. Which rows share a beginning, and what
the numbers mean, is up to the caller.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from prmd.cache import ScoreTable
from prmd.models.prefix_rows import attention_mask
from prmd.models.sequence_models import SequenceLogps, supports_shared_prompts
from prmd.models.tokenization import PrefixRow, Tokens
from prmd.scoring import lookup, score_logps, score_rows

logger = logging.getLogger(__name__)

KeysAndValues = list[tuple[Tensor, Tensor]]
"""Per layer, keys and values [1, heads, P, d] of the P tokens of the beginning."""


def shared_beginning(rows: Sequence[PrefixRow]) -> Tokens:
    """The tokens all prompts begin with; at least one token of every prompt is left behind them."""
    first, last = min(row.prompt_ids for row in rows), max(row.prompt_ids for row in rows)
    limit = min(len(row.prompt_ids) for row in rows) - 1
    # Of sorted sequences, what the first and the last share is shared by all between.
    length = next((i for i in range(limit) if first[i] != last[i]), limit)
    return first[:length]


def score_logps_behind_primer(
    model: nn.Module | None,
    rows: Sequence[PrefixRow],
    *,
    table: ScoreTable,
    pad_id: int,
    tokens_per_batch: int,
    description: str,
) -> list[Tensor]:
    """As `scoring.score_logps`, with the beginning of all prompts processed once.

    Args:
        model: the causal model; None where the table already holds every row.

    Returns:
        One [n_responses] float32 tensor per row, nats.
    """
    options = {"table": table, "pad_id": pad_id, "tokens_per_batch": tokens_per_batch}
    if model is None or table.holds(rows):
        return [lookup(table, row)[:, 0] for row in rows]
    scorer = PrimedLogps(model, shared_beginning(rows)).eval()
    if not (scorer.primer and supports_shared_prompts(scorer.unwrapped.config, max(r.longest for r in rows))):
        return score_logps(model, rows, description=description, **options)
    values = score_rows(
        rows,
        lambda batch: scorer(**batch)[:, None],
        share_prompt=True,
        device=next(model.parameters()).device,
        description=description,
        **options,
    )
    return [value[:, 0] for value in values]


class PrimedLogps(SequenceLogps):
    """`SequenceLogps` that processes the beginning of its rows once and not in every batch.

    Args:
        model: a causal model for which `supports_shared_prompts` holds, not to be changed while this is in use.
        primer: tokens that every row of every batch begins with.
    """

    def __init__(self, model: nn.Module, primer: Tokens) -> None:
        super().__init__(model)
        self.primer = primer
        self._cache: KeysAndValues | None = None

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Last hidden states, flat [B*L, d]; those of the primer's tokens are zero, nothing is read there.

        The token that predicts the first one behind the primer's end always lies behind it too, because
        `shared_beginning` leaves a token of every prompt.
        """
        length, device = len(self.primer), input_ids.device
        if self._cache is None:
            self._cache = self._encode_primer(device)
        mask = attention_mask(segment_ids)
        output = self._backbone()(
            input_ids=input_ids[:, length:],
            attention_mask=mask if mask.ndim == 2 else mask[:, :, length:],
            position_ids=position_ids[:, length:],
            past_key_values=_expanded(self._cache, len(input_ids)),
            use_cache=True,
        )
        hidden = output.last_hidden_state
        unread = hidden.new_zeros(len(input_ids), length, hidden.shape[-1])
        return torch.cat([unread, hidden], dim=1).flatten(0, 1)

    def _backbone(self) -> nn.Module:
        return getattr(self.unwrapped, self.unwrapped.base_model_prefix)

    def _encode_primer(self, device: torch.device) -> KeysAndValues:
        ids = torch.tensor([self.primer], device=device)
        cache = self._backbone()(
            input_ids=ids, past_key_values=DynamicCache(), use_cache=True
        ).past_key_values
        logger.info("the %d tokens all prompts begin with are processed once", len(self.primer))
        return [(layer.keys, layer.values) for layer in cache.layers]


def _expanded(layers: KeysAndValues, batch: int) -> DynamicCache:
    """A new cache per batch: the model appends to the one it is given."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), number)
    return cache
