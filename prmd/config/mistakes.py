"""What is wrong with a configuration, in one line for each place: where, the key, got, wanted, did you mean.

Pydantic says what it refused and under which keys; the node tree knows the file and line of those keys.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from prmd.config.masking import masked
from prmd.config.shared import RewardModelConfig

REFERRED = "reward_model_config"
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
        shown = keys[1:] if keys[:1] == (REFERRED,) and len(keys) > 1 else keys
        place = _place(node.where, shown)
        if item["type"] == "extra_forbidden":
            section, prefix = _section_at(kind, keys[:-1]), _dotted(shown[:-1])
            siblings = [f"{prefix}.{name}".lstrip(".") for name in section.model_fields]
            everything = list(dotted_keys(RewardModelConfig if len(shown) < len(keys) else kind))
            guess = did_you_mean(_dotted(shown), siblings) or did_you_mean(_dotted(shown), everything)
            yield f"{place}: got an unknown key, wanted one of {', '.join(section.model_fields)}{guess}"
        else:
            if item["type"] in ("list_type", "tuple_type") and not isinstance(node.value, dict):
                item["msg"] += f", which has brackets: write {_in_brackets(node, shown)}"
            if item["type"] in ("model_type", "dict_type", "missing"):
                item["msg"] = f"a section, such as {_form(_annotation_at(kind, keys), node.plain())}"
            wanted.setdefault((place, quote(node.plain()), item["type"] == "value_error"), []).append(item)
    for (place, got, _), items in wanted.items():
        yield f"{place}: {_complaint(got, items)}"


def shown_path(path: Path) -> str:
    """A path as messages say it: from the working folder where it lies below it, else absolute."""
    resolved = path.resolve()
    return str(resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else resolved)


def given_twice(where: str, key: str, first: str) -> str:
    """The line for a key that stands twice in one mapping; both places are one on the command line."""
    if not where.startswith(COMMAND_LINE):
        return f"{where}: {key}: given twice, first at {first}; keep one of them"
    return f"{where.partition('=')[0]}: {key}: given twice; keep one of them"


def _place(where: str, keys: Sequence[str | int]) -> str:
    """Where a value stands: file, line and key; of an override its text, and the key where that lies within its value."""
    if not where.startswith(COMMAND_LINE):
        return f"{where}: {_dotted(keys)}"
    given = where.removeprefix(f"{COMMAND_LINE}: ").partition("=")[0].strip()
    named, inside = given.removeprefix(f"{REFERRED}."), _dotted(keys)
    return f"{where}: {inside}" if inside.startswith(f"{named}.") else where


def _in_brackets(node: Node, keys: Sequence[str | int]) -> str:
    """How to write what was given as the list it should be: `hard_min,cvar` is [hard_min, cvar]."""
    value = node.plain()
    parts = re.split(r"[,;\s]+", value.strip()) if isinstance(value, str) else [json.dumps(value)]
    listed = f"[{', '.join(part for part in parts if part)}]"
    if node.where.startswith(COMMAND_LINE):
        return masked(f'"{_dotted(keys)}={listed}"')
    return masked(f"{_dotted(keys[-1:])}: {listed}")


def _form(annotation: Any, value: Any = None) -> str:
    """How a section or mapping is written: `{path: x.csv}`, with what was given in the place of its only needed key."""
    if _is_dict(annotation):
        inner = get_args(annotation)[1]
        return f"{{NAME: {'0.5' if inner is float else _form(inner)}, ...}}"
    fields = section.model_fields if (section := _section(annotation)) else {}
    needed = [name for name, field in fields.items() if field.is_required()]
    if len(needed) == 1 and isinstance(value, str):
        plain = re.fullmatch(r"[\w./~@-]+", value)
        return f"{{{needed[0]}: {value if plain else quote(value)}}}"
    if not fields:
        return "[...]" if get_origin(annotation) is tuple else "..."
    shown = [f"{name}: ..." for name in needed or list(fields)[:3]]
    return f"{{{', '.join(shown if needed or len(fields) <= 3 else [*shown, '...'])}}}"


def _annotation_at(kind: type[BaseModel], keys: Sequence[str | int]) -> Any:
    """The type of what stands under these keys; None where the schema has no such place."""
    found: Any = kind
    for key in keys:
        if _is_dict(found):
            found = get_args(found)[1]
        else:
            fields = section.model_fields if (section := _section(found)) else {}
            found = fields[str(key)].annotation if str(key) in fields else None
    return found


def _complaint(got: str, items: list[dict[str, Any]]) -> str:
    if items[0]["type"] == "value_error":
        return str(items[0]["ctx"]["error"])
    wishes = [item["msg"].removeprefix("Input should be ") for item in items]
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
        if section and name != REFERRED and not _is_dict(field.annotation):
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


def mistyped_arguments(
    overrides: Iterable[str], arguments: Mapping[str, Any], kinds: Iterable[type[BaseModel]]
) -> list[str]:
    """One line for each override that is no key of these schemas, but almost the name of an argument that is None."""
    known = {REFERRED, *arguments, *(name for kind in kinds for name in kind.model_fields)}
    wanted = [name for name, value in arguments.items() if value is None]
    names = {text: text.partition("=")[0].strip() for text in overrides}
    guesses = {text: did_you_mean(name, wanted) for text, name in names.items() if name.isidentifier()}
    return [
        f"{COMMAND_LINE}: {' '.join(text.splitlines())}: got an unknown key{guess}"
        for text, guess in guesses.items()
        if guess and names[text] not in known
    ]


def _dotted(keys: Sequence[str | int]) -> str:
    return ".".join(map(str, keys))


def quote(value: Any) -> str:
    """A value as it is shown in a message, without secrets, cut at 60 characters."""
    text = masked(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------ what a shell or a habit makes of an override
def whole_overrides(texts: Sequence[str], mistakes: list[str]) -> list[str]:
    """The overrides; a list that the shell cut at its spaces, `[hard_min,` and `cvar]`, is a mistake with the remedy."""
    whole: list[str] = []
    rest = list(texts)
    while rest:
        text = rest.pop(0)
        if _open_brackets(text) > 0:
            count = next(
                (n for n in range(len(rest) + 1) if _open_brackets(" ".join([text, *rest[:n]])) <= 0), 0
            )
            if count:
                joined, rest = " ".join([text, *rest[:count]]), rest[count:]
                mistakes.append(
                    f'{COMMAND_LINE}: got a list in {count + 1} parts; put it in quotes: "{joined}"'
                )
                continue
        whole.append(text)
    return whole


def _open_brackets(text: str) -> int:
    """How many brackets of a value are open at its end."""
    value = text.partition("=")[2]
    return sum(value.count(sign) for sign in "[{") - sum(value.count(sign) for sign in "]}")


def option_advice(message: str, kinds: Iterable[type[BaseModel]]) -> str:
    """What argparse says of `--methods hard_min`, and how a setting is given; other messages as they are.

    Args:
        kinds: the schemas whose keys may be meant.
    """
    if not message.startswith("unrecognized arguments: --"):
        return message
    keys = dict.fromkeys(key for kind in kinds for key in dotted_keys(kind))
    names = [name.replace("-", "_") for name in re.findall(r"--([\w.-]+)", message)]
    meant = [key for name in names for key in keys if f".{key}".endswith(f".{name}")]
    said = " or ".join(f'"{key}=..."' for key in meant[:3])
    return f"{message}; settings have no dashes, give key.sub=value" + (f", here {said}" if said else "")
