"""`data/raw/<source>/`: fetching a source into it, its manifest, and reading it back checked.

A manifest says where the rows come from (path, revision) and lists each file with rows and sha256. Fetching resumes: a
file whose origin and sha256 are those of the manifest is kept. The embedded pairs are not copied, only manifested.
Readers of the sources themselves are in `sources`.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.artifacts.paths import EMBEDDED_DIR, ArtifactPaths, stage_command
from prmd.config.shared import DataConfig
from prmd.data import sources
from prmd.data.collection import RawFile, StoredRows
from prmd.data.own.files import refuse_empty, reward_columns
from prmd.data.readers import Row, SourceFile
from prmd.errors import DataError
from prmd.runtime import progress, require_disk

logger = logging.getLogger(__name__)

DOWNLOAD_COMMAND = stage_command("download_dataset")
MANIFEST = "manifest.json"


def fetch_source(source: str, data: DataConfig, paths: ArtifactPaths, *, force: bool) -> dict[str, Any]:
    """Bring one source to `data/raw/<source>/`.

    Args:
        source: a name of `sources.required_sources`.
        data: says from where.
        force: fetch every file again.

    Returns:
        The manifest.

    Raises:
        ConfigError: the source cannot be reached or the disk is too small; names the YAML key.
        DataError: a file is not what it should be.
    """
    directory = paths.raw(source)
    identity = _identity(source, data)
    plan = sources.plan_source(source, data)
    former = {} if force else _former_files(directory, identity)
    missing = [f for f in plan if not _is_kept(source, directory, f, former.get(f.name))]
    if missing and source != "embedded":
        require_disk(directory, sum(file.size for file in missing))
    head = {"source": source, **identity}
    entries = dict(former)
    for file in plan:
        if file in missing:
            entries[file.name] = _write_file(source, directory, file)
            io.write_json(directory / MANIFEST, {**head, "complete": False, "files": entries})
        else:
            rows = former[file.name]["rows"]
            logger.info("%s: kept %s (%d rows, sha256 as recorded)", source, file.name, rows)
    filled = {file.label for file in plan if entries[file.name]["rows"]}
    if not filled:
        raise DataError(
            f"data.{source}: {', '.join(file.label for file in plan)} of {identity['path']} hold no row; put the data there"
        )
    if source == "own_pairs":
        refuse_empty(filled, data.own_pairs)
    manifest = {**head, "complete": True, "files": {file.name: entries[file.name] for file in plan}}
    io.write_json(directory / MANIFEST, manifest)
    _remove_leftovers(directory, manifest)
    return manifest


def read_manifest(source: str, data: DataConfig, paths: ArtifactPaths) -> dict[str, Any]:
    """The manifest of a fetched source.

    Raises:
        DataError: it was not fetched, not completely, or from elsewhere than the configuration says now.
    """
    path = paths.raw(source) / MANIFEST
    if not path.is_file():
        raise DataError(f"{path}: source {source!r} was not downloaded; run `{DOWNLOAD_COMMAND}` first")
    manifest = _read_manifest_file(path)
    if not manifest.get("complete"):
        raise DataError(
            f"{path}: the download of {source!r} was interrupted; run `{DOWNLOAD_COMMAND}` to resume it"
        )
    wanted = _identity(source, data)
    got = {key: manifest.get(key) for key in wanted}
    if got != wanted:
        raise DataError(
            f"{path}: {source!r} was downloaded with {got}, the configuration says {wanted}; "
            f"run `{DOWNLOAD_COMMAND}` again"
        )
    return manifest


def _read_manifest_file(path: Path) -> dict[str, Any]:
    """A manifest as `fetch_source` writes it.

    Raises:
        DataError: it is something else; names the file.
    """
    manifest = io.read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    keys = {"label", "upstream_split", "origin", "rows", "sha256"}
    if not isinstance(files, dict) or not all(
        isinstance(f, dict) and keys <= f.keys() for f in files.values()
    ):
        raise DataError(
            f"{path}: not a manifest of downloaded files; delete it and run `{DOWNLOAD_COMMAND}` again"
        )
    return manifest


def read_source(source: str, data: DataConfig, paths: ArtifactPaths) -> Iterator[RawFile]:
    """Read a fetched source, file by file, each checked against its sha256.

    Raises:
        DataError: as `read_manifest`, or a file is missing or was changed.
    """
    directory = _file_directory(source, paths.raw(source))
    for name, entry in read_manifest(source, data, paths)["files"].items():
        path = directory / name
        if not path.is_file() or io.file_sha256(path) != entry["sha256"]:
            raise DataError(
                f"{path}: missing or changed since it was downloaded; run `{DOWNLOAD_COMMAND}` again"
            )
        rows = StoredRows(path, entry["rows"])
        yield RawFile(source, entry["label"], entry["upstream_split"], path, rows)


def _identity(source: str, data: DataConfig) -> dict[str, Any]:
    """What in the configuration decides which rows a source has."""
    if source == "embedded":
        return {"path": "1_data_preparation/embedded", "revision": None}
    if source == "own_pairs":
        own = data.own_pairs
        named = {**own.objectives, **({"scored": own.scored} if own.scored else {})}
        kept = {
            label: [
                file.path,
                file.revision,
                file.split,
                file.kept_columns,
                *([file.name] if file.name else []),
            ]
            for label, file in named.items()
        }
        columns = {k: list(both) for k, both in reward_columns(own).items()}
        rewards = {"rewards": columns} if columns else {}
        path = ", ".join(file.path for file in named.values())
        return {"path": path, "revision": None, "named": kept, **rewards}
    section = getattr(data, source)
    identity = {"path": section.path, "revision": section.revision}
    if source == "hh_rlhf":
        identity["subsets"] = list(dict.fromkeys(section.helpful_subsets + section.harmless_subsets))
    return identity


def _former_files(directory: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        return {}
    manifest = _read_manifest_file(path)
    same_place = all(manifest.get(key) == identity[key] for key in ("path", "revision"))
    return manifest["files"] if same_place else {}


def _is_kept(source: str, directory: Path, file: SourceFile, entry: Mapping[str, Any] | None) -> bool:
    if entry is None or entry["origin"] != file.origin:
        return False
    path = _file_directory(source, directory) / file.name
    return path.is_file() and io.file_sha256(path) == entry["sha256"]


def _write_file(source: str, directory: Path, file: SourceFile) -> dict[str, Any]:
    path = _file_directory(source, directory) / file.name
    lazy = file.read()
    total = len(lazy) if hasattr(lazy, "__len__") else None
    counted = Counter[str]()
    rows = _counted(progress(lazy, total, f"{source} {file.label}"), counted)
    if source == "embedded":
        deque(rows, maxlen=0)
    else:
        io.write_jsonl(path, rows)
    count = counted["rows"]
    logger.log(logging.INFO if count else logging.WARNING, "%s: %s, %d rows", source, path, count)
    return {
        "label": file.label,
        "upstream_split": file.upstream_split,
        "origin": file.origin,
        "rows": count,
        "sha256": io.file_sha256(path),
    }


def _counted(rows: Iterable[Row], counted: Counter[str]) -> Iterator[Row]:
    for row in rows:
        counted["rows"] += 1
        yield row


def _file_directory(source: str, directory: Path) -> Path:
    return EMBEDDED_DIR if source == "embedded" else directory


def _remove_leftovers(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Files of a former configuration would be mistaken for this one's."""
    for path in directory.glob("*.jsonl"):
        if path.name not in manifest["files"]:
            path.unlink()
