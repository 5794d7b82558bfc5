"""One row per injected fault, written as soon as it is known, and the table made of them."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

OUTCOMES = ("identical", "said", "untouched", "skipped", "bad")
"""Made again to the same bytes; said in one line; not read by the command, whose results are the same; not possible here."""


@dataclass(frozen=True)
class Row:
    """What one injected fault led to.

    Attributes:
        kind: `kills`, `corruptions`, `races`, `disk`, `fuzz`.
        where: stage or artifact.
        case: what exactly was done; with kind and where it names the row.
        outcome: one of `OUTCOMES`.
        detail: the line that was said, or what is wrong.
        number: faults or examples that the row stands for.
    """

    kind: str
    where: str
    case: str
    outcome: str
    detail: str
    number: int = 1

    @classmethod
    def of(
        cls, kind: str, where: str, case: str, outcome: str, detail: str, folder: Path | None = None
    ) -> "Row":
        """A row; the folder of its case is deleted unless the outcome is bad."""
        if folder is not None and outcome != "bad":
            shutil.rmtree(folder)
        return cls(kind, where, case, outcome, " ".join(detail.split()))

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same case in another run."""
        return self.kind, self.where, self.case


class Rows:
    """A JSON Lines file of rows that grows, and is gone on with."""

    def __init__(self, file: Path, head: dict[str, object]) -> None:
        """Go on with the file if its first line is `head`, else begin it."""
        self.file, self.rows = file, []
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        if lines and json.loads(lines[0]) == head:
            self.rows = [Row(**json.loads(line)) for line in lines[1:]]
        else:
            file.write_text(json.dumps(head) + "\n", encoding="utf-8")
        self.done = {row.key for row in self.rows}

    def add(self, row: Row) -> None:
        """Keep a row and write it."""
        self.rows.append(row)
        self.done.add(row.key)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


TITLES = ("kind", "where", "injected", "identical", "in one line", "not read", "bad")


def table(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Counts by kind and place, in order of first appearance, with a line of sums for each kind."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        for where in (row.where, "together"):
            counts.setdefault((row.kind, where), Counter())[row.outcome] += row.number
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    lines = []
    for kind in kinds:
        places = [where for k, where in counts if k == kind and where != "together"]
        for where in (*places, "together"):
            found = counts[kind, where]
            injected = sum(found.values()) - found["skipped"]
            cells = (found["identical"], found["said"], found["untouched"], found["bad"])
            lines.append((kind, where, f"{injected:,}", *(f"{cell:,}" for cell in cells)))
    return lines


def markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a page; sums in bold."""
    shown = [[f"**{cell}**" if line[1] == "together" else cell for cell in line] for line in lines]
    ruler = ["---", "---", *["---:"] * (len(titles) - 2)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, ruler, *shown])
