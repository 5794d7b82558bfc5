"""Training of a reward model's backbone r_0, and of the members where the ensemble is of adapters.

    L_RM = mean_i w_i { -log sigma(r_0(x_i, y_w) - r_0(x_i, y_l) + s_0 a_i) + c (r_0(y_w) + r_0(y_l))^2 }

a_i is what features that are held to be a bias predict of the label (`debias`), 0 where none is named; w_i is the pair's
weight, 1 where none was given. Heads, measurements and calibration, which follow the backbone, are in `fitting`; the order of
all of it is in `train`; the loop itself is `training.trainer.PairTrainer`, run by `training.run`.
"""

import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.errors import ConfigError
from prmd.models.classifiers import save_code
from prmd.models.loading import add_lora, load_adapted, load_base_classifier, save_merged
from prmd.models.sequence_models import SequenceRewards
from prmd.models.tokenization import TokenizedPairs, say_one_prompt
from prmd.pessimism.losses import bradley_terry_loss
from prmd.rewards.adapters import (
    is_trained,
    keep_adapter,
    member_folder,
    member_seed,
    resampled,
)
from prmd.rewards.debias import Debiasing
from prmd.rewards.task import RewardPairs, RewardTask, tokenize_reward_pairs
from prmd.runtime import free_memory, is_main_process, set_seed, wait_for_everyone
from prmd.training.checkpoints import (
    best_step,
    copy_model,
    drop_checkpoints,
    name_checkpoints,
    remember_trained,
)
from prmd.training.run import TrainingRun, run_training
from prmd.training.trainer import Columns, PairData, PairLoss, weight_column

logger = logging.getLogger(__name__)

WITH_OFFSET = "eval_rewards/accuracies_with_offset"
"""Held-out accuracy by margin and offset together, which is what a debiased training maximises."""


def epoch_stream(n: int, epochs: float, seed: int) -> list[int]:
    """Indices of round(epochs x n) pairs: every epoch shuffled anew, a fractional last one cut short.

    Raises:
        ConfigError: they are none.
    """
    if not round(epochs * n):
        raise ConfigError(
            f"training.epochs: {epochs:g} of {n} pairs come to none, wanted at least one; raise it, or give more data"
        )
    stream: list[int] = []
    for epoch in range(math.ceil(epochs)):
        order = list(range(n))
        random.Random(f"{seed}-{epoch}").shuffle(order)
        stream += order
    return stream[: round(epochs * n)]


def train_backbone(
    task: RewardTask,
    data: RewardPairs,
    tokenizer: PreTrainedTokenizerBase,
    partial: Path,
    debiasing: Debiasing | None = None,
) -> dict[str, Any]:
    """Train r_0 into `partial` and return sizes and the curve; an interrupted run that got this far is not repeated."""
    done = partial / "backbone.json"
    if not done.is_file():
        strength = debiasing.strength if debiasing else 0.0
        facts = _train(task, data, tokenizer, partial, debiasing, strength)
        if is_main_process():
            _save_best(task, tokenizer, partial, partial / f"checkpoint-{facts['best_step']}")
            io.write_json(done, facts)
            remember_trained(partial)
        wait_for_everyone()
    facts = io.read_json(done)
    if is_main_process():
        steps = {int(step): name for step, name in facts["checkpoints"].items()}
        name_checkpoints(partial, steps, facts["best_step"])
    return facts


def train_members(
    task: RewardTask,
    data: RewardPairs,
    tokenizer: PreTrainedTokenizerBase,
    partial: Path,
    debiasing: Debiasing | None = None,
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
                debiasing,
                debiasing.strengths[member] if debiasing else 0.0,
            )
            if is_main_process():
                io.write_json(folder / "training.json", facts)
                keep_adapter(folder, folder / f"checkpoint-{facts['best_step']}")
            free_memory()
        elif is_main_process():
            drop_checkpoints(folder)
        wait_for_everyone()


