"""How one training runs: precision, plan of batches, trainer, checkpoints, resume; shared by stages 2 and 3.

A stage says what is trained (`TrainingRun`); this module decides how, so that reward models, judges and policies are
trained, logged, checkpointed and resumed alike. The optimiser step itself is in `trainer`.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.artifacts.runs import partial_path
from prmd.config.shared import ModelConfig, SharedConfig, TrainingConfig, TuningConfig
from prmd.errors import ConfigError, first_line
from prmd.models.agreement import check_agreement
from prmd.models.attention import attention_implementation
from prmd.models.loading import load_model_config
from prmd.models.sequence_models import SequenceLogps, SequenceRewards, supports_shared_prompts
from prmd.runtime import free_memory, get_runtime, is_main_process, require_disk, wait_for_everyone
from prmd.training.arguments import reporting_callbacks, training_arguments
from prmd.training.batches import TrainingPlan, plan_run, step_size
from prmd.training.checkpoints import (
    PREFIX,
    RESUMABLE,
    START_FILE,
    STEPS_FILE,
    ShareCheckpoints,
    checkpoint_steps,
    newest_complete,
)
from prmd.training.memory import device_memory, memory_planner, precision_for, state_bytes
from prmd.training.merging import MOST_TOKENS, Filling, fill_card, least_memory, recomputing
from prmd.training.precision import Precision, refuse_if_stuck
from prmd.training.rehearsal import Task, enable_gradient_checkpointing, meta_model
from prmd.training.sharding import requested_sharding
from prmd.training.stopping import RefuseNotFinite, StopRequests
from prmd.training.trainer import BeforeStep, LossFunction, PairData, PairTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRun:
    """What to train.

    Attributes:
        directory: working directory of the checkpoints.
        stream: indices into `data` over all epochs, in training order.
        load_model: (master_weights) -> the model to train, adapters added.
        task: `reward_model` or `policy`.
        sampled: as for `memory.plan_memory`.
        before_step: what the loss reads of a whole optimizer step (`trainer.BeforeStep`).
    """

    name: str
    directory: Path
    shared: SharedConfig
    tuning: TuningConfig
    training: TrainingConfig
    data: PairData
    stream: Sequence[int]
    eval_data: PairData | None
    loss_function: LossFunction
    load_model: Callable[[bool], SequenceRewards | SequenceLogps]
    log_directory: Path
    task: str
    sampled: Sequence[int] = ()
    before_step: BeforeStep | None = None


def choose_precision(
    model: ModelConfig,
    paths: ArtifactPaths,
    tuning: TuningConfig,
    training: TrainingConfig,
    task: str,
    sampled: Sequence[int] = (),
) -> Precision:
    """The optimiser and number formats of a training: what the YAML says, or for `auto` what fits the card."""
    plan = memory_planner(load_model_config(model, paths), tuning, training, task, sampled)
    return precision_for(plan, model, tuning, training, device_memory())


def check_training(
    model: ModelConfig,
    paths: ArtifactPaths,
    tuning: TuningConfig,
    training: TrainingConfig,
    *,
    task: str,
    directory: Path,
    sampled: Sequence[int] = (),
    trainings: int = 1,
) -> None:
    """Refuse, before any model loads, a training that cannot learn or whose files do not fit the disk.

    Args:
        task: `reward_model` or `policy`.
        directory: the folder that will be published; it need not exist.
        sampled: as for `memory.plan_memory`.
        trainings: how many of them the stage does, one after the other, on the same disk.

    Raises:
        ConfigError: as `attention_implementation`, `step_size`, `choose_precision`, `refuse_if_stuck`, `require_disk`.
    """
    attention_implementation(model.attention, load_model_config(model, paths))
    step_size(training, get_runtime().world_size)
    precision = choose_precision(model, paths, tuning, training, task, sampled)
    refuse_if_stuck(precision)
    sizes = planned_sizes(model, paths, tuning, training, precision, task=task, trainings=trainings)
    require_disk(directory, sizes.most - _written(partial_path(directory)))


@dataclass(frozen=True)
class Sizes:
    """Bytes of a training, computed from the shapes of its weights alone.

    Attributes:
        memory: weights, gradients and optimizer states; activations come on top.
        most: its files at their largest moment.
        kept: its files that stay: the models at its checkpoints and the last one; a reward model's last one merged.
    """

    memory: int
    most: int
    kept: int


def planned_sizes(
    model: ModelConfig,
    paths: ArtifactPaths,
    tuning: TuningConfig,
    training: TrainingConfig,
    precision: Precision,
    *,
    task: Task,
    trainings: int = 1,
) -> Sizes:
    """What a training takes at least in memory, and on the disk.

    Args:
        trainings: how many follow each other on the same disk; its largest moment is the end of the last one, when what it
            goes on from is still there.
    """
    lora = tuning.lora if tuning.method == "lora" else None
    config = load_model_config(model, paths)
    skeleton = meta_model(config, task=task, dtype=precision.weights_dtype, lora=lora)
    moved = [p for p in skeleton.parameters() if p.requires_grad]
    held, trained = _bytes(skeleton.parameters()), _bytes(moved)
    states = sum(state_bytes(p, precision.optimizer) for p in moved)
    # The models at its checkpoints, and the last one beside them.
    finished = trained * (len(training.checkpoints) + 1)
    # FSDP and ZeRO-3 resume from a copy of their own: frozen weights too, tied ones twice
    resumable = states + (_bytes(skeleton.state_dict().values()) if requested_sharding() else 0)
    return Sizes(
        memory=held + trained + states,
        # the newest `RESUMABLE` keep their state while one more is written; two of other steps may lie there after stops
        most=finished * trainings + trained + resumable * (RESUMABLE + 1) + held,
        kept=finished + (held if task == "reward_model" else 0),
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _written(folder: Path) -> int:
    """Bytes that an interrupted training left, which its continuation does not write again."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def run_training(
    run: TrainingRun, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, float]], dict[int, str]]:
    """Train, evaluating and saving at the shares of `training.checkpoints`; resumes what was interrupted.

    Returns:
        Every logged row (`eval_...` keys are held out) and the names by step of the checkpoints that are there: of
        `training.checkpoints`, and none that was left behind before these shares were asked for.

    Raises:
        ConfigError: as `refuse_if_stuck`, here on the model's own weights, and `check_agreement`.
        StoppedError: as `StopRequests.heard`.
        NotFiniteError: a loss or gradient is NaN or infinite.
        ConfigError: the card's memory is full, in the first step of one process also without what it need not hold.
    """
    training, shared = run.training, run.shared
    precision = choose_precision(shared.model, shared.paths, run.tuning, training, run.task, run.sampled)
    plan = plan_run(run.data.rows, run.stream, training, seed=shared.seed)
    steps = checkpoint_steps(training.checkpoints, plan.steps)
    resume = newest_complete(run.directory)
    refuse_other_steps(run.directory, precision, plan, resumed=resume is not None)
    history = _trained(run, tokenizer, precision, plan, steps, resume)
    kept = {step: name for step, name in steps.items() if (run.directory / f"{PREFIX}{step}").is_dir()}
    wait_for_everyone()  # before the main process moves a checkpoint that another is still writing to
    return history, kept


