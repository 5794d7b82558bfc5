"""What transformers' Trainer is told, and what it shows: schedule, optimizer, precision, progress bar, curves.

The values shown come from the trainer's log.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from prmd.config.shared import TrainingConfig
from prmd.errors import ConfigError
from prmd.runtime import get_device, is_main_process, progress


def reporting_callbacks(
    report_to: Sequence[str], log_directory: Path, description: str, *, task: str, resumed: bool = False
) -> list[TrainerCallback]:
    """Progress display, TensorBoard in `log_directory`, and Weights & Biases where the YAML asks for it.

    Args:
        task: `reward_model` or `policy`, in front of TensorBoard's tags, so that their losses share no chart.
        resumed: keep the curves that the interrupted run wrote; otherwise those of an older training are removed.

    Raises:
        ConfigError: Weights & Biases is not installed.
    """
    callbacks: list[TrainerCallback] = [_ProgressBar(description)]
    if is_main_process() and "tensorboard" in report_to:
        from torch.utils.tensorboard import SummaryWriter

        class TaskWriter(SummaryWriter):
            def add_scalar(self, tag: str, *values: Any, **named: Any) -> None:
                super().add_scalar(f"{task}_{tag}", *values, **named)

        if not resumed:
            shutil.rmtree(log_directory, ignore_errors=True)
        callbacks.append(TensorBoardCallback(TaskWriter(str(log_directory))))
    if "wandb" in report_to:
        if find_spec("wandb") is None:
            raise ConfigError(
                "report_to: got wandb, which is not installed; give `pip install wandb`, or leave it out"
            )
        callbacks.append(WandbCallback())
    return callbacks


class _ProgressBar(TrainerCallback):
    """One bar per training, with the remaining time; the steps before a resume are counted as done."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.steps: Iterator[int] = iter(())

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        steps = range(state.global_step, state.max_steps)
        self.steps = progress(steps, len(steps), self.description)
        next(self.steps, None)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        next(self.steps, None)


logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments", bound=TrainingArguments)


def training_arguments(
    training: TrainingConfig,
    *,
    directory: Path,
    learning_rate: float,
    optimizer: str,
    bf16: bool,
    seed: int,
    steps: int,
    accumulation: int,
) -> TrainingArguments:
    """`TrainingArguments` for `PairTrainer`: one pass over the plan, checkpoints and logging by our callbacks.

    Args:
        accumulation: micro-batches of a step on each process, as `batches.plan_training` says.
    """
    eight_bit = optimizer == "adamw_8bit_stochastic"
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=math.ceil(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_8bit" if eight_bit else "adamw_torch_fused",
        optim_args="bf16_stochastic_round=True" if eight_bit else None,
        bf16=bf16,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=True,
        accelerator_config={"non_blocking": True},  # else every batch waits for the one before it
        ddp_find_unused_parameters=False,
        use_cpu=get_device().type == "cpu",
        seed=seed,
    )
    return on_one_gpu(arguments)


def on_one_gpu(arguments: Arguments) -> Arguments:
    """The arguments of a process that trains on its own GPU, whatever else it sees.

    A process without a launcher that sees several would be given torch's DataParallel, which splits our batches' flat indices.
    """
    if arguments.n_gpu > 1:
        logger.info(
            "%d GPUs are visible and one is used; for all: accelerate launch --config_file configs/accelerate/ddp.yaml",
            arguments.n_gpu,
        )
        arguments._n_gpu = 1
    return arguments
