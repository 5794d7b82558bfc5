"""Stage 2 for an objective whose reward the user brings: nothing is trained; it is tried, measured and calibrated.

What the other stages find in its folder are `reward.json` (what it is and of which content), `calibration.json` and
`metrics.json`, as beside a trained reward model. The reward itself is in `brought`.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.runs import (
    finish_run,
    is_current,
    partial_directory,
    publish,
    refuse_replacing,
    start_run,
    write_step_result,
)
from prmd.config.shared import RewardModelConfig
from prmd.inference.reference import check_engine, reference_key
from prmd.models.loading import load_tokenizer
from prmd.pairs import read_pairs
from prmd.rewards.brought import BROUGHT_FILE, BroughtReward, brought_reward
from prmd.rewards.fitting import calibrate_reward_model, measure
from prmd.rewards.reward_model import CALIBRATION_FILE
from prmd.rewards.task import RewardPairs, RewardTask, read_reward_pairs
from prmd.runtime import is_main_process
from prmd.training.fingerprints import calibration_keys

logger = logging.getLogger(__name__)

_TRIED = ("train", "val", "test")
"""The splits whose pairs a function has rewarded before anything is trained."""


def bring_reward(task: RewardTask, *, force: bool = False, dry_run: bool = False) -> Path:
    """Make the folder of a reward that the user brings.

    Raises:
        ConfigError: its function cannot be loaded, or the folder holds what was made of other settings or data.
        DataError: it does not reward every response, or gives no scale.
    """
    config = task.config
    if dry_run:
        source = config.data.brought[task.objective]
        named = source.function or f"columns {source.column_chosen} and {source.column_rejected}"
        logger.info("%s: brought (%s), nothing would be trained", task.name, named)
        logger.info("would calibrate and measure it, and write %s", task.directory)
        return task.directory
    reward, tokenizer = (
        brought_reward(config, task.objective, task.directory),
        load_tokenizer(config.model, config.paths),
    )
    one = config.ensemble.model_copy(update={"members": 1})  # no pairs are kept for heads
    data = read_reward_pairs(replace(task, config=config.model_copy(update={"ensemble": one})))
    fingerprint = _fingerprint(task, reward, tokenizer)
    if not force and is_current(task.directory, fingerprint, read=(CALIBRATION_FILE, BROUGHT_FILE)):
        logger.info(
            "%s: finished before with the same settings and data, reused: %s", task.name, task.directory
        )
        return task.directory
    if not force:
        refuse_replacing(task.directory, fingerprint, what=task.name)
    check_engine(config.calibration)
    check_functions(config)
    _build(task, data, reward, tokenizer, fingerprint, force)
    return task.directory


def _fingerprint(task: RewardTask, reward: BroughtReward, tokenizer: PreTrainedTokenizerBase) -> str:
    """Key of the reward itself, of what is sampled and cut to calibrate and measure it, and of the pairs."""
    config, paths = task.config, task.config.paths
    parts = [(task.objective, "train"), (task.objective, "test"), *((k, "val") for k in paths.objectives)]
    digests = io.files_sha256([paths.split(*part) for part in parts])
    cut = [config.training.max_length, config.training.over_length]
    base = reference_key(config.model, paths, tokenizer)
    how = [config.seed, calibration_keys(config.calibration)[0]]
    return io.fingerprint(["brought", task.objective, reward.fingerprint, cut, how, base, digests])


def _build(
    task: RewardTask,
    data: RewardPairs,
    reward: BroughtReward,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str,
    force: bool,
) -> None:
    """Calibration and measurements, published when everything is there."""
    clock, config = start_run(), task.config
    partial = partial_directory(task.directory, fingerprint, force)
    reward = replace(reward, directory=partial)
    if is_main_process():
        io.write_json(partial / BROUGHT_FILE, reward.record())
    reward, _ = calibrate_reward_model(task, reward)
    sizes = {"train": 0, "fit": 0, "val": len(data.val), "test": len(data.test)}
    facts: dict[str, Any] = {"sizes": sizes, "brought": reward.source.model_dump(exclude_none=True)}
    metrics = measure(task, data, reward, tokenizer, facts)
    inputs = {"data": fingerprint, "reward_model": reward.fingerprint}
    if is_main_process():
        io.write_json(partial / "metrics.json", metrics)
        finish_run(partial, config=config, inputs=inputs, fingerprint=fingerprint, clock=clock)
    publish(partial, task.directory)
    if is_main_process():
        headline = {key: metrics[key] for key in ("accuracy", "brought")}
        step = f"train_{task.objective}_rm"
        write_step_result(config.paths, step, {"artifact": str(task.directory), **headline})


def check_functions(config: RewardModelConfig) -> None:
    """Have every function of the user's reward all pairs, before anything is trained; what it said is kept in the cache.

    Raises:
        ConfigError: one cannot be loaded.
        DataError: one does not give every response a finite number, an empty one included, as a sample may be.
    """
    paths = config.paths
    for objective, source in config.data.brought.items():
        if source.function is None:
            continue
        reward = brought_reward(config, objective, paths.reward_model(objective))
        pairs = [pair for k in paths.objectives for split in _TRIED for pair in read_pairs(paths, k, split)]
        rows = reward.rows_of_pairs(pairs)
        empty = reward.rows_of_texts(pairs[0].prompt, [""])
        reward.rewards([*rows[:4], empty], description=f"{source.function}: a first try")
        reward.rewards(rows, description=f"{source.function}: all pairs")
