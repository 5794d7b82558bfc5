"""The plain DPO baseline, by TRL's own `DPOTrainer` through its public constructor.

It tokenises the messages and precomputes the reference log-probabilities itself, so nothing of ours touches its loss.
It gets the pairs that every method gets, in the same order and the same batches, with prompts already fitted to
`max_length` so that it cuts no response; its loss on the held-out pairs is logged beside. What it cannot be given are weights of pairs (`unweighted_notes`).
"""

import logging
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import DPOConfig, DPOTrainer

from prmd.config.policy import PolicyConfig
from prmd.errors import ConfigError
from prmd.models.loading import load_causal_lm, lora_config
from prmd.pairs import PreferencePair
from prmd.policies.pairs import PolicyPairs, TokenizedPairs
from prmd.runtime import get_device, get_runtime, is_main_process, set_seed, wait_for_everyone
from prmd.training.arguments import on_one_gpu, reporting_callbacks
from prmd.training.batches import MicroBatch, StepSize, TrainingPlan, plan_run
from prmd.training.checkpoints import (
    PREFIX,
    ShareCheckpoints,
    Trained,
    checkpoint_steps,
    newest_complete,
)
from prmd.training.precision import Precision
from prmd.training.run import choose_precision, refuse_other_steps
from prmd.training.sharding import RefuseUnsharded, requested_sharding
from prmd.training.stopping import RefuseNotFinite, StopRequests

logger = logging.getLogger(__name__)

NAME = "policy baseline_dpo (TRL)"
TEMPLATE_TAIL = 8
"""Tokens TRL may see beyond ours: it keeps what the template puts behind the end of the turn."""


def baseline_rows(
    pairs: list[PreferencePair], batches: Sequence[MicroBatch]
) -> list[dict[str, list[dict[str, str]]]]:
    """The pairs as TRL's conversational rows, in training order."""
    rows = [
        {
            "prompt": [dict(message) for message in pair.prompt],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs
    ]
    return [rows[i] for micro in batches if micro.weight for i in micro.rows]


DATASET, HELD_OUT = "trl_pairs", "trl_held_out"
"""The folders, in that of a training in several processes, of the rows and of what TRL computes of them."""


def dataset_of(rows: list[dict[str, Any]], folder: Path) -> Dataset:
    """The rows as TRL takes them.

    In several processes they are a file: TRL has the main process compute reference log-probabilities of it and all read them
    from beside it, which of rows in memory is a temporary folder that each process has of its own.
    """
    if get_runtime().world_size == 1:
        return Dataset.from_list(rows)
    forget_dataset(folder)
    if is_main_process():
        Dataset.from_list(rows).save_to_disk(folder)
    wait_for_everyone()
    return Dataset.load_from_disk(folder)


def forget_dataset(folder: Path) -> None:
    """Delete what `dataset_of` wrote, once no process reads it any more."""
    wait_for_everyone()
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)


def unweighted_notes(pairs: Sequence[PreferencePair]) -> list[str]:
    """What is to be known of a baseline whose pairs have weights; nothing where none has.

    TRL averages the losses of a batch inside of its trainer; its own weighting is another thing, a weight by likelihood.
    """
    if all(pair.weight in (None, 1.0) for pair in pairs):
        return []
    return [
        "TRL's DPO takes no weights of pairs, so all pairs weigh alike in it and not as in the other methods; the method dpo "
        "is the same loss with the weights"
    ]


class _OurColumns(TrainerCallback):
    """Adds to TRL's rows what our trainer logs of a policy: log-ratios, and tokens per second of one process.

    TRL counts tokens from zero again in a continued training; here they go on from those of the checkpoint.
    """

    def __init__(self, beta: float, world_size: int) -> None:
        self.beta, self.world_size = beta, world_size
        self.tokens = self.earlier_tokens = 0.0
        self.clock = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **keywords: Any) -> None:
        counted = (row["num_tokens"] for row in reversed(state.log_history) if "num_tokens" in row)
        self.tokens = self.earlier_tokens = next(counted, 0.0)
        self.clock = time.monotonic()

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **keywords: Any
    ) -> None:
        if "num_tokens" not in logs:
            for row in (logs, state.log_history[-1]):
                row.pop("eval_num_tokens", None)  # those trained on, again from zero in a continued training
            return
        now, tokens = time.monotonic(), self.earlier_tokens + logs["num_tokens"]
        speed = (tokens - self.tokens) / max(now - self.clock, 1e-9) / self.world_size
        logratios = {
            f"logratios/{side}": logs[f"rewards/{side}"] / self.beta for side in ("chosen", "rejected")
        }
        for row in (logs, state.log_history[-1]):
            row |= {"num_tokens": tokens, "tokens_per_second": speed, **logratios}
        self.tokens, self.clock = tokens, now


class _WatchedTrainer(DPOTrainer):
    """TRL's trainer, whose passes over held-out pairs leave the random numbers of the training alone.

    Dropout draws from them, so a policy is the same to the bit whether or not it is watched.
    """

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        with _random_numbers_kept():
            return super().evaluate(*arguments, **keywords)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        with _random_numbers_kept() if name == "eval" else nullcontext():
            return super()._precompute_ref_logps(dataset, name, batch_size)


