"""Stage 2: a reward model per objective, with its ensemble, calibration, checkpoints and analysis.

    L_RM = mean_i [ -log sigma(r_0(x_i, y_w) - r_0(x_i, y_l)) ] + c mean_i (r_0(y_w) + r_0(y_l))^2

The backbone is trained by `trainer.PairTrainer`; the M heads are then fit on a slice of the training pairs it never saw,
or M adapters are trained in the same way, each on its own bootstrap of the pairs.
The evaluation's judges are trained by the same code on the `judge` split (`train_judge`). What
follows the backbone is in `reward_fitting`.
"""

import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prmd import io
from prmd.adapter_members import (
    drop_checkpoints,
    is_trained,
    keep_adapter,
    member_folder,
    member_seed,
    resampled,
)
from prmd.checkpoints import best_step, copy_model, name_checkpoints
from prmd.config import EvaluationConfig, RewardModelConfig
from prmd.dry_run import describe_training
from prmd.losses import bradley_terry_loss
from prmd.models import add_lora, load_adapted, load_base_classifier, load_tokenizer, save_merged
from prmd.provenance import (
    finish_run,
    is_current,
    partial_directory,
    publish,
    refuse_replacing,
    start_run,
    write_step_result,
)
from prmd.reward_data import RewardPairs, RewardTask, read_reward_pairs, tokenize_reward_pairs
from prmd.reward_fitting import calibrate_reward_model, fit_heads, measure
from prmd.reward_models import load_reward_model
from prmd.runtime import is_main_process, set_seed, wait_for_everyone
from prmd.scoring import free_memory
from prmd.sequence_models import SequenceRewards
from prmd.trainer import Columns, PairData, PairLoss
from prmd.training import TrainingRun, check_training, run_training

logger = logging.getLogger(__name__)


def train_reward_model(
    config: RewardModelConfig, *, objective: str, force: bool = False, dry_run: bool = False
) -> Path:
    """Train the reward model of one objective.

    Args:
        objective: `helpful`, `harmless` or `honest`.
        force: rebuild what is finished.
        dry_run: say what would be read, trained and written; load nothing.

    Returns:
        Its folder: a one-logit classifier with `ensemble.safetensors` or `members/`, `calibration.json`, `metrics.json`.
    """
    paths = config.paths
    names = ("reward_models", paths.approach, objective)
    return _run(RewardTask(config, objective, "train", paths.reward_model(objective), names), force, dry_run)


