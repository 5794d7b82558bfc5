"""What other files say of a model that is published: how a policy was evaluated, and the license of the base model."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, metadata_load

from prmd.artifacts import hub, io
from prmd.artifacts.paths import find_user_path
from prmd.artifacts.runs import is_as_recorded, read_run
from prmd.errors import first_line
from prmd.inference.candidates import policy_key

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"


def newest_evaluation(policy: Path, root: Path) -> dict[str, Any] | None:
    """The newest results of `compute_metrics` that were measured on what a policy's folder holds now; None without any.

    Args:
        policy: its folder; a policy of the same name with other weights is not this one.
        root: the artifact root, below which every approach has its results.
    """
    found = []
    for path in sorted(root.glob("outputs/metrics/*/*.json")):
        record = io.read_json(path)
        said = record.get("evaluation") if isinstance(record, dict) else None
        if not said or "objectives" not in record or not is_as_recorded(path.parent, path.name):
            continue
        if said["policy"] == policy_key(said["compared_on"]["reference"], policy):
            found.append(
                ((read_run(path.parent) or {}).get("started") or "", path.stat().st_mtime_ns, record)
            )
    return max(found, key=lambda one: one[:2])[2] if found else None


def base_license(model: dict[str, Any]) -> list[str]:
    """License of a base model, its name and its link, as far as its card states them, on this machine or on the hub.

    Args:
        model: `source`, `name` and `revision` of the base, as section `model` of the configuration names it.
    """
    if model.get("source", "hub") != "hub":
        return []
    folder = find_user_path(model["name"], "folder")
    try:
        if folder is None and not Path(model["name"]).is_absolute():
            card = Path(
                hf_hub_download(
                    model["name"],
                    CARD_FILE,
                    revision=model.get("revision"),
                    cache_dir=hub.cache_of(model["name"], model.get("revision")),
                )
            )
        else:
            card = (folder or Path(model["name"])) / CARD_FILE
        stated = (metadata_load(card) if card.is_file() else None) or {}
    except Exception as error:  # offline, unknown, gated; a header that is none, of which YAML raises its own
        logger.info("%s: its card cannot be read (%s)", model["name"], first_line(error))
        return []
    values = [stated.get(key) for key in ("license", "license_name", "license_link")]
    return [
        ", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values if value
    ]
