"""Stage 2: a reward model per objective, with its ensemble, calibration, checkpoints and analysis.

    L_RM = mean_i w_i { -log sigma(r_0(x_i, y_w) - r_0(x_i, y_l) + s_0 a_i) + c (r_0(y_w) + r_0(y_l))^2 }

a_i is 0 unless the configuration names features that are held to be a bias of the labels (`debias`); w_i is 1 unless the
pairs came with weights.
The backbone is trained first (`backbone`); the M heads are then fit on a slice of the training pairs it never saw
(`fitting`), or M adapters are trained in the same way, each on its own bootstrap of the pairs. The evaluation's
judges are trained by the same code on the `judge` split (`train_judge`).
"""

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.manifest import EVERYTHING
from prmd.artifacts.paths import TRAIN_COMMAND
from prmd.artifacts.runs import (
    finish_run,
    is_current,
    partial_directory,
    publish,
    refuse_replacing,
    start_run,
    take_over,
    write_step_result,
)
from prmd.config.evaluation import EvaluationConfig
from prmd.config.shared import RewardModelConfig
from prmd.errors import ConfigError
from prmd.inference.reference import calibration_sampling, check_engine
from prmd.models.bases import base_record
from prmd.models.chat_templates import describe_template
from prmd.models.loading import load_tokenizer
from prmd.rewards.backbone import epoch_stream, train_backbone, train_members
from prmd.rewards.bring import bring_reward, check_functions
from prmd.rewards.debias import DEBIAS_FILE, Debiasing, FittedBias, prepare_debiasing
from prmd.rewards.fitting import calibrate_reward_model, fit_heads, measure
from prmd.rewards.reward_model import CALIBRATION_FILE, ENSEMBLE_FILE, load_reward_model
from prmd.rewards.task import RewardPairs, RewardTask, read_reward_pairs
from prmd.runtime import is_main_process, wait_for_everyone
from prmd.training.dry_run import describe_training, read_if_there
from prmd.training.run import check_training

logger = logging.getLogger(__name__)

FITTED = frozenset({ENSEMBLE_FILE, CALIBRATION_FILE, DEBIAS_FILE, "metrics.json", "config.yaml"})
"""The files of a reward model that are made from its backbone, in minutes."""


def train_reward_model(
    config: RewardModelConfig, *, objective: str | None, force: bool = False, dry_run: bool = False
) -> Path:
    """Train the reward model of one objective; of one whose reward is brought, try, measure and calibrate that.

    Args:
        objective: one of the approach; None: not named on the command line, which is refused.
        force: rebuild what is finished.
        dry_run: say what would be read, trained and written; load nothing.

    Returns:
        Its folder: a one-logit classifier with `ensemble.safetensors` or `members/`, `calibration.json`, `metrics.json`.

    Raises:
        ConfigError: no such objective.
    """
    paths = config.paths
    if objective not in paths.objectives:
        raise ConfigError(
            f"objective: got {objective or 'none'}, wanted one of {', '.join(paths.objectives)}, those of data.approach: "
            f"{paths.approach}; name it, such as `{TRAIN_COMMAND} objective={paths.objectives[0]}`"
        )
    names = ("reward_models", paths.approach, objective)
    task = RewardTask(config, objective, "train", paths.reward_model(objective), names)
    if objective in config.data.brought:
        return bring_reward(task, force=force, dry_run=dry_run)
    return _run(task, force, dry_run)


def train_judge(
    config: EvaluationConfig, *, objective: str, force: bool = False, dry_run: bool = False
) -> Path:
    """Train the evaluation's own reward model of one objective on the `judge` split, without an ensemble.

    Args:
        force: replace a judge of other settings or data; a current one is reused.
    """
    shared, judges = config.reward_model_config, config.judges
    changes = {
        "model": judges.model or shared.model,
        "tuning": judges.tuning,
        "training": judges.training,
        "debias": judges.debias,  # not that of the reward models: judges see the labels as they are
        "ensemble": shared.ensemble.model_copy(update={"members": 1}),
    }
    task_config = shared.model_copy(update=changes)
    names = ("judges", shared.paths.approach, objective)
    return _run(
        RewardTask(task_config, objective, "judge", shared.paths.judge(objective), names), force, dry_run
    )