def train_judge(
    config: EvaluationConfig, *, objective: str, force: bool = False, dry_run: bool = False
) -> Path:
    """Train the evaluation's own reward model of one objective on the `judge` split, without an ensemble.

    Args:
        force: replace a judge of other settings or data; a current one is reused.
    """
    shared, judges = config.shared, config.judges
    changes = {
        "model": judges.model or shared.model,
        "tuning": judges.tuning,
        "training": judges.training,
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
    fingerprint = task.fingerprint(tokenizer)
    rebuild = force and task.split == "train"  # a judge that is current serves a forced evaluation too
    if not rebuild and is_current(task.directory, fingerprint):
        logger.info(
            "%s: finished before with the same settings and data, reused: %s", task.name, task.directory
        )
        return task.directory
    if not force:
        refuse_replacing(task.directory, what=task.name)
    config = task.config
    check_training(
        config, config.tuning, config.training, task="reward_model", directory=task.directory.parent
    )
    _build(task, data, tokenizer, fingerprint, force)
    return task.directory


def _say_what_would_be_trained(task: RewardTask) -> None:
    config = task.config
    describe_training(
        config,
        name=task.name,
        trained_on=[config.paths.split(task.objective, task.split)],
        also_read=[config.paths.split(task.objective, split) for split in ("val", "test")],
        tuning=config.tuning,
        training=config.training,
        task="reward_model",
        output=task.directory,
    )
    if task.has_adapters:
        members = config.ensemble.members
        logger.info(
            "would train %d members more, each on its own resample of these pairs: %d trainings in all",
            *(members, members + 1),
        )


def _build(
    task: RewardTask, data: RewardPairs, tokenizer: PreTrainedTokenizerBase, fingerprint: str, force: bool
) -> None:
    """Backbone, heads, measurements and calibration, published when everything is there."""
    clock = start_run()
    partial = partial_directory(task.directory, fingerprint, force)
    facts = _train_backbone(task, data, tokenizer, partial)
    if task.has_adapters:
        _train_members(task, data, tokenizer, partial)
    reward_model = load_reward_model(partial, config=task.config)
    if task.has_heads:
        fit_heads(task, data.fit, reward_model)
        wait_for_everyone()
        reward_model = load_reward_model(partial, config=task.config)
    metrics = measure(task, data, reward_model, facts)
    if task.split == "train":  # judges are calibrated by the evaluation, on its own samples
        metrics["member_correlation_reference_samples"] = calibrate_reward_model(task.config, reward_model)
    inputs = {"data": fingerprint, "reward_model": reward_model.fingerprint}
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


# ------------------------------------------------------------------ backbone
def epoch_stream(n: int, epochs: float, seed: int) -> list[int]:
    """Indices of round(epochs x n) pairs: every epoch shuffled anew, a fractional last one cut short."""
    stream: list[int] = []
    for epoch in range(math.ceil(epochs)):
        order = list(range(n))
        random.Random(f"{seed}-{epoch}").shuffle(order)
        stream += order
    return stream[: round(epochs * n)]


def _train_backbone(
    task: RewardTask, data: RewardPairs, tokenizer: PreTrainedTokenizerBase, partial: Path
) -> dict[str, Any]:
    """Train r_0 into `partial` and return sizes and the curve; an interrupted run that got this far is not repeated."""
    done = partial / "backbone.json"
    if not done.is_file():
        facts = _train(task, data, tokenizer, partial)
        if is_main_process():
            _save_best(task, tokenizer, partial, partial / f"checkpoint-{facts['best_step']}")
            io.write_json(done, facts)
        wait_for_everyone()
    facts = io.read_json(done)
    if is_main_process():
        steps = {int(step): name for step, name in facts["checkpoints"].items()}
        name_checkpoints(partial, steps, facts["best_step"])
    return facts


def _train_members(
    task: RewardTask, data: RewardPairs, tokenizer: PreTrainedTokenizerBase, partial: Path
) -> None:
    """Train the adapters of the ensemble into `partial/members`, one after the other; finished ones are left alone."""
    config = task.config
    draws = resampled(data.train, members=config.ensemble.members, seed=config.seed)
    for member, pairs in enumerate(draws):
        folder = member_folder(partial, member)
        if not is_trained(folder):
            own = config.model_copy(update={"seed": member_seed(config.seed, member)})
            names = (*task.log_names, f"member-{member}")
            facts = _train(
                replace(task, config=own, log_names=names, member=member),
                replace(data, train=pairs),
                tokenizer,
                folder,
            )
            if is_main_process():
                io.write_json(folder / "training.json", facts)
                keep_adapter(folder, folder / f"checkpoint-{facts['best_step']}")
            free_memory()
        elif is_main_process():
            drop_checkpoints(folder)
        wait_for_everyone()


def _train(
    task: RewardTask, data: RewardPairs, tokenizer: PreTrainedTokenizerBase, partial: Path
) -> dict[str, Any]:
    """Train and evaluate; the checkpoints stay as the trainer left them."""
    train, val = (
        tokenize_reward_pairs(task, data.train, tokenizer),
        tokenize_reward_pairs(task, data.val, tokenizer),
    )
    config = task.config
    set_seed(config.seed)  # before loading: the scalar head is initialised at random

    def load(master_weights: bool) -> SequenceRewards:
        model = load_base_classifier(
            config.model, config.paths, pad_token_id=tokenizer.pad_token_id, master_weights=master_weights
        )
        lora = config.tuning.method == "lora"
        return SequenceRewards(add_lora(model, config.tuning.lora, task="SEQ_CLS") if lora else model)

    def loss(rewards: Tensor, columns: Columns) -> PairLoss:
        return reward_loss(rewards, config.centering_coefficient)

    run = TrainingRun(
        name=task.name,
        directory=partial,
        shared=config,
        tuning=config.tuning,
        training=config.training,
        data=PairData(train.rows, {}),
        stream=epoch_stream(len(train.rows), config.training.epochs, config.seed),
        eval_data=PairData(val.rows, {}),
        loss_function=loss,
        load_model=load,
        log_directory=config.paths.logs(*task.log_names),
        task="reward_model",
    )
    history, steps = run_training(run, tokenizer)
    sizes = {"train": len(train.rows), "fit": len(data.fit), "val": len(data.val), "test": len(data.test)}
    counts = {"sizes": sizes, "dropped": train.dropped, "truncated": train.truncated}
    return _checkpoint_facts(task, history, steps) | counts


def _checkpoint_facts(
    task: RewardTask, history: list[dict[str, float]], steps: dict[int, str]
) -> dict[str, Any]:
    """The held-out curve and which of the checkpoints `steps` (step -> name) is best."""
    curve = [
        {"step": row["step"], "eval_loss": row["eval_loss"], "eval_accuracy": row["eval_rewards/accuracies"]}
        for row in history
        if "eval_loss" in row
    ]
    best = best_step(curve)
    logger.info("%s: best checkpoint is %r by held-out accuracy", task.name, steps[best])
    return {
        "curve": curve,
        "best": steps[best],
        "best_step": best,
        "checkpoints": {str(step): name for step, name in steps.items()},
    }


def reward_loss(rewards: Tensor, centering_coefficient: float) -> PairLoss:
    """Bradley-Terry with centring and what is logged, from rewards [B, 2] of (chosen, rejected)."""
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    margins = (chosen - rejected).detach()
    metrics = {
        "rewards/chosen": chosen.detach(),
        "rewards/rejected": rejected.detach(),
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
    }
    loss = bradley_terry_loss(
        chosen_rewards=chosen, rejected_rewards=rejected, centering_coefficient=centering_coefficient
    )
    return PairLoss(loss, metrics)


def _save_best(task: RewardTask, tokenizer: PreTrainedTokenizerBase, partial: Path, best: Path) -> None:
    """Put the best checkpoint into the folder itself: merged where it is an adapter, else its own files."""
    if (best / "adapter_config.json").is_file():
        config = task.config
        base = load_base_classifier(
            config.model, config.paths, pad_token_id=tokenizer.pad_token_id, master_weights=True
        )
        save_merged(load_adapted(base, best), tokenizer, partial, dtype=config.model.dtype)
    else:
        copy_model(best, partial)
