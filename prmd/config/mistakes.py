"""What is wrong with a configuration, in one line for each place: where, the key, got, wanted, did you mean.

Pydantic says what it refused and under which keys; the node tree knows the file and line of those keys.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from prmd.config.masking import masked
from prmd.config.shared import RewardModelConfig

REFERENCE = "reward_model_config"
"""The key under which the policy and evaluation files hold the file they share."""
COMMAND_LINE = "command line"
"""How the place of an override begins."""


@dataclass(frozen=True)
class Node:
    """A YAML value that remembers where it was written.

    Attributes:
        value: a dict of nodes, a list of nodes, or a scalar.
        where: `file:line` of its key, or `command line: key=value`.
        folder: the folder that file names in this value are relative to.
    """

    value: Any
    where: str
    folder: Path

    def plain(self) -> Any:
        """The value without its marks."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def explain(error: ValidationError, tree: Node, kind: type[BaseModel]) -> Iterator[str]:
    """One line for each place that is wrong; what the members of a union wanted is joined with `or`."""
    wanted: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        inside = getattr(item.get("ctx", {}).get("error"), "keys", ())
        node, keys = _locate(tree, (*item["loc"], *inside))
        shown = keys[1:] if keys[:1] == (REFERENCE,) and len(keys) > 1 else keys
        place = node.where if node.where.startswith(COMMAND_LINE) else f"{node.where}: {_dotted(shown)}"
        if item["type"] == "extra_forbidden":
            section, prefix = _section_at(kind, keys[:-1]), _dotted(shown[:-1])
            siblings = [f"{prefix}.{name}".lstrip(".") for name in section.model_fields]
            everything = list(dotted_keys(RewardModelConfig if len(shown) < len(keys) else kind))
            guess = did_you_mean(_dotted(shown), siblings) or did_you_mean(_dotted(shown), everything)
            yield f"{place}: got an unknown key, wanted one of {', '.join(section.model_fields)}{guess}"
        else:
            wanted.setdefault((place, quote(node.plain()), item["type"] == "value_error"), []).append(item)
    for (place, got, _), items in wanted.items():
        yield f"{place}: {_complaint(got, items)}"


def _complaint(got: str, items: list[dict[str, Any]]) -> str:
    if items[0]["type"] == "value_error":
        return str(items[0]["ctx"]["error"])
    wishes = [
        item["msg"].removeprefix("Input should be ").replace("an object", "a section") for item in items
    ]
    choices = [c for item in items for c in re.findall(r"'([^']*)'", item.get("ctx", {}).get("expected", ""))]
    return (
        f"got {got}, wanted {' or '.join(dict.fromkeys(wishes))}{did_you_mean(got.strip(chr(34)), choices)}"
    )


def _locate(tree: Node, location: Sequence[str | int]) -> tuple[Node, tuple[str | int, ...]]:
    node, keys = tree, ()
    for part in location:
        inside = (isinstance(node.value, dict) and part in node.value) or (
            isinstance(node.value, list) and isinstance(part, int)
        )
        if not inside:  # the rest names a member of a union, not a place in the file
            break
        node, keys = node.value[part], (*keys, part)
    return node, keys


def _section_at(kind: type[BaseModel], keys: Sequence[str | int]) -> type[BaseModel]:
    for key in keys:
        if str(key) in kind.model_fields:  # not one that the user chose, of a mapping
            kind = _section(kind.model_fields[str(key)].annotation) or kind
    return kind


def _section(annotation: Any) -> type[BaseModel] | None:
    for member in (annotation, *get_args(annotation)):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def is_mapping(kind: type[BaseModel], keys: Sequence[str]) -> bool:
    """Whether a key of the schema holds a mapping whose keys the user chooses, such as `policy.weights`."""
    for key in keys[:-1]:
        found = kind.model_fields.get(key)
        inner = found and _section(found.annotation)
        if not inner or _is_dict(found.annotation):
            return False
        kind = inner
    return bool(keys) and keys[-1] in kind.model_fields and _is_dict(kind.model_fields[keys[-1]].annotation)


def _is_dict(annotation: Any) -> bool:
    return get_origin(annotation) is dict


def dotted_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a schema, sections before what they hold: data, data.approach, ..."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}"
        section = _section(field.annotation)
        if section and name != REFERENCE and not _is_dict(field.annotation):
            yield from dotted_keys(section, f"{prefix}{name}.")


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known keys whose last part is closest to that of `text`; empty if none is close.

    Only last parts are compared: any unknown key of `training.run` shares most of its letters with every key of its section.
    """
    known = list(dict.fromkeys(known))
    tails = [key.rsplit(".", 1)[-1] for key in known]
    best = difflib.get_close_matches(text.rsplit(".", 1)[-1], tails, n=1, cutoff=0.7)
    candidates = [key for key, tail in zip(known, tails, strict=True) if tail in best]
    close = difflib.get_close_matches(text, candidates, n=1, cutoff=0.8) or candidates
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _dotted(keys: Sequence[str | int]) -> str:
    return ".".join(map(str, keys))


def quote(value: Any) -> str:
    """A value as it is shown in a message, without secrets, cut at 60 characters."""
    text = masked(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."
