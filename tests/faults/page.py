"""The table of what faults led to, in docs/reliability.md between two markers."""

import sys
from collections.abc import Sequence
from pathlib import Path

from faults.rows import TITLES, Row, markdown, table

from prmd.artifacts import io
from prmd.artifacts.runs import git_state, versions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- table: tests/faults/run.py --all -->", "<!-- end of table -->"


def results(rows: Sequence[Row], seed: int, seconds: float) -> str:
    """The table with what it was made with, and every row that is bad or was not possible."""
    state, used = git_state(), versions()
    named = ", ".join(f"{name} {used[name]}" for name in ("python", "torch", "transformers", "trl", "peft"))
    changed = " with changes" if state["dirty"] else ""
    lines = [
        f"Commit {str(state['commit'])[:12]}{changed}, {sys.platform}, {named}; seed {seed}; "
        f"{sum(row.number for row in rows if row.outcome != 'skipped'):,} faults injected in {seconds / 60:.0f} minutes.",
        "",
        markdown(TITLES, table(rows)),
    ]
    for outcome, title in (("bad", "Bad:"), ("skipped", "Not possible on this machine:")):
        found = [
            f"* {row.kind}, {row.where}, {row.case}: {row.detail}" for row in rows if row.outcome == outcome
        ]
        lines += ["", title, "", *found] if found else []
    return "\n".join(lines)


def write(rows: Sequence[Row], seed: int, seconds: float) -> None:
    """Put the results between the markers of the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    io.write_text(PAGE, f"{before}{BEGIN}\n\n{results(rows, seed, seconds)}\n\n{END}{rest.split(END)[1]}")
