"""Tables of the report: numbers and values of files to text, and one table to HTML cells, Markdown, CSV and LaTeX.

What lives here: `format_estimate` and its like, `Table` and the headline table of a comparison. What does not: page layout
(`report_template.html`) and which tables there are (`report_sections`, to be read next).
"""

import csv
import io as text_io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Estimate = dict[str, Any]

NOTHING = "–"
UP, DOWN = "↑", "↓"

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
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


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


def headline_table(
    rows: Sequence[dict[str, Any]],
    worst_names: Mapping[str, str | None],
    caption: str,
    marks: Mapping[tuple[str, str], str] | None = None,
) -> Table:
    """Method × (win rate per objective, worst objective, mean of the minimum, KL, length).

    Args:
        rows: `rows` of comparison.json.
        worst_names: method to the name of its worst objective.
        caption: what the numbers were measured on.
        marks: by (method, measure as the paired tests name it), put behind the number.
    """
    objectives = objectives_of(rows)
    columns = (
        "method",
        *objectives,
        "worst objective",
        "mean of minimum",
        "KL, nats/response",
        "length, tokens",
    )
    body, marks = [], marks or {}
    for row in rows:
        name = row["method"]
        rates = [
            _joined(with_mark(row["win_rate"].get(k)), marks.get((name, f"win rate, {k}")))
            for k in objectives
        ]
        worst = _joined(worst_names.get(name), with_mark(row.get("worst")))
        minimum = _joined(format_estimate(row.get("mean_of_min")), marks.get((name, "mean of minimum")))
        rest = (format_estimate(row.get("kl")), format_estimate(row.get("length"), 1))
        body.append((name, *rates, worst, minimum, *rest))
    return Table(columns, tuple(body), caption)


def _joined(*parts: str | None) -> str:
    return " ".join(filter(None, parts))


def objectives_of(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Objectives that any row has a win rate for, in the order they appear."""
    return tuple(dict.fromkeys(k for row in rows for k in row["win_rate"]))


def to_markdown(table: Table) -> str:
    """The table in GitHub's Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", r"\|").replace("\n", " ") for c in cells) + " |"

    rule = "|" + "|".join(["---", *["---:"] * (len(table.columns) - 1)]) + "|"
    return "\n".join([line(table.columns), rule, *map(line, table.rows), "", table.caption, ""])


def to_latex(table: Table) -> str:
    """A `tabular` that needs no package; the caption is a comment above it."""

    def line(cells: Sequence[str]) -> str:
        return "  " + " & ".join(_LATEX_SPECIAL.sub(lambda m: _LATEX[m[0]], c) for c in cells) + r" \\"

    layout = "l" + "r" * (len(table.columns) - 1)
    comment = "".join(f"% {text}\n" for text in table.caption.splitlines())
    body = [line(table.columns), r"  \hline", *map(line, table.rows)]
    return comment + "\n".join([rf"\begin{{tabular}}{{{layout}}}", *body, r"\end{tabular}", ""])


def headline_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The headline table as numbers: four columns (value, low, high, n) for every measure."""
    measures = [(f"win_rate_{k}", "win_rate", k) for k in objectives_of(rows)]
    measures += [(name, name, None) for name in ("worst", "mean_of_min", "kl", "length")]
    parts = ("value", "low", "high", "n")
    stream = text_io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", *(f"{name}_{part}" for name, _, _ in measures for part in parts)])
    for row in rows:
        cells = [(row.get(key) or {}).get(k) if k else row.get(key) for _, key, k in measures]
        writer.writerow([row["method"], *((cell or {}).get(part, "") for cell in cells for part in parts)])
    return stream.getvalue()
