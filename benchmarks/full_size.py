"""The full size as one command: the stages themselves, on a card, with a model of random weights of a real shape.

    python benchmarks/full_size.py [--shape qwen2.5-3b] [--cap-gib 31.3] [--minutes 6] [--data FOLDER] [--json FILE] [--work FOLDER]
    accelerate launch --config_file configs/accelerate/fsdp2.yaml benchmarks/full_size.py

Stage 1 splits the pairs, `train_reward_model` trains a reward model with heads and calibrates it on samples, and
`train_pessimistic` (hard_min) and `train_baseline_dpo` (TRL) train policies, by the settings of `configs/` on few
pairs and for some twelve steps. A card is capped, so that it stands for a smaller one, and choices of `auto` are made for
that size. Nothing is fetched: without `--data` (HH-RLHF in the hub's layout) the pairs are the project's own, and the
tokenizer is learnt from them. On a CPU the shape is tiny.

A stage for which too little of `--minutes` is left is not begun, a training is stopped between two steps, and both are said.
Writes   FILE (JSON Lines; default: benchmarks/results/<card>.jsonl) and a page beside it after every phase. What the stages
         write lies in the folder of `--work` and is deleted at the end; an earlier run's is deleted at the start.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

import torch

from benchmarks.full_size_parts import page
from benchmarks.full_size_parts.project import (
    BROUGHT,
    FULL_SHAPE,
    METHOD,
    TINY_SHAPE,
    TRAINED,
    Size,
    base_folder,
    make_base,
    read_pairs,
    settings_of,
    sizes,
    texts_of,
    write_pairs,
)
from benchmarks.full_size_parts.watch import (
    LargestBatch,
    OutOfTimeError,
    StepWatch,
    Watch,
    every_trainer_has,
    replaced,
)
from benchmarks.side_by_side.mfu import counted_parameters, mfu, own_card
from benchmarks.side_by_side.row_file import RowFile
from benchmarks.side_by_side.shape import cap_memory
from prmd.artifacts import io
from prmd.artifacts.paths import PROJECT_ROOT, safe_name
from prmd.artifacts.runs import git_state
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.data.prepare import download_dataset, split_objectives
from prmd.errors import UserError
from prmd.inference.scoring import gather
from prmd.models.loading import load_model_config
from prmd.pairs import PreferencePair
from prmd.policies.train import train_baseline_dpo, train_pessimistic
from prmd.rewards.train import train_reward_model
from prmd.runtime import (
    GIB,
    configure_logging,
    free_memory,
    get_runtime,
    hardware,
    is_main_process,
    start_processes,
    wait_for_everyone,
)
from prmd.training import memory
from prmd.training.rehearsal import Task, meta_model
from prmd.training.run import choose_precision
from utils import USER_ERROR_STATUS, user_errors_exit

WORK = PROJECT_ROOT / "outputs" / "full_size"
RESULTS = PROJECT_ROOT / "benchmarks" / "results"
REWARD_MODEL, POLICY, BASELINE = "reward_model", "policy", "baseline"


class Run:
    """Rows as they come, the clock of the whole run, and what every row says of it.

    Attributes:
        longest: seconds of the longest stage so far without what it compiled: what a later one is taken to need.
    """

    def __init__(self, file: Path, *, minutes: float, common: dict[str, Any]) -> None:
        self.file, self.common, self.longest = RowFile(file), common, 0.0
        self.minutes, self.end = minutes, time.monotonic() + 60 * minutes
        self.failed = False

    @property
    def left(self) -> float:
        """Seconds that are left, by the main process's clock."""
        return gather([self.end - time.monotonic()])[0]

    def say(self, stage: str, phase: str, seconds: float, **facts: Any) -> None:
        """Print a row and have it on the disk."""
        if not is_main_process():
            return
        row = {"stage": stage, "phase": phase, "seconds": round(seconds, 4), **facts, **self.common}
        self.file.append(row)
        print(page.line(row), flush=True)
        if self.file.file:
            io.write_text(self.file.file.with_suffix(".md"), page.page(self.file.rows))

    def stage(self, name: str, work: Callable[[], Any], make_steps: Callable[[], StepWatch]) -> None:
        """Do a stage and say where its time went; what ends it early is said, and the next stage has its turn."""
        left = self.left
        if left < self.longest:
            needed = (
                f"{self.longest:.0f} s are needed, {max(left, 0):.0f} s of {self.minutes:g} minutes are left"
            )
            self.say(name, "skipped", 0.0, note=needed)
            return
        watch, begin = Watch(partial(self.say, name)), time.perf_counter()
        end, note, steps = "total", "", None
        try:
            with watch.watching():
                steps = make_steps()
                with every_trainer_has(steps):
                    work()
        except OutOfTimeError as error:
            end, note = "cut", str(error)
        except (UserError, torch.OutOfMemoryError) as error:
            end, note, self.failed = "failed", " ".join(str(error).split())[:300], True
        free_memory()
        seconds = time.perf_counter() - begin
        parts = watch.seconds | (steps.parts if steps else {})
        parts["other"] = seconds - sum(parts.values())
        self.longest = max(self.longest, seconds - parts.get("compile", 0.0))
        rounded = {name: round(value, 3) for name, value in parts.items()}
        self.say(name, end, seconds, parts=rounded, **({"note": note} if note else {}))


