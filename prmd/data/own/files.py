"""The files of `data.own_pairs`: where they are, how they are read, and which of their columns are kept.

JSON, JSON Lines, CSV and Parquet, gzipped or not; a file, a folder of such files, or a data set on the hub. What is kept in
`data/raw/own_pairs/` are the columns that the configuration names, under the names of `COLUMNS`.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from prmd.artifacts.paths import places_tried
from prmd.config.shared import DataConfig, OwnPairsConfig, OwnSource
from prmd.data.own.scored import as_score, scored_rows
from prmd.data.readers import (
    Row,
    SourceFile,
    json_rows,
    local_file,
    local_path,
    open_csv,
    parquet_rows,
    split_rows,
    stored_name,
)
from prmd.errors import ConfigError, DataError

COLUMNS = ("prompt", "chosen", "rejected", "id", "source", "system", "tools", "weight")
"""What a row of pairs may hold; all but `chosen` and `rejected` may be missing."""
SCORED = "_scored"
"""Label of the file whose responses carry scores; no objective begins so."""

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_HUB_BYTES = 500_000_000
_LONGEST_CELL = 2**30


def plan_own(data: DataConfig) -> list[SourceFile]:
    """The files of each objective, then the file of scored responses.

    Raises:
        ConfigError: a path is neither local nor a hub id with a revision, or a folder holds no such file; names its key.
    """
    own, rewards = data.own_pairs, reward_columns(data.own_pairs)
    files = []
    for objective, settings in own.objectives.items():
        key = f"data.own_pairs.objectives.{objective}"
        keep = partial(pair_rows, columns=settings.columns, key=key, rewards=rewards)
        files += _planned(objective, settings, key, keep, rewards)
    if own.scored is not None:
        key = "data.own_pairs.scored"
        files += _planned(SCORED, own.scored, key, partial(scored_rows, settings=own.scored, key=key))
    return files


def refuse_empty(filled: Iterable[str], own: OwnPairsConfig) -> None:
    """Refuse an objective without any row, which no split could be made of.

    Args:
        filled: labels of the files that hold rows.

    Raises:
        DataError: names its key and its path.
    """
    held = {label.partition("/")[0] for label in filled}
    named = [(k, f"objectives.{k}", source.path, (k,)) for k, source in own.objectives.items()]
    named += [(SCORED, "scored", own.scored.path, tuple(own.scored.scores))] if own.scored else []
    for label, key, path, objectives in named:
        if label not in held:
            raise DataError(
                f"data.own_pairs.{key}.path: {path} holds no row, so {objectives[0]} has 0 pairs of 0 rows; put its pairs "
                "there, or correct the path"
            )


def reward_columns(own: OwnPairsConfig) -> dict[str, tuple[str, str]]:
    """The columns (of chosen, of rejected) that hold the rewards of an objective."""
    return {
        objective: (source.column_chosen, source.column_rejected)
        for objective, source in own.rewards.items()
        if source.column_chosen is not None and source.column_rejected is not None
    }


def _planned(
    label: str,
    settings: OwnSource,
    key: str,
    keep: Callable[[Iterable[Row], str], Iterable[Row]],
    rewards: Mapping[str, tuple[str, str]] | None = None,
) -> list[SourceFile]:
    """The files that one path stands for.

    Args:
        keep: (rows, the file for messages) -> the rows as they are kept.
        rewards: the columns that are kept as `rewards`.
    """
    path, kept = local_path(settings.path, f"{key}.path"), settings.kept_columns
    kept |= {"rewards": rewards} if rewards else {}
    if path is None:
        if Path(settings.path.removesuffix(".gz")).suffix.lower() in _SUFFIXES and settings.revision is None:
            raise ConfigError(
                f"{key}.path: got {settings.path}, wanted a file; {places_tried(settings.path)}; correct the path"
            )
        if settings.revision is None:
            raise ConfigError(
                f"{key}.revision: got none, wanted the commit of {settings.path} on the hub, so that its pairs stay the same; "
                f"if a file is meant: {places_tried(settings.path)}"
            )
        hub = (settings.path, settings.revision, settings.split)
        read = partial(split_rows, f"{key}.path", *hub, name=settings.name, section=key)
        named = f"{settings.name}/" if settings.name else ""
        origin = f"{settings.path}@{settings.revision}:{named}{settings.split} {kept}"
        rows = partial(_kept, keep, read, settings.path)
        return [SourceFile(label, None, origin, _HUB_BYTES, rows)]
    if settings.name is not None:
        raise ConfigError(
            f"{key}.name: got {settings.name}, which names one of the configurations of a set on the hub, and {path} is here; "
            "leave it out"
        )
    found = [path] if path.is_file() else sorted(file for file in path.iterdir() if _kind(file))
    if not found:
        raise ConfigError(f"{key}.path: {path} holds no {', '.join(_SUFFIXES)} file (or .gz); put one there")
    files = []
    for file, own_label in zip(found, [label] if path.is_file() else _labels(label, found), strict=True):
        one = local_file(file, own_label, None, partial(_kept, keep, partial(table_rows, file), str(file)))
        files.append(SourceFile(one.label, None, f"{one.origin} {kept}", one.size, one.read))
    return files


def _labels(label: str, files: Iterable[Path]) -> list[str]:
    """`polite/pairs` of a folder's `pairs.csv`; a number behind it where another file would be stored under the same name.

    So are `part.0.parquet` and `part.1.parquet`, and names in letters that no stored name has.
    """
    found: list[str] = []
    taken: set[str] = set()
    for file in files:
        stem = own = f"{label}/{file.name.partition('.')[0]}"
        number = 1
        while (stored := stored_name(own).lower()) in taken:
            number += 1
            own = f"{stem}_{number}"
        taken.add(stored)
        found.append(own)
    return found


def _kept(
    keep: Callable[[Iterable[Row], str], Iterable[Row]], read: Callable[[], Iterable[Row]], where: str
) -> Iterable[Row]:
    return keep(read(), where)


def _kind(path: Path) -> str:
    """`.csv` of `pairs.csv.gz`; empty for what is no table."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return suffix if path.is_file() and suffix in _SUFFIXES else ""


