"""Checkpoints at shares of the training: when they are made, which one is complete, which one is best.

While a training runs, its working directory holds the trainer's resumable `checkpoint-<step>` folders; one without its
`COMPLETE` marker was torn by an interruption and is ignored. At the end they become plain models named by their share
(`start`, `33`, `66`, `end`) beside `best`.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prmd.artifacts import io

MARKER = "COMPLETE"
START_FILE, STEPS_FILE = "start.json", "steps.json"
"""What a training notes in its working directory for its continuation: the held-out numbers of its start, and its steps."""
PREFIX = "checkpoint-"
TRAINER_FILES = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "trainer_state.json", MARKER),
    *("pytorch_model_fsdp.bin", "latest", "zero_to_fp32.py"),  # FSDP2's and DeepSpeed's own
)


def checkpoint_steps(shares: Sequence[float], total_steps: int) -> dict[int, str]:
    """Optimiser step -> name of the checkpoint, for shares of training in 0..1; the end always has its own.

    In a training of very few steps shares that fall on one step share its checkpoint; none but 0 is the untrained model.
    """
    names = {max(round(share * total_steps), 1 if share else 0): _name(share) for share in reversed(shares)}
    return {**dict(sorted(names.items())), total_steps: "end"}


def _name(share: float) -> str:
    return {0.0: "start", 1.0: "end"}.get(share, f"{round(100 * share)}")


class ShareCheckpoints(TrainerCallback):
    """Logs, evaluates and saves at the given optimiser steps.

    Means since the last log are not part of a checkpoint; logging there makes a resumed run log what an
    uninterrupted one does.
    """

    def __init__(self, steps: dict[int, str]) -> None:
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        if state.global_step in self.steps:
            control.should_log = True
            control.should_evaluate = True
            control.should_save = True
        return control


def mark_complete(checkpoint: Path) -> None:
    """Say that everything of this checkpoint is on disk."""
    (checkpoint / MARKER).touch()


def newest_complete(directory: Path) -> Path | None:
    """The complete checkpoint with the most steps in a working directory, to resume from."""
    found = [
        d
        for d in directory.glob(f"{PREFIX}*")
        if (d / MARKER).is_file() and (d / "trainer_state.json").is_file()
    ]
    return max(found, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


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


def drop_notes(directory: Path) -> None:
    """Delete what a training noted for its continuation."""
    for note in (START_FILE, STEPS_FILE):
        (directory / note).unlink(missing_ok=True)


def name_checkpoints(directory: Path, steps: dict[int, str], best: int | None = None) -> None:
    """Turn `checkpoint-<step>` folders into `checkpoints/<name>` without the trainer's state, and copy the best one.

    What an interrupted call left undone, the next one does.
    """
    for step, name in steps.items():
        source = directory / f"{PREFIX}{step}"
        if not source.is_dir():
            continue
        for leftover in (*TRAINER_FILES, *(p.name for p in source.glob("rng_state*.pth"))):
            (source / leftover).unlink(missing_ok=True)
        for states in source.glob("global_step*"):  # DeepSpeed's
            shutil.rmtree(states)
        io.publish_directory(source, directory / "checkpoints" / name)
    drop_notes(directory)
    if best is not None:
        copy_model(directory / "checkpoints" / steps[best], directory / "checkpoints" / "best")
