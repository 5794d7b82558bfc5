"""JailbreakBench's files: harmful and benign behaviours, and attack prompts by behaviour.

Headers differ in case between the published files, and wording between their versions, so behaviours are known by their index.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.artifacts.paths import resolve_user_path
from prmd.benchmarks.base import Row, csv_rows, integer_of, numbered, refuse_twice, text_of
from prmd.config.evaluation import JailbreakBenchConfig
from prmd.data.readers import benchmark_files, json_rows, split_rows
from prmd.errors import ConfigError, DataError

KEY = "benchmarks.jailbreakbench.path"
ATTACKS_KEY = "benchmarks.jailbreakbench.attacks"
_INDEX_NAMES = ("index", "", "unnamed: 0")


@dataclass(frozen=True)
class Behavior:
    """One behaviour: the request itself, and what it is about."""

    index: int
    goal: str
    category: str


@dataclass(frozen=True)
class Attack:
    """A prompt that asks for behaviour `index`, or None where the attack found none.

    Attributes:
        response: what another model answered, where the file holds it.
        jailbroken: whether that answer was judged harmful, where the file says so.
    """

    index: int
    prompt: str | None
    response: str | None
    jailbroken: bool | None


def read_behaviors(settings: JailbreakBenchConfig) -> tuple[dict[str, list[Behavior]], str]:
    """Behaviours by `harmful` and `benign` in the order of their index, and a key of the files.

    Raises:
        ConfigError: they are not at `path`.
        DataError: a row is malformed or there twice; names row and field.
    """
    path = settings.path or ""
    found, origins = {}, []
    for group in ("harmful", "benign"):
        name = f"{group}-behaviors.csv"
        files = benchmark_files(path, (name, f"*/{name}"), KEY)
        if files is None:
            table = split_rows(KEY, path, settings.revision, group, name="behaviors")
            rows = numbered(({k.casefold(): v for k, v in row.items()} for row in table), f"{path} {group}")
            origins.append(f"{path}@{settings.revision}")
        elif files[0].name != name:
            raise ConfigError(f"{KEY}: {files[0]} is one file; give the folder with both CSV files")
        else:
            rows, origin = csv_rows(files[0]), io.file_sha256(files[0])
            origins.append(origin)
        found[group] = parse_behaviors(rows, f"{path} {group}")
    return found, io.fingerprint(origins)


def parse_behaviors(rows: Iterable[tuple[str, Row]], source: str) -> list[Behavior]:
    """Rows with `goal`, `category` and an index, sorted by it."""
    seen: dict[Any, str] = {}
    behaviors = []
    for where, row in rows:
        index = integer_of(row, _INDEX_NAMES, where)
        refuse_twice(seen, index, "index", where)
        behaviors.append(Behavior(index, text_of(row, "goal", where), text_of(row, "category", where)))
    if not behaviors:
        raise DataError(f"{source}: no rows; fetch the file again")
    return sorted(behaviors, key=lambda behavior: behavior.index)


def read_attacks(settings: JailbreakBenchConfig, behaviors: dict[str, list[Behavior]]) -> list[Attack] | None:
    """The attack file: JSON Lines, or an artifact with its rows under `jailbreaks`; None where none is configured.

    Raises:
        ConfigError: the file is missing.
        DataError: a row is malformed, there twice, or of no behaviour; names row and field.
    """
    if settings.attacks is None:
        return None
    path = resolve_user_path(settings.attacks, ATTACKS_KEY, "a file of attack prompts, or null", "file")
    known = {behavior.index for behavior in behaviors["harmful"]}
    seen: dict[Any, str] = {}
    attacks = []
    for where, row in numbered(_attack_rows(path), path):
        index = integer_of(row, ("index",), where)
        refuse_twice(seen, index, "index", where)
        if index not in known:
            raise DataError(f"{where}: index: {index} is none of the harmful behaviours; correct it")
        prompt = None if row.get("prompt") is None else text_of(row, "prompt", where)
        response, label = row.get("response"), row.get("jailbroken")
        if not (response is None or isinstance(response, str)):
            raise DataError(f"{where}: response: got {type(response).__name__}, wanted text or null")
        if not (label is None or isinstance(label, bool)):
            raise DataError(f"{where}: jailbroken: got {label!r}, wanted true, false or null")
        attacks.append(Attack(index, prompt, response, label))
    if not attacks:
        raise DataError(f"{path}: no attack prompts; fetch the file again")
    return attacks


def _attack_rows(path: Path) -> Iterable[Row]:
    if path.suffix != ".json":
        return json_rows(path)
    try:
        found = io.parse_json(io.read_utf8(path))
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}); fetch the file again") from error
    rows = found.get("jailbreaks") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: jailbreaks: wanted a list of attacks; it must be an artifact as published")
    return rows