def _random_numbers_kept() -> AbstractContextManager[None]:
    """Give torch's random numbers back as they were, those of this process's device too."""
    device = get_device()
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def train_trl_dpo(
    config: PolicyConfig,
    pairs: PolicyPairs,
    held_out: TokenizedPairs,
    tokenizer: PreTrainedTokenizerBase,
    *,
    directory: Path,
    log_directory: Path,
) -> Trained:
    """Train with TRL and save the policy (adapter or full weights) to `directory`; resumes what was interrupted.

    Returns:
        TRL's log rows, held-out keys beginning with `eval_`, and the names by step of the checkpoints that are there.

    Raises:
        StoppedError: as `StopRequests.heard`.
        NotFiniteError: a gradient is NaN or infinite, or the weights are at the end.
    """
    shared, tuning, training = config.shared, config.tuning, config.training
    # The plan of our own trainer, so that TRL sees the same pairs in the same steps.
    plan = plan_run(pairs.tokenized.rows, pairs.stream, training, seed=shared.seed)
    rows, ids = baseline_rows(pairs.tokenized.pairs, plan.batches), [p.id for p in pairs.tokenized.pairs]
    precision = choose_precision(shared.model, shared.paths, tuning, training, "policy")
    resume, stops = newest_complete(directory), StopRequests()
    refuse_other_steps(directory, precision, plan, resumed=resume is not None)
    watched = baseline_rows(held_out.pairs, [MicroBatch(tuple(range(len(held_out.pairs))))])
    steps = checkpoint_steps(training.checkpoints, plan.steps)
    shares = ShareCheckpoints(steps, evaluates=bool(watched))
    guard = RefuseNotFinite(NAME, [[ids[i] for i in rows] for rows in plan.pairs])
    set_seed(shared.seed)
    trainer = _WatchedTrainer(
        model=load_causal_lm(shared.model, shared.paths, master_weights=precision.master_weights),
        args=_dpo_arguments(config, precision, directory, plan),
        train_dataset=dataset_of(rows, directory / DATASET),
        eval_dataset=dataset_of(watched, directory / HELD_OUT) if watched else None,
        processing_class=tokenizer,
        peft_config=lora_config(tuning.lora, task="CAUSAL_LM") if tuning.method == "lora" else None,
        callbacks=_callbacks(
            config, shares, stops, guard, log_directory=log_directory, resumed=resume is not None
        ),
    )
    with stops.heard(NAME):
        _train(trainer, resume)
    _save(trainer, tokenizer, directory)
    kept = {step: name for step, name in steps.items() if (directory / f"{PREFIX}{step}").is_dir()}
    return trainer.state.log_history, kept


def _callbacks(
    config: PolicyConfig, *own: TrainerCallback, log_directory: Path, resumed: bool
) -> list[TrainerCallback]:
    """The callbacks of a training; our columns come before the loggers, which read their values."""
    columns, report_to = _OurColumns(config.policy.beta, get_runtime().world_size), config.shared.report_to
    reporting = reporting_callbacks(report_to, log_directory, NAME, task="policy", resumed=resumed)
    return [columns, RefuseUnsharded(), *own, *reporting]


def _train(trainer: DPOTrainer, resume: Path | None) -> None:
    """Train from the start or from a checkpoint; what is shown is our own."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if resume is not None:
        logger.info("%s: resuming from %s", NAME, resume.name)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)


def _save(trainer: DPOTrainer, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save the policy, for which every process is needed where its weights are spread over them, and delete what TRL read."""
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) if requested_sharding() else None
    if is_main_process():
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.save_pretrained(directory, state_dict=whole)
        tokenizer.save_pretrained(directory)
    for folder in (DATASET, HELD_OUT):
        forget_dataset(directory / folder)


def equal_batches(size: StepSize, most: int) -> int:
    """Pairs of a micro-batch of TRL, whose micro-batches are all of one size: at most `most`, and a divisor of the step.

    Raises:
        ConfigError: the pairs of a step do not share out among the processes.
    """
    own, left = divmod(size.pairs, size.processes)
    if left:
        raise ConfigError(
            f"training.pairs_per_step: got {size.pairs} pairs on {size.processes} processes, wanted a multiple of "
            f"{size.processes}, because TRL's baseline gives every process as many; set {own * size.processes} or "
            f"{(own + 1) * size.processes}"
        )
    return max(pairs for pairs in range(1, min(most, own) + 1) if own % pairs == 0)


def _dpo_arguments(
    config: PolicyConfig, precision: Precision, directory: Path, plan: TrainingPlan
) -> DPOConfig:
    """TRL's arguments for the configured training over the pairs of `plan` in their order."""
    training, on_gpu = config.training, get_device().type == "cuda"
    own = equal_batches(plan.size, training.pairs_per_device)
    eight_bit = precision.optimizer == "adamw_8bit_stochastic"
    arguments = DPOConfig(
        output_dir=str(directory),
        beta=config.policy.beta,
        max_length=training.max_length + TEMPLATE_TAIL,
        precompute_ref_log_probs=True,
        num_train_epochs=1,
        per_device_train_batch_size=own,
        per_device_eval_batch_size=own,
        gradient_accumulation_steps=plan.size.pairs // (own * plan.size.processes),
        train_sampling_strategy="sequential",
        learning_rate=precision.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=math.ceil(training.warmup_ratio * plan.steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_8bit" if eight_bit else "adamw_torch_fused",
        optim_args="bf16_stochastic_round=True" if eight_bit else None,
        bf16=precision.autocast,
        gradient_checkpointing=on_gpu
        if training.gradient_checkpointing == "auto"
        else training.gradient_checkpointing,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
        seed=config.shared.seed,
    )
    return on_one_gpu(arguments)