def table_rows(path: Path) -> Iterable[Row]:
    """Rows of a local table.

    Raises:
        DataError: it is of no kind that is read, or cannot be read; names it.
    """
    kind = _kind(path)
    if not kind:
        raise DataError(
            f"{path}: got {path.suffix or 'no ending'}, wanted {', '.join(_SUFFIXES)}, or .gz behind it"
        )
    if kind == ".parquet":
        return parquet_rows(path)
    return _csv_rows(path) if kind == ".csv" else json_rows(path)


def _csv_rows(path: Path) -> Iterator[Row]:
    with open_csv(path, strict=True, longest_cell=_LONGEST_CELL) as reader:
        _check_header(reader.fieldnames or (), path)
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise DataError(
                    f"{path}: row {number} has more or fewer cells than the header; mend the file"
                )
            yield {name: _cell(text) for name, text in row.items()}


def _check_header(names: Sequence[str], path: Path) -> None:
    """Refuse what a spreadsheet may write in the place of CSV with commas, and columns of which one would hide another."""
    if len(names) == 1 and (other := next((sign for sign in ";\t|" if sign in names[0]), None)):
        raise DataError(
            f"{path}: its cells are separated by {other!r}, wanted commas; save it as CSV with commas, or as JSON Lines"
        )
    if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise DataError(f"{path}: the header names {twice[0]!r} twice; rename or remove one of these columns")


def _cell(text: str) -> Any:
    """A cell; a list that is written as JSON, as messages are in a CSV file, is that list."""
    if text.lstrip().startswith("[{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


# ------------------------------------------------------------------ columns
def pair_rows(
    rows: Iterable[Row],
    where: str,
    *,
    columns: dict[str, str | None],
    key: str,
    rewards: Mapping[str, tuple[str, str]] | None = None,
) -> Iterator[Row]:
    """The named columns of every row, under the names of `COLUMNS`; and under `rewards` those of the objectives that have some.

    Row by row, so that a file of any size can be read.

    Args:
        where: the file, for messages.
        columns: whose name here is another one there; None: not to be read.
        key: of the file's section in the configuration.
        rewards: columns of the rewards of chosen and rejected by objective; what is no number there is kept as None.

    Raises:
        DataError: a column that is needed or named is in no row, known once the last was read; says which are there.
    """
    names = {name: columns.get(name, name) for name in COLUMNS}
    there: dict[str, None] = {}
    empty = True
    for row in rows:
        empty = False
        there.update(dict.fromkeys(row))
        kept = {name: row[column] for name, column in names.items() if column in row}
        if isinstance(weight := kept.get("weight"), float) and not isfinite(weight):
            kept["weight"] = str(weight)  # JSON Lines hold no such number; as text it is refused with its row
        scores = {k: [as_score(row.get(column)) for column in both] for k, both in (rewards or {}).items()}
        yield kept | ({"rewards": scores} if scores else {})
    needed = [name for name in COLUMNS if name in ("chosen", "rejected") or columns.get(name)]
    require_columns({} if empty else {name: names[name] for name in needed}, there, where, key)
    _require_rewards(rewards or {}, None if empty else there, where)


def _require_rewards(
    rewards: Mapping[str, tuple[str, str]], there: Collection[str] | None, where: str
) -> None:
    for objective, columns in rewards.items():
        if there is not None and (absent := [column for column in columns if column not in there]):
            raise DataError(
                f"{where}: no column {absent[0]!r} for the rewards of {objective} (data.own_pairs.rewards); it has "
                f"{', '.join(there)}; every pair of every objective needs them, as all objectives reward it: name the columns "
                "that hold them, or bring a function"
            )


def require_columns(names: dict[str, str | None], there: Iterable[str], where: str, key: str) -> None:
    """Refuse a file that lacks a column.

    Args:
        names: what is needed, and what it is called there.

    Raises:
        DataError: names the column and those that are there.
    """
    there = list(there)
    for name, column in names.items():
        if column not in there:
            raise DataError(
                f"{where}: no column {column!r} for {name}; it has {', '.join(there)}; say which it is: "
                f"{key}.columns: {{{name}: ...}}"
            )
