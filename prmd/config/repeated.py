"""What the command of another stage has to repeat of the one that was given, so that it works on the same configuration."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from prmd.artifacts.paths import CONFIG_DIR, beside, find_user_path
from prmd.config.evaluation import EvaluationConfig
from prmd.config.loading import CONFIG_FILES, read_tree, takes
from prmd.config.masking import masked
from prmd.config.mistakes import REFERRED, shown_path
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig

KIND_OF_STAGE: dict[str, type[BaseModel]] = {
    "1": RewardModelConfig,
    "2": RewardModelConfig,
    "3": PolicyConfig,
    "4": EvaluationConfig,
}
"""The configuration that the scripts of a stage read."""


def options_of_stages(
    config: Path, overrides: Sequence[str], own: type[BaseModel] | None = None
) -> dict[str, list[str]]:
    """For each stage, `--config` and the overrides that its scripts are to be given, as words of a shell.

    Args:
        config: what `--config` named, or its default, which no command has to repeat.
        overrides: `key.sub=value` texts as they were given; what is no override, or no key there, is left out.
        own: the kind of configuration that the given command reads; None for all three, as the pipeline does.
    """
    return {
        stage: [
            *_config_option(config, overrides, kind, own),
            *(
                shell_word(masked(" ".join(text.splitlines())))
                for text in _overrides_of(kind, overrides, own)
            ),
        ]
        for stage, kind in KIND_OF_STAGE.items()
    }


def _config_option(
    config: Path, overrides: Sequence[str], kind: type[BaseModel], own: type[BaseModel] | None
) -> list[str]:
    """`--config PATH` of a command that reads `kind`; nothing where that is the default."""
    name = next(name for name, schema in CONFIG_FILES.items() if schema is kind)
    folder = config if find_user_path(config, "file") is None else config.parent
    chosen = config if own is kind else folder
    if kind is RewardModelConfig and own not in (kind, None):
        referred = _referred_file(config, overrides, own)
        if referred and referred.resolve() != (find_user_path(folder, "folder") / name).resolve():
            chosen = Path(shown_path(referred))
    place = find_user_path(chosen)
    is_default = place is not None and place.resolve() in (CONFIG_DIR, CONFIG_DIR / name)
    return [] if is_default else ["--config", shell_word(str(chosen))]


def _referred_file(config: Path, overrides: Sequence[str], own: type[BaseModel]) -> Path | None:
    """The reward model configuration that a readable policy or evaluation configuration, or an override, names."""
    if named := [text.partition("=")[2] for text in overrides if text.partition("=")[0].strip() == REFERRED]:
        return find_user_path(named[-1], "file")
    place = find_user_path(config)
    name = next(name for name, schema in CONFIG_FILES.items() if schema is own)
    tree = read_tree(place / name if place.is_dir() else place, "--config", [])
    node = tree.value.get(REFERRED) if tree else None
    return beside(node.folder, node.value) if node and isinstance(node.value, str) else None


def _overrides_of(
    kind: type[BaseModel], overrides: Sequence[str], own: type[BaseModel] | None
) -> Iterator[str]:
    """The overrides that mean the same in a command that reads `kind`."""
    for text in overrides:
        keys = text.partition("=")[0].strip().split(".")
        bare = text.strip().removeprefix(f"{REFERRED}.")
        if own in (kind, None):
            if takes(kind, keys):
                yield text
        elif own is not RewardModelConfig and keys[0] in own.model_fields and keys[0] != REFERRED:
            continue  # a setting of the given command alone, such as its training
        elif kind is RewardModelConfig:
            if takes(kind, keys):
                yield bare
        elif takes(RewardModelConfig, keys) or keys == [REFERRED]:
            yield f"{REFERRED}.{bare}" if bare.split(".")[0] in kind.model_fields else bare


_PLAIN = re.compile(r"[\w./:=+@%-]+")
_LIVE = re.compile(r"[\"$`!]|\\$")
"""What a shell reads, or may read, inside double quotes."""


def shell_word(text: str) -> str:
    """A word as bash, PowerShell and cmd read it alike: in double quotes where it is more than letters and a few signs."""
    if _PLAIN.fullmatch(text):
        return text
    if _LIVE.search(text) and "'" not in text:
        return f"'{text}'"
    return '"' + text.replace('"', '\\"') + '"'