def _train(
    task: RewardTask,
    data: RewardPairs,
    tokenizer: PreTrainedTokenizerBase,
    partial: Path,
    debiasing: Debiasing | None,
    strength: float,
) -> dict[str, Any]:
    """Train and evaluate; the checkpoints stay as the trainer left them."""
    train, val = (
        tokenize_reward_pairs(task, data.train, tokenizer),
        tokenize_reward_pairs(task, data.val, tokenizer),
    )
    say_one_prompt(train.rows, task.name)
    config = task.config
    set_seed(config.seed)  # before loading: the scalar head is initialised at random

    def load(master_weights: bool) -> SequenceRewards:
        model = load_base_classifier(
            config.model, config.paths, pad_token_id=tokenizer.pad_token_id, master_weights=master_weights
        )
        lora = config.tuning.method == "lora"
        return SequenceRewards(add_lora(model, config.tuning.lora, task="SEQ_CLS") if lora else model)

    def loss(rewards: Tensor, columns: Columns) -> PairLoss:
        return reward_loss(rewards, config.centering_coefficient, columns.get("offsets"))

    def paired(tokenized: TokenizedPairs, **columns: Tensor) -> PairData:
        if debiasing:
            columns["offsets"] = strength * debiasing.of(tokenized.pairs)
        return PairData(tokenized.rows, columns, [pair.id for pair in tokenized.pairs])

    run = TrainingRun(
        name=task.name,
        directory=partial,
        shared=config,
        tuning=config.tuning,
        training=config.training,
        data=paired(train, **weight_column(train.pairs)),
        stream=epoch_stream(len(train.rows), config.training.epochs, config.seed),
        eval_data=paired(val),
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
    curve = [_held_out_row(row) for row in history if "eval_loss" in row]
    chosen_by = [
        row | {"eval_accuracy": row.get("eval_accuracy_with_offset", row["eval_accuracy"])}
        for row in curve
        if row["step"] in steps
    ]
    best = best_step(chosen_by)
    logger.info("%s: best checkpoint is %r by held-out accuracy", task.name, steps[best])
    return {
        "curve": curve,
        "best": steps[best],
        "best_step": best,
        "checkpoints": {str(step): name for step, name in steps.items()},
    }


def _held_out_row(row: dict[str, float]) -> dict[str, float]:
    known = {"eval_loss": "eval_loss", "eval_accuracy": "eval_rewards/accuracies"}
    known |= {"eval_accuracy_with_offset": WITH_OFFSET} if WITH_OFFSET in row else {}
    return {"step": row["step"], **{name: row[key] for name, key in known.items()}}


def reward_loss(rewards: Tensor, centering_coefficient: float, offsets: Tensor | None = None) -> PairLoss:
    """Bradley-Terry with centring and what is logged, from rewards [B, 2] of (chosen, rejected) and offsets s a [B]."""
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    margins = (chosen - rejected).detach()
    metrics = {
        "rewards/chosen": chosen.detach(),
        "rewards/rejected": rejected.detach(),
        "rewards/margins": margins,
        "rewards/accuracies": _right(margins),
    }
    if offsets is not None:
        metrics["rewards/accuracies_with_offset"] = _right(margins + offsets.to(margins.dtype))
    loss = bradley_terry_loss(
        chosen_rewards=chosen,
        rejected_rewards=rejected,
        centering_coefficient=centering_coefficient,
        offsets=offsets,
    )
    return PairLoss(loss, metrics)


def _right(margins: Tensor) -> Tensor:
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def _save_best(task: RewardTask, tokenizer: PreTrainedTokenizerBase, partial: Path, best: Path) -> None:
    """Put the best checkpoint into the folder itself: merged where it is an adapter, else its own files."""
    logger.info("%s: writing its best checkpoint to %s", task.name, partial)
    if (best / "adapter_config.json").is_file():
        config = task.config
        base = load_base_classifier(  # a card that holds the base in bfloat16 need not hold it in float32
            config.model,
            config.paths,
            pad_token_id=tokenizer.pad_token_id,
            master_weights=True,
            device=torch.device("cpu"),
        )
        save_merged(load_adapted(base, best), tokenizer, partial, dtype=config.model.dtype)
    else:
        copy_model(best, partial)
    save_code(partial)
