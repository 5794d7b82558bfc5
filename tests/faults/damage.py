"""What happens to a file on a disk or at the hands of a user."""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

_NUMBER = re.compile(rb"\d+\.\d+|(?<=[:,\[\s])\d+(?=[,\]\s}])")


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(content))


def _truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(1, len(content))])


def _empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def _delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def _folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _zeros(path: Path, chance: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _number(path: Path, chance: random.Random) -> None:
    """Another digit in one number of a JSON file, which stays JSON."""
    content = bytearray(path.read_bytes())
    found = chance.choice(list(_NUMBER.finditer(bytes(content))))
    places = [i for i in range(*found.span()) if chr(content[i]).isdigit()]
    place = chance.choice(places)
    content[place] = ord(chance.choice([d for d in "123456789" if d != chr(content[place])]))
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "byte flipped": _flip,
    "truncated": _truncate,
    "emptied": _empty,
    "deleted": _delete,
    "replaced by a folder": _folder,
    "number edited": _number,
    "zero-filled": _zeros,
}
SWAPPED = "swapped with a sibling"
EVERY = (*DAMAGES, SWAPPED)


def fits(damage: str, path: Path, siblings: Sequence[Path]) -> bool:
    """Whether a damage can be done to a file and changes it."""
    if damage == SWAPPED:
        return bool(_others(path, siblings))
    if damage == "number edited":
        return path.suffix in (".json", ".jsonl") and _NUMBER.search(path.read_bytes()) is not None
    return damage in ("deleted", "replaced by a folder") or path.stat().st_size > 1


def do(damage: str, path: Path, siblings: Sequence[Path], chance: random.Random) -> list[Path]:
    """Damage a file; the files that are now other than they were."""
    if damage != SWAPPED:
        DAMAGES[damage](path, chance)
        return [path]
    other = chance.choice(_others(path, siblings))
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)
    return [path, other]


def _others(path: Path, siblings: Sequence[Path]) -> list[Path]:
    content = path.read_bytes()
    return [other for other in siblings if other != path and other.read_bytes() != content]
