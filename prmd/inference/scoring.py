"""Scoring passes: one number or vector for every response of a data set, without gradients, cached and resumable.

Rows are sorted by length, the prompt of a row is encoded once for all its responses, and only responses that the table
does not hold are computed. Under several processes each scores its share and the main process writes the table. Where all
rows begin with one long text, such as the primer of a benchmark, its keys and values are computed once and read by every
batch (`PrimedLogps`), with the same results and the same table.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DynamicCache

from prmd.inference.cache import ScoreTable, tokens_key
from prmd.models.agreement import check_agreement
from prmd.models.prefix_rows import attention_mask, collate_rows, on_device, plan_scoring
from prmd.models.sequence_models import SequenceLogps, supports_shared_prompts
from prmd.models.tokenization import PrefixRow, Tokens
from prmd.runtime import is_main_process, progress, wait_for_everyone

logger = logging.getLogger(__name__)

SHARD_SECONDS = 60.0
"""A table is saved about this often, so that an interruption costs at most a minute."""

Compute = Callable[[dict[str, Tensor]], Tensor]
Item = TypeVar("Item")


def score_rows(
    rows: Sequence[PrefixRow],
    compute: Compute,
    *,
    table: ScoreTable,
    pad_id: int,
    tokens_per_batch: int,
    share_prompt: bool,
    device: torch.device,
    description: str,
) -> list[Tensor]:
    """Values of every response of every row, from the table or computed and added to it.

    Args:
        compute: batch tensors (`models.prefix_rows.collate_rows`) -> [S, width] float32.
        share_prompt: whether the model takes several responses in one row (`supports_shared_prompts`).

    Returns:
        One [n_responses, width] float32 tensor per row.
    """
    missing = _missing_rows(rows, table)
    groups = plan_scoring(missing, tokens_per_batch=tokens_per_batch, share_prompt=share_prompt)
    rank, world = place_among_processes()

    def turns() -> Iterator[list[tuple[bytes, Tensor]]]:
        for turn in progress(range(0, len(groups), world), -(-len(groups) // world), description):
            done: list[tuple[list[bytes], Tensor]] = []
            if turn + rank < len(groups):
                group = [missing[i] for i in groups[turn + rank]]
                batch = collate_rows(group, pad_id=pad_id, share_prompt=share_prompt)
                with torch.inference_mode():
                    values = compute(on_device(batch, device)).float().cpu()
                done = [(_keys(group), values.clone())]
            # whole tensors: a row of one would carry all of it between processes
            yield [pair for keys, found in gather(done) for pair in zip(keys, found, strict=True)]

    keep_in_turns(turns(), partial(keep_scores, table))
    return [lookup(table, row) for row in rows]


def place_among_processes() -> tuple[int, int]:
    """(rank, number of processes) of a distributed run, (0, 1) of a single process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(items: list[Item]) -> list[Item]:
    """The items of all processes in the order of their ranks, on every process."""
    _, world = place_among_processes()
    if world == 1:
        return items
    parts: list[list[Item]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def lookup(table: ScoreTable, row: PrefixRow) -> Tensor:
    """[n_responses, width] values of a row whose responses the table holds."""
    return torch.stack([table[tokens_key(row.prompt_ids, response)] for response in row.responses])


def keep_in_turns(
    turns: Iterable[list[Item]], keep: Callable[[list[Item]], None], *, every: int = 32
) -> None:
    """Have `keep` save what turns make, now and then and at the end, also where a turn fails; wait for all processes.

    By the clock in one process, by turns in several, whose clocks differ.

    Args:
        every: turns from one time to the next in several processes.
    """
    fresh, saved = list[Item](), time.monotonic()
    _, world = place_among_processes()
    try:
        for turn, made in enumerate(turns):
            fresh += made
            if turn % every == every - 1 if world > 1 else time.monotonic() - saved > SHARD_SECONDS:
                keep(fresh)
                fresh, saved = [], time.monotonic()
    finally:  # what was made before a failure is not made again
        keep(fresh)
    wait_for_everyone()  # no process may open the table again before the main one has written it


def keep_scores(table: ScoreTable, fresh: Sequence[tuple[bytes, Tensor]]) -> None:
    """Add keys with their rows [width] to the table, which the main process writes."""
    if fresh:
        keys, values = zip(*fresh, strict=True)
        table.append(keys, torch.stack(values), write=is_main_process())


def _keys(rows: Sequence[PrefixRow]) -> list[bytes]:
    return [tokens_key(row.prompt_ids, response) for row in rows for response in row.responses]


def _missing_rows(rows: Sequence[PrefixRow], table: ScoreTable) -> list[PrefixRow]:
    """The rows cut down to the responses that the table lacks, each response once."""
    seen: set[bytes] = set()
    missing = []
    for row in rows:
        wanted = []
        for response in row.responses:
            key = tokens_key(row.prompt_ids, response)
            if key not in table and key not in seen:
                seen.add(key)
                wanted.append(response)
        if wanted:
            missing.append(PrefixRow(row.prompt_ids, tuple(wanted)))
    return missing


def score_logps(
    model: nn.Module | None,
    rows: Sequence[PrefixRow],
    *,
    table: ScoreTable,
    pad_id: int,
    tokens_per_batch: int,
    description: str,
    behind_primer: bool = False,
) -> list[Tensor]:
    """Summed log-probabilities of every response under a causal model, in nats.

    Args:
        model: the causal model; None where the table already holds every row.
        behind_primer: the beginning of all prompts is long, so it is processed once, where the model takes shared rows.

    Returns:
        One [n_responses] float32 tensor per row.
    """
    if model is None or table.holds(rows):
        return [lookup(table, row)[:, 0] for row in rows]
    scorer, longest = SequenceLogps(model).eval(), max(row.longest for row in rows)
    check_agreement(model, scorer, longest=longest)
    shared = supports_shared_prompts(scorer.unwrapped.config, longest)
    if behind_primer and shared and (primer := shared_beginning(rows)):
        scorer = PrimedLogps(model, primer).eval()
    values = score_rows(
        rows,
        lambda batch: scorer(**batch)[:, None],
        table=table,
        pad_id=pad_id,
        tokens_per_batch=tokens_per_batch,
        share_prompt=shared,
        device=next(model.parameters()).device,
        description=description,
    )
    return [value[:, 0] for value in values]


KeysAndValues = list[tuple[Tensor, Tensor]]
"""Per layer, keys and values [1, heads, P, d] of the P tokens of the beginning."""


def shared_beginning(rows: Sequence[PrefixRow]) -> Tokens:
    """The tokens all prompts begin with; at least one token of every prompt is left behind them."""
    first, last = min(row.prompt_ids for row in rows), max(row.prompt_ids for row in rows)
    limit = min(len(row.prompt_ids) for row in rows) - 1
    # Of sorted sequences, what the first and the last share is shared by all between.
    length = next((i for i in range(limit) if first[i] != last[i]), limit)
    return first[:length]


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

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, *, shared: bool | None = None
    ) -> Tensor:
        """Last hidden states, flat [B*L, d]; those of the primer's tokens are zero, nothing is read there.

        The token that predicts the first one behind the primer's end always lies behind it too, because
        `shared_beginning` leaves a token of every prompt.
        """
        length, device = len(self.primer), input_ids.device
        if self._cache is None:
            self._cache = self._encode_primer(device)
        mask = attention_mask(segment_ids, shared=shared)
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
