"""The machine a run has: device, processes, seed, memory, disk, log lines and progress bars.

Nothing here knows models or data. What a run did with the machine is recorded by `artifacts.runs`; whether a machine is fit
for the project is checked by `setup_check`.
"""

import gc
import importlib.util
import logging
import os
import platform
import random
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm

from prmd.errors import ConfigError

logger = logging.getLogger(__name__)

GIB = 1024**3
TRITON_WINDOWS = "triton-windows==3.6.0.post26"
"""What `torch.compile` needs on Windows beside the torch that `setup_check` names; docs/hardware.md has the pairs."""
_PROGRESS_AFTER_SECONDS = 5.0
_PROGRESS_INTERVAL_IN_FILES = 30.0
_TALKATIVE = ("torchao", "torch.utils._pytree")
"""Libraries that warn at their import of kernels that nothing here uses, and of their own deprecations."""
for _name in _TALKATIVE:
    logging.getLogger(_name).setLevel(logging.ERROR)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Runtime:
    """What this process computes on.

    Attributes:
        device: this process's own device.
        world_size: number of processes of a distributed run.
    """

    device: torch.device
    world_size: int


def get_runtime() -> Runtime:
    """Describe the device and how many processes there are."""
    return Runtime(device=get_device(), world_size=int(os.environ.get("WORLD_SIZE", "1")))


def get_device() -> torch.device:
    """This process's GPU (by LOCAL_RANK, as torchrun and accelerate set it), else the CPU.

    Apple's MPS is not used: it has no float64, in which rewards are calibrated.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def is_main_process() -> bool:
    """Whether this process writes files and speaks; always so without torchrun or accelerate."""
    return os.environ.get("RANK", "0") == "0"


def start_processes() -> None:
    """Under torchrun or `accelerate launch`, join the other processes before anything is read or written."""
    if get_runtime().world_size > 1:
        from accelerate import PartialState  # slow to import, and useless to a single process

        PartialState()


def missing_compiler() -> str | None:
    """What `torch.compile` lacks on this machine's device, or None where it seems complete."""
    if get_device().type == "cuda" and importlib.util.find_spec("triton") is None:
        return f"triton-windows (pip install {TRITON_WINDOWS})" if sys.platform == "win32" else "triton"
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default)
    return None if shutil.which(compiler) else f"a C++ compiler ({compiler})"


def wait_for_everyone() -> None:
    """Wait until all processes are here; nothing in a single one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def of_all_processes(value: int, pick: Literal["MIN", "MAX"]) -> int:
    """The smallest or largest of the numbers that all processes call this with; every one has to."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    picked = torch.tensor(value, device=get_device())
    torch.distributed.all_reduce(picked, op=getattr(torch.distributed.ReduceOp, pick))
    return int(picked)


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class _ProgressSafeHandler(logging.Handler):
    """Writes log lines to stderr through tqdm, so that no line is torn by a progress bar."""

    def __init__(self, shown: Callable[[str], str]) -> None:
        super().__init__()
        self._shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self._shown(self.format(record)), file=sys.stderr)


def configure_logging(shown: Callable[[str], str] = str) -> None:
    """One line per event on stderr: ours from INFO, other libraries' from WARNING; only errors beside process 0.

    Args:
        shown: what a line becomes before it is written.
    """
    handler = _ProgressSafeHandler(shown)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    main = is_main_process()
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING if main else logging.ERROR)
    logging.getLogger("prmd").setLevel(logging.INFO if main else logging.ERROR)
    logging.captureWarnings(True)
    # A FutureWarning addresses the developers of the libraries' callers, not the user.
    warnings.filterwarnings("ignore", category=FutureWarning)


def progress(
    iterable: Iterable[Item], total: int | None, description: str, *, unit: str = "it"
) -> Iterator[Item]:
    """Iterate with a bar and the remaining time, once five seconds have passed; silent beside process 0.

    Where stderr is a file, the bar writes a line after five seconds, then one every half minute and not ten a second.

    Args:
        unit: what an item is.
    """
    terminal = sys.stderr.isatty()
    interval = 0.1 if terminal else _PROGRESS_INTERVAL_IN_FILES
    bar = tqdm(
        iterable,
        total=total,
        desc=description,
        delay=_PROGRESS_AFTER_SECONDS,
        mininterval=interval,
        miniters=0,  # the clock alone decides: a count guessed from the speed lets old numbers be shown
        smoothing=0.3 if terminal else 0.0,  # one line in half a minute: the mean so far
        disable=not is_main_process(),
        dynamic_ncols=True,
        file=sys.stderr,
        unit=unit,
    )
    if not bar.disable:  # else the first line would wait for a whole interval
        bar.last_print_t = bar.start_t + _PROGRESS_AFTER_SECONDS - interval
    return iter(bar)


@contextmanager
def said_if_slow(what: str) -> Iterator[None]:
    """Log `what` once the block has taken five seconds: a bar for what has no parts to count."""
    timer = threading.Timer(_PROGRESS_AFTER_SECONDS, logger.info, ("%s ...", what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def free_memory() -> None:
    """Give back the memory of models that nothing refers to any more, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory_bytes() -> int:
    """Highest memory so far: of the GPU since `torch.cuda.reset_peak_memory_stats`, else of this process's life."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def free_disk_bytes(path: Path) -> int:
    """Free space of the disk that holds `path`, which need not exist yet."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def require_disk(path: Path, size: int) -> None:
    """Refuse to start what would not fit on the disk, or may not be written there.

    Args:
        path: file or directory to be written; it need not exist.
        size: bytes it will take.

    Raises:
        ConfigError: less than `size` bytes are free, the disk is read-only, or this account has no right to write.
    """
    path = path.absolute()
    place = _existing(path)
    if not place.is_dir() and place != path:
        raise ConfigError(
            f"{path}: {place} is a file, wanted a folder; move it away, or set another artifact_root"
        )
    if not os.access(place, os.W_OK):
        raise ConfigError(
            f"{path}: {place} cannot be written (read-only, or no right to it); give this account the right to it, or set "
            "artifact_root to a folder you can write to"
        )
    if (free := free_disk_bytes(path)) < size:
        raise ConfigError(
            f"{path}: got {free / GIB:.1f} GiB of free disk, wanted {size / GIB:.1f} GiB; "
            "make room, or set artifact_root to a folder on a larger disk"
        )


def hardware() -> dict[str, Any]:
    """What results are named by: operating system, processor, cores, memory (GiB) and GPUs."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / GIB, 1)} for gpu in gpus],
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
