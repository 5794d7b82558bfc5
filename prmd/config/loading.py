"""YAML files and command-line overrides to frozen configurations; every mistake named at once, with file:line.

Only this module reads YAML. A file may begin with `extends: other.yaml` (deep merge, lists replaced); the policy and
evaluation files name the file they share with `reward_model_config: file`. There are no variables, anchors or tags.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.reader import ReaderError

from prmd.artifacts.paths import beside, resolve_user_path
from prmd.config.evaluation import EvaluationConfig
from prmd.config.masking import masked
from prmd.config.mistakes import (
    COMMAND_LINE,
    REFERRED,
    Node,
    did_you_mean,
    dotted_keys,
    explain,
    given_twice,
    is_mapping,
    mistyped_arguments,
    quote,
    shown_path,
    whole_overrides,
)
from prmd.config.policy import PolicyConfig
from prmd.config.shared import ModelConfig, RewardModelConfig, Section
from prmd.errors import ConfigError

AnyConfig = RewardModelConfig | PolicyConfig | EvaluationConfig

CONFIG_FILES: dict[str, type[Section]] = {
    "reward_model_config.yaml": RewardModelConfig,
    "policy_config.yaml": PolicyConfig,
    "evaluation_config.yaml": EvaluationConfig,
}


def config_directory(path: Path) -> Path:
    """The directory that holds the three files, given it or one of them."""
    return path if path.is_dir() else path.parent


Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class Override:
    """`a.b=value` from the command line: its keys, the tree {a: {b: value}}, and whether a mistake was found in the text."""

    keys: tuple[str, ...]
    text: str
    tree: Node
    is_mistaken: bool = False


# ------------------------------------------------------------------ what callers use
def load_config(path: Path, kind: type[Config], overrides: Sequence[str] = ()) -> Config:
    """Load one configuration file, or the file of this kind in a folder.

    Args:
        path: the YAML file, or the folder that holds it under its own name; relative as `resolve_user_path` says.
        kind: `RewardModelConfig`, `PolicyConfig` or `EvaluationConfig`.
        overrides: `key.sub=value` texts; values are YAML. A key goes to this file if its schema has it, else to the
            `reward_model_config` it refers to.

    Raises:
        ConfigError: one line for every mistake of every file and override.
    """
    mistakes: list[str] = []
    parsed = _parse_overrides(overrides, (kind,), mistakes)
    found = _found(path, "--config", mistakes)
    config = _build(found, kind, parsed, mistakes) if found else None
    _refuse(mistakes)
    return config  # type: ignore[return-value]  # None only together with a mistake


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> dict[type[BaseModel], AnyConfig]:
    """Load all three files of a folder; an override goes to every file whose schema, or reference, has its key.

    Args:
        path: the folder, or one of the files in it; relative as `resolve_user_path` says.
        overrides: `key.sub=value` texts.

    Raises:
        ConfigError: one line for every mistake of every file and override.
    """
    # a mistyped folder must not be taken for a file of its parent
    path = resolve_user_path(path, "--config", f"a folder that holds {', '.join(CONFIG_FILES)}")
    mistakes: list[str] = []
    kinds, folder = tuple(CONFIG_FILES.values()), config_directory(path)
    parsed = _parse_overrides(overrides, kinds, mistakes)
    configs = {
        kind: _build(folder, kind, [o for o in parsed if takes(kind, o.keys)], mistakes) for kind in kinds
    }
    _refuse(mistakes)
    return configs  # type: ignore[return-value]


def named_arguments(overrides: Sequence[str], arguments: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments of a stage, those that are None as `name=value` gives them, and the overrides that are left.

    Raises:
        ConfigError: one is no key, but almost the name of such an argument.
    """
    _refuse(mistyped_arguments(overrides, arguments, CONFIG_FILES.values()))
    split = [(text, *text.partition("=")[::2]) for text in overrides]
    named = {name: value for _, name, value in split if arguments.get(name, "") is None}
    return arguments | named, [text for text, name, _ in split if name not in named]


def as_dict(config: BaseModel) -> dict[str, Any]:
    """The configuration as JSON-able values in the order of the schema: equal configurations give equal dicts."""
    return config.model_dump(mode="json")


