"""Where an artifact came from, and whether it is finished: `run.json`, `config.yaml`, partial directories, step results.

`run.json` is written last, so a directory without it does not exist. It lists the files the artifact vouches for
(`manifest`). What goes into a fingerprint is decided by the stage that writes the artifact; how bytes reach the disk is in
`io`, and how two runs keep out of each other's way in `locks`.
"""

import logging
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel

from prmd.artifacts import locks
from prmd.artifacts.io import (
    copy_file,
    file_sha256,
    publish_directory,
    read_json,
    sweep_temporaries,
    write_json,
    write_text,
)
from prmd.artifacts.manifest import (
    UNFINISHED,
    Files,
    changed_file,
    damaged_files,
    list_files,
    lost_file,
    refuse_changed,
)
from prmd.artifacts.paths import PROJECT_ROOT, ArtifactPaths
from prmd.errors import ConfigError, DataError
from prmd.runtime import get_runtime, hardware, is_main_process, peak_memory_bytes, wait_for_everyone

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
CONFIG_COPY = "config.yaml"
FINGERPRINT_FILE = "fingerprint.json"
_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "scipy",
)


@dataclass(frozen=True)
class RunClock:
    """When a run began: `started` in UTC for people, `origin` (seconds, monotonic) for its length."""

    started: str
    origin: float

    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.origin