# ------------------------------------------------------------------ stages
def prepare(run: Run, size: Size, work: Path, pairs: Sequence[PreferencePair]) -> None:
    """The base model and stage 1, by the main process before the others join it: stage 1 is one process's work."""
    if not is_main_process():
        return
    shutil.rmtree(work, ignore_errors=True)
    begin = time.perf_counter()
    weights = make_base(base_folder(work), size, texts_of(pairs))
    free_memory()
    run.say("base", "make", time.perf_counter() - begin, bytes=weights)
    begin, config = time.perf_counter(), settings_of(work, size).rewards
    write_pairs(work, pairs)
    download_dataset(config)
    split_objectives(config)
    run.say("data", "prepare", time.perf_counter() - begin, note=f"{len(pairs)} pairs")


def run_stages(run: Run, size: Size, work: Path, cap: int | None) -> None:
    """Stages 2 and 3 in their turn.

    Args:
        work: the artifact root.
        cap: bytes of the card that may be used; None on a CPU.
    """
    first = settings_of(work, size).rewards
    split = io.read_jsonl(first.paths.split(TRAINED, "train"))
    project = settings_of(work, size, trained_on=round((1 - first.ensemble.fit_fraction) * len(split)))
    with replaced(memory.device_memory, lambda: cap):  # the library asks for the size of the card itself
        _train(run, project.rewards, project.policies)


def _train(run: Run, rewards: RewardModelConfig, policies: PolicyConfig) -> None:
    paths = rewards.paths

    def reward_models() -> None:
        train_reward_model(rewards, objective=TRAINED)
        train_reward_model(rewards, objective=BROUGHT)

    run.stage(REWARD_MODEL, reward_models, partial(_steps, run, REWARD_MODEL, rewards, rewards))
    _delete(paths.reward_model(TRAINED) / "checkpoints")  # no later stage reads them, and a disk has an end
    run.stage(POLICY, partial(train_pessimistic, policies), partial(_steps, run, POLICY, rewards, policies))
    _delete(paths.policy(METHOD))
    run.stage(
        BASELINE, partial(train_baseline_dpo, policies), partial(_steps, run, BASELINE, rewards, policies)
    )


def _delete(folder: Path) -> None:
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
    wait_for_everyone()


