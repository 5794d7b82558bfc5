"""What `--dry-run` says of a training: what would be read, trained and written, and whether it fits the memory.

No model is loaded and nothing is written; a missing input is said with the command that makes it. The closed-form gate,
which a dry run of pessimistic_dpo.py adds, is in `policy_gate`.
"""

import heapq
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from prmd import io
from prmd.config import ModelConfig, PolicyConfig, RewardModelConfig, TrainingConfig, TuningConfig
from prmd.errors import UserError
from prmd.memory import plan_generation_memory, plan_memory
from prmd.memory_plan import MemoryPlan, device_memory
from prmd.models import load_model_config, load_tokenizer, model_source
from prmd.objectives import OBJECTIVES
from prmd.paths import ArtifactPaths
from prmd.policy_methods import POLICY_METHODS, SOUP, SOUP_MEMBERS
from prmd.precision import Precision, eight_bit_precision, resolve_precision
from prmd.preferences import PREPARE_COMMAND, PreferencePair
from prmd.provenance import read_run
from prmd.reference import GENERATION_BATCH
from prmd.rehearsal import Task
from prmd.reward_models import reward_model_command
from prmd.runtime import GIB, free_disk_bytes
from prmd.tokenization import PrefixRow, tokenize_pairs

logger = logging.getLogger(__name__)

PLANNED_CARD = 32 * GIB
"""The card that is planned for besides, where this machine has none."""

_LONGEST_PAIRS = 256
_LETTERS_PER_TOKEN = 4


def describe_inputs(files: Sequence[Path], command: str) -> int:
    """Log size and rows of each JSON Lines file, or the command that makes it.

    Returns:
        Rows of all files together.
    """
    total = 0
    for path in files:
        if path.is_file():
            rows = len(io.read_jsonl(path))
            total += rows
            logger.info("would read  %s (%d rows, %.1f MB)", path, rows, path.stat().st_size / 1e6)
        else:
            logger.info("would read  %s: missing; make it with `%s`", path, command)
    return total


def describe_training(
    config: RewardModelConfig,
    *,
    name: str,
    trained_on: Sequence[Path],
    also_read: Sequence[Path],
    tuning: TuningConfig,
    training: TrainingConfig,
    task: Task,
    output: Path,
) -> None:
    """Log what one training would do.

    Args:
        trained_on: files whose rows are pooled and trained on.
        also_read: the held-out ones.
    """
    rows = describe_inputs(trained_on, PREPARE_COMMAND)
    describe_inputs(also_read, PREPARE_COMMAND)
    if training.max_pairs:
        rows = min(rows, training.max_pairs)
    step_pairs = training.pairs_per_device * training.gradient_accumulation_steps
    logger.info(
        "would train %s on about %d pairs x %g epochs = %d optimiser steps of %d pairs (%s, %s)",
        *(name, rows, training.epochs, math.ceil(rows * training.epochs / step_pairs), step_pairs),
        *(config.model.name, tuning.method),
    )
    for line in memory_lines(config, tuning, training, task, trained_on=trained_on):
        logger.info("%s", line)
    logger.info("would write %s (%.1f GiB free on this disk)", output, free_disk_bytes(output) / GIB)


def describe_policies(config: PolicyConfig, methods: Sequence[str]) -> None:
    """Log what training these methods would read, do and write."""
    train, val = (
        [config.paths.split(objective, split) for objective in OBJECTIVES] for split in ("train", "val")
    )
    if any(POLICY_METHODS[method].reads_rewards for method in methods):
        describe_reward_models(config.paths)
    for method in methods:
        directory = config.paths.policy(method, config.run_name)
        if method == SOUP:
            logger.info("would average %s to %s; nothing is trained", ", ".join(SOUP_MEMBERS), directory)
            continue
        describe_training(
            config.shared,
            name=f"policy {method}",
            trained_on=train,
            also_read=val,
            tuning=config.tuning,
            training=config.training,
            task="policy",
            output=directory,
        )
        if config.pairs.reference_samples and POLICY_METHODS[method].reward is not None:
            times, share = 1 / (1 - config.pairs.share), config.pairs.share
            logger.info(
                "with pairs of reference samples, %.0f%% of all: %.3g times these steps", 100 * share, times
            )


def describe_reward_models(paths: ArtifactPaths) -> None:
    """Log the reward models a policy stage reads, or the commands that train them."""
    for objective in OBJECTIVES:
        folder = paths.reward_model(objective)
        found = (
            "finished" if read_run(folder) else f"missing; make it with `{reward_model_command(objective)}`"
        )
        logger.info("would read  %s: %s", folder, found)