def refuse_other_steps(directory: Path, precision: Precision, plan: TrainingPlan, *, resumed: bool) -> None:
    """Refuse to continue a training with other steps than it began with, on another number of processes or card.

    Args:
        resumed: a checkpoint is there to continue from; otherwise the steps are noted for one.

    Raises:
        ConfigError: `auto` now chooses another optimizer, or the steps or processes are others.
    """
    file, world_size = directory / STEPS_FILE, get_runtime().world_size
    own = {"processes": world_size, "optimizer": precision.optimizer, "weights": str(precision.weights_dtype)}
    own |= {"steps": io.fingerprint(plan.pairs)}
    if resumed and file.is_file():
        before = io.read_json(file)
        if changed := [
            f"{name} {before.get(name)} (now {value})"
            for name, value in own.items()
            if before.get(name) != value
        ]:
            raise ConfigError(
                f"{directory}: its checkpoints are of a training with {', '.join(changed)}; continue with that, or give "
                "--force to start again"
            )
    elif is_main_process():
        io.write_json(file, own)


def _trained(
    run: TrainingRun,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    plan: TrainingPlan,
    steps: dict[int, str],
    resume: Path | None,
) -> list[dict[str, float]]:
    """Train; where the first step does not fit the card, once more from the same start with half as much merged."""
    training, most, before = run.training, MOST_TOKENS, _random_states()
    first = int(resume.name.removeprefix(PREFIX)) if resume else 0
    with_start = 0 in steps and resume is None
    while True:
        model = _load(run, precision)
        filling = _fill(run, precision, plan, training, most)
        enable_gradient_checkpointing(model.unwrapped, filling.recomputed)
        stops = StopRequests()
        guard = RefuseNotFinite(run.name, [[run.data.name(i) for i in rows] for rows in plan.pairs])
        callbacks = [ShareCheckpoints(steps), stops, guard]
        trainer = _trainer(run, model, precision, filling.plan, tokenizer, callbacks, resume)
        logger.info(
            "%s: %d pairs, %d optimizer steps of %s, learning rate %g, %s, logs in %s",
            *(run.name, len(run.stream), plan.steps, filling.describe()),
            *(precision.learning_rate, precision.optimizer, run.log_directory),
        )
        with stops.heard(run.name):
            if with_start:
                _start(trainer, run)
            try:
                return _train(trainer, run, resume)
            except torch.OutOfMemoryError as error:
                may_take_less = filling.merged or (
                    filling.keeps and training.gradient_checkpointing == "auto"
                )
                in_first = trainer.state.global_step == first
                if not (in_first and may_take_less) or get_runtime().world_size > 1:
                    raise _does_not_fit(run, filling, trainer.state.global_step + 1, error) from error
        del model, trainer, callbacks  # before the model is loaded again
        with_start, most, training = False, filling.plan.tokens // 2, recomputing(run.training)
        _set_random_states(before)
        logger.warning(
            "%s: the first step does not fit the card; the same training begins again with every layer recomputed and "
            "nothing merged beyond %d tokens",
            *(run.name, most),
        )