def _run(task: RewardTask, force: bool, dry_run: bool) -> Path:
    if dry_run:
        _say_what_would_be_trained(task)
        return task.directory
    data = read_reward_pairs(task)
    tokenizer = load_tokenizer(task.config.model, task.config.paths)
    fingerprints = task.fingerprints(tokenizer)
    rebuild = force and task.split == "train"  # a judge that is current serves a forced evaluation too
    read = EVERYTHING if force else (CALIBRATION_FILE,)
    if not rebuild and is_current(task.directory, *fingerprints, read=read):
        logger.info(
            "%s: finished before with the same settings and data, reused: %s", task.name, task.directory
        )
        return task.directory
    if not force:
        refuse_replacing(task.directory, *fingerprints, what=task.name)
    config = task.config
    logger.info("%s: %s", config.model.name, describe_template(tokenizer))
    logger.info("%s", data.describe(task))
    if task.split == "train":
        check_engine(config.calibration)
    check_training(
        *(config.model, config.paths, config.tuning, config.training),
        task="reward_model",
        directory=task.directory,
    )
    if task.split == "train":
        check_functions(config)
    debiased = prepare_debiasing(task, data, tokenizer)  # refuses before anything is written
    _build(task, data, tokenizer, fingerprints, force, *debiased)
    return task.directory


def _say_what_would_be_trained(task: RewardTask) -> None:
    config = task.config
    files = [config.paths.split(task.objective, split) for split in (task.split, "val", "test")]
    data = read_if_there(files, lambda: read_reward_pairs(task))
    train = data.train if data else []
    calibrated = task.split == "train" and config.calibration.source == "reference_samples"
    describe_training(
        config,
        name=task.name,
        pairs=train,
        epoch=len(train),
        drawn=len(epoch_stream(len(train), config.training.epochs, config.seed)) if train else 0,
        tuning=config.tuning,
        training=config.training,
        task="reward_model",
        output=task.directory,
        sampling=calibration_sampling(config).calibration if calibrated else None,
    )
    if features := config.debias.of(task.objective):
        logger.info("would keep out of it what these features predict of the labels: %s", ", ".join(features))
    if task.has_adapters:
        members = config.ensemble.members
        logger.info(
            "would train %d members more, each on its own resample of these pairs: %d trainings in all",
            *(members, members + 1),
        )


def _keep_backbone(task: RewardTask, partial: Path, fingerprints: tuple[str, ...]) -> None:
    """A reward model that lost no weights of a training is not trained again: heads and calibration are fit anew."""
    facts = task.directory / "backbone.json"
    best = io.read_json(facts)["best"] if facts.is_file() else ""
    if is_main_process() and best and (task.directory / "checkpoints" / best).is_dir():
        take_over(task.directory, partial, *fingerprints, made_again=FITTED)
    wait_for_everyone()


def _build(
    task: RewardTask,
    data: RewardPairs,
    tokenizer: PreTrainedTokenizerBase,
    fingerprints: tuple[str, ...],
    force: bool,
    bias: FittedBias | None,
    debiasing: Debiasing | None,
) -> None:
    """Backbone, heads, measurements and calibration, published when everything is there."""
    clock, fingerprint = start_run(), fingerprints[0]
    partial = partial_directory(task.directory, fingerprint, force)
    if not force:
        _keep_backbone(task, partial, fingerprints)
    with io.disk_errors_named(partial):
        if bias and is_main_process():
            io.write_json(partial / DEBIAS_FILE, bias.record)
        facts = train_backbone(task, data, tokenizer, partial, debiasing)
        if task.has_adapters:
            train_members(task, data, tokenizer, partial, debiasing)
    reward_model = load_reward_model(partial, shared=task.config)
    if task.has_heads:
        fit_heads(task, data.fit, reward_model, debiasing)
        wait_for_everyone()
        reward_model = load_reward_model(partial, shared=task.config)
    if task.split == "train":  # judges are calibrated by the evaluation, on its own samples
        reward_model, correlation = calibrate_reward_model(task, reward_model)
        facts["member_correlation_reference_samples"] = correlation
    metrics = measure(task, data, reward_model, reward_model.tokenizer, facts, debiasing)
    reward_model.release()  # its weights are read from the folder that is about to be moved
    base = base_record(task.config.model, task.config.paths)
    inputs = {"data": fingerprint, "reward_model": reward_model.fingerprint, "base": base}
    if is_main_process():
        io.write_json(partial / "metrics.json", metrics)
        finish_run(partial, config=task.config, inputs=inputs, fingerprint=fingerprint, clock=clock)
    publish(partial, task.directory)
    if is_main_process():
        headline = {
            k: metrics[k] for k in ("accuracy", "mean_member_accuracy", "sizes", "member_correlation")
        }
        step = f"train_judge_{task.objective}" if task.split == "judge" else f"train_{task.objective}_rm"
        write_step_result(task.config.paths, step, {"artifact": str(task.directory), **headline})
