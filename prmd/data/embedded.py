"""The pairs written for this project: files and pairs of the `embedded` approach."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from prmd.artifacts.paths import EMBEDDED_DIR
from prmd.config.shared import DataConfig
from prmd.data.collection import PairCollection, RawFile, SourcedPair
from prmd.data.readers import SourceFile, local_file
from prmd.errors import ConfigError, DataError
from prmd.objectives import OBJECTIVES
from prmd.pairs import PreferencePair, broken_text


def plan_embedded(_: DataConfig) -> list[SourceFile]:
    """One file per objective."""
    paths = [EMBEDDED_DIR / f"{objective}.jsonl" for objective in OBJECTIVES]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path}: missing; it is part of the project, restore it (git checkout)")
    return [local_file(path, path.stem, None) for path in paths]


def embedded_pairs(files: Iterable[RawFile]) -> PairCollection:
    """The pairs written for this project, one file per objective; an id that several files use gets its file's name in front.

    Raises:
        DataError: a row breaks a rule of the format, or two different rows have one id; names file and line (these files
            are ours: none may be refused).
    """
    collection, pairs = PairCollection(), {}
    for file in files:
        for index, row in enumerate(file.rows):
            where = f"{file.path}:{index + 1}"
            pairs[where] = _read_pair(row, objective=file.label, where=where)
    homes = defaultdict(set)
    for pair in pairs.values():
        homes[pair.id].add(pair.objective)
    first: dict[str, tuple[str, PreferencePair]] = {}
    for where, pair in pairs.items():
        if len(homes[pair.id]) > 1:
            pair = replace(pair, id=f"{pair.objective}-{pair.id}")
            collection.counts["ids_of_several_files_made_unique"] += 1
        before, same = first.setdefault(pair.id, (where, pair))
        if same != pair:
            raise DataError(f"{where}: the id {pair.id!r} is also that of {before}; give each row its own")
        collection.pairs.append(SourcedPair(pair, None))
    return collection


def _read_pair(row: dict[str, Any], *, objective: str, where: str) -> PreferencePair:
    pair = PreferencePair.from_row(row, objective=objective, where=where)
    if broken_text(*(message["content"] for message in pair.prompt), pair.chosen, pair.rejected):
        raise DataError(f"{where}: a text holds NUL (\\u0000); mend or remove this row")
    return pair
