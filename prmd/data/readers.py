"""Rows of local files and of hub repositories; only this module calls `load_dataset`.

JSON arrays and lines and CSV (gzipped or not), and parquet. Every mistake in a file is one `DataError` that names file and line; a
place that cannot be reached is one `ConfigError` that names the YAML key.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any

from prmd.artifacts import hub, io
from prmd.artifacts.paths import find_user_path, places_tried, safe_name
from prmd.config.shared import HhRlhfConfig, PkuSafeRlhfConfig, TruthfulQaConfig
from prmd.errors import ConfigError, DataError

Row = dict[str, Any]


@contextmanager
def open_csv(
    path: Path, *, strict: bool = False, longest_cell: int = 2**17
) -> Iterator["csv.DictReader[str]"]:
    """The rows of a CSV file with a header, gzipped where it ends in .gz.

    Args:
        strict: refuse broken quotes.
        longest_cell: characters; the default is that of `csv`.

    Raises:
        DataError: it is not UTF-8, or no CSV file.
    """
    opener = gzip.open if path.suffix == ".gz" else Path.open
    csv.field_size_limit(longest_cell)  # of the whole process, so set for every file
    try:
        with opener(path, "rb") as stream:
            yield csv.DictReader(TextIOWrapper(stream, "utf-8-sig", newline=""), strict=strict)
    except (UnicodeDecodeError, EOFError, OSError, csv.Error) as error:
        raise DataError(
            f"{path}: not readable as UTF-8 CSV ({error}); save or fetch the file again"
        ) from error


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON array or of JSON Lines, gzipped or not; NaN and other numbers nothing can hold are null.

    Raises:
        DataError: the file or a line of it cannot be read; names both.
    """
    lines, start = _text_lines(path), []
    for line in lines:  # the first that is not blank tells an array from lines
        start.append(line)
        if line.strip():
            break
    if "".join(start).lstrip().startswith("["):
        yield from _array_rows(path, "".join([*start, *lines]))
        return
    for number, line in enumerate(chain(start, lines), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield io.parse_object(line.removesuffix("\n"), where, odd_numbers_as_null=True)


def _text_lines(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else Path.open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as stream:
            for line in stream:
                yield line
                number += 1
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        said = error.reason if isinstance(error, UnicodeDecodeError) else error
        raise DataError(
            f"{path}: not readable as UTF-8 text (after line {number}: {said}), wanted JSON or JSON Lines, gzipped only "
            "where it ends in .gz; save or fetch the file again"
        ) from error


def _array_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = io.parse_json(text, odd_numbers_as_null=True)
    except ValueError as error:
        line = error.__cause__.lineno if isinstance(error.__cause__, json.JSONDecodeError) else 1
        raise DataError(f"{path}:{line}: not JSON ({error}); mend the file") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: item {number} is {type(row).__name__}, not a JSON object; mend the file"
            )
        yield row


def parquet_rows(path: Path) -> list[Row]:
    """Rows of a parquet file, gzipped where it ends in .gz.

    Raises:
        DataError: it is none, or holds text that is not UTF-8; names it.
    """
    from pyarrow import ArrowException, BufferReader, parquet  # slow to import, and only this layout needs it

    try:
        held = BufferReader(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
        return parquet.ParquetFile(held).read().to_pylist()
    except (ArrowException, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: not readable as parquet ({error}); fetch the file again") from error


HubSource = HhRlhfConfig | TruthfulQaConfig | PkuSafeRlhfConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILE_BYTES = {"hh_rlhf": 150_000_000, "truthfulqa": 5_000_000, "pku_safe_rlhf": 400_000_000}
"""Room one raw file and its share of the hub's cache need (rounded up from the pinned revisions)."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        label: `helpful-base/train`: what a row's `source` is made of.
        upstream_split: `train` or `test` where upstream says so, else None.
        origin: what its content depends on: the sha256 of a local file, or hub id and revision.
        size: bytes it is expected to take in `data/raw`.
        read: gives its rows.
    """

    label: str
    upstream_split: str | None
    origin: str
    size: int
    read: Callable[[], Iterable[Row]]

    @property
    def name(self) -> str:
        """File name in `data/raw/<source>/`."""
        return stored_name(self.label)


def stored_name(label: str) -> str:
    """File name in `data/raw/<source>/` of the file with this label."""
    return safe_name(label.replace("/", "-")) + ".jsonl"


# ------------------------------------------------------------------ benchmarks
def benchmark_files(path: str, patterns: tuple[str, ...], key: str) -> list[Path] | None:
    """Local files of a benchmark: the file `path` names, or all in the folder that a pattern matches; None for a hub id.

    Raises:
        ConfigError: `path` is neither local nor a hub id, or the folder has no such file; names the YAML key.
    """
    found = local_path(path, key)
    if found is None or found.is_file():
        return None if found is None else [found]
    if files := sorted({file for pattern in patterns for file in found.glob(pattern) if file.is_file()}):
        return files
    raise ConfigError(f"{key}: {found} has no {' or '.join(patterns)}; point it at a folder that has")


# ------------------------------------------------------------------ local files
def local_path(text: str, key: str) -> Path | None:
    """The local file or folder `text` names, or None where it is a hub id."""
    if found := find_user_path(text):
        return found.resolve()
    if not HUB_ID.fullmatch(text):
        raise ConfigError(
            f"{key}: {text!r} is neither an existing file or folder nor a hub id such as owner/name ({places_tried(text)}); "
            "correct it"
        )
    return None


def first_existing(folder: Path, patterns: tuple[str, ...], key: str) -> Path:
    """The first file in a folder that one of the patterns matches, in their order."""
    for pattern in patterns:
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return found[0]
    raise ConfigError(
        f"{key}: {folder} has no {' or '.join(patterns)}; point it at a folder in the hub's file layout"
    )


def plain_stem(path: Path) -> str:
    """File name without .json, .jsonl and .gz."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")


def local_file(
    path: Path, label: str, split: str | None, read: Callable[[], Iterable[Row]] | None = None
) -> SourceFile:
    """A local file as one of a source; without `read` it is JSON.

    Raises:
        DataError: it may not be read; names it.
    """
    try:
        size, digest = path.stat().st_size, io.file_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); put a readable file there") from error
    expected = size * (5 if path.suffix == ".gz" else 2)
    return SourceFile(label, split, digest, expected, read or partial(json_rows, path))


# ------------------------------------------------------------------ the hub
def hub_file(
    source: str, label: str, split: str | None, settings: HubSource, read: Callable[[], Iterable[Row]]
) -> SourceFile:
    """A split on the hub as one file of a source."""
    return SourceFile(label, split, f"{settings.path}@{settings.revision}", _HUB_FILE_BYTES[source], read)


def split_rows(
    key: str,
    path: str,
    revision: str,
    split: str,
    *,
    name: str | None = None,
    subset: str | None = None,
    section: str | None = None,
) -> Iterable[Row]:
    """Rows of one split on the hub.

    Args:
        key: of `path` in the configuration.
        section: whose keys `name` and `split` are; None where they are no keys.

    Raises:
        ConfigError: it cannot be fetched, or has no such split; names the YAML key.
    """
    try:
        dataset = _load(key, path, revision, name, subset)
    except ConfigError as error:
        said = " ".join(str(error.__cause__).split())
        if section is None or not said.startswith(_NO_SUCH_NAME):
            raise
        raise ConfigError(
            f"{section}.name: got {name or 'none'}, wanted a configuration of {path}@{revision} ({said[:240]})"
        ) from error
    if split not in dataset:
        given = f"{section}.split" if section else key
        raise ConfigError(
            f"{given}: {path}@{revision} has no split {split!r} (it has {', '.join(dataset)}); correct it"
        )
    return dataset[split]


_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub")
"""Libraries whose errors say that the connection broke."""
_SAYS_NOTHING = "An error occurred while generating the dataset"
"""What `datasets` says of a file that it cannot read; the cause says what."""
_NO_SUCH_NAME = ("Config name is missing", "BuilderConfig")
"""How `datasets` begins about a set of several configurations of which none, or one that it has not, is named."""
_NOT_AS_ROWS = (*_NO_SUCH_NAME, "Dataset scripts are no longer supported")
"""How `datasets` begins a plain ValueError or RuntimeError about a data set that is not one table; its own errors say the rest."""


@cache
def _load(key: str, path: str, revision: str, name: str | None, subset: str | None) -> Mapping[str, Any]:
    """A hub data set with all its splits; loaded once a run, because two raw files share it."""
    from datasets import load_dataset  # slow to import, and not needed for local folders

    try:
        if own := hub.whole_dataset(path, revision):
            return load_dataset(str(own), name, data_dir=subset)
        return load_dataset(path, name, data_dir=subset, revision=revision)
    except Exception as error:  # unreachable, offline, no such repository or revision, no room: OSErrors, but for the clients' own
        theirs = type(error).__module__.partition(".")[0] in (*_CLIENTS, "datasets")
        if not (theirs or isinstance(error, OSError) or str(error).startswith(_NOT_AS_ROWS)):
            raise
        said = error.__cause__ if str(error) == _SAYS_NOTHING and error.__cause__ else error
        detail = " ".join(str(said).split())[:240] or type(said).__name__
        raise ConfigError(
            f"{key}: cannot get {path!r} at revision {revision} from the hub ({detail}), and {places_tried(path)}; "
            f"check the connection and the id, or set {key} to a local folder in the hub's file layout"
        ) from error