def _fill(
    run: TrainingRun, precision: Precision, plan: TrainingPlan, training: TrainingConfig, most: int
) -> Filling:
    """How the card is filled; behind `check_agreement`, which may find that this model shares no prompts."""
    model_config = load_model_config(run.shared.model, run.shared.paths)
    planned = partial(memory_planner(model_config, run.tuning, training, run.task), precision=precision)
    return fill_card(
        plan, run.data.rows, training, planned=planned, device_bytes=least_memory(), most_tokens=most
    )


def _does_not_fit(
    run: TrainingRun, filling: Filling, step: int, error: torch.OutOfMemoryError
) -> ConfigError:
    """What to change; whatever it is, the training goes on from what is saved."""
    device = run.training.pairs_per_device
    remedies = ["training.merge_micro_batches: false"] if filling.merged else []
    remedies += ["training.gradient_checkpointing: true"] if filling.keeps else []
    if not remedies and device > 1:
        accumulation = math.ceil(filling.plan.size.pairs / (device // 2 * filling.plan.size.processes))
        remedies = [
            f"training.pairs_per_device: {device // 2} and gradient_accumulation_steps: {accumulation}"
        ]
    remedy = " and ".join(remedies) or "a smaller training.max_length, tuning.method: lora, or a larger card"
    return ConfigError(
        f"{run.name}: the card's memory is full at step {step} ({first_line(error)}); set {remedy}"
    )


def _random_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_states(states: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    """Have what is made at random on loading, a head or adapters, made as before."""
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])


def _load(run: TrainingRun, precision: Precision) -> SequenceRewards | SequenceLogps:
    """The model to train, which the optimiser moves."""
    free_memory()  # of the model trained before this one
    model = run.load_model(precision.master_weights)
    progress = refuse_if_stuck(precision, model)
    logger.info(
        "%s: optimizer check passed: its steps move these weights (%.3f of float32's progress at learning rate %g)",
        run.name,
        progress,
        precision.learning_rate,
    )
    if not requested_sharding():  # before a sharded model is wrapped, no process holds it whole
        rows = [*run.data.rows, *(run.eval_data.rows if run.eval_data else ())]
        check_agreement(model.model, model, longest=max(row.longest for row in rows))
    return model


def _trainer(
    run: TrainingRun,
    model: SequenceRewards | SequenceLogps,
    precision: Precision,
    plan: TrainingPlan,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback],
    resume: Path | None,
) -> PairTrainer:
    rows = [*run.data.rows, *(run.eval_data.rows if run.eval_data else ())]
    share_prompt = supports_shared_prompts(model.unwrapped.config, max(row.longest for row in rows))
    if not share_prompt:
        logger.info(
            "%s: this model cannot share a prompt between responses exactly; each gets its own row", run.name
        )
    arguments = training_arguments(
        run.training,
        directory=run.directory,
        learning_rate=precision.learning_rate,
        optimizer=precision.optimizer,
        bf16=precision.autocast,
        seed=run.shared.seed,
        steps=plan.steps,
        accumulation=plan.size.accumulation,
    )
    reporting = reporting_callbacks(
        run.shared.report_to, run.log_directory, run.name, task=run.task, resumed=resume is not None
    )
    return PairTrainer(
        model,
        arguments,
        data=run.data,
        plan=plan.batches,
        eval_data=run.eval_data,
        loss_function=run.loss_function,
        before_step=run.before_step,
        tokenizer=tokenizer,
        share_prompt=share_prompt,
        eval_tokens=run.shared.scoring_tokens,
        callbacks=[*callbacks, *reporting],
    )


def _start(trainer: PairTrainer, run: TrainingRun) -> None:
    """Evaluate and save the untrained model."""
    metrics = trainer.evaluate()
    trainer.save_start(run.directory / f"{PREFIX}0")
    if is_main_process():
        io.write_json(run.directory / START_FILE, {"step": 0, **metrics})


def _train(trainer: PairTrainer, run: TrainingRun, resume: Path | None) -> list[dict[str, float]]:
    """Train, from a checkpoint if there is one."""
    start_file = run.directory / START_FILE
    if resume is not None:
        logger.info("%s: resuming from %s", run.name, resume.name)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    start = [io.read_json(start_file)] if start_file.is_file() else []
    return start + trainer.state.log_history
