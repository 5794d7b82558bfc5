"""Checkpoints at shares of the training: when they are made, which one is whole, which one is best.

While a training runs, its working directory holds `checkpoint-<step>` folders. `COMPLETE` in one names its files with their
sizes and digests; it is written when all of them are on the disk, so that a torn one is known and not resumed from. The two
newest hold the state of optimizer, schedule and random numbers. At the end all become plain models named by their share
(`start`, `33`, `66`, `end`) beside `best`.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prmd.artifacts import io
from prmd.artifacts.manifest import forget, remember, remember_digests
from prmd.errors import DataError
from prmd.runtime import is_main_process, wait_for_everyone

logger = logging.getLogger(__name__)

MARKER = "COMPLETE"
START_FILE, STEPS_FILE = "start.json", "steps.json"
"""What a training notes in its working directory for its continuation: the held-out numbers of its start, and its steps."""
PREFIX = "checkpoint-"
TRAINER_FILES = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "trainer_state.json", MARKER),
    *("pytorch_model_fsdp.bin", "latest", "zero_to_fp32.py"),  # FSDP2's and DeepSpeed's own
    "training_args.bin",
)
TRAINED_FILE = "training.json"
"""What a training leaves in its folder when its last step is done."""
Trained = tuple[list[dict[str, float]], dict[int, str]]
"""Its logged rows, and the names of its checkpoints by step."""
RESUMABLE = 2
"""Newest checkpoints that keep what a resume needs."""


def checkpoint_steps(shares: Sequence[float], total_steps: int) -> dict[int, str]:
    """Optimiser step -> name of the checkpoint, for shares of training in 0..1; the end always has its own.

    In a training of very few steps shares that fall on one step share its checkpoint; none but 0 is the untrained model.
    """
    names = {max(round(share * total_steps), 1 if share else 0): _name(share) for share in reversed(shares)}
    return {**dict(sorted(names.items())), total_steps: "end"}


def _name(share: float) -> str:
    return {0.0: "start", 1.0: "end"}.get(share, f"{round(100 * share)}")


class ShareCheckpoints(TrainerCallback):
    """Logs, evaluates and saves at the given optimizer steps, marks what is whole, and drops state that is too old.

    Means since the last log are not part of a checkpoint; logging there makes a resumed run log what an
    uninterrupted one does.

    Args:
        evaluates: whether the trainer has held-out pairs.
    """

    def __init__(self, steps: dict[int, str], *, evaluates: bool = True) -> None:
        self.steps, self.evaluates = steps, evaluates

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        state.logging_steps = args.logging_steps  # a resumed state brings those of before

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        if state.global_step in self.steps:
            control.should_log = True
            control.should_evaluate = self.evaluates
            control.should_save = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        wait_for_everyone()  # every process writes its own state of random numbers
        if args.should_save:
            directory = Path(args.output_dir)
            mark_complete(directory / f"{PREFIX}{state.global_step}")
            _drop_old_states(directory, self.steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        if "train_loss" in logs:  # transformers' own is that of the steps since a resume
            for row in (logs, state.log_history[-1]):
                row["train_loss"] = mean_loss(state.log_history)


def mean_loss(history: Sequence[Mapping[str, float]]) -> float:
    """Mean loss of all steps, from rows that hold the mean since the row before them."""
    total, before = 0.0, 0
    for row in (row for row in history if "loss" in row):
        total, before = total + row["loss"] * (row["step"] - before), int(row["step"])
    return total / max(before, 1)


def mark_complete(checkpoint: Path) -> None:
    """Say that everything of this checkpoint is on the disk, after it has got there."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    io.make_durable(files)
    manifest = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, digest]
        for path, digest in zip(files, io.files_sha256(files), strict=True)
    }
    io.make_durable([io.write_json(checkpoint / MARKER, {"files": manifest})])


def newest_complete(directory: Path) -> Path | None:
    """The whole checkpoint with the most steps in a working directory, to resume from.

    Those of later steps are torn, and all are where none is whole. The main process deletes them, with a line for each that
    was to be resumed from: their steps are saved again, and a folder in the place of a file would be in the way.
    """
    torn: dict[Path, str | None] = {}
    whole = None
    for checkpoint in sorted(directory.glob(f"{PREFIX}[0-9]*"), key=_step, reverse=True):
        problem = _torn(checkpoint)
        if problem is None:
            whole = checkpoint
            break
        torn[checkpoint] = problem if _state_files(checkpoint) else None  # else a model alone
    wait_for_everyone()  # who still looks at them
    if is_main_process() and torn:
        _delete_torn(directory, torn)
    wait_for_everyone()
    return whole


def _delete_torn(directory: Path, torn: Mapping[Path, str | None]) -> None:
    for checkpoint, problem in torn.items():
        if problem:
            logger.warning("%s is not resumed from: %s; it is deleted", checkpoint, problem)
        _delete(checkpoint)
    forget(directory, [checkpoint.name for checkpoint in torn])


def _torn(checkpoint: Path) -> str | None:
    """What a checkpoint lacks of what its marker names, or None where it is whole."""
    marker = checkpoint / MARKER
    if not marker.is_file():
        return "it was not finished"
    manifest = _manifest(checkpoint)
    if manifest is None:
        return f"its {MARKER} is not readable, or of an earlier version"
    return _damage(manifest)


