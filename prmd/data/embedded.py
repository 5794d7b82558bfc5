"""The pairs written for this project: files and pairs of the `embedded` approach."""

from collections.abc import Iterable

from prmd.artifacts.paths import EMBEDDED_DIR
from prmd.config.shared import DataConfig
from prmd.data.collection import PairCollection, RawFile, SourcedPair
from prmd.data.readers import SourceFile, local_file
from prmd.errors import ConfigError
from prmd.objectives import OBJECTIVES
from prmd.pairs import PreferencePair


def plan_embedded(_: DataConfig) -> list[SourceFile]:
    """One file per objective."""
    paths = [EMBEDDED_DIR / f"{objective}.jsonl" for objective in OBJECTIVES]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path}: missing; it is part of the project, restore it (git checkout)")
    return [local_file(path, path.stem, None) for path in paths]


def embedded_pairs(files: Iterable[RawFile]) -> PairCollection:
    """The pairs written for this project, one file per objective.

    Raises:
        DataError: a row breaks a rule of the format; names file and line (these files are ours: none may be refused).
    """
    collection = PairCollection()
    for file in files:
        for index, row in enumerate(file.rows):
            pair = PreferencePair.from_row(row, objective=file.label, where=f"{file.path}:{index + 1}")
            collection.pairs.append(SourcedPair(pair, None))
    return collection
