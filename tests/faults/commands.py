"""Numbered scripts run in forks of one interpreter that has imported everything, so that a command takes a second, not ten.

Only the harness forks; the scripts are run as a user runs them, with a command line, and end with a status. What they log
goes to a file beside their stderr, so that on stderr stands what a user has to read.
"""

import contextlib
import errno
import importlib
import logging
import os
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmd.artifacts.paths import PROJECT_ROOT

LONGEST_SECONDS = 300.0
"""After which a command counts as hanging; a pipeline takes a minute where other work shares the cores."""
HANGS = -999
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile")
Prepare = Callable[[], None]
"""Called in the process of a command before its script."""


def messages(said: str) -> list[str]:
    """Lines of a stderr but those of progress bars, which TRL and datasets draw there."""
    return [line for line in said.splitlines() if line.strip() and "%|" not in line]


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: of its exit, or the signal's number below zero, or `HANGS`.
        said: its stderr without what was logged.
    """

    script: str
    status: int
    said: str
    seconds: float

    def fault(self, *names: str) -> str | None:
        """What is wrong with this end as the refusal of something damaged, or None.

        Args:
            names: one of which the line has to hold; none: any line will do.
        """
        lines = messages(self.said)
        if self.status == HANGS:
            return "hangs"
        if "Traceback" in self.said:
            return f"a traceback: {lines[-1][:300]}"
        if self.status != 2:
            return f"exit {self.status}: {' | '.join(lines)[-300:]}"
        if len(lines) != 1:
            return f"{len(lines)} lines: {' | '.join(lines)[:300]}"
        if names and not any(name in lines[0] for name in names):
            return f"the line names none of {', '.join(names)}: {lines[0][:300]}"
        return None


@dataclass
class Running:
    """A command at work; `end` waits for it."""

    script: str
    process: int
    folder: Path
    began: float

    def kill(self) -> bool:
        """SIGKILL, unless it has ended; whether it had not."""
        if os.waitpid(self.process, os.WNOHANG)[0]:
            self.process = 0
            return False
        os.kill(self.process, signal.SIGKILL)
        return True

    def end(self) -> Ended:
        """Wait for the end; a command that does not come to one is killed."""
        status, limit = 0, self.began + LONGEST_SECONDS
        while self.process:
            found, raw = os.waitpid(self.process, os.WNOHANG)
            if found:
                self.process, status = 0, os.waitstatus_to_exitcode(raw)
            elif time.monotonic() > limit:
                os.kill(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)
                self.process, status = 0, HANGS
            else:
                time.sleep(0.005)
        said = (self.folder / "stderr").read_text(encoding="utf-8", errors="replace")
        seconds = time.monotonic() - self.began
        shutil.rmtree(self.folder)
        return Ended(self.script, status, said, seconds)


def start(script: str, arguments: Sequence[str], folder: Path, prepare: Sequence[Prepare] = ()) -> Running:
    """Start a script with a command line.

    Args:
        script: its path in the project.
        folder: does not exist; gets stdout, stderr and log until the end is read.
        prepare: called in the new process first.
    """
    folder.mkdir(parents=True)
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    process = os.fork()
    if not process:
        _be(script, arguments, folder, prepare)
    return Running(script, process, folder, began)


def run(script: str, arguments: Sequence[str], folder: Path, prepare: Sequence[Prepare] = ()) -> Ended:
    """Run a script to its end."""
    return start(script, arguments, folder, prepare).end()


def _be(script: str, arguments: Sequence[str], folder: Path, prepare: Sequence[Prepare]) -> None:
    """Become the process of a script; does not return."""
    status = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
        sys.argv = [script, *arguments]
        _log_to(folder / "log")
        for call in prepare:
            call()
        runpy.run_path(str(PROJECT_ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            importlib.import_module(
                "prmd.artifacts.locks"
            )._let_go_of_all()  # what an interpreter's exit does
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _log_to(path: Path) -> None:
    runtime = importlib.import_module("prmd.runtime")
    real = runtime.configure_logging

    def configure(shown: Callable[[str], str]) -> None:
        real(shown)
        logging.getLogger().handlers[:] = [logging.FileHandler(path, encoding="utf-8")]

    runtime.configure_logging = configure


# ------------------------------------------------------------------ what is done to a process
def watch_changes(root: Path, seen: Callable[[int, str, Path], Any]) -> Prepare:
    """Call `seen(number, operation, path)` before every change of a file below `root` that Python makes.

    What libraries write in C or Rust is not seen, but the names it gets afterwards are.
    """

    def prepare() -> None:
        number = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal number
            if event != "open" and event not in _CHANGES:
                return
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
                return
            named = arguments[1] if event == "os.rename" else arguments[0]
            if isinstance(named, (str, os.PathLike)) and Path(named).is_relative_to(root):
                number += 1
                seen(number, event, Path(named))

        sys.addaudithook(hook)

    return prepare


def die_before(root: Path, operation: int) -> Prepare:
    """SIGKILL before the n-th change of a file below `root`, counted from 1."""

    def seen(number: int, event: str, path: Path) -> None:
        if number == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    return watch_changes(root, seen)


def die_when(root: Path, wanted: Callable[[str, Path], bool]) -> Prepare:
    """SIGKILL before the first change of a file below `root` that is `wanted(operation, path)`."""

    def seen(number: int, event: str, path: Path) -> None:
        if wanted(event, path):
            os.kill(os.getpid(), signal.SIGKILL)

    return watch_changes(root, seen)


def note_changes(root: Path, file: Path) -> Prepare:
    """Write one line `operation path` per change of a file below `root`."""
    return watch_changes(root, lambda number, event, path: _append(file, f"{event} {path}\n"))


def _append(file: Path, line: str) -> None:
    with file.open("a", encoding="utf-8") as stream:  # lies outside of what is watched
        stream.write(line)


def largest_file(size: int) -> Prepare:
    """No file may grow beyond `size` bytes: writes fail as they do where the disk is full."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return prepare


def mount_small(folder: Path, size: int) -> str | None:
    """Mount an empty file system of `size` bytes; why it cannot be, or None."""
    return _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))


def enlarge(folder: Path, size: int) -> None:
    """Give a file system of `mount_small` another size."""
    if reason := _mount("-o", f"remount,size={size}", str(folder)):
        raise OSError(errno.EPERM, reason)


def unmount(folder: Path) -> None:
    """Take a file system of `mount_small` away."""
    _call("umount", "-l", str(folder))


def _mount(*arguments: str) -> str | None:
    if os.geteuid():
        return "mounting needs root"
    return _call("mount", *arguments)


def _call(*words: str) -> str | None:
    import subprocess

    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip() or f"{words[0]} failed")


# ------------------------------------------------------------------ imports
def import_what(names: Sequence[str]) -> None:
    """Import modules that a command was seen to need; what cannot be imported by its name alone is left out."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def note_modules(file: Path) -> Prepare:
    """Write the names of all modules when the process ends."""

    def prepare() -> None:
        real = os._exit

        def leave(status: int) -> None:
            file.write_text("\n".join(sys.modules), encoding="utf-8")
            real(status)

        os._exit = leave  # type: ignore[assignment]

    return prepare
