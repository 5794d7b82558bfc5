"""What `--dry-run` says of one training: what would be read, trained and written, and whether it fits the memory.

No model is loaded and nothing is written; a missing input is said with the command that makes it. The plan of the memory is
made of the model's configuration and the longest row of the pairs that would be trained on.
"""

import heapq
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache

from prmd.artifacts import hub, io
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import CalibrationConfig, ModelConfig, SharedConfig, TrainingConfig, TuningConfig
from prmd.errors import UserError
from prmd.models.card import USABLE, prompts_at_once, sampling_bytes
from prmd.models.loading import load_model_config, load_tokenizer, model_source
from prmd.models.tokenization import PrefixRow, tokenize_pairs
from prmd.pairs import PREPARE_COMMAND, PreferencePair
from prmd.runtime import GIB, free_disk_bytes
from prmd.training.batches import plan_training, step_size
from prmd.training.memory import MemoryPlan, device_memory, memory_planner, precision_for, weight_bytes
from prmd.training.merging import fill_card
from prmd.training.precision import Precision, eight_bit_precision
from prmd.training.rehearsal import Task, meta_model

logger = logging.getLogger(__name__)
Read = TypeVar("Read")

PLANNED_CARD = 32 * GIB
"""The card that is planned for besides, where this machine has none."""

_LONGEST_PAIRS = 256
_SOME_PAIRS = 1024
_LETTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Sampled:
    """Most tokens of the reference samples in the rows of a training.

    Attributes:
        gamma: of each that stands behind the two responses of every pair.
        paired: of those that are pairs of their own; 0 without such pairs.
    """

    gamma: tuple[int, ...] = ()
    paired: int = 0


UNSAMPLED = Sampled()


@dataclass(frozen=True)
class KnownRows:
    """Rows that training will see.

    Attributes:
        longest: by tokens of prompt and both responses; None where no data is prepared, no tokenizer is on this machine, or
            no pair fits.
        some: of pairs evenly spread over the data, and the longest.
    """

    longest: PrefixRow | None = None
    some: tuple[PrefixRow, ...] = ()


def read_if_there(files: Sequence[Path], read: Callable[[], Read]) -> Read | None:
    """What a stage reads to begin with, each file said; None where one is missing, or where it refuses them, which is said too."""
    try:
        describe_inputs(files)
        return read() if all(path.is_file() for path in files) else None
    except UserError as error:
        logger.info("the data would be refused: %s", error)
        return None