def start_run() -> RunClock:
    """Start the clock of a run and forget the GPU's former memory peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return RunClock(started=datetime.now(UTC).isoformat(timespec="seconds"), origin=time.monotonic())


def finish_run(
    directory: Path,
    *,
    config: BaseModel,
    inputs: dict[str, Any],
    fingerprint: str,
    clock: RunClock,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write `config.yaml` and then, last of all, `run.json`; in a distributed run process 0 does it.

    Args:
        directory: the artifact's (or its partial) directory; everything else in it is already written.
        config: the configuration of the run.
        inputs: name -> fingerprint of everything that was read.
        fingerprint: key of the finished artifact; equal keys mean that the artifact can be reused.
        clock: from `start_run`.
        extra: further JSON-able facts to keep, such as sizes.
    """
    if not is_main_process():
        return
    runtime = get_runtime()
    write_text(directory / CONFIG_COPY, dump_yaml(config))
    record = {
        "fingerprint": fingerprint,
        "inputs": inputs,
        "files": list_files(directory),
        **git_state(),
        "versions": versions(),
        "device": str(runtime.device),
        "processes": runtime.world_size,
        "hardware": hardware(),
        "seed": config.seed,  # type: ignore[attr-defined]  # every configuration file has it
        "started": clock.started,
        "seconds": round(clock.seconds(), 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    write_json(directory / RUN_FILE, record | (extra or {}))


def dump_yaml(config: BaseModel) -> str:
    """The complete configuration as YAML that `config.loading.load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_run(directory: Path) -> dict[str, Any] | None:
    """The record of a finished artifact, or None.

    Raises:
        DataError: `run.json` is there and is not a JSON object.
    """
    path = directory / RUN_FILE
    if not path.exists():
        return None
    record = read_json(path)
    if not isinstance(record, dict):
        raise DataError(f"{path}: expected a JSON object; delete it and run its stage again")
    return record


def is_current(directory: Path, *fingerprints: str, read: Sequence[str] = ()) -> bool:
    """Whether a finished artifact with one of these fingerprints lies there, none of its files lost; a lost one is said.

    Args:
        fingerprints: today's, and those that earlier versions gave the same artifact.
        read: files whose content has to be what was written, as for `require_artifact`.
    """
    record = read_run(directory)
    if record is None or record.get("fingerprint") not in fingerprints:
        return False
    files = _files(directory, record)
    if damage := lost_file(directory, files) or changed_file(directory, files, read):
        logger.warning("%s: %s, so it is not finished; it is made again", directory, damage)
    return damage is None


def _files(directory: Path, record: dict[str, Any]) -> Files:
    """The files that a record lists; those of a record without a list are accepted as they are, once, and listed there."""
    if "files" in record:
        return record["files"]
    if not is_main_process():
        return {}
    files = list_files(directory)
    logger.info(
        "%s: finished by a version that kept no list of files; its %d files are accepted as they are",
        *(directory, len(files)),
    )
    try:
        write_json(directory / RUN_FILE, record | {"files": files})
    except OSError as error:
        logger.info("%s: the list of its files could not be kept (%s)", directory, error)
    return files


def is_as_recorded(directory: Path, *names: str) -> bool:
    """Whether files are what the record of their folder lists; one that is not is said.

    What no record lists is believed: a stage that was interrupted has written it, or an earlier version.
    """
    recorded = (read_run(directory) or {}).get("files", {})
    files = {name: recorded[name] for name in names if name in recorded}
    if damage := lost_file(directory, files) or changed_file(directory, files, names):
        logger.warning("%s: %s; it is made again", directory, damage)
    return damage is None


def vouch_again(path: Path) -> None:
    """Renew what the record of a finished artifact lists of a file that its own stage has written anew."""
    record = read_run(path.parent)
    if record is not None and "files" in record:
        entry = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        write_json(path.with_name(RUN_FILE), record | {"files": record["files"] | {path.name: entry}})


def refuse_replacing(directory: Path, *fingerprints: str, what: str) -> None:
    """Refuse to build over a finished artifact of other settings or data; `--force` skips this.

    One with one of these fingerprints is built again, because `is_current` has missed files of it.

    Raises:
        ConfigError: a finished artifact lies there.
    """
    record = read_run(directory)
    if record is not None and record.get("fingerprint") not in fingerprints:
        raise ConfigError(
            f"{what}: {directory} was finished with other settings or data; give --force to replace it, or keep it and "
            "give this one its own place (run_name for policies, artifact_root for everything)"
        )


def require_artifact(directory: Path, *, what: str, command: str, read: Sequence[str] = ()) -> dict[str, Any]:
    """The record of an artifact that a stage needs.

    Args:
        directory: where it should lie.
        what: its name in the message, such as "the helpful reward model".
        command: the command that makes it.
        read: which of its files are about to be read, names or patterns as for `manifest.changed_file`; their content has
            to be what was written.

    Raises:
        DataError: it is missing, was interrupted, lost its `run.json` or a file, or a file was changed; the message names
            the command.
    """
    record = read_run(directory)
    if record is not None:
        files = _files(directory, record)
        if lost := lost_file(directory, files):
            raise DataError(f"{what} is damaged ({directory}: {lost}); make it again with: {command}")
        if changed := changed_file(directory, files, read):
            raise DataError(
                f"{what} is damaged ({directory}: {changed}); make it again with: {command} --force"
            )
        return record
    if directory.exists():
        state = f"is half-written ({directory} has no {RUN_FILE}); delete that folder and make it again"
    elif partial_path(directory).exists():
        state = f"is unfinished ({partial_path(directory)}); continue it"
    else:
        state = f"is missing ({directory}); make it"
    raise DataError(f"{what} {state} with: {command}")


def partial_directory(final: Path, fingerprint: str, force: bool) -> Path:
    """The directory in which `final` is built, until `publish` moves it there; its lock is held from here to there.

    What an interrupted run left is kept when it was building the same thing, so that training resumes; otherwise, or
    with `force`, it is emptied, and said so. In a distributed run process 0 does this and the others wait.

    Raises:
        ConfigError: another run builds it, or has just finished it.
        DataError: what an interrupted run left was changed since.
    """
    partial = partial_path(final)
    if is_main_process():
        locks.take(final)
        if not force and _is_whole(final, fingerprint):
            locks.let_go(final)
            raise ConfigError(
                f"{final}: another run has just finished it with the same settings and data; give the same command again, "
                "which reuses it"
            )
        marker = partial / FINGERPRINT_FILE
        same = marker.exists() and read_json(marker) == {"fingerprint": fingerprint}
        if partial.exists() and (force or not same):
            if not force:
                logger.info(
                    "%s: half done with other settings or data, or by an earlier version; starting again",
                    partial,
                )
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(partial)
        try:
            refuse_changed(partial)
        except DataError:
            locks.let_go(final)
            raise
        write_json(marker, {"fingerprint": fingerprint})
    wait_for_everyone()
    return partial


def _is_whole(directory: Path, fingerprint: str) -> bool:
    record = read_run(directory)
    if record is None or record.get("fingerprint") != fingerprint:
        return False
    return not damaged_files(directory, record.get("files", {}))


def take_over(final: Path, partial: Path, *fingerprints: str, made_again: frozenset[str]) -> None:
    """Copy what is whole of a damaged artifact to where it is built again, so that only what is damaged is made again.

    Nothing is copied where something else is damaged, where `final` is another artifact, or where its building has begun.

    Args:
        fingerprints: as for `is_current`.
        made_again: the files that the stage makes in any case.
    """
    record = read_run(final)
    begun = any(path.name != FINGERPRINT_FILE for path in partial.iterdir())
    if begun or record is None or record.get("fingerprint") not in fingerprints or "files" not in record:
        return
    damaged = damaged_files(final, record["files"])
    if damaged <= made_again:
        logger.info("%s: whole but for %s; the rest is kept", final, ", ".join(sorted(damaged)))
        for name in sorted(set(record["files"]) - damaged - {FINGERPRINT_FILE}):
            if (final / name).is_file():  # a checkpoint may have been deleted
                copy_file(final / name, partial / name)


def publish(partial: Path, final: Path) -> None:
    """Move a finished partial directory to its place; in a distributed run process 0 does it and the others wait.

    Raises:
        DataError: a file that its `run.json` lists is lost.
    """
    if is_main_process():
        record = read_run(partial) or {}
        if lost := lost_file(partial, record.get("files", {})):
            raise DataError(f"{partial}: {lost}, so {final} is not replaced; give the same command again")
        for kept in list(partial.rglob(UNFINISHED)):
            kept.unlink()
        publish_directory(partial, final)
        locks.let_go(final)
    wait_for_everyone()


def partial_path(final: Path) -> Path:
    """Where `final` is built."""
    return final.with_name(f".{final.name}.partial")


def write_step_result(paths: ArtifactPaths, step: str, payload: dict[str, Any]) -> Path:
    """Write `outputs/step_results/<step>_<YYYYmmdd-HHMMSS>.json`, never over an older one."""
    now = datetime.now().astimezone()
    stem = f"{step}_{now:%Y%m%d-%H%M%S}"
    path, repeat = paths.step_results / f"{stem}.json", 1
    while path.exists():
        repeat += 1
        path = paths.step_results / f"{stem}-{repeat}.json"
    return write_json(path, {"step": step, "written": now.isoformat(timespec="seconds"), **payload})


def versions() -> dict[str, str | None]:
    """Python's and the decisive packages' versions; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state(root: Path = PROJECT_ROOT) -> dict[str, Any]:
    """`commit` and `dirty` of the checkout at `root`; both None without git or outside a checkout of its own."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root.resolve():
        return {"commit": None, "dirty": None}
    status = _git(root, "status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or one that answers too slowly
        return None
    return done.stdout.decode("utf-8", errors="replace").strip()
