"""Rows of benchmark files, checked field by field; every mistake is one line that names row and field.

Where the files are is `data.readers.benchmark_files`; what the rows mean is in the benchmarks.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prmd.artifacts.paths import find_user_path
from prmd.errors import ConfigError, DataError, UserError

Row = Mapping[str, Any]


def csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(where, row) for each row of a CSV file with a header; column names in lower case.

    Raises:
        DataError: not UTF-8, or not a CSV file.
    """
    try:
        with path.open("r", encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            for row in reader:
                values = {(name or "").strip().casefold(): value for name, value in row.items()}
                yield f"{path}:{reader.line_num}", values
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as UTF-8 CSV ({error}); fetch the file again") from error


def numbered(rows: Iterable[Row], source: object) -> Iterator[tuple[str, Row]]:
    """(where, row) for rows without line numbers."""
    for number, row in enumerate(rows, start=1):
        yield f"{source}: row {number}", row


def text_of(row: Row, name: str, where: str) -> str:
    """A field that must hold words.

    Args:
        name: the field, a dot between the levels of nested ones.
    """
    value = value_of(row, name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name}: got {_shown(value)}, wanted text; mend or remove this row")
    return value


def share_of(row: Row, name: str, where: str) -> float | None:
    """A field that holds a number from 0 to 1, or nothing."""
    value = value_of(row, name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DataError(
            f"{where}: {name}: got {_shown(value)}, wanted a number from 0 to 1 or null; mend this row"
        )
    return float(value)


def integer_of(row: Row, names: tuple[str, ...], where: str) -> int:
    """The first of several fields that is there, a whole number or its digits."""
    name = next((n for n in names if n in row), names[0])
    value = row.get(name)
    if isinstance(value, bool) or not (
        isinstance(value, int) or (isinstance(value, str) and value.isdigit())
    ):
        raise DataError(
            f"{where}: {name or 'index'}: got {_shown(value)}, wanted a whole number; mend this row"
        )
    return int(value)


def value_of(row: Row, name: str) -> Any:
    """A field by its dotted name; None where it is absent."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def refuse_twice(seen: dict[Any, str], key: Any, name: str, where: str) -> None:
    """Remember where a key was met; a second time is a mistake."""
    if key in seen:
        raise DataError(f"{where}: {name}: {key!r} is there before, at {seen[key]}; keep one of the two")
    seen[key] = where


def _shown(value: Any) -> str:
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------ what did not run
def why_not_run(path: str | None, key: str, error: UserError | None = None) -> str:
    """The reason of a benchmark without its data, or with data that cannot be read."""
    if path is None:
        return f"data missing at {key}: null; name a hub id, a folder or a file there"
    if isinstance(error, ConfigError):
        return f"data missing at {path}: {error}"
    return str(error)


def content_key(settings: BaseModel) -> list[list[Any]]:
    """Name, size and time of every local file that a section names, for a benchmark's fingerprint.

    Of a folder its own files and those one folder down, where readers look (`reference_answer/gpt-4.jsonl`).
    """
    found = []
    for value in settings.model_dump().values():
        place = find_user_path(value) if isinstance(value, str) else None
        if place is None:
            continue
        files = [place] if place.is_file() else sorted([*place.glob("*"), *place.glob("*/*")])
        for file in (f for f in files if f.is_file()):
            name = file.relative_to(place.parent).as_posix()
            found.append([name, file.stat().st_size, file.stat().st_mtime_ns])
    return found
