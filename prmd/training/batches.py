"""The plan of a training: first the pairs of every optimizer step, then the micro-batches each step is cut into.

Which pairs share a step follows from the seed and the data alone. How many of them a device takes at once, and how many
devices there are, only decides how a step is cut, so that other hardware learns the same. A card with room for more gets the
same steps in fewer micro-batches (`merging`), whose rows are then limited by their tokens and no longer by their number.
"""

import bisect
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prmd.config.shared import TrainingConfig
from prmd.errors import ConfigError
from prmd.models.prefix_rows import MOST_PADDING
from prmd.models.tokenization import PrefixRow
from prmd.runtime import get_runtime

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
    tokens: int = 0
    """A micro-batch of at most so many, padding included, may hold more than `training.pairs_per_device`; 0: none does."""

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


def plan_run(
    rows: Sequence[PrefixRow], stream: Sequence[int], training: TrainingConfig, *, seed: int
) -> TrainingPlan:
    """`plan_training` of these rows for the processes of this run: the same from everyone who asks."""
    lengths, processes = [row.shared_length for row in rows], get_runtime().world_size
    return plan_training(lengths, stream, training, seed=seed, processes=processes)


def merges(
    plan: TrainingPlan, lengths: Sequence[int], *, device: int, most_tokens: int
) -> Iterator[tuple[StepSize, int]]:
    """What the steps of a plan may be cut into instead: fewer micro-batches for each process, fewest first.

    Each comes with the fewest tokens of a micro-batch, padding included, with which every step can be cut so and at most
    `MOST_PADDING` of them is padding. Those are left out that need more than `most_tokens`.

    Args:
        plan: as `plan_training` gives it.
        device: `training.pairs_per_device`, which a micro-batch may hold whatever its tokens.
    """
    full = [step for step in plan.pairs if len(step) == plan.size.pairs]
    ascending = [np.sort([[lengths[i] for i in step] for step in full])] if full else []
    ascending += [np.sort([[lengths[i] for i in step]]) for step in plan.pairs if len(step) < plan.size.pairs]
    for accumulation in range(1, plan.size.accumulation):
        size = replace(plan.size, accumulation=accumulation)

        def enough(tokens: int, size: StepSize = size) -> bool:
            """Both become true with more tokens, and stay so."""
            return all(_cuts_into(rows, size.batches, device, tokens) for rows in ascending) and _pads_little(
                full[:_LOOKED_AT], lengths, size, device, tokens
            )

        if enough(most_tokens):
            yield size, bisect.bisect_left(range(most_tokens), True, key=enough)


def merged(
    plan: TrainingPlan, lengths: Sequence[int], size: StepSize, tokens: int, *, device: int
) -> TrainingPlan:
    """The same steps cut as one of `merges` says."""
    batches = [batch for step in plan.pairs for batch in _cut(step, lengths, size, device, tokens)]
    return replace(plan, size=size, batches=batches, tokens=tokens)


def _cuts_into(ascending: np.ndarray, parts: int, device: int, tokens: int) -> bool:
    """Whether each row of lengths, int [steps, n], can be cut into so many micro-batches; the longest are taken first."""
    left = np.full(len(ascending), ascending.shape[1])
    for _ in range(parts):
        longest = np.maximum(ascending[np.arange(len(ascending)), left - 1], 1)
        left = np.maximum(left - np.maximum(device, tokens // longest), 0)
    return not left.any()


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
    for accumulation in range(size.accumulation, math.ceil(size.pairs / size.processes)):
        if _pads_little(full, lengths, replace(size, accumulation=accumulation), device):
            return accumulation
    return max(size.accumulation, math.ceil(size.pairs / size.processes))


def _pads_little(
    steps: Sequence[Sequence[int]], lengths: Sequence[int], size: StepSize, device: int, tokens: int = 0
) -> bool:
    dense = sum(lengths[i] for step in steps for i in step)
    cut = [_cut(step, lengths, size, device, tokens) for step in steps]
    padded = sum(len(b.rows) * lengths[b.rows[-1]] for batches in cut for b in batches)
    return dense >= (1 - MOST_PADDING) * padded


def _cut(
    step: Sequence[int], lengths: Sequence[int], size: StepSize, device: int, tokens: int = 0
) -> list[MicroBatch]:
    """The rows of a step, by length, in micro-batches of at most `device` rows, or more of at most so many tokens.

    A short last step is cut into the fewest.
    """
    rows = sorted(step, key=lambda i: lengths[i])
    count = size.batches
    if len(rows) < size.pairs:
        count = -(-_fewest([lengths[i] for i in rows], device, tokens) // size.processes) * size.processes
    parts = min(count, len(rows))
    bounds = _bounds([lengths[i] for i in rows], parts, device, tokens)
    cut = [tuple(rows[a:b]) for a, b in itertools.pairwise(bounds)]
    batches = [MicroBatch(part, weight=len(part) * count / len(rows)) for part in cut]
    return batches + [MicroBatch((rows[0],), weight=0.0)] * (count - parts)


def _fewest(lengths: Sequence[int], device: int, tokens: int) -> int:
    """Fewest micro-batches that ascending lengths can be cut into, by the rule of `_cut`."""
    parts, left = 0, len(lengths)
    while left > 0:
        left -= max(device, tokens // max(lengths[left - 1], 1))
        parts += 1
    return parts


def _bounds(lengths: Sequence[int], parts: int, most: int, tokens: int = 0) -> list[int]:
    """Where to cut ascending `lengths` into `parts` by the rule of `_cut` so that least is padded, ends included.

    Dynamic programme over (parts, end): total(p, b) = min_a total(p - 1, a) + (b - a) lengths[b - 1].
    """
    n = len(lengths)
    if parts in (1, n) or (parts * most == n and not tokens):
        return [round(i * n / parts) for i in range(parts + 1)]
    ends = np.arange(n + 1)
    taken = ends[None, :] - ends[:, None]  # [a, b]: rows of a part that begins at a and ends before b
    widest = np.array([0, *lengths], dtype=float)
    cost = taken * widest[None, :]
    cost = np.where((taken >= 1) & ((taken <= most) | (cost <= tokens)), cost, np.inf)
    total, chosen = cost[0], []
    for _ in range(parts - 1):
        totals = total[:, None] + cost
        chosen.append(totals.argmin(axis=0))
        total = totals.min(axis=0)
    bounds = [n]
    for begin in reversed(chosen):
        bounds.append(int(begin[bounds[-1]]))
    return [0, *reversed(bounds)]
