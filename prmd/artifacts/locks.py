"""One run at a time builds an artifact: a lock beside its folder, and a note of who holds it.

`.<name>.lock` is locked by the operating system, which lets go of it when its process ends, however it ends: neither a
process id that is used again, nor a reboot, nor a clock that jumped makes it stale. `.<name>.lock.json` says who works
there, for people. Of the processes of one distributed run the main one holds the lock for all.
"""

import atexit
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prmd.artifacts import io
from prmd.errors import ConfigError, DataError
from prmd.runtime import is_main_process

logger = logging.getLogger(__name__)

_TAKE_SECONDS = 0.2
"""How long a lock is tried for: another run may be letting go of it just now."""
_NOTE_SECONDS = 0.5
"""How long the note of whoever has just taken a lock is waited for."""
_held: dict[Path, FileLock] = {}
"""The locks of this process, by the path of their file."""


@contextmanager
def held(final: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of an artifact; see `take`."""
    take(final, wait=wait)
    try:
        yield
    finally:
        let_go(final)


def take(final: Path, *, wait: bool = False) -> None:
    """Take the lock of the artifact that will lie at `final`; nothing where this process has it already.

    Args:
        wait: for another run to end, instead of refusing.

    Raises:
        ConfigError: another run works on it; names its process, machine and beginning.
    """
    path = _lock_file(final)
    if path in _held or not is_main_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=_TAKE_SECONDS)
    except Timeout:
        who = _describe(_read_note(final, _NOTE_SECONDS))
        if not wait:
            raise ConfigError(
                f"{final}: another run is at work on it ({who}); wait until it has ended and give the same command "
                "again, or set another artifact_root"
            ) from None
        logger.info("%s: waiting for the run that is at work on it (%s)", final, who)
        lock.acquire()
    _held[path] = lock
    if former := _read_note(final):
        logger.warning("%s: taken over from a run that ended without a word (%s)", final, _describe(former))
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    io.write_json(_note_file(final), {"pid": os.getpid(), "host": platform.node(), "since": since})


def let_go(final: Path) -> None:
    """Let go of the lock of an artifact; nothing where this process does not have it."""
    path = _lock_file(final)
    if lock := _held.pop(path, None):
        with suppress(OSError):  # a disk that went read-only; Windows removes an open file when it is closed
            _note_file(final).unlink(missing_ok=True)
            path.unlink()  # whoever waits for this file finds it gone, and takes a new one
        lock.release()


@atexit.register
def _let_go_of_all() -> None:
    """Remove the notes of locks that an error or Ctrl-C left; the locks themselves end with the process."""
    for path in list(_held):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".lock"))
        if (note := _read_note(final)) and note.get("pid") == os.getpid():  # not in a forked child
            let_go(final)


def _lock_file(final: Path) -> Path:
    return final.absolute().with_name(f".{final.name}.lock")


def _note_file(final: Path) -> Path:
    return _lock_file(final).with_suffix(".lock.json")


def _read_note(final: Path, seconds: float = 0.0) -> dict[str, Any] | None:
    """Who holds the lock, or None where nobody wrote it down (within `seconds`)."""
    path, end = _note_file(final), time.monotonic() + seconds
    while True:
        try:
            note = io.read_json(path)
            return note if isinstance(note, dict) else None
        except (OSError, DataError):
            if time.monotonic() >= end:
                return None
            time.sleep(0.05)


def _describe(note: dict[str, Any] | None) -> str:
    if note is None:
        return "process unknown"
    return f"process {note.get('pid')} on {note.get('host')}, since {note.get('since')}"
