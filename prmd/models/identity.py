"""What the numbers of a model folder depend on, for every key and fingerprint: the one place that says which files these are.

Weights, configuration, adapter, tokenizer and chat template, and code that came with the model, by content. Generation
settings are not among them, for nothing here samples by a model's own.

Earlier versions counted the weights alone. What they finished keeps its key: an artifact of theirs vouches for its other
files itself, and any other folder keeps their key for as long as its other files are as this version first saw them.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.artifacts.runs import FINGERPRINT_FILE, read_run
from prmd.errors import DataError
from prmd.runtime import is_main_process

logger = logging.getLogger(__name__)

_PICKLED = ("pytorch_model*.bin", "adapter_model.bin")
"""Weights that are read where there are no safetensors."""
_BESIDE_WEIGHTS = (
    *("config.json", "adapter_config.json", "*.index.json", "*.py"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.spm"),
    *("chat_template.json", "*.jinja", "additional_chat_templates/*.jinja"),
)
Files = list[list[str]]
"""Name and sha256 of each."""


def weight_files(folder: Path) -> Files:
    """Name and sha256 of each weight file in a local folder.

    Raises:
        DataError: there is none.
    """
    require_weights(folder)
    return _weights(folder)


def require_weights(folder: Path) -> None:
    """Refuse a folder without weights, and read none.

    Raises:
        DataError: there is no weight file.
    """
    if not _weight_paths(folder):
        raise DataError(f"{folder}: no .safetensors weights; give a folder saved by save_pretrained")


def model_files(folder: Path, paths: ArtifactPaths | None = None) -> Files:
    """Name and sha256 of each file in a model folder that its numbers depend on, its weights first.

    Args:
        paths: the artifact root whose earlier keys are kept; None for what is an artifact itself.

    Raises:
        DataError: it holds no weights.
    """
    weights = weight_files(folder)
    return earlier_or_whole(folder, paths, earlier=_hashed(sorted(folder.glob("*.safetensors"))) or weights)


def model_key(folder: Path, paths: ArtifactPaths) -> str:
    """Content key of a model folder, also of one whose weights are in another format.

    Args:
        paths: as for `model_files`.
    """
    earlier = _hashed(sorted(folder.glob("*.safetensors"))) or [str(folder)]
    return io.fingerprint(earlier_or_whole(folder, paths, earlier=earlier))


def earlier_or_whole(folder: Path, paths: ArtifactPaths | None, *, earlier: Any) -> Any:
    """What a key of this folder is made of: name and sha256 of everything, or what an earlier version made it of.

    Args:
        earlier: what that version counted, JSON-able.
    """
    whole = _weights(folder) + _hashed(_matching(folder, _BESIDE_WEIGHTS))
    return earlier if _keeps_earlier_key(folder, paths, earlier, whole) else whole


def content_key(folder: Path) -> str:
    """Content key of a model folder, whatever keys an earlier version gave it; `run.json` names a base by it."""
    return io.fingerprint(_weights(folder) + _hashed(_matching(folder, _BESIDE_WEIGHTS)))


def _keeps_earlier_key(folder: Path, paths: ArtifactPaths | None, earlier: Any, whole: Files) -> bool:
    if (own := _record_around(folder)) is not None:
        return _is_earlier(own)
    if paths is None or (folder / FINGERPRINT_FILE).is_file():  # an artifact that is being built
        return False
    file, content = paths.first_seen(io.fingerprint(earlier)), io.fingerprint(whole)
    if file.is_file():
        return io.read_json(file)["content"] == content
    bases = list(_bases_of_artifacts(paths))
    if all(base is not None for base in bases) or content in bases:
        return False
    _remember(file, folder, content)
    return True


def _remember(file: Path, folder: Path, content: str) -> None:
    if is_main_process():
        try:
            io.write_json(file, {"folder": str(folder), "content": content})
        except OSError as error:
            logger.info("%s: what %s holds could not be noted (%s)", file, folder, error)


def _bases_of_artifacts(paths: ArtifactPaths) -> Iterator[str | None]:
    """The `content_key` of the base of each finished artifact; None for what an earlier version finished."""
    for folder in paths.finished_models():
        record = read_run(folder)
        if record is not None and "inputs" in record:
            yield None if _is_earlier(record) else record["inputs"]["base"]["content"]


def _is_earlier(record: dict[str, Any]) -> bool:
    base = record.get("inputs", {}).get("base") or {}
    return "content" not in base


def _record_around(folder: Path) -> dict[str, Any] | None:
    """The record of the artifact that a folder is, or is a checkpoint of."""
    for place in (folder, *folder.parents[:2]):
        record = read_run(place)
        if record is not None and "inputs" in record:
            return record
    return None


def _weights(folder: Path) -> Files:
    return _hashed(_weight_paths(folder))


def _weight_paths(folder: Path) -> list[Path]:
    return _matching(folder, ("*.safetensors",)) or _matching(folder, _PICKLED)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _hashed(files: list[Path]) -> Files:
    return [[file.name, key] for file, key in zip(files, io.files_sha256(files), strict=True)]
