"""Tables of the report: numbers of files as text, and one table as HTML cells, Markdown and LaTeX.

What is measured of every method, and its CSV, is in `measures`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Estimate = dict[str, Any]

NOTHING = "–"
UP, DOWN = "↑", "↓"
SIGNIFICANT = 0.05

_LATEX = {
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "–": "--",
    "−": "$-$",
    UP: r"$\uparrow$",
    DOWN: r"$\downarrow$",
    "▲": r"$\bigtriangleup$",
    "▼": r"$\bigtriangledown$",
    "½": r"$\frac12$",
    "×": r"$\times$",
}
_LATEX_SPECIAL = re.compile(f"[{re.escape(''.join(_LATEX))}]")


@dataclass(frozen=True)
class Table:
    """Cells as text: the first column names the row.

    Attributes:
        columns: header cells.
        rows: body cells, each row as long as `columns`.
        caption: what the numbers are and what they were measured on.
        heading: what columns next to each other have in common, the first of them, and how many they are.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    heading: tuple[str, int, int] | None = None

    @property
    def headings(self) -> list[tuple[str, int]]:
        """The row above the column names: texts with the number of columns below each; empty without a heading."""
        if self.heading is None:
            return []
        text, first, count = self.heading
        return [("", first), (text, count), ("", len(self.columns) - first - count)]


def format_number(value: float | None, digits: int = 2) -> str:
    """`0.56`; `–` for a number that is not there; no negative zero."""
    if value is None:
        return NOTHING
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def format_estimate(estimate: Estimate | float | None, digits: int = 2) -> str:
    """`0.56 [0.48, 0.63]`: value and interval of `{"value", "low", "high"}`; a bare number is written alone."""
    if not isinstance(estimate, dict):
        return format_number(estimate, digits)
    value = format_number(estimate.get("value"), digits)
    if estimate.get("low") is None or estimate.get("high") is None:
        return value
    return f"{value} [{format_number(estimate['low'], digits)}, {format_number(estimate['high'], digits)}]"


def with_mark(estimate: Estimate | None, neutral: float = 0.5, digits: int = 2) -> str:
    """`format_estimate` with an arrow where the interval lies wholly above or below `neutral`."""
    text = format_estimate(estimate, digits)
    if not estimate or estimate.get("low") is None or estimate.get("high") is None:
        return text
    mark = UP if estimate["low"] > neutral else DOWN if estimate["high"] < neutral else ""
    return f"{text} {mark}".rstrip()


def with_agreed_mark(
    plain: Estimate | None, controlled: Estimate | None, *, needs_both: bool
) -> tuple[str, str]:
    """A win rate as it is and at equal length, with their arrows; where both are needed, only arrows that agree."""
    cells = (with_mark(plain), with_mark(controlled))
    arrows = {cell[-1] for cell in cells if cell[-1] in (UP, DOWN)}
    agree = len(arrows) == 1 and all(cell[-1] in arrows for cell in cells)
    if not needs_both or agree:
        return cells
    return (format_estimate(plain), format_estimate(controlled))


_INTERVAL = re.compile(r"(\[[^][]*\])")


def cell_parts(cell: str) -> list[tuple[str, bool]]:
    """A cell in pieces, and whether each is an interval, in which no line ends: `0.56 `, `[0.48, 0.63]`, ` ↑`."""
    return [(piece, i % 2 == 1) for i, piece in enumerate(_INTERVAL.split(cell)) if piece]


def format_seconds(seconds: float | None) -> str:
    """Seconds as a person reads them."""
    if seconds is None:
        return NOTHING
    hours, rest = divmod(round(seconds), 3600)
    parts = ((hours, "h"), (rest // 60, "min"), (rest % 60, "s"))
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "under 1 s"


def flat(values: Any) -> str:
    """`{"cores": 2, "os": "Linux"}` as `cores 2, os Linux`."""
    if isinstance(values, dict):
        values = {k: flat(v) for k, v in values.items()}
        return ", ".join(
            f"{k.replace('_gib', ' GiB').replace('_', ' ')} {v}"
            for k, v in values.items()
            if v not in ("", "None")
        )
    if isinstance(values, list):
        return ", ".join(map(flat, values))
    return str(values)


def as_text(messages: Any) -> str:
    """Messages as readable text, one turn a paragraph; text stays as it is."""
    if not isinstance(messages, list):
        return str(messages if messages is not None else "")
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"{m.get('role', '?')}: {m.get('content', '')}" for m in messages)


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def objectives_of(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Objectives that any row has a win rate for, in the order they appear."""
    return tuple(dict.fromkeys(k for row in rows for k in row["win_rate"]))


def to_markdown(table: Table) -> str:
    """The table in GitHub's Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", r"\|").replace("\n", " ") for c in cells) + " |"

    rule = "|" + "|".join(["---", *["---:"] * (len(table.columns) - 1)]) + "|"
    above = []
    if table.heading:
        text, first, count = table.heading
        above = [f"{table.columns[first]} to {table.columns[first + count - 1]}: {text}.", ""]
    return "\n".join([*above, line(table.columns), rule, *map(line, table.rows), "", table.caption, ""])


def to_latex(table: Table) -> str:
    """A `tabular` that needs no package; the caption is a comment above it."""

    def line(cells: Sequence[str]) -> str:
        return "  " + " & ".join(_LATEX_SPECIAL.sub(lambda m: _LATEX[m[0]], c) for c in cells) + r" \\"

    layout = "l" + "r" * (len(table.columns) - 1)
    comment = "".join(f"% {text}\n" for text in table.caption.splitlines())
    spans = (rf"\multicolumn{{{n}}}{{c}}{{{text}}}" for text, n in table.headings if n)
    above = ["  " + " & ".join(spans) + r" \\"] if table.heading else []
    body = [*above, line(table.columns), r"  \hline", *map(line, table.rows)]
    return comment + "\n".join([rf"\begin{{tabular}}{{{layout}}}", *body, r"\end{tabular}", ""])
