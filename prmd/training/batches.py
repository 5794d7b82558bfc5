"""The plan of a training's micro-batches: rows of like length together inside large shuffled windows."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """Rows that are processed together, and their weight in the mean over the optimiser step.

    `weight` makes the mean over micro-batches of (weight x mean over rows) the mean over all rows of the step.
    """

    rows: tuple[int, ...]
    weight: float = 1.0


def plan_batches(
    lengths: Sequence[int],
    order: Sequence[int],
    *,
    rows_per_batch: int,
    batches_per_step: int,
    seed: int,
    world_size: int = 1,
    window_rows: int = 1024,
) -> list[MicroBatch]:
    """Micro-batches of a whole training, `batches_per_step` consecutive ones to an optimiser step.

    Rows keep the order of `order` between windows of about `window_rows`; inside a window they are sorted by length,
    cut into micro-batches, and the micro-batches are shuffled. The plan depends on its arguments alone, so it is the
    same for every method and after a resume.

    Args:
        lengths: tokens of each row.
        order: row indices as a stream over all epochs; a row may occur more than once.
        batches_per_step: micro-batches per optimiser step over all processes (accumulation x world_size).
        world_size: the last step is cut into a multiple of this many micro-batches; where it has too few rows for
            that, fewer than `world_size` of them are left out.
    """
    step_rows = rows_per_batch * batches_per_step
    full = len(order) // step_rows * step_rows
    window = max(1, window_rows // step_rows) * step_rows
    plan: list[MicroBatch] = []
    for start in range(0, full, window):
        rows = sorted(order[start : min(start + window, full)], key=lambda i: lengths[i])
        batches = [tuple(rows[i : i + rows_per_batch]) for i in range(0, len(rows), rows_per_batch)]
        random.Random(f"{seed}-{start}").shuffle(batches)
        plan += [MicroBatch(batch) for batch in batches]
    return plan + _last_step(order[full:], lengths, rows_per_batch, world_size)


def total_steps(plan: Sequence[MicroBatch], batches_per_step: int) -> int:
    """Optimiser steps of a plan."""
    return math.ceil(len(plan) / batches_per_step)


def _last_step(
    order: Sequence[int], lengths: Sequence[int], rows_per_batch: int, world_size: int
) -> list[MicroBatch]:
    rows, count = list(order), _batch_count(len(order), rows_per_batch, world_size)
    if count > len(rows):
        rows = rows[: len(rows) // world_size * world_size]
        count = _batch_count(len(rows), rows_per_batch, world_size)
    if not rows:
        return []
    rows.sort(key=lambda i: lengths[i])
    bounds = [round(i * len(rows) / count) for i in range(count + 1)]
    parts = [tuple(rows[a:b]) for a, b in itertools.pairwise(bounds)]
    return [MicroBatch(part, weight=len(part) * count / len(rows)) for part in parts]


def _batch_count(rows: int, rows_per_batch: int, world_size: int) -> int:
    """Fewest micro-batches that hold `rows` and share out evenly among the processes."""
    return -(-rows // (rows_per_batch * world_size)) * world_size
