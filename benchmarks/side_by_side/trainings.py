"""Trainings and scoring passes to be timed, ours and TRL's; the limit that both are held to is in `side_by_side/limit.py`.

Only optimiser steps are timed: loading, tokenisation and reference log-probabilities lie outside on every side.
All use the fused AdamW with states of the weights' own format, the same pairs, batch size, clipping and schedule. A training
can be run again: its optimiser starts anew, its weights go on from where they were, which costs no time and saves none.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from benchmarks.side_by_side.setup import MAX_LENGTH, PAIRS_PER_BATCH, SEED, Workload, shares_prompts
from prmd.config.shared import TrainingConfig
from prmd.inference.cache import ScoreTable
from prmd.inference.scoring import score_logps
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.policies.trl_baseline import TEMPLATE_TAIL, baseline_rows
from prmd.rewards.backbone import reward_loss
from prmd.runtime import get_device
from prmd.training.arguments import training_arguments
from prmd.training.trainer import Columns, LossFunction, PairData, PairLoss, PairTrainer

LEARNING_RATE = 5e-7
CENTERING = 0.01
BETA = 0.1
SCORING_TOKENS = 8192

datasets.disable_progress_bars()


def synchronize() -> None:
    """Wait for the GPU, so that a clock read afterwards means something."""
    if get_device().type == "cuda":
        torch.cuda.synchronize()


class StepClock(TrainerCallback):
    """Seconds from the beginning of training to the end of its last optimiser step."""

    def __init__(self) -> None:
        self.begin = self.end = 0.0

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.end = time.perf_counter()


class CountingCollator:
    """A collator that counts the tokens of its batches, padding included."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self.collator, self.tokens = collator, 0

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        batch = self.collator(examples)
        self.tokens += batch["input_ids"].numel()
        return batch


@dataclass
class TimedTraining:
    """A trainer that can be run again and again."""

    trainer: Trainer
    clock: StepClock

    def run(self) -> float:
        """Train once over the pairs; seconds of its optimiser steps."""
        self.trainer.train()
        self.trainer.optimizer = self.trainer.lr_scheduler = None
        self.trainer.model.zero_grad(set_to_none=True)
        return self.clock.seconds


# ------------------------------------------------------------------ ours
def our_training(
    model: SequenceLogps | SequenceRewards,
    data: PairData,
    loss_function: LossFunction,
    *,
    workload: Workload,
    directory: Path,
    checkpointing: bool,
) -> TimedTraining:
    """`PairTrainer` over the planned batches."""
    if checkpointing:
        model.unwrapped.gradient_checkpointing_enable({"use_reentrant": False})
    settings = TrainingConfig(pairs_per_device=PAIRS_PER_BATCH, gradient_accumulation_steps=1)
    clock = StepClock()
    arguments = training_arguments(
        settings,
        directory=directory,
        learning_rate=LEARNING_RATE,
        optimizer="adamw_float32",
        bf16=False,
        seed=SEED,
        steps=len(workload.plan),
        accumulation=1,
    )
    trainer = PairTrainer(
        model,
        arguments,
        data=data,
        plan=workload.plan,
        eval_data=None,
        loss_function=loss_function,
        tokenizer=workload.tokenizer,
        share_prompt=shares_prompts(model.unwrapped.config, data.rows),
        callbacks=[clock],
    )
    return TimedTraining(trainer, clock)


def reward_objective(rewards: Tensor, columns: Columns) -> PairLoss:
    """The loss of reward models, centred as TRL's is in `trl_reward`."""
    return reward_loss(rewards, CENTERING)


def our_scoring(model: nn.Module, workload: Workload, directory: Path) -> tuple[float, list[Tensor]]:
    """Seconds of one pass of log-probabilities over all responses, and their values [2] per pair."""
    was_training = model.training
    synchronize()
    begin = time.perf_counter()
    values = score_logps(
        model,
        workload.policy_rows,
        table=ScoreTable(directory, width=1),
        pad_id=workload.tokenizer.pad_token_id,
        tokens_per_batch=SCORING_TOKENS,
        description="our log-probabilities",
    )
    synchronize()
    seconds = time.perf_counter() - begin
    model.train(was_training)
    return seconds, values


# ------------------------------------------------------------------ TRL
def _trl_arguments(
    directory: Path, checkpointing: bool, steps: int, max_length: int = MAX_LENGTH
) -> dict[str, Any]:
    ours = TrainingConfig()
    return {
        "output_dir": str(directory),
        "num_train_epochs": 1,
        "per_device_train_batch_size": PAIRS_PER_BATCH,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": ours.lr_scheduler,
        "warmup_steps": -(-steps // 10),
        "weight_decay": ours.weight_decay,
        "max_grad_norm": ours.max_grad_norm,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "gradient_checkpointing": checkpointing,
        "max_length": max_length + TEMPLATE_TAIL,
        "logging_steps": ours.logging_steps,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": get_device().type == "cpu",
        "seed": SEED,
    }


def _timed_trl(
    trainer_of: type[DPOTrainer | RewardTrainer],
    model: PreTrainedModel,
    arguments: DPOConfig | RewardConfig,
    workload: Workload,
) -> TimedTraining:
    trainer = trainer_of(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(baseline_rows(list(workload.pairs), list(workload.plan))),
        processing_class=workload.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.data_collator = CountingCollator(trainer.data_collator)
    clock = StepClock()
    trainer.add_callback(clock)
    return TimedTraining(trainer, clock)


def trl_dpo(
    model: PreTrainedModel,
    workload: Workload,
    directory: Path,
    *,
    checkpointing: bool,
    max_length: int = MAX_LENGTH,
) -> TimedTraining:
    """TRL's `DPOTrainer`, its reference log-probabilities computed here, before any timing."""
    arguments = DPOConfig(
        **_trl_arguments(directory, checkpointing, len(workload.plan), max_length),
        beta=BETA,
        precompute_ref_log_probs=True,
    )
    return _timed_trl(DPOTrainer, model, arguments, workload)


def trl_reward(
    model: PreTrainedModel, workload: Workload, directory: Path, *, checkpointing: bool
) -> TimedTraining:
    """TRL's `RewardTrainer` with the centring term of ours."""
    arguments = RewardConfig(
        **_trl_arguments(directory, checkpointing, len(workload.plan)), center_rewards_coefficient=CENTERING
    )
    return _timed_trl(RewardTrainer, model, arguments, workload)


def trl_scoring(training: TimedTraining) -> float:
    """Seconds of TRL's own reference pass: `compute_ref_log_probs` over its batches, as its precomputation does."""
    trainer = training.trainer
    loader = DataLoader(
        trainer.train_dataset, batch_size=PAIRS_PER_BATCH, collate_fn=trainer.data_collator.collator
    )
    trainer.model.eval()
    synchronize()
    begin = time.perf_counter()
    for batch in loader:
        trainer.compute_ref_log_probs(trainer.model, {k: v.to(get_device()) for k, v in batch.items()})
    synchronize()
    seconds = time.perf_counter() - begin
    trainer.model.train()
    return seconds