def known_rows(
    model: ModelConfig,
    paths: ArtifactPaths,
    pairs: Sequence[PreferencePair],
    training: TrainingConfig,
    task: Task,
    *,
    sample_tokens: int = 0,
) -> KnownRows:
    """The longest row that training will see and some others.

    Only pairs with the most characters and a sample are tokenised; all would take minutes.

    Args:
        pairs: those that are trained on.
        sample_tokens: pairs of reference samples, at most so long, are trained on too, as far as they fit
            `training.max_length` with their prompt; 0: none are.
    """
    if not pairs or not _tokenizer_is_here(model, paths):
        return KnownRows()

    def rows_of(pairs: Sequence[PreferencePair]) -> list[PrefixRow]:
        return list(
            tokenize_pairs(
                pairs,
                load_tokenizer(model, paths),
                max_length=training.max_length,
                over_length=training.over_length,
                keep_suffix=task == "reward_model",
            ).rows
        )

    try:
        longest = rows_of(_longest_pairs(pairs, training.max_length, sample_tokens))
        some = rows_of(pairs[:: max(1, len(pairs) // _SOME_PAIRS)])
    except UserError as error:
        logger.info("memory is planned for rows of training.max_length: %s", error)
        return KnownRows()
    for row in tuple(longest) if sample_tokens else ():
        tokens = min(sample_tokens, training.max_length - len(row.prompt_ids))
        longest.append(PrefixRow(row.prompt_ids, ((0,) * tokens,) * 2))
    row = max(longest, key=lambda row: row.shared_length, default=None)
    return KnownRows(row, (*some, row)) if row else KnownRows()


def _longest_pairs(
    pairs: Sequence[PreferencePair], max_length: int, sample_tokens: int
) -> list[PreferencePair]:
    """The pairs with the most letters, and those whose prompts have the most with a pair of samples."""
    most = _LETTERS_PER_TOKEN * max_length

    def prompt(pair: PreferencePair) -> int:
        return sum(len(message["content"]) for message in pair.prompt)

    def own(pair: PreferencePair) -> int:
        shorter, longer = sorted((len(pair.chosen), len(pair.rejected)))
        # a prompt is cut until it and the longer response fit
        return min(prompt(pair) + longer, most) + shorter

    def sampled(pair: PreferencePair) -> int:
        return prompt(pair) + 2 * min(_LETTERS_PER_TOKEN * sample_tokens, most - prompt(pair))

    keys = (own, sampled) if sample_tokens else (own,)
    return [pair for key in keys for pair in heapq.nlargest(_LONGEST_PAIRS, pairs, key=key)]


def _tokenizer_is_here(model: ModelConfig, paths: ArtifactPaths) -> bool:
    if Path(model_source(model, paths)).is_dir():
        return True
    cached = try_to_load_from_cache(
        model.name,
        "tokenizer_config.json",
        revision=model.revision,
        cache_dir=hub.cache_of(model.name, model.revision),
    )
    return isinstance(cached, str)


def memory_lines(
    shared: SharedConfig,
    tuning: TuningConfig,
    training: TrainingConfig,
    task: Task,
    *,
    pairs: Sequence[PreferencePair] = (),
    sampled: Sampled = UNSAMPLED,
    sampling: CalibrationConfig | None = None,
) -> list[str]:
    """The memory plan for this machine as lines, or why there is none; without a card also that for one of 32 GiB.

    Args:
        pairs: those that are trained on, as far as they are known.
        sampling: how the stage samples the reference; None: it does not.
    """
    model, paths = shared.model, shared.paths
    if model.source == "pypi_wheel" and not paths.base_model(model.name).is_dir():
        return [f"memory      not known before {model.name} is fetched once"]
    try:
        model_config = load_model_config(model, paths)
    except UserError as error:
        return [f"memory      not known: {error}"]
    rows = known_rows(model, paths, pairs, training, task, sample_tokens=sampled.paired)
    plan = memory_planner(model_config, tuning, training, task, sampled.gamma)
    card = device_memory()
    lines = [_row_line(rows.longest, training) + _gamma_clause(sampled)]
    some = [_with_samples(row, sampled.gamma) for row in rows.some]
    for device_bytes in (card,) if card else (None, PLANNED_CARD):
        known = {"device_bytes": device_bytes, "longest": rows.longest, "rows": some, "seed": shared.seed}
        lines += _plan_lines(plan, model, tuning, training, **known)
    if sampling:
        dtype, device_bytes = getattr(torch, model.dtype), card or PLANNED_CARD
        lines.append(_sampling_line(sampling, model_config, dtype, training.max_length, device_bytes))
    return [f"memory      {line}" for line in lines]


def _row_line(longest: PrefixRow | None, training: TrainingConfig) -> str:
    if longest is None:
        return (
            f"of batches of two responses of {training.max_length} tokens each (no data or tokenizer at hand)"
        )
    responses = " and ".join(str(len(tokens)) for tokens in longest.responses)
    return f"of batches of the longest pair: {len(longest.prompt_ids)} tokens of prompt, {responses} of responses"


def _with_samples(row: PrefixRow, tokens: Sequence[int]) -> PrefixRow:
    """With reference samples of so many tokens behind its responses."""
    return PrefixRow(row.prompt_ids, (*row.responses, *((0,) * count for count in tokens)))


def _gamma_clause(sampled: Sampled) -> str:
    tokens = " and ".join(map(str, sampled.gamma))
    return f", with {tokens} of reference samples behind each (policy.gamma)" if tokens else ""


def _plan_lines(
    plan: Callable[..., MemoryPlan],
    model: ModelConfig,
    tuning: TuningConfig,
    training: TrainingConfig,
    *,
    device_bytes: int | None,
    longest: PrefixRow | None,
    rows: Sequence[PrefixRow],
    seed: int,
) -> list[str]:
    """The precision that a run would choose on such a card, its plan, and what a step would be cut into."""
    where = "this machine, which has no card"
    if device_bytes is not None:
        where = (
            "this card" if device_memory() else f"a card of {device_bytes / GIB:.0f} GiB, which is not here"
        )
    try:
        precision, problem = precision_on(plan, model, tuning, training, device_bytes)
        chosen = partial(plan, precision=precision, longest=longest)
        lines = _filled_lines(chosen, training, rows, device_bytes=device_bytes, seed=seed)
        lines = lines or chosen(device_bytes=device_bytes).rows()
    except UserError as error:
        return [f"not known: {error}"]
    return [f"on {where}: {precision.describe()}", *lines, *([f"before that: {problem}"] if problem else [])]


def _filled_lines(
    plan: Callable[..., MemoryPlan],
    training: TrainingConfig,
    rows: Sequence[PrefixRow],
    *,
    device_bytes: int | None,
    seed: int,
) -> list[str]:
    """The plan of the largest micro-batch and what a step is cut into; nothing where that is not known or does not fit."""
    if not device_bytes or not rows:
        return []
    lengths = [row.shared_length for row in rows]
    cut = plan_training(lengths, range(len(rows)), training, seed=seed, processes=1)
    filling = fill_card(cut, rows, training, planned=plan, device_bytes=device_bytes)
    if filling.memory is None or not filling.memory.fits:
        return []
    return [
        *filling.memory.rows(),
        f"a step of {filling.describe()}, as far as {len(rows)} of the pairs show",
    ]


def precision_on(
    plan: Callable[..., MemoryPlan],
    model: ModelConfig,
    tuning: TuningConfig,
    training: TrainingConfig,
    device_bytes: int | None,
) -> tuple[Precision, str]:
    """The precision that a run would choose on a card of so many bytes, and what it lacks here, else empty.

    Args:
        plan: `memory.memory_planner` of this model and training.

    Raises:
        ConfigError: none can be chosen.
    """

    try:
        return precision_for(plan, model, tuning, training, device_bytes), ""
    except UserError as error:
        if model.dtype != "bfloat16":
            raise
        return eight_bit_precision(training.learning_rate), str(error)


def _sampling_line(
    sampling: CalibrationConfig, model_config: Any, dtype: torch.dtype, length: int, device_bytes: int
) -> str:
    """As `inference.batching.BatchPlan` samples on a card that holds nothing but the model.

    Args:
        length: most tokens of a prompt.
    """
    sizes, samples = sampling_bytes(model_config, dtype), sampling.samples_per_prompt
    if sizes is None:
        return "of sampling not known: the family has no attention heads that could be counted"
    weights = weight_bytes(meta_model(model_config, task="policy", dtype=dtype, lora=None))
    free, numbers = int(USABLE * device_bytes) - weights, {"new_tokens": sampling.max_new_tokens}
    at_once = prompts_at_once(sampling.batch_size, sizes, free, samples=samples, **numbers)
    sequences, tokens = at_once(length) * samples, length + sampling.max_new_tokens
    cache, logits = sequences * tokens * sizes.cached, sequences * sizes.logits
    return (
        f"of sampling {sequences} responses at once, {tokens} tokens with their prompts: weights "
        f"{weights / GIB:.2f} GiB, cache {cache / GIB:.2f} GiB, logits {logits / GIB:.2f} GiB"
    )


def describe_inputs(files: Sequence[Path]) -> None:
    """Log size and rows of each prepared file, or the command that makes it."""
    for path in files:
        if path.is_file():
            rows = len(io.read_jsonl(path))
            logger.info("would read  %s (%d rows, %.1f MB)", path, rows, path.stat().st_size / 1e6)
        else:
            logger.info("would read  %s: missing; make it with `%s`", path, PREPARE_COMMAND)


def describe_training(
    shared: SharedConfig,
    *,
    name: str,
    pairs: Sequence[PreferencePair],
    epoch: int,
    drawn: int,
    tuning: TuningConfig,
    training: TrainingConfig,
    task: Task,
    output: Path,
    sampled: Sampled = UNSAMPLED,
    sampling: CalibrationConfig | None = None,
) -> None:
    """Log what one training would do.

    Args:
        pairs: those that are trained on; none where they are not known.
        epoch: how often one of them is trained on in an epoch.
        drawn: the same over all epochs.
        sampling: as for `memory_lines`.
    """
    step_pairs, epochs = step_size(training, 1).pairs, training.epochs
    counted = f"about {epoch} pairs x {epochs:g} epochs = {math.ceil(drawn / step_pairs)} optimiser steps"
    logger.info(
        "would train %s on %s of %d pairs (%s, %s)",
        *(name, counted if drawn else f"pairs that are not known yet, {epochs:g} epochs in steps"),
        *(step_pairs, shared.model.name, tuning.method),
    )
    for line in memory_lines(shared, tuning, training, task, pairs=pairs, sampled=sampled, sampling=sampling):
        logger.info("%s", line)
    logger.info("would write %s (%.1f GiB free on this disk)", output, free_disk_bytes(output) / GIB)
