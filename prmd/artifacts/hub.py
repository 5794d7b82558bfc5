"""Where files of the Hugging Face hub lie: below the artifact root, unless the user's own cache has them whole.

Downloads are large, so they belong on the disk that the user gave the artifacts. The hub's client reads its cache from the
environment when it is imported, so `use_project_cache` comes first. HF_HOME stays as it is, because the login lies there.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Literal

Kind = Literal["model", "dataset"]
_CHOSEN_BY_USER = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
_project: list[Path] = []
"""The cache that this process chose; empty where the user did, or nobody."""


def use_project_cache(folder: Path) -> None:
    """Let the hub's client download to `folder`, unless the environment says where, or the client is imported already."""
    if "huggingface_hub" not in sys.modules and not any(map(os.environ.get, _CHOSEN_BY_USER)):
        os.environ["HF_HUB_CACHE"] = str(folder)
        _project[:] = [folder]


def is_offline() -> bool:
    """Whether the user switched the hub off, read as its client reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def id_problem(text: str) -> str | None:
    """Why the hub's client would not take a text for a repository's name; None where it would ask the hub for it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # `use_project_cache` comes first

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        return str(error)
    return None


def cache_of(repository: str, revision: str | None = None) -> str | None:
    """The user's own cache where it holds this model whole; None: the client's, which is the project's or the user's choice.

    Without a connection also where it holds a part, and the project's cache nothing: what worked before it moved still does.
    """
    if not _project:
        return None
    own = _users_cache()
    held = _snapshot(own, repository, revision, "model")
    if held is None:
        return None
    unknown = is_offline() and _snapshot(_project[0], repository, revision, "model") is None
    return str(own) if unknown or _is_whole_model(held) else None


def whole_dataset(repository: str, revision: str) -> Path | None:
    """The folder of a data set in the user's own cache, where its listing says that no file is missing; else None."""
    held = _snapshot(_users_cache(), repository, revision, "dataset") if _project else None
    if held is None:
        return None
    try:
        listing = held.parents[1] / "trees" / f"{held.name}.json"
        files = json.loads(listing.read_text(encoding="utf-8"))["files"]
        whole = bool(files) and all((held / name).stat().st_size == files[name]["size"] for name in files)
    except (OSError, ValueError, KeyError, TypeError):  # no listing: an older client, or single files alone
        return None
    return held if whole else None


def _users_cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "huggingface" / "hub"


def _snapshot(cache: Path, repository: str, revision: str | None, kind: Kind) -> Path | None:
    """The folder of a revision (commit, branch or tag) in a cache of the hub's layout."""
    folder, name = cache / f"{kind}s--{repository.replace('/', '--')}", revision or "main"
    try:
        if not re.fullmatch(r"[0-9a-f]{40}", name):
            name = (folder / "refs" / name).read_text(encoding="utf-8").strip()
        held = folder / "snapshots" / name
        return held if name and held.is_dir() else None
    except (OSError, ValueError):
        return None


def _is_whole_model(folder: Path) -> bool:
    """Whether configuration, tokenizer and every file of the weights are there, of a model or of an adapter."""
    try:
        if (folder / "adapter_config.json").is_file():
            return any((folder / f"adapter_model{end}").is_file() for end in (".safetensors", ".bin"))
        tokenizer = any(path.is_file() for pattern in _TOKENIZERS for path in folder.glob(pattern))
        return tokenizer and (folder / "config.json").is_file() and _weights_are_whole(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _weights_are_whole(folder: Path) -> bool:
    for format_ in ("model.safetensors", "pytorch_model.bin"):
        if (folder / format_).is_file():
            return True
        index = folder / f"{format_}.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return bool(names) and all((folder / name).is_file() for name in names)
    return False
