"""How full a card is worked: micro-batches of a step merged by their tokens, then layers kept instead of recomputed.

Neither changes a step: its loss and gradient are sums over its pairs, divided once, whatever it is cut into, and a layer that
is recomputed computes what it would have kept. Merging comes first: where a micro-batch is small, the card waits for its
launches (one of some 920 tokens of the 3B shape took an H100 84 ms, at a fifth of its peak), so that 5 instead of 8 may save
three eighths of a step; keeping every layer saves a quarter at most.

Without a card nothing is merged and `auto` recomputes nothing, so that results on a CPU stay what they are to the bit.
"""

import bisect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prmd.config.shared import TrainingConfig
from prmd.errors import ConfigError
from prmd.models.card import USABLE
from prmd.models.tokenization import PrefixRow
from prmd.runtime import GIB, of_all_processes
from prmd.training.batches import MicroBatch, TrainingPlan, merged, merges
from prmd.training.memory import MemoryPlan, device_memory

logger = logging.getLogger(__name__)

MOST_TOKENS = 16_384
"""Tokens, padding included, beyond which nothing is merged: a card is busy long before."""


@dataclass(frozen=True)
class Filling:
    """How a training uses its card.

    Attributes:
        plan: the training's steps, in micro-batches that may have been merged.
        recomputed: layers that are recomputed, the first ones; None: all.
        memory: of the largest micro-batch; None without a card, and where it cannot be planned.
        before: micro-batches of a step on each process before any were merged.
        pairs_per_device: as the YAML has it.
    """

    plan: TrainingPlan
    recomputed: int | None
    memory: MemoryPlan | None
    before: int
    pairs_per_device: int

    @property
    def merged(self) -> bool:
        return self.plan.size.accumulation < self.before

    @property
    def keeps(self) -> bool:
        """Whether layers are kept."""
        return self.memory.recomputed < self.memory.layers if self.memory else self.recomputed == 0

    def describe(self) -> str:
        """What the log says of it: `32 pairs, in 5 micro-batches (8 of 4 pairs merged: 17.9 of 29.4 GiB)`."""
        own, memory = self.plan.size.describe(), self.memory
        if memory is None or memory.device_bytes is None:
            return own
        cut = f"{self.before} of {self.pairs_per_device} pairs merged: " if self.merged else ""
        sizes = f"{memory.total / GIB:.1f} of {USABLE * memory.device_bytes / GIB:.1f} GiB"
        layers = (
            f", {memory.recomputed} of {memory.layers} layers recomputed"
            if memory.recomputed
            else ", all layers kept"
        )
        return f"{own} ({cut}{sizes}{layers})"


def least_memory() -> int | None:
    """Bytes of the smallest card of all processes, which have to cut a step alike; None on a CPU."""
    card = device_memory()
    return None if card is None else of_all_processes(card, "MIN")


def fill_card(
    plan: TrainingPlan,
    rows: Sequence[PrefixRow],
    training: TrainingConfig,
    *,
    planned: Callable[..., MemoryPlan],
    device_bytes: int | None,
    most_tokens: int = MOST_TOKENS,
) -> Filling:
    """Cut the steps of a plan into as few micro-batches as the card holds, then keep as many layers.

    Args:
        plan: as `batches.plan_training` gives it.
        rows: the training's rows.
        planned: `memory.plan_memory` of the model and its precision, all but `training`, `device_bytes` and `rows`.
        device_bytes: memory of the card, or None.
        most_tokens: of a micro-batch that is merged.
    """
    before, device = plan.size.accumulation, training.pairs_per_device
    written = {True: None, False: 0, "auto": None if device_bytes else 0}[training.gradient_checkpointing]
    if device_bytes is None:
        return Filling(plan, written, None, before, device)
    lengths = [row.shared_length for row in rows]

    def memory(cut: TrainingPlan, training: TrainingConfig) -> MemoryPlan:
        plans = [
            planned(training=training, device_bytes=device_bytes, rows=[rows[i] for i in batch.rows])
            for batch in _largest(cut, lengths)
        ]
        return max(plans, key=lambda plan: (plan.recomputed, plan.total))

    try:
        if training.merge_micro_batches:
            sizes = merges(plan, lengths, device=device, most_tokens=most_tokens)
            cuts = (merged(plan, lengths, *size, device=device) for size in sizes)
            plan = _first_that_fits(cuts, lambda cut: bool(memory(cut, recomputing(training)).fits)) or plan
        found = memory(plan, training)
    except ConfigError as error:
        logger.info("no micro-batches are merged: %s", error)
        return Filling(plan, written, None, before, device)
    return Filling(plan, found.recomputed, found, before, device)


def _first_that_fits(
    cuts: Iterator[TrainingPlan], fits: Callable[[TrainingPlan], bool]
) -> TrainingPlan | None:
    """The first of cuts that take less and less; mostly it is the very first, so that no other is looked at."""
    first = next(cuts, None)
    if first is None or fits(first):
        return first
    rest = list(cuts)
    best = bisect.bisect_left(rest, True, key=fits)
    return rest[best] if best < len(rest) else None


def recomputing(training: TrainingConfig) -> TrainingConfig:
    """The same training with every layer recomputed where the YAML leaves that open."""
    free = training.gradient_checkpointing == "auto"
    return training.model_copy(update={"gradient_checkpointing": True}) if free else training


def _largest(cut: TrainingPlan, lengths: Sequence[int]) -> set[MicroBatch]:
    """The micro-batches of most tokens and of the largest attention mask, mostly one and the same."""
    return {
        max(cut.batches, key=lambda batch: len(batch.rows) * lengths[batch.rows[-1]] ** power)
        for power in (1, 2)
    }
