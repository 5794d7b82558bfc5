"""What transformers' Trainer is told: schedule, optimiser, precision, one GPU a process.

What it does with a batch is in `trainer`; which values it gets is decided in `training`.
"""

import logging
import math
from pathlib import Path
from typing import TypeVar

from transformers import TrainingArguments

from prmd.config.shared import TrainingConfig
from prmd.runtime import get_device

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
) -> TrainingArguments:
    """`TrainingArguments` for `PairTrainer`: one pass over the plan, checkpoints and logging by our callbacks."""
    eight_bit = optimizer == "adamw_8bit_stochastic"
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
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