def kept_model(path: Path) -> ModelConfig | None:
    """The base model that the `config.yaml` kept beside an artifact names, whatever else an earlier version wrote there.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        model = kept_values(path).get("model") or {}
        names = {key: model[key] for key in ("source", "name", "revision") if key in model}
        return ModelConfig(**names) if "name" in names else None
    except (AttributeError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def kept_values(path: Path) -> dict[str, Any]:
    """What that file says of model and data, as it was written; empty where it is missing.

    Raises:
        ConfigError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return dict(values.get(REFERRED) or values)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ConfigError:
    problem = " ".join(str(error).split())[:200]
    return ConfigError(
        f"{path}: damaged ({problem}), wanted the configuration that was written there; restore it, or make {path.parent} "
        "again with --force"
    )


def _refuse(mistakes: list[str]) -> None:
    if mistakes:
        raise ConfigError(masked("\n".join(dict.fromkeys(mistakes))))


# ------------------------------------------------------------------ YAML to nodes
class _Loader(yaml.SafeLoader):
    """Safe YAML in which 5e-7 is a number, a date is text, and nothing refers to anything else or says its own type."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = "got an alias (*), wanted the value written out"
        elif getattr(event, "tag", None):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            problem = (
                f"got the tag {tag}, wanted the value alone (in quotes where it is text that begins with !)"
            )
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.rsplit(":", 1)[1] in ("null", "bool", "int")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$"
    ),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, where: str, folder: Path, mistakes: list[str]) -> Node | None:
    """Compose `text`; `where` is the file (lines are added to it) or the override it came from."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return Node(None, where, folder) if root is None else _convert(root, loader, where, folder, mistakes)
    except ReaderError as error:
        problem = f"the character U+{ord(text[error.position]):04X} may not stand in YAML; remove it"
        line = text.count("\n", 0, error.position)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem, line = getattr(error, "problem", None) or str(error), mark.line if mark else 0
    except RecursionError:
        problem, line = "nested too deeply", 0
    mistakes.append(f"{_at(where, line)}: not readable as YAML: {problem}")
    return None


def _at(where: str, line: int) -> str:
    return where if where.startswith(COMMAND_LINE) else f"{where}:{line + 1}"


def _convert(node: yaml.Node, loader: _Loader, where: str, folder: Path, mistakes: list[str]) -> Node:
    place = _at(where, node.start_mark.line)
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(n, loader, where, folder, mistakes) for n in node.value], place, folder)
    if not isinstance(node, yaml.MappingNode):
        value = _scalar(node, loader)
        if isinstance(value, str) and (whole := _whole(value)) != value:
            mistakes.append(f"{place}: got half a character (an escape such as \\ud83d), wanted whole text")
            value = whole
        return Node(value, place, folder)
    children: dict[str, Node] = {}
    for key_node, value_node in node.value:
        line = _at(where, key_node.start_mark.line)
        if not isinstance(key_node, yaml.ScalarNode):
            mistakes.append(f"{line}: got a {key_node.id} as a key, wanted text")
            continue
        key = _scalar(key_node, loader)
        if not isinstance(key, str) or not key.isprintable():  # half a character, a line break
            mistakes.append(f"{line}: got the key {key!r:.60}, wanted text on one line")
        elif key in children:
            mistakes.append(given_twice(line, key, children[key].where))
        else:
            children[key] = replace(_convert(value_node, loader, where, folder, mistakes), where=line)
    return Node(children, place, folder)


def _whole(text: str) -> str:
    """The text with `?` for every half of a character (lone surrogate)."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _scalar(node: yaml.ScalarNode, loader: _Loader) -> Any:
    """The value of a scalar; its text where nothing can hold the number, so that it is refused like any wrong type."""
    try:
        value = loader.construct_object(node)
    except ValueError:  # 0b_, or more digits than Python turns into a number
        return node.value
    too_large = (isinstance(value, float) and not math.isfinite(value)) or (
        isinstance(value, int) and abs(value) >= 2**63
    )
    return node.value if too_large else value


def _merge(base: Node, over: Node) -> Node:
    """`over` on top of `base`: mappings key by key, everything else replaced."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = _merge(merged[key], child) if key in merged else child
    return replace(base, value=merged)


