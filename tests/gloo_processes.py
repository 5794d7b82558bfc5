"""Programs of the tests in one or several gloo processes on the CPU: how a test starts them, and what they share.

`run_processes` is for the test; the rest is for the program it starts, which writes `rank-<r>.json` in every process.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a program of the tests is started by its file

from transformers import PreTrainedModel

from prmd.artifacts import io


def run_processes(
    script: str, directory: Path, *arguments: object, processes: int, **environment: str
) -> list[dict[str, Any]]:
    """What every process of `tests/<script> DIRECTORY ARGUMENTS` recorded there; `environment` is added to this one."""
    directory.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    program = [str(Path(__file__).with_name(script)), *map(str, (directory, *arguments))]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *program],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=kept | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((directory / f"rank-{r}.json").read_text(encoding="utf-8")) for r in range(processes)]


def own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def record_rank(directory: Path, record: dict[str, Any]) -> None:
    """Leave what this process saw for the test; not through `artifacts.io`, which only the main process may use."""
    with (directory / f"rank-{own_rank()}.json").open("w", encoding="utf-8", newline="\n") as stream:
        json.dump(record, stream)


def only_the_main_process_writes() -> None:
    """In a process beside the main one, let anything of the project fail that tries to write a file."""
    if own_rank() == 0:
        return

    @contextmanager
    def refused(path: Path):
        raise AssertionError(f"a process beside the main one writes {path}")
        yield path

    def refused_save(self: PreTrainedModel, directory: str, **arguments: object) -> None:
        raise AssertionError(f"a process beside the main one saves to {directory}")

    io.atomic_path = refused
    PreTrainedModel.save_pretrained = refused_save
