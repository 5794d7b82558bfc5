"""What `--dry-run` says of a training: what would be read, trained and written, and whether it fits the memory.

No model is loaded and nothing is written; a missing input is said with the command that makes it. The closed-form gate,
which a dry run of pessimistic_dpo.py adds, is in `policy_gate`.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from prmd import io
from prmd.config import ModelConfig, PolicyConfig, RewardModelConfig, TrainingConfig, TuningConfig
from prmd.errors import UserError
from prmd.memory import plan_memory
from prmd.memory_plan import device_memory
from prmd.models import load_model_config
from prmd.objectives import OBJECTIVES
from prmd.paths import ArtifactPaths
from prmd.policy_methods import POLICY_METHODS, SOUP, SOUP_MEMBERS
from prmd.precision import resolve_precision
from prmd.preferences import PREPARE_COMMAND
from prmd.provenance import read_run
from prmd.reward_models import reward_model_command
from prmd.runtime import GIB, free_disk_bytes

logger = logging.getLogger(__name__)


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
    task: str,
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
    for line in memory_lines(config.model, config.paths, tuning, training, task):
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


def memory_lines(
    model: ModelConfig, paths: ArtifactPaths, tuning: TuningConfig, training: TrainingConfig, task: str
) -> list[str]:
    """The memory plan as lines, or why there is none."""
    if model.source == "pypi_wheel" and not paths.base_model(model.name).is_dir():
        return [f"memory      not known before {model.name} is fetched once"]
    try:
        model_config = load_model_config(model, paths)
        precision = resolve_precision(
            tuning, learning_rate=training.learning_rate, model=model, plan_fits=None
        )
    except UserError as error:
        return [f"memory      not known: {error}"]
    plan = plan_memory(
        model_config=model_config,
        tuning=tuning,
        training=training,
        precision=precision,
        task=task,
        pairs_per_device=training.pairs_per_device,
        device_bytes=device_memory(),
    )
    return [f"memory      {row}" for row in plan.rows()]
