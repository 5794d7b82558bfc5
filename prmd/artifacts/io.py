"""Reading and writing: JSON, JSON Lines and safetensors, every write atomic.

A file appears whole or not at all (temporary name in the same folder, then `os.replace`); a directory likewise through
`publish_directory`. Nothing here knows what the data means, and no pickle is read or written.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prmd.errors import DataError
from prmd.runtime import GIB, free_disk_bytes, progress, said_if_slow

_MIB = 1 << 20
_DIGITS = 16
"""Hexadecimal digits of a sha256 in a file's name."""
_LEFTOVER = re.compile(r"\..+\.((?P<process>\d+)\.tmp|former)")
"""Names of `atomic_path` and `publish_directory` for what is on its way."""
Identity = tuple[Path, int, int, int]
"""What tells one state of a file from another: path, inode, size and time of its last change (ns)."""

_digests: dict[Identity, str] = {}
"""sha256 of every file this process has hashed; those of large models take minutes, and several keys are made of each."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors_named(path):
            yield temporary
            replace(temporary, path)
    finally:
        if temporary.exists():
            temporary.unlink()


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Give an error of the disk the path that was being written, where it names none.

    The system names no file where a write fails (and not an opening), and safetensors, tokenizers and torch have errors of
    their own for a full disk; each becomes the `OSError` that it was.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if (number := _system_error(error, path)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _system_error(error: Exception, path: Path) -> int | None:
    """The number of the system's error behind that of a library, or None where there is none."""
    if found := _RUST_ERROR.search(str(error)):
        code = int(found[1])
        return _DISK_FULL_ON_WINDOWS.get(code, errno.EIO) if os.name == "nt" else code
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch's writer of archives
        return errno.ENOSPC if free_disk_bytes(path.absolute()) < _FULL else errno.EIO
    return None


_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_DISK_FULL_ON_WINDOWS = {39: errno.ENOSPC, 112: errno.ENOSPC, 5: errno.EACCES}
_FULL = 64 * _MIB
"""Less than this left free after a failed write means a full disk."""


def replace(source: Path, target: Path, attempts: int = 5) -> None:
    """`os.replace` that waits a little for a virus scanner or indexer on Windows to let go of a file."""
    for attempt in range(attempts):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if attempt + 1 == attempts:
                raise
            time.sleep(0.2 * 2**attempt)


def publish_directory(source: Path, target: Path) -> None:
    """Move the finished directory `source` to `target`, replacing a former one without a moment of half of each."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(source, of_living=True)
    former = target.with_name(f".{target.name}.former")
    if former.exists():
        shutil.rmtree(former)
    if target.exists():
        replace(target, former)
    try:
        replace(source, target)
    except OSError:
        if former.exists():  # what was finished stays finished
            replace(former, target)
        raise
    _move_digests(source.resolve(), target.resolve())
    if former.exists():
        shutil.rmtree(former, ignore_errors=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file so that `target` is whole or absent.

    The sha256 of both is known afterwards: a copy of weights is not read again to be hashed, and what its source had is what
    it has to have.
    """
    before, digest = _identity(source), hashlib.sha256()
    known, mebibytes = _digests.get(before), -(-before[2] // _MIB)
    with atomic_path(target) as temporary, source.open("rb") as read, temporary.open("wb") as written:
        blocks = iter(lambda: read.read(_MIB), b"")
        for block in progress(blocks, mebibytes, f"copying {source.parent.name}/{source.name}", unit="MiB"):
            written.write(block)
            if known is None:
                digest.update(block)
    if _identity(source) == before:  # else it was changed in the meantime
        _digests[before] = _digests[_identity(target)] = known or digest.hexdigest()


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text with newline line ends."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as indented JSON; NaN and infinity are refused, because no other reader would take them."""
    return write_text(path, _json_text(value, indent=2) + "\n")


def _json_text(value: Any, indent: int | None = None) -> str:
    """JSON in plain characters; in escapes where it holds half a character, which UTF-8 has no bytes for."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return json.dumps(value, indent=indent, allow_nan=False) if has_surrogate(text) else text


def read_json(path: Path) -> Any:
    """Read JSON; a file that cannot be read as JSON is a `DataError` that names it."""
    try:
        return parse_json(read_utf8(path))
    except ValueError as error:
        raise DataError(
            f"{path}: not readable as JSON ({error}); delete it and run its stage again"
        ) from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON Lines.

    Raises:
        DataError: a row is nested deeper than can be followed.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        for number, row in enumerate(rows, start=1):
            try:
                stream.write(jsonl_line(row))
            except RecursionError:
                raise DataError(f"{path}: row {number} is nested too deeply; leave it out") from None
    return path


def jsonl_line(row: Mapping[str, Any]) -> str:
    """One row of a JSON Lines file, its line end included."""
    return _json_text(row) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines; a line that is not a JSON object is a `DataError` with file:line."""
    return list(iterate_jsonl(path))


def iterate_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """`read_jsonl` row by row, so that no more than one is in memory."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield parse_object(line.removesuffix("\n"), f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (after line {number}: {error.reason}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_object(line: str, where: str, *, odd_numbers_as_null: bool = False) -> dict[str, Any]:
    """The JSON object of a line; a `DataError` that says `where` for anything else. Arguments as for `parse_json`."""
    try:
        row = parse_json(line, odd_numbers_as_null=odd_numbers_as_null)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); mend or remove this line") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: expected a JSON object, got {type(row).__name__}; mend or remove this line"
        )
    return row


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark and with newline line ends.

    Raises:
        DataError: it is not there, may not be read, is a folder, or is not UTF-8; names it.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); save the file as UTF-8") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error}); put a readable file there")


def parse_json(text: str, *, odd_numbers_as_null: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        odd_numbers_as_null: read a number that nothing here can hold (NaN, infinite, of thousands of digits) as null, what
            other programs write for a missing value.

    Raises:
        ValueError: it is not JSON, nested deeper than can be followed, or holds an integer of thousands of digits.
    """
    try:
        return (_ODD_NUMBERS_AS_NULL if odd_numbers_as_null else _STRICT).decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg if error.lineno == 1 else f"line {error.lineno}: {error.msg}") from error
    except RecursionError:
        raise ValueError("nested too deeply") from None