def _steps(
    run: Run, stage: str, shared: RewardModelConfig, how: RewardModelConfig | PolicyConfig
) -> StepWatch:
    """What watches the steps of a stage's training.

    Args:
        how: what says tuning and training.
    """
    task: Task = "reward_model" if stage == REWARD_MODEL else "policy"
    shape = load_model_config(shared.model, shared.paths)
    counted = counted_parameters(meta_model(shape, task=task, dtype=torch.bfloat16, lora=None))

    def facts(seconds: float, tokens: float, steps: int, largest: LargestBatch | None) -> dict[str, Any]:
        each = {"tokens_per_second": tokens / seconds, "tokens_per_step": tokens / steps}
        work: dict[str, Any] = {"parameters": counted, "tokens": tokens, "seconds": seconds}
        share = mfu(**work, card=own_card(), processes=get_runtime().world_size)
        planned = _planned(shared, how, task, largest) if largest else None  # TRL's memory is not planned
        return each | {"counted_parameters": counted, "mfu": share, "planned_bytes": planned}

    return StepWatch(partial(run.say, stage), facts, lambda: run.left <= 0)


def _planned(
    shared: RewardModelConfig, how: RewardModelConfig | PolicyConfig, task: Task, largest: LargestBatch
) -> int:
    """Bytes of the memory plan of a training, for its largest micro-batch."""
    model, paths, training = shared.model, shared.paths, how.training
    plan = memory.plan_memory(
        model_config=load_model_config(model, paths),
        tuning=how.tuning,
        training=training,
        precision=choose_precision(model, paths, how.tuning, training, task),
        task=task,
        device_bytes=memory.device_memory(),
        rows=[largest.row()] * largest.pairs,
    )
    return plan.total


# ------------------------------------------------------------------ the command
def common_facts(shape: str, cap_gib: float | None, pairs: str) -> dict[str, Any]:
    """What every row of this run says of machine, versions and setting."""
    used = {name: _version(name) for name in ("torch", "transformers", "trl", "torchao")}
    return {
        "run": datetime.now().astimezone().isoformat(timespec="seconds"),
        "card": own_card() or hardware()["cpu"],
        "shape": shape,
        "cap_gib": cap_gib,
        "processes": get_runtime().world_size,
        "pairs": pairs,
        **used,
        "driver": _driver(),
        **git_state(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages, and say and keep a row after each phase.

    Raises:
        SystemExit: with status 2 where a stage ended by an error; its row says which.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = sizes()
    parser.add_argument(
        "--shape", choices=shapes, help=f"default: {FULL_SHAPE} on a GPU, {TINY_SHAPE} on a CPU"
    )
    parser.add_argument(
        "--cap-gib", type=float, default=31.3, metavar="GIB", help="of the card; default: 31.3"
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="of the whole run; default: 6")
    parser.add_argument(
        "--data", metavar="FOLDER", help="HH-RLHF in the hub's layout; default: configured, else embedded"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go, and a page beside it")
    parser.add_argument("--work", type=Path, default=WORK, metavar="FOLDER", help="of what the stages write")
    options = parser.parse_args(arguments)
    configure_logging()
    on_card = own_card() is not None
    shape = options.shape or (FULL_SHAPE if on_card else TINY_SHAPE)
    cap = round(options.cap_gib * GIB) if on_card else None
    if cap:
        cap_memory(cap)
    size, work = shapes[shape], options.work.absolute()
    pairs, source = read_pairs(options.data, size.pairs)
    common = common_facts(shape, options.cap_gib if on_card else None, source)
    file = options.json or RESULTS / f"{safe_name(common['card']).lower()}.jsonl"
    run = Run(file, minutes=options.minutes, common=common)
    if is_main_process():
        print(page.setting(common), "", *page.HEAD, sep="\n", flush=True)
    try:
        prepare(run, size, work, pairs)
        start_processes()
        run_stages(run, size, work, cap)
    finally:
        if is_main_process():
            shutil.rmtree(work, ignore_errors=True)
    if run.failed:
        raise SystemExit(USER_ERROR_STATUS)


if __name__ == "__main__":
    with user_errors_exit():
        main()