# ------------------------------------------------------------------ files that refer to files
def _found(text: str | Path, key: str, mistakes: list[str]) -> Path | None:
    """What the command line names, or None and a mistake."""
    try:
        return resolve_user_path(text, key, "a YAML file or the folder that holds it")
    except ConfigError as error:
        mistakes.append(str(error))
        return None


def read_tree(path: Path, asked_by: str, mistakes: list[str], chain: tuple[Path, ...] = ()) -> Node | None:
    """The node tree of a file with what it extends merged below it; None if that cannot be read."""
    try:
        path = path.resolve()
    except (OSError, ValueError):  # NUL in it
        mistakes.append(f"{asked_by}: got {str(path)!r:.80}, wanted a readable YAML file; correct the path")
        return None
    if path in chain:
        circle = " -> ".join(shown_path(p) for p in (*chain[chain.index(path) :], path))
        mistakes.append(f"{asked_by}: extends goes in a circle: {circle}; remove one of them")
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError:
        mistakes.append(f"{asked_by}: got {shown_path(path)}, wanted a readable YAML file; correct the path")
        return None
    except UnicodeDecodeError:
        mistakes.append(f"{shown_path(path)}: not UTF-8; save the file as UTF-8")
        return None
    if not text.strip():
        mistakes.append(
            f"{shown_path(path)}: empty, wanted `key: value` lines; restore the file, or write {{}} for all defaults"
        )
        return None
    node = _parse_yaml(text, shown_path(path), path.parent, mistakes)
    if node is None:
        return None
    tree = Node({} if node.value is None else node.value, shown_path(path), path.parent)
    if not isinstance(tree.value, dict):
        mistakes.append(f"{shown_path(path)}:1: got {quote(tree.plain())}, wanted `key: value` lines")
        return None
    parent = tree.value.pop("extends", None)
    if parent is None:
        return tree
    base = _read_referred("extends", parent, mistakes, (*chain, path))
    return replace(_merge(base, tree), where=tree.where) if base else None


def _read_referred(key: str, node: Node, mistakes: list[str], chain: tuple[Path, ...] = ()) -> Node | None:
    in_command = node.where.startswith(COMMAND_LINE)
    asked_by = node.where if in_command else f"{node.where}: {key}"
    if not isinstance(node.value, str):
        mistakes.append(f"{asked_by}: got {quote(node.plain())}, wanted the name of a YAML file")
        return None
    path = beside(node.folder, node.value)
    if in_command:
        path = _found(node.value, asked_by, mistakes)
    return read_tree(path, asked_by, mistakes, chain) if path else None


def _resolve_reference(tree: Node, mistakes: list[str]) -> Node | None:
    """Put the tree of the file named by `reward_model_config` in the place of its name."""
    node = tree.value.get(REFERRED)
    if node is None:
        mistakes.append(
            f"{tree.where}: {REFERRED}: got nothing, wanted the file that holds data.* and model.*; "
            f"add the line `{REFERRED}: {REFERRED}.yaml`"
        )
        return None
    if isinstance(node.value, dict):  # the config.yaml kept beside an artifact holds it inline
        return tree
    referred = _read_referred(REFERRED, node, mistakes)
    return replace(tree, value={**tree.value, REFERRED: referred}) if referred else None


# ------------------------------------------------------------------ overrides
def takes(kind: type[BaseModel], keys: Sequence[str]) -> bool:
    """Whether an override of these keys goes to a file of this kind, or to the one it refers to."""
    if kind is RewardModelConfig:
        keys = keys[1:] if keys[0] == REFERRED else keys
        return bool(keys) and keys[0] in kind.model_fields
    return keys[0] in kind.model_fields or keys[0] in RewardModelConfig.model_fields


