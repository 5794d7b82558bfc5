"""From a finished reward model, policy or judge to the folder that may leave: checked, picked, described.

What it says of itself is in `card`; how a stranger scores with it is in `prmd_scorer`, which is copied beside the weights.
"""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from safetensors import safe_open

from prmd.artifacts import io
from prmd.artifacts.manifest import EVERYTHING
from prmd.artifacts.paths import find_user_path, policy_command, reward_model_command, stage_command
from prmd.artifacts.runs import CONFIG_COPY, require_artifact
from prmd.config.loading import kept_values
from prmd.errors import ConfigError, DataError, first_line
from prmd.publishing.card import Facts, model_card
from prmd.publishing.records import base_license, newest_evaluation
from prmd.rewards.brought import BROUGHT_FILE
from prmd.rewards.debias import DEBIAS_FILE
from prmd.rewards.reward_model import CALIBRATION_FILE, ENSEMBLE_FILE

logger = logging.getLogger(__name__)

KINDS = {"reward_models": "reward_model", "policy_models": "policy", "judges": "judge"}
_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "adapter_model*.safetensors"),
    *("model*.safetensors", "model.safetensors.index.json", ENSEMBLE_FILE, DEBIAS_FILE),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.jinja", "*.py"),
    *("members/*/adapter/adapter_config.json", "members/*/adapter/adapter_model.safetensors"),
)
_OF_THIS_MACHINE = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
"""Keys that transformers writes of where a model was read."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


def publish_model(artifact: Path, *, hub_id: str | None, folder: Path | None, license_: str | None) -> str:
    """Publish a finished artifact into a new folder, or to the hub by the user's own login.

    Args:
        license_: of own pairs.

    Returns:
        Where it is.

    Raises:
        DataError: the artifact is no finished one, or was changed since.
        ConfigError: the folder is not empty, the license of own pairs is missing, or the hub refuses.
    """
    if folder is not None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--folder: {folder} is not an empty or new folder; name another")
        write_published(artifact, folder, here=folder.name, license_=license_)
        return str(folder)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "published"
        write_published(artifact, made, here=str(hub_id), license_=license_)
        return _push(made, str(hub_id))


def _push(folder: Path, hub_id: str) -> str:
    try:
        api = HfApi()
        api.create_repo(hub_id, exist_ok=True)
        return str(api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Publish the model"))
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, ConnectionError) as error:
        raise ConfigError(
            f"--to: {hub_id} was not written ({first_line(error)}); log in with `hf auth login`, or give --folder PATH"
        ) from error


def write_published(artifact: Path, folder: Path, *, here: str, license_: str | None) -> None:
    """Write everything that leaves into `folder`.

    Args:
        here: how the card names it.

    Raises:
        DataError, ConfigError: as `publish_model`.
    """
    artifact = artifact.absolute()
    kind = KINDS.get(artifact.parent.parent.name)
    if kind is None:
        raise DataError(f"{artifact}: wanted the folder of a reward model, policy or judge of this project")
    command = _command(kind, artifact.name)
    record = require_artifact(artifact, what=f"{kind} {artifact.name}", command=command, read=EVERYTHING)
    if (artifact / BROUGHT_FILE).is_file():
        raise DataError(
            f"{artifact}: a reward that was brought (data.own_pairs.rewards), with no model to publish"
        )
    facts = _facts(artifact, kind, command, record, here, license_)
    card = model_card(facts)  # refuses before anything is written
    with tempfile.TemporaryDirectory(dir=_made(folder.absolute().parent)) as scratch:
        made = Path(scratch) / "published"
        for source in _picked(artifact):
            _copy(source, made / source.relative_to(artifact), facts)
        io.write_text(made / "README.md", card)
        if kind != "policy":
            _write_scoring(artifact, made, facts)
        _refuse_own_paths(made, artifact)
        io.publish_directory(made, folder.absolute())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _command(kind: str, name: str) -> str:
    if kind == "policy":
        return policy_command(name)
    return stage_command("compute_metrics") if kind == "judge" else reward_model_command(name[: -len("_rm")])


def _facts(
    artifact: Path, kind: str, command: str, record: dict[str, Any], here: str, license_: str | None
) -> Facts:
    model = kept_values(artifact / CONFIG_COPY)["model"]
    local = Path(model["name"]).is_absolute() or find_user_path(model["name"], "folder") is not None
    local = local or model.get("source", "hub") != "hub"
    metrics = io.read_json(artifact / "metrics.json")
    return Facts(
        kind=kind,
        name=artifact.name if kind == "policy" else metrics["objective"],
        here=here,
        base=Path(model["name"]).name if local else model["name"],
        is_hub_base=not local,
        base_license=base_license(model),
        revision=model.get("revision"),
        approach=metrics["approach"],
        metrics=metrics,
        record=record,
        command=command,
        license=license_,
        evaluation=newest_evaluation(artifact, artifact.parents[3]) if kind == "policy" else None,
        is_adapter=(artifact / "adapter_config.json").is_file(),
        has_ensemble=(artifact / ENSEMBLE_FILE).is_file(),
        has_members=(artifact / "members").is_dir(),
    )


def _picked(artifact: Path) -> Iterator[Path]:
    found = {path for pattern in _FILES for path in artifact.glob(pattern) if path.is_file()}
    return iter(sorted(found))


def _copy(source: Path, target: Path, facts: Facts) -> None:
    if source.name not in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        io.copy_file(source, target)
        return
    values = {key: value for key, value in io.read_json(source).items() if key not in _OF_THIS_MACHINE}
    if source.name == "adapter_config.json":
        values["base_model_name_or_path"] = facts.base
        values["revision"] = facts.revision if facts.is_hub_base else None
    io.write_json(target, values)


def _write_scoring(artifact: Path, made: Path, facts: Facts) -> None:
    """`scoring.json` (precision, calibration, its source) and the program that reads it."""
    calibration = artifact / CALIBRATION_FILE
    kept = io.read_json(calibration) if calibration.is_file() else {}
    scoring = {
        "objective": facts.name,
        "dtype": kept_values(artifact / CONFIG_COPY)["model"]["dtype"],
        "source": kept.get("source"),
        "calibration": kept.get("calibration"),
    }
    if facts.has_members:
        scoring["base"] = facts.base if facts.is_hub_base else None
        scoring["revision"] = facts.revision if facts.is_hub_base else None
    io.write_json(made / "scoring.json", scoring)
    io.copy_file(Path(__file__).with_name("prmd_scorer.py"), made / "prmd_scorer.py")


def _refuse_own_paths(made: Path, artifact: Path) -> None:
    """No text that leaves names a folder of this machine, nor do the notes in front of weights.

    Raises:
        DataError: one does.
    """
    root, home = artifact.parents[3], Path.home()
    for path in sorted(file for file in made.rglob("*") if file.is_file()):
        # A vocabulary may hold a home as short as /root by chance, but not a whole path.
        places = [root] if path.name in _VOCABULARIES else [root, home]
        own = [_spellings(place) for place in places if place != Path(place.anchor)]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                text = str(file.metadata())
        elif path.suffix == ".model":
            continue  # pieces of words in binary
        else:
            text = io.read_utf8(path)
        if named := next((place[0] for place in own if any(spelled in text for spelled in place)), None):
            raise DataError(
                f"{path.name}: names {named}, a folder of this machine; take it out of {artifact / path.name}"
            )


def _spellings(place: Path) -> list[str]:
    """As this system writes it, as JSON and Python do, and with forward slashes."""
    return [str(place), str(place).replace("\\", "\\\\"), place.as_posix()]
