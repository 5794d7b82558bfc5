"""Which code a benchmark's results were made by: hashes of every project file that its script imports.

A result is as good as the code behind it; it is stale once one of these files has changed. Imports are read from the syntax
tree, also those inside functions, so nothing is run.
"""

import ast
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.artifacts.paths import PROJECT_ROOT

PACKAGES = ("prmd", "benchmarks")


def source_hashes(script: Path, root: Path = PROJECT_ROOT) -> dict[str, str]:
    """sha256 by path below `root` of a script and of all modules of `PACKAGES` that it reaches, sorted."""
    found: dict[Path, str] = {}
    waiting = [script.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found:
            text = path.read_bytes()
            found[path] = hashlib.sha256(text).hexdigest()
            waiting += _imported(ast.parse(text), root, path)
    return dict(sorted((path.relative_to(root).as_posix(), digest) for path, digest in found.items()))


def _imported(tree: ast.AST, root: Path, path: Path) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(root).parent.parts
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield from _files(name, root)


def _files(name: str, root: Path) -> Iterator[Path]:
    """The file of a module, and of the packages that importing it runs."""
    parts = name.split(".")
    if parts[0] in PACKAGES:
        for n in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:n])
            yield from (p for p in (place / "__init__.py", place.with_suffix(".py")) if p.is_file())


def changed_sources(recorded: Mapping[str, str], root: Path = PROJECT_ROOT) -> list[str]:
    """Recorded files whose contents are others now, or which are gone."""

    def now(name: str) -> str | None:
        path = root / name
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    return [name for name, digest in recorded.items() if now(name) != digest]


def stale_results(folder: Path, root: Path = PROJECT_ROOT) -> dict[str, str]:
    """What is to be said of the results in a folder: by file and part, what changed since, or that no hashes are recorded."""
    notes = {}
    for path in sorted(folder.glob("*.json")):
        results = io.read_json(path)
        recorded = dict(_records(results)) if isinstance(results, dict) else {}
        if not recorded:
            notes[path.name] = "records no hashes of the code that made it"
        for part, hashes in recorded.items():
            if changed := changed_sources(hashes, root):
                notes[f"{path.name}: {part}"] = "made before changes of " + ", ".join(changed)
    return notes


def _records(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, str]]]:
    for part, value in results.items():
        if isinstance(value, dict) and isinstance(value.get("sources"), dict):
            yield part, value["sources"]
