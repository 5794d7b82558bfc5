"""Which base model an artifact was trained from, and whether it is the one of the configuration.

Kept in `run.json` as a content key; of artifacts without one, `config.yaml` beside them tells. An adapter also names its base.
"""

from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths, find_user_path
from prmd.artifacts.runs import CONFIG_COPY, read_run
from prmd.config.loading import kept_model
from prmd.config.shared import ModelConfig
from prmd.errors import ConfigError
from prmd.models.identity import weight_files
from prmd.models.loading import base_content_key, base_model_key, model_source


def base_record(model: ModelConfig, paths: ArtifactPaths) -> dict[str, Any]:
    """What `run.json` keeps among its inputs: name, revision and keys of the base, and what adapters call it.

    By `content` it is also known that a version made it which counts more than weights (`identity`).
    """
    folder = _last(model_source(model, paths))
    return {
        "name": model.name,
        "revision": model.revision,
        "folder": folder,
        "key": base_model_key(model, paths),
        "content": base_content_key(model, paths),
    }


def check_base(directory: Path, model: ModelConfig, paths: ArtifactPaths, *, what: str, command: str) -> None:
    """Refuse an artifact that was trained from another base than `model`.

    Args:
        what: its name in the message, such as "policy cvar".
        command: the command that trains it.

    Raises:
        ConfigError: it was, or its adapter names another base; names both.
    """
    kept = (read_run(directory) or {}).get("inputs", {}).get("base")
    former = None if kept else kept_model(directory / CONFIG_COPY)
    now = base_record(model, paths)
    other = None
    if kept and not _is_same(kept, now):
        other = kept
    elif former and not _was_same(former, model, paths):
        other = {"name": former.name, "revision": former.revision}
    elif named := _named_by_adapter(directory):
        known = [now["name"], now["folder"], *([kept["name"], kept["folder"]] if kept else [])]
        known += [former.name] if former else []
        other = None if _last(named) in map(_last, known) else {"name": named, "revision": None}
    if other:
        changed = (other["name"], other["revision"]) == (now["name"], now["revision"])
        raise ConfigError(
            f"{what} was trained from {_shown(other)}, "
            + (
                "whose weights, configuration or tokenizer have changed since"
                if changed
                else f"model.name is now {_shown(now)}"
            )
            + f" ({directory}); set model.name (and model.revision) to what it was trained from, or make it again with: "
            f"{command} --force"
        )


def adapter_base(directory: Path, model: ModelConfig, paths: ArtifactPaths, *, what: str) -> str:
    """The base that an adapter without a record names, and how it was found to be `model`.

    By content where it is a folder of this machine, else by its name.

    Args:
        what: where it is configured, for messages.

    Raises:
        ConfigError: it names none, or another.
    """
    config, base = io.read_json(directory / "adapter_config.json"), Path(model_source(model, paths))
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    remedy = (
        "set model.name to the base it was trained from, or name the right one in its adapter_config.json"
    )
    if not named:
        raise ConfigError(
            f"{what}: no base_model_name_or_path in {directory / 'adapter_config.json'}; {remedy}"
        )
    here = find_user_path(named, "folder")
    if here is not None and base.is_dir():
        same, how = weight_files(here) == weight_files(base), "the same weights as model.name"
    elif here is None and "/" in named and not Path(named).is_absolute() and not base.is_dir():
        same = named == model.name and revision in (None, "main", model.revision or "main")
        how = "the hub id of model.name"
    else:
        same, how = _last(named) in (_last(model.name), base.name), "known by its name alone"
    if not same:
        now = {"name": model.name, "revision": model.revision}
        raise ConfigError(
            f"{what}: the adapter was trained from {_shown({'name': named, 'revision': revision})}, model.name is "
            f"{_shown(now)} ({directory}); {remedy}"
        )
    return f"{named}, {how}"


def _is_same(kept: dict[str, Any], now: dict[str, Any]) -> bool:
    """Equal content; a hub id and a folder of its name cannot be told apart without fetching."""
    if kept["key"] == now["key"]:
        return True
    return _is_folder(kept["name"]) != _is_folder(now["name"]) and _last(kept["name"]) == _last(now["name"])


def _is_folder(name: str) -> bool:
    return Path(name).is_absolute() or find_user_path(name, "folder") is not None


def _was_same(former: ModelConfig, model: ModelConfig, paths: ArtifactPaths) -> bool:
    """Whether the base named by an older configuration is this one: by name, by content, or moved with its folder's name."""
    if (former.source, former.name, former.revision) == (model.source, model.name, model.revision):
        return True
    if former.source == "hub" and find_user_path(former.name, "folder"):
        return base_model_key(former, paths) == base_model_key(model, paths)
    hub_ids = not _is_folder(former.name) and not _is_folder(model.name)
    if hub_ids and former.revision != model.revision:
        return False
    return _last(former.name) == _last(model.name)


def _named_by_adapter(directory: Path) -> str | None:
    path = directory / "adapter_config.json"
    return io.read_json(path).get("base_model_name_or_path") if path.is_file() else None


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _shown(base: dict[str, Any]) -> str:
    return f"{base['name']} (revision {base['revision']})" if base["revision"] else base["name"]
