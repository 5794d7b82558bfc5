"""The plan of a training: first the pairs of every optimizer step, then the micro-batches each step is cut into.

Which pairs share a step follows from the seed and the data alone. How many of them a device takes at once, and how many
devices there are, only decides how a step is cut, so that other hardware learns the same.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from prmd.config.shared import TrainingConfig
from prmd.errors import ConfigError
from prmd.models.prefix_rows import MOST_PADDING

_LOOKED_AT = 64
"""Steps from which the padding of a training is known well enough."""

ALIKE = 4
"""Pairs of like length that stay together when a window is shuffled: a step holds many lengths and pads little."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that are processed together, and their weight in the mean over the optimizer step.

    `weight` makes the mean over micro-batches of (weight x mean over rows) the mean over all rows of the step. One of
    weight 0 repeats a row that counts elsewhere, for a process that would have nothing to do.
    """

    rows: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class StepSize:
    """Pairs of one optimizer step over all processes, and the micro-batches that each process accumulates for it."""

    pairs: int
    accumulation: int
    processes: int = 1

    @property
    def batches(self) -> int:
        """Micro-batches of a step over all processes."""
        return self.accumulation * self.processes

    def describe(self) -> str:
        """What the log says of it."""
        own = f"{self.pairs} pairs, in {self.accumulation} micro-batches"
        return own if self.processes == 1 else f"{own} on each of {self.processes} processes"


def step_size(training: TrainingConfig, processes: int) -> StepSize:
    """`training.pairs_per_step` cut for so many processes; without it what the two other settings multiply to.

    Raises:
        ConfigError: on one process, the accumulation in the YAML contradicts `training.pairs_per_step`.
    """
    device, given = training.pairs_per_device, training.gradient_accumulation_steps
    if training.pairs_per_step is None:
        return StepSize(device * given * processes, given, processes)
    wanted = math.ceil(training.pairs_per_step / (device * processes))
    if processes == 1 and given != wanted and "gradient_accumulation_steps" in training.model_fields_set:
        raise ConfigError(
            f"training.gradient_accumulation_steps: got {given}, wanted {wanted}, because a step of pairs_per_step: "
            f"{training.pairs_per_step} is {wanted} micro-batches of pairs_per_device: {device}; set it to {wanted}, or "
            "pairs_per_step: null"
        )
    return StepSize(training.pairs_per_step, wanted, processes)


@dataclass(frozen=True)
class TrainingPlan:
    """All micro-batches of a training, `size.batches` consecutive ones to an optimizer step."""

    size: StepSize
    batches: list[MicroBatch]
    pairs: list[list[int]]
    """The rows of every step, whatever it is cut into."""

    @property
    def steps(self) -> int:
        return len(self.pairs)


def plan_training(
    lengths: Sequence[int],
    stream: Sequence[int],
    training: TrainingConfig,
    *,
    seed: int,
    processes: int,
) -> TrainingPlan:
    """The plan of a training; it depends on its arguments alone, so it is the same for every method and after a resume.

    A step is cut into as few micro-batches as `training.pairs_per_device` allows, or into more where their padding would
    exceed `MOST_PADDING`.

    Args:
        lengths: tokens of each row.
        stream: row indices over all epochs; a row may occur more than once.

    Raises:
        ConfigError: as `step_size`.
    """
    size, device = step_size(training, processes), training.pairs_per_device
    pairs = plan_steps(lengths, stream, pairs_per_step=size.pairs, seed=seed)
    size = replace(size, accumulation=_enough(pairs[:_LOOKED_AT], lengths, size, device))
    batches = [batch for step in pairs for batch in _cut(step, lengths, size, device)]
    return TrainingPlan(size, batches, pairs)


def plan_steps(
    lengths: Sequence[int],
    order: Sequence[int],
    *,
    pairs_per_step: int,
    seed: int,
    window_rows: int = 1024,
) -> list[list[int]]:
    """The rows of every optimizer step.

    Rows keep the order of `order` between windows of about `window_rows`; inside a window they are sorted by length,
    cut into groups of `ALIKE`, and the groups are shuffled.
    """
    full = len(order) // pairs_per_step * pairs_per_step
    window = max(1, window_rows // pairs_per_step) * pairs_per_step
    planned: list[int] = []
    for start in range(0, full, window):
        rows = sorted(order[start : min(start + window, full)], key=lambda i: lengths[i])
        groups = [rows[i : i + ALIKE] for i in range(0, len(rows), ALIKE)]
        random.Random(f"{seed}-{start}").shuffle(groups)
        planned += itertools.chain.from_iterable(groups)
    planned += order[full:]
    return [planned[i : i + pairs_per_step] for i in range(0, len(planned), pairs_per_step)]


def _enough(steps: Sequence[Sequence[int]], lengths: Sequence[int], size: StepSize, device: int) -> int:
    """Fewest micro-batches of each process with which these steps hold little padding, the last of them left aside."""
    full = [step for step in steps if len(step) == size.pairs]
    dense = sum(lengths[i] for step in full for i in step)
    for accumulation in range(size.accumulation, math.ceil(size.pairs / size.processes)):
        cut = [_cut(step, lengths, replace(size, accumulation=accumulation), device) for step in full]
        padded = sum(len(b.rows) * lengths[b.rows[-1]] for batches in cut for b in batches)
        if dense >= (1 - MOST_PADDING) * padded:
            return accumulation
    return max(size.accumulation, math.ceil(size.pairs / size.processes))


def _cut(step: Sequence[int], lengths: Sequence[int], size: StepSize, device: int) -> list[MicroBatch]:
    """The rows of a step, by length, in micro-batches of at most `device` rows; a short last step in the fewest."""
    rows = sorted(step, key=lambda i: lengths[i])
    count = size.batches
    if len(rows) < size.pairs:
        count = -(-len(rows) // (device * size.processes)) * size.processes
    parts = min(count, len(rows))
    bounds = _bounds([lengths[i] for i in rows], parts, device)
    cut = [tuple(rows[a:b]) for a, b in itertools.pairwise(bounds)]
    batches = [MicroBatch(part, weight=len(part) * count / len(rows)) for part in cut]
    return batches + [MicroBatch((rows[0],), weight=0.0)] * (count - parts)


def _bounds(lengths: Sequence[int], parts: int, most: int) -> list[int]:
    """Where to cut ascending `lengths` into `parts` of at most `most` so that least is padded, ends included.

    Dynamic programme over (parts, end): tokens(p, b) = min_a tokens(p - 1, a) + (b - a) lengths[b - 1].
    """
    n = len(lengths)
    if parts in (1, n) or parts * most == n:
        return [round(i * n / parts) for i in range(parts + 1)]
    ends = np.arange(n + 1)
    taken = ends[None, :] - ends[:, None]  # [a, b]: rows of a part that begins at a and ends before b
    widest = np.array([0, *lengths], dtype=float)
    cost = np.where((taken >= 1) & (taken <= most), taken * widest[None, :], np.inf)
    tokens, chosen = cost[0], []
    for _ in range(parts - 1):
        totals = tokens[:, None] + cost
        chosen.append(totals.argmin(axis=0))
        tokens = totals.min(axis=0)
    bounds = [n]
    for begin in reversed(chosen):
        bounds.append(int(begin[bounds[-1]]))
    return [0, *reversed(bounds)]
