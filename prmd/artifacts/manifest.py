"""The files an artifact vouches for: their sizes and sha256, and which of them are lost or changed.

The list is part of `run.json` (`runs.finish_run`). Presence and size are looked at wherever an artifact counts as finished,
content where a file is about to be read. The kept checkpoints of a training may be deleted to make room.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.errors import DataError

Files = Mapping[str, Mapping[str, Any]]
"""`size` (bytes) and `sha256` by name, with `/` between folders."""
EVERYTHING = ("*",)
"""Every file but the kept checkpoints."""
_CHECKPOINTS = "checkpoints/"
_RECORD = "run.json"
UNFINISHED = ".digests.json"
"""The list of what is done in a folder whose artifact is still being built; `publish` deletes it."""


def list_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below `directory`, but for its own record and temporary ones."""
    found = [
        path for path in sorted(directory.rglob("*")) if path.is_file() and not _is_apart(path, directory)
    ]
    keys = io.files_sha256(found)
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": key}
        for path, key in zip(found, keys, strict=True)
    }


def _is_apart(path: Path, directory: Path) -> bool:
    names = path.relative_to(directory).parts
    return names == (_RECORD,) or any(name.startswith(".") for name in names)


def lost_file(directory: Path, files: Files) -> str | None:
    """The first file that is missing or of another size, in words, or None."""
    return next(iter(_lost(directory, files).values()), None)


def _lost(directory: Path, files: Files) -> dict[str, str]:
    """What is wrong with each file that is missing or of another size, by name."""
    found = {}
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            if not name.startswith(_CHECKPOINTS) or path.exists():  # a folder of that name
                found[name] = f"{name} is missing"
        elif (size := path.stat().st_size) != entry["size"]:
            found[name] = f"{name} has {size:,} bytes, {entry['size']:,} were written"
        elif not size and path.suffix == ".safetensors":
            found[name] = f"{name} is empty"
    return found


def changed_file(directory: Path, files: Files, read: Sequence[str]) -> str | None:
    """The first of the files to be read whose content is not what was written, in words, or None.

    Args:
        read: names or patterns (`*` also stands for `/`); kept checkpoints are only meant where a pattern names them.
    """
    return next(iter(_changed(directory, files, read).values()), None)


def _changed(directory: Path, files: Files, read: Sequence[str]) -> dict[str, str]:
    names = [name for name in _named(files, read) if (directory / name).is_file()]
    keys = io.files_sha256([directory / name for name in names])
    return {
        name: f"{name} was changed since it was written (sha256 {key[:12]}, was {files[name]['sha256'][:12]})"
        for name, key in zip(names, keys, strict=True)
        if key != files[name]["sha256"]
    }


def damaged_files(directory: Path, files: Files) -> set[str]:
    """Names of all files that are lost or changed, kept checkpoints included; a deleted checkpoint is neither."""
    read = (*EVERYTHING, f"{_CHECKPOINTS}*")
    return set(_lost(directory, files)) | set(_changed(directory, files, read))


def _named(files: Files, read: Sequence[str]) -> Iterable[str]:
    for name in files:
        patterns = [p for p in read if p.startswith(_CHECKPOINTS) or not name.startswith(_CHECKPOINTS)]
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield name


def remember(directory: Path, paths: Iterable[Path]) -> None:
    """Add files below `directory`, which is being built, to what `refuse_changed` compares when its building goes on."""
    remember_digests(directory, dict(zip(found := list(paths), map(_state, found), strict=True)))


def _state(path: Path) -> tuple[int, str]:
    return path.stat().st_size, io.file_sha256(path)


def remember_digests(directory: Path, states: Mapping[Path, tuple[int, str]]) -> None:
    """As `remember`, with size and sha256 of each file as they are known already."""
    kept = directory / UNFINISHED
    entries = {
        path.relative_to(directory).as_posix(): {"size": size, "sha256": key}
        for path, (size, key) in states.items()
    }
    io.make_durable([io.write_json(kept, (io.read_json(kept) if kept.is_file() else {}) | entries)])


def forget(directory: Path, folders: Sequence[str]) -> None:
    """Take back what `remember` noted of the files in these folders of `directory`, which are made again."""
    kept = directory / UNFINISHED
    entries = io.read_json(kept) if kept.is_file() else {}
    left = {name: entry for name, entry in entries.items() if name.partition("/")[0] not in folders}
    if left != entries:
        io.make_durable([io.write_json(kept, left)])


def refuse_changed(partial: Path) -> None:
    """Refuse to go on with a folder in which a file was changed after `remember` listed it; one that is gone is made again.

    Raises:
        DataError: one was, or a list is not readable.
    """
    for kept in sorted(partial.rglob(UNFINISHED)):
        try:
            files = {
                name: entry for name, entry in io.read_json(kept).items() if (kept.parent / name).exists()
            }
            everything = (*EVERYTHING, f"{_CHECKPOINTS}*")
            changed = lost_file(kept.parent, files) or changed_file(kept.parent, files, everything)
        except (AttributeError, KeyError, TypeError, ValueError, OSError):
            changed = "it is not a list of files"
        if changed:
            raise DataError(f"{kept}: {changed}; give --force to make everything in {partial} again")