# ------------------------------------------------------------------ memory
def longest_row(
    config: RewardModelConfig, files: Sequence[Path], training: TrainingConfig, task: Task
) -> PrefixRow | None:
    """The longest row that training will see, by tokens of prompt and both responses.

    Only pairs with the most characters are tokenised; all would take minutes.

    Returns:
        None where no data is prepared, no tokenizer is on this machine, or no pair fits.
    """
    files = [path for path in files if path.is_file()]
    if not files or not _tokenizer_is_here(config):
        return None

    def size(pair: PreferencePair) -> int:
        prompt = sum(len(message["content"]) for message in pair.prompt)
        shorter, longer = sorted((len(pair.chosen), len(pair.rejected)))
        # a prompt is cut until it and the longer response fit
        return min(prompt + longer, _LETTERS_PER_TOKEN * training.max_length) + shorter

    try:
        pairs = [
            PreferencePair.from_row(row, objective=path.parent.name, where=f"{path}:{number}")
            for path in files
            for number, row in enumerate(io.read_jsonl(path), start=1)
        ]
        tokenized = tokenize_pairs(
            heapq.nlargest(_LONGEST_PAIRS, pairs, key=size),
            load_tokenizer(config.model, config.paths),
            max_length=training.max_length,
            over_length=training.over_length,
            keep_suffix=task == "reward_model",
        )
    except UserError as error:
        logger.info("memory is planned for rows of training.max_length: %s", error)
        return None
    return max(tokenized.rows, key=lambda row: row.shared_length, default=None)


def _tokenizer_is_here(config: RewardModelConfig) -> bool:
    model = config.model
    if Path(model_source(model, config.paths)).is_dir():
        return True
    cached = try_to_load_from_cache(model.name, "tokenizer_config.json", revision=model.revision)
    return isinstance(cached, str)


def memory_lines(
    config: RewardModelConfig,
    tuning: TuningConfig,
    training: TrainingConfig,
    task: Task,
    *,
    trained_on: Sequence[Path] = (),
) -> list[str]:
    """The memory plan for this machine as lines, or why there is none; without a card also that for one of 32 GiB."""
    model = config.model
    if model.source == "pypi_wheel" and not config.paths.base_model(model.name).is_dir():
        return [f"memory      not known before {model.name} is fetched once"]
    try:
        model_config = load_model_config(model, config.paths)
    except UserError as error:
        return [f"memory      not known: {error}"]
    longest = longest_row(config, trained_on, training, task)
    plan = partial(
        plan_memory,
        model_config=model_config,
        tuning=tuning,
        training=training,
        task=task,
        pairs_per_device=training.pairs_per_device,
    )
    card = device_memory()
    lines = [_row_line(longest, training)]
    for device_bytes in (card,) if card else (None, PLANNED_CARD):
        lines += _plan_lines(plan, model, tuning, training, device_bytes=device_bytes, longest=longest)
    if config.calibration.source == "reference_samples":
        lines.append(_sampling_line(config, model_config, training, card or PLANNED_CARD))
    return [f"memory      {line}" for line in lines]


def _row_line(longest: PrefixRow | None, training: TrainingConfig) -> str:
    if longest is None:
        return (
            f"of batches of two responses of {training.max_length} tokens each (no data or tokenizer at hand)"
        )
    responses = " and ".join(str(len(tokens)) for tokens in longest.responses)
    return f"of batches of the longest prepared pair: {len(longest.prompt_ids)} tokens of prompt, {responses} of responses"


def _plan_lines(
    plan: Callable[..., MemoryPlan],
    model: ModelConfig,
    tuning: TuningConfig,
    training: TrainingConfig,
    *,
    device_bytes: int | None,
    longest: PrefixRow | None,
) -> list[str]:
    """The precision that a run would choose on such a card, and its plan."""

    def fits(precision: Precision) -> bool:
        return plan(precision=precision, device_bytes=device_bytes).fits is not False

    where = "this machine, which has no card"
    if device_bytes is not None:
        where = (
            "this card" if device_memory() else f"a card of {device_bytes / GIB:.0f} GiB, which is not here"
        )
    problem = []
    try:
        precision = resolve_precision(
            tuning,
            learning_rate=training.learning_rate,
            model=model,
            plan_fits=fits if device_bytes else None,
        )
    except UserError as error:
        if model.dtype != "bfloat16":
            return [f"not known: {error}"]
        precision, problem = eight_bit_precision(training.learning_rate), [f"before that: {error}"]
    rows = plan(precision=precision, device_bytes=device_bytes, longest=longest).rows()
    return [f"on {where}: {precision.describe()}", *rows, *problem]


def _sampling_line(
    config: RewardModelConfig, model_config: Any, training: TrainingConfig, device_bytes: int
) -> str:
    tokens = training.max_length + config.calibration.max_new_tokens
    plan = plan_generation_memory(
        model_config=model_config,
        dtype=getattr(torch, config.model.dtype),
        sequences=GENERATION_BATCH,
        tokens=tokens,
        device_bytes=device_bytes,
    )
    return (
        f"of sampling {GENERATION_BATCH} responses at once, {tokens} tokens with their prompts: weights "
        f"{plan.weights / GIB:.2f} GiB, cache {plan.cache / GIB:.2f} GiB, logits {plan.logits / GIB:.2f} GiB"
    )