def _manifest(checkpoint: Path) -> dict[Path, tuple[int, str]] | None:
    """Sizes and digests of the files that a marker names, or None where it cannot be read."""
    try:
        files = io.read_json(checkpoint / MARKER)["files"]
        return {checkpoint / name: (size, digest) for name, (size, digest) in files.items()}
    except (DataError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _damage(manifest: Mapping[Path, tuple[int, str]]) -> str | None:
    for path, (size, _) in manifest.items():
        if not path.is_file():
            return f"its {path.name} is missing"
        if path.stat().st_size != size:
            return f"its {path.name} has {path.stat().st_size} bytes, wanted {size}"
    digests = io.files_sha256(list(manifest))
    changed = [p.name for p, found in zip(manifest, digests, strict=True) if manifest[p][1] != found]
    return f"its {changed[0]} is not what was saved" if changed else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def _state_files(checkpoint: Path) -> list[Path]:
    """Files and folders of a checkpoint that are no part of the model, its marker first."""
    named = [checkpoint / name for name in (MARKER, *TRAINER_FILES)]
    patterns = (
        "rng_state*.pth",
        "global_step*",
        "optimizer_*",
        "pytorch_model_fsdp_*",
    )  # DeepSpeed's, FSDP2's
    return [
        path
        for path in dict.fromkeys([*named, *(p for pattern in patterns for p in checkpoint.glob(pattern))])
        if path.exists()
    ]


def _drop_state(checkpoint: Path) -> None:
    for path in _state_files(checkpoint):
        _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _drop_old_states(directory: Path, kept: Mapping[int, str]) -> None:
    """Leave the state to the newest `RESUMABLE` marked checkpoints; of older ones those in `kept` stay as models."""
    marked = sorted((path.parent for path in directory.glob(f"{PREFIX}*/{MARKER}")), key=_step)
    for checkpoint in marked[:-RESUMABLE]:
        if _step(checkpoint) in kept:
            state = _state_files(checkpoint)
            saved = _manifest(checkpoint) or {}
            remember_digests(directory, {path: saved[path] for path in saved if path not in state})
            _drop_state(checkpoint)
        else:
            shutil.rmtree(checkpoint)


def best_step(curve: Sequence[dict[str, float]]) -> int:
    """The step with the highest `eval_accuracy`, the lower `eval_loss` and then the later step breaking ties.

    The start is no candidate: on few held-out pairs a head that nothing has trained can score highest by chance.
    """
    trained = [row for row in curve if row["step"] > 0] or curve
    best = max(trained, key=lambda row: (row["eval_accuracy"], -row["eval_loss"], row["step"]))
    return int(best["step"])


def copy_model(source: Path, target: Path) -> None:
    """Copy the files of a model out of a checkpoint, without the trainer's state."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.name not in TRAINER_FILES and not file.name.startswith("rng_state"):
            io.copy_file(file, target / file.name)


def drop_checkpoints(directory: Path) -> None:
    """Delete all that a training kept for its continuation."""
    for note in (START_FILE, STEPS_FILE):
        (directory / note).unlink(missing_ok=True)
    for leftover in directory.glob(f"{PREFIX}*"):
        shutil.rmtree(leftover)


def name_checkpoints(directory: Path, steps: dict[int, str], best: int | None = None) -> None:
    """Turn `checkpoint-<step>` folders into `checkpoints/<name>` without the trainer's state, and copy the best one.

    Those of other steps, made when the training was stopped, go. What an interrupted call left undone, the next one does.

    Raises:
        DataError: one was damaged after it was saved.
    """
    for step, name in steps.items():
        source = directory / f"{PREFIX}{step}"
        if not source.is_dir():
            continue
        state = _state_files(source)
        model = {path: saved for path, saved in (_manifest(source) or {}).items() if path not in state}
        if problem := _damage(model):
            raise DataError(f"{source}: {problem}; give --force to train again")
        _drop_state(source)
        io.publish_directory(source, directory / "checkpoints" / name)
        remember(directory, _files_of(directory / "checkpoints" / name))
    drop_checkpoints(directory)
    if best is not None:
        copy_model(directory / "checkpoints" / steps[best], directory / "checkpoints" / "best")
        remember(directory, _files_of(directory / "checkpoints" / "best"))


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remember_trained(folder: Path) -> None:
    """Have all files that lie in the folder of a finished training itself compared, should its stage be interrupted now."""
    remember(folder, [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")])


def trained_once(folder: Path, train: Callable[[], Trained]) -> Trained:
    """Train, or read what a run noted that was interrupted between its last step and publication."""
    done = folder / TRAINED_FILE
    if not done.is_file():
        curve, steps = train()
        if is_main_process():
            io.make_durable(path for path in folder.iterdir() if path.is_file())
            names = {str(step): name for step, name in steps.items()}
            io.make_durable([io.write_json(done, {"curve": curve, "checkpoints": names})])
            remember_trained(folder)
        wait_for_everyone()
    facts = io.read_json(done)
    return facts["curve"], {int(step): name for step, name in facts["checkpoints"].items()}