def _parse_overrides(
    texts: Sequence[str], kinds: Sequence[type[BaseModel]], mistakes: list[str]
) -> list[Override]:
    parsed = []
    for text in whole_overrides(texts, mistakes):
        before = len(mistakes)
        name, equals, value = text.partition("=")
        keys = tuple(name.strip().split("."))
        where = f"{COMMAND_LINE}: {' '.join(text.splitlines())}"
        if not equals or not all(re.fullmatch(r"\w+", key) for key in keys):
            mistakes.append(f"{where}: got {text!r}, wanted key.sub=value, such as data.approach=pku_safe")
        elif not any(takes(kind, keys) for kind in kinds):
            mistakes.append(f"{where}: {_unknown_key(keys, kinds)}")
        elif (node := _parse_yaml(value, where, Path.cwd(), mistakes)) is not None:
            for key in reversed(keys):
                node = Node({key: node}, where, node.folder)
            parsed.append(Override(keys, text, node, len(mistakes) > before))
    return parsed


def _unknown_key(keys: tuple[str, ...], kinds: Sequence[type[BaseModel]]) -> str:
    for file, kind in CONFIG_FILES.items():
        if keys[0] in kind.model_fields and keys[0] != REFERRED:
            return f"{keys[0]} is set in {file}, which this command does not read; leave it out here"
    known = [key for kind in (*kinds, RewardModelConfig) for key in dotted_keys(kind)]
    return f"got an unknown key{did_you_mean('.'.join(keys), known)}"


def _apply(tree: Node, kind: type[BaseModel], overrides: Sequence[Override]) -> Node:
    for override in overrides:
        over, keys = override.tree, override.keys
        if keys[0] not in kind.model_fields:
            inside = kind is RewardModelConfig  # which is itself what the other files keep under REFERRED
            over = over.value[REFERRED] if inside else replace(over, value={REFERRED: over})
            keys = keys[1:] if inside else (REFERRED, *keys)
        if is_mapping(kind, keys):  # {concise: 1.0} are all the weights, not one beside those of the file
            tree = _without(tree, keys)
        tree = _merge(tree, over)
    return tree


def _without(tree: Node, keys: Sequence[str]) -> Node:
    """The tree without what lies under `keys`."""
    if not keys or not isinstance(tree.value, dict) or keys[0] not in tree.value:
        return tree
    rest = {key: child for key, child in tree.value.items() if key != keys[0] or len(keys) > 1}
    if len(keys) > 1:
        rest[keys[0]] = _without(tree.value[keys[0]], keys[1:])
    return replace(tree, value=rest)


# ------------------------------------------------------------------ nodes to configuration
def _build(
    path: Path, kind: type[BaseModel], overrides: Sequence[Override], mistakes: list[str]
) -> BaseModel | None:
    own_name = next(name for name, schema in CONFIG_FILES.items() if schema is kind)
    if CONFIG_FILES.get(path.name, kind) is not kind:
        mistakes.append(f"{shown_path(path)}: got {path.name}, wanted {own_name} or the folder that holds it")
        return None
    tree = read_tree(path / own_name if path.is_dir() else path, "--config", mistakes)
    first = [o for o in overrides if o.keys == (REFERRED,)]
    if tree is not None and kind is not RewardModelConfig:
        tree = _resolve_reference(_apply(tree, kind, first), mistakes)
    if tree is None:
        return None
    tree = _apply(tree, kind, [o for o in overrides if o not in first])
    try:
        return kind.model_validate_json(
            json.dumps(_over_defaults(kind.model_construct(), tree.plain())), strict=True
        )
    except ValidationError as error:
        said = tuple(o.tree.where for o in overrides if o.is_mistaken)  # what follows from that is no news
        mistakes.extend(line for line in explain(error, tree, kind) if not line.startswith(said))
        return None


def _over_defaults(default: BaseModel, given: Any) -> Any:
    """What is given on top of what `default` sets: PolicyConfig has other training defaults than TrainingConfig alone."""
    if not isinstance(given, dict):
        return given
    completed = default.model_dump(mode="json", exclude_unset=True)
    for key, value in given.items():
        inner = getattr(default, key, None)
        completed[key] = _over_defaults(inner, value) if isinstance(inner, BaseModel) else value
    if given.get("pairs_per_step") and "gradient_accumulation_steps" not in given:
        step = completed["pairs_per_step"]
        pairs = completed.get("pairs_per_device", getattr(default, "pairs_per_device", None))
        if all(isinstance(count, int) and count > 0 for count in (step, pairs)):  # else refused by the schema
            completed["gradient_accumulation_steps"] = math.ceil(step / pairs)
    return completed