def has_surrogate(text: str) -> bool:
    """Whether a text holds half a character: what an escape such as `\\ud83d` without its other half leaves."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def _finite_or_none(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def _integer_or_none(digits: str) -> int | None:
    try:
        return int(digits)
    except ValueError:  # more digits than Python turns into a number
        return None


_SURROGATE = re.compile("[\ud800-\udfff]")
_STRICT = json.JSONDecoder()
_ODD_NUMBERS_AS_NULL = json.JSONDecoder(
    parse_constant=lambda name: None, parse_float=_finite_or_none, parse_int=_integer_or_none
)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file with text metadata."""
    with atomic_path(path) as temporary:
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in tensors.items()},
            temporary,
            metadata=dict(metadata or {}),
        )
    return path


def write_digested(path: Path, data: bytes) -> Path:
    """Write bytes under `path` with the first digits of their sha256 in the name: `<stem>-<digits><suffix>`."""
    digest = hashlib.sha256(data).hexdigest()
    named = path.with_name(f"{path.stem}-{digest[:_DIGITS]}{path.suffix}")
    with atomic_path(named) as temporary:
        temporary.write_bytes(data)
    _digests[_identity(named)] = digest
    return named


def is_as_written(path: Path) -> bool:
    """Whether a file holds what its name says; one whose name carries no digits, of an earlier version, is believed."""
    _, _, digits = path.stem.rpartition("-")
    return len(digits) != _DIGITS or file_sha256(path)[:_DIGITS] == digits


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; one that is torn, or cannot be read, is a `DataError` that names it."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: not readable as safetensors ({error}); delete it and run its stage again"
        ) from error


def make_durable(files: Iterable[Path]) -> None:
    """Have the system put files, and their names in their folders, on the disk: they then outlast a loss of power."""
    files = list(files)
    size = sum(path.stat().st_size for path in files) / GIB
    named = ", ".join(dict.fromkeys(path.absolute().parent.name for path in files))
    with said_if_slow(f"waiting for the disk to have written {size:.1f} GiB of {named}"):
        for path in files:
            with path.open("r+b") as stream:
                os.fsync(stream.fileno())
    folders = {folder for path in files for folder in (path.parent, path.parent.parent)}
    for folder in folders if os.name == "posix" else ():  # Windows has no descriptors of folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep_temporaries(folder: Path, *, of_living: bool = False) -> None:
    """Delete below `folder` what dead processes left of writes that they did not finish.

    Args:
        of_living: that of living processes too, where nobody writes any more.
    """
    for path in list(folder.rglob(".*")):
        found = _LEFTOVER.fullmatch(path.name)
        if found and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif found and (of_living or not psutil.pid_exists(int(found["process"] or 0))):
            path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """sha256 of a file, hexadecimal; a file that stays as it is is read once in the life of a process."""
    [digest] = files_sha256([path])
    return digest


def files_sha256(paths: Sequence[Path]) -> list[str]:
    """`file_sha256` of several files, with one bar over all that have to be read."""
    files = [_identity(path) for path in paths]
    hashes = {file: hashlib.sha256() for file in files if file not in _digests}
    mebibytes = sum(-(-size // _MIB) for _, _, size, _ in hashes)
    blocks = ((file, block) for file in hashes for block in _blocks(file[0]))
    named = ", ".join(dict.fromkeys(path.absolute().parent.name for path in paths))
    for file, block in progress(blocks, mebibytes, f"hashing {named}", unit="MiB"):
        hashes[file].update(block)
    _digests.update((file, found.hexdigest()) for file, found in hashes.items())
    return [_digests[file] for file in files]


def _identity(path: Path) -> Identity:
    status = path.stat()
    return path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while block := stream.read(_MIB):
            yield block


def _move_digests(source: Path, target: Path) -> None:
    """Keep what is known of the files of a folder that was moved; moving changes nothing but their paths."""
    for (path, *state), digest in list(_digests.items()):
        if path.is_relative_to(source):
            _digests[(target / path.relative_to(source), *state)] = digest


def fingerprint(value: Any) -> str:
    """A 16-digit content key of any JSON-able value: equal values give equal keys on every machine."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]
