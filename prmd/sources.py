"""Where preference data comes from: readers of the hub and of local folders in the hub's file layout.

`plan_source` lists the files one source gives, each with a reader that yields its rows; only this module calls
`load_dataset`. Parsing local files is in `local_rows`; what is written to `data/raw` and how it is checked is in `raw_data`; what rows mean is in `pair_builders`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.artifacts.paths import EMBEDDED_DIR, find_user_path, places_tried, safe_name
from prmd.config.shared import DataConfig, HhRlhfConfig, PkuSafeRlhfConfig, TruthfulQaConfig
from prmd.errors import ConfigError
from prmd.local_rows import Row, csv_rows, json_rows, parquet_rows, truthfulqa_row
from prmd.objectives import OBJECTIVES

HubSource = HhRlhfConfig | TruthfulQaConfig | PkuSafeRlhfConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
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
        return safe_name(self.label.replace("/", "-")) + ".jsonl"


def required_sources(data: DataConfig) -> tuple[str, ...]:
    """The sources an approach is made of."""
    if data.approach == "hh_truthfulqa":
        return ("hh_rlhf", "truthfulqa")
    if data.approach == "pku_safe":
        needs_truthfulqa = data.pku_safe_rlhf.honest == "truthfulqa"
        return ("pku_safe_rlhf", "truthfulqa") if needs_truthfulqa else ("pku_safe_rlhf",)
    return ("embedded",)


def plan_source(source: str, data: DataConfig) -> list[SourceFile]:
    """List the files of one source; nothing is fetched before a file's `read` is used.

    Raises:
        ConfigError: the local path does not exist or does not have the hub's layout; names the YAML key.
    """
    planners = {
        "hh_rlhf": _plan_hh_rlhf,
        "truthfulqa": _plan_truthfulqa,
        "pku_safe_rlhf": _plan_pku,
        "embedded": _plan_embedded,
    }
    files = planners[source](data)
    if repeated := sorted(name for name, n in Counter(file.name for file in files).items() if n > 1):
        raise ConfigError(
            f"data.{source}.path: two files would both become {repeated[0]}; rename or remove one"
        )
    return files


# ------------------------------------------------------------------ one function per source
def _plan_hh_rlhf(data: DataConfig) -> list[SourceFile]:
    settings = data.hh_rlhf
    key = "data.hh_rlhf.path"
    folder = _local_path(settings.path, key)
    files = []
    for subset in dict.fromkeys(settings.helpful_subsets + settings.harmless_subsets):
        if not _HUB_ID.fullmatch(subset) or subset.startswith("red-team"):
            raise ConfigError(
                f"data.hh_rlhf: {subset!r} is no preference subset (the bare repository would mix in red-team rows); "
                "name folders such as helpful-base or harmless-base"
            )
        for split in ("train", "test"):
            label = f"{subset}/{split}"
            if folder is None:
                read = partial(_hub_rows, key, settings.path, settings.revision, split, subset=subset)
                files.append(_hub_file("hh_rlhf", label, split, settings, read))
            else:
                path = _first_existing(folder, (f"{label}.jsonl.gz", f"{label}.jsonl"), key)
                files.append(_local_file(path, label, split))
    return files


def _plan_truthfulqa(data: DataConfig) -> list[SourceFile]:
    settings = data.truthfulqa
    key = "data.truthfulqa.path"
    path = _local_path(settings.path, key)
    label = "generation"
    if path is None:
        hub = partial(_hub_rows, key, settings.path, settings.revision, "validation", name="generation")
        return [_hub_file("truthfulqa", label, None, settings, lambda: map(truthfulqa_row, hub()))]
    if path.is_dir():
        path = _first_existing(path, ("TruthfulQA.csv", "generation/validation-*.parquet"), key)
    rows = partial(parquet_rows, path) if path.suffix == ".parquet" else partial(csv_rows, path)
    return [_local_file(path, label, None, read=lambda: map(truthfulqa_row, rows()))]


def _plan_pku(data: DataConfig) -> list[SourceFile]:
    settings = data.pku_safe_rlhf
    key = "data.pku_safe_rlhf.path"
    path = _local_path(settings.path, key)
    if path is None:
        return [
            _hub_file(
                "pku_safe_rlhf",
                f"default/{split}",
                split,
                settings,
                partial(_hub_rows, key, settings.path, settings.revision, split),
            )
            for split in ("train", "test")
        ]
    if path.is_file():
        return [_local_file(path, _stem(path), None)]
    if found := sorted(p for s in ("train", "test") for p in path.glob(f"data/*/{s}.json*")):
        return [_local_file(p, f"{p.parent.name}/{_stem(p)}", _stem(p)) for p in found]
    found = sorted(p for pattern in ("*.json", "*.jsonl", "*.jsonl.gz") for p in path.glob(pattern))
    if not found:
        raise ConfigError(
            f"{key}: {path} has neither data/<model>/train.jsonl nor *.json, *.jsonl or *.jsonl.gz files; "
            "point it at a folder in the hub's layout"
        )
    splits = {"train": "train", "test": "test"}
    return [_local_file(p, _stem(p), splits.get(_stem(p))) for p in found]


def _plan_embedded(_: DataConfig) -> list[SourceFile]:
    paths = [EMBEDDED_DIR / f"{objective}.jsonl" for objective in OBJECTIVES]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path}: missing; it is part of the project, restore it (git checkout)")
    return [_local_file(path, path.stem, None) for path in paths]


# ------------------------------------------------------------------ benchmarks
def benchmark_files(path: str, patterns: tuple[str, ...], key: str) -> list[Path] | None:
    """Local files of a benchmark: the file `path` names, or all in the folder that a pattern matches; None for a hub id.

    Raises:
        ConfigError: `path` is neither local nor a hub id, or the folder has no such file; names the YAML key.
    """
    found = _local_path(path, key)
    if found is None or found.is_file():
        return None if found is None else [found]
    if files := sorted({file for pattern in patterns for file in found.glob(pattern)}):
        return files
    raise ConfigError(f"{key}: {found} has no {' or '.join(patterns)}; point it at a folder that has")


def hub_rows(path: str, revision: str, split: str, key: str, *, name: str | None = None) -> Iterable[Row]:
    """Rows of one split of a benchmark on the hub.

    Raises:
        ConfigError: it cannot be fetched; names the YAML key.
    """
    return _hub_rows(key, path, revision, split, name=name)


# ------------------------------------------------------------------ local files
def _local_path(text: str, key: str) -> Path | None:
    """The local file or folder `text` names, or None where it is a hub id."""
    if found := find_user_path(text):
        return found.resolve()
    if not _HUB_ID.fullmatch(text):
        raise ConfigError(
            f"{key}: {text!r} is neither an existing folder nor a hub id such as owner/name ({places_tried(text)}); "
            "correct it"
        )
    return None


def _first_existing(folder: Path, patterns: tuple[str, ...], key: str) -> Path:
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise ConfigError(
        f"{key}: {folder} has no {' or '.join(patterns)}; point it at a folder in the hub's file layout"
    )


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")


def _local_file(
    path: Path, label: str, split: str | None, read: Callable[[], Iterable[Row]] | None = None
) -> SourceFile:
    size = path.stat().st_size * (5 if path.suffix == ".gz" else 2)
    return SourceFile(label, split, io.file_sha256(path), size, read or partial(json_rows, path))


# ------------------------------------------------------------------ the hub
def _hub_file(
    source: str, label: str, split: str | None, settings: HubSource, read: Callable[[], Iterable[Row]]
) -> SourceFile:
    return SourceFile(label, split, f"{settings.path}@{settings.revision}", _HUB_FILE_BYTES[source], read)


def _hub_rows(
    key: str, path: str, revision: str, split: str, *, name: str | None = None, subset: str | None = None
) -> Iterable[Row]:
    dataset = _load(key, path, revision, name, subset)
    if split not in dataset:
        raise ConfigError(
            f"{key}: {path}@{revision} has no split {split!r} (it has {', '.join(dataset)}); correct it"
        )
    return dataset[split]


@cache
def _load(key: str, path: str, revision: str, name: str | None, subset: str | None) -> Mapping[str, Any]:
    """A hub data set with all its splits; loaded once a run, because two raw files share it."""
    from datasets import load_dataset  # slow to import, and not needed for local folders

    try:
        return load_dataset(path, name, data_dir=subset, revision=revision)
    except (
        OSError
    ) as error:  # unreachable, offline, no such repository or revision, no room: all are OSErrors
        detail = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{key}: cannot get {path!r} at revision {revision} from the hub ({detail[0][:160]}), and {places_tried(path)}; "
            f"check the connection and the id, or set {key} to a local folder in the hub's file layout"
        ) from error
