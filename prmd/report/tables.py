"""Tables of the report: numbers of files as text, and one table as HTML cells, Markdown, CSV and LaTeX.

A number that a file lacks is left out.
"""

import csv
import io as text_io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prmd.artifacts.paths import REFERENCE

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
    plain: Estimate | None, controlled: Estimate | None, *, needs_both: bool, digits: int = 2
) -> tuple[str, str]:
    """A win rate as it is and at equal length, with their arrows; where both are needed, only arrows that agree."""
    cells = (with_mark(plain, digits=digits), with_mark(controlled, digits=digits))
    arrows = {cell[-1] for cell in cells if cell[-1] in (UP, DOWN)}
    agree = len(arrows) == 1 and all(cell[-1] in arrows for cell in cells)
    if not needs_both or agree:
        return cells
    return (format_estimate(plain, digits), format_estimate(controlled, digits))


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


WORST_OBJECTIVE = "worst objective"


def headline_table(
    rows: Sequence[dict[str, Any]],
    worst_names: Mapping[str, str | None],
    caption: str,
    marks: Mapping[tuple[str, str], str] | None = None,
    kl_targets: Mapping[str, float] | None = None,
) -> Table:
    """Method × (win rate per objective, worst objective, mean of the minimum, KL of its target, length).

    Args:
        rows: `rows` of comparison.json.
        worst_names: method to the name of its worst objective.
        caption: what the numbers were measured on.
        marks: by (method, measure as the tests name it), put behind the number.
        kl_targets: `kl_target` by method, put behind the KL that was reached.
    """
    objectives = objectives_of(rows)
    columns = (
        *("method", *objectives, WORST_OBJECTIVE, "mean of minimum"),
        *("KL, nats/response" + (" (of kl_target)" if kl_targets else ""), "length, tokens"),
    )
    body, marks = [], marks or {}
    for row in rows:
        name = row["method"]
        both, controlled, rates = bool(row.get("debiased")), row.get("length_controlled") or {}, []
        for k in objectives:
            plain, _ = with_agreed_mark(row["win_rate"].get(k), controlled.get(k), needs_both=both)
            rates.append(_joined(plain, marks.get((name, f"win rate, {k}"))))
        worst, _ = with_agreed_mark(row.get("worst"), row.get("worst_length_controlled"), needs_both=both)
        worst = _joined(worst_names.get(name), worst, marks.get((name, WORST_OBJECTIVE)))
        minimum = _joined(format_estimate(row.get("mean_of_min")), marks.get((name, "mean of minimum")))
        aimed = (kl_targets or {}).get(name)
        kl = _joined(format_estimate(row.get("kl")), f"of {format_number(aimed)}" if aimed else None)
        body.append((name, *rates, worst, minimum, kl, format_estimate(row.get("length"), 1)))
    return Table(columns, tuple(body), caption, (_WIN_RATE, 1, len(objectives) + 1))


_WIN_RATE = "win rate against the reference (0.50 = no change)"


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


def headline_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The headline table as numbers: four columns (value, low, high, n) for every measure."""
    measures = [(f"win_rate_{k}", "win_rate", k) for k in objectives_of(rows)]
    measures += [(f"win_rate_at_equal_length_{k}", "length_controlled", k) for k in objectives_of(rows)]
    names = ("worst", "worst_length_controlled", "mean_of_min", "kl", "length")
    measures += [(name, name, None) for name in names]
    parts = ("value", "low", "high", "n")
    stream = text_io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", *(f"{name}_{part}" for name, _, _ in measures for part in parts)])
    for row in rows:
        cells = [(row.get(key) or {}).get(k) if k else row.get(key) for _, key, k in measures]
        writer.writerow([row["method"], *((cell or {}).get(part, "") for cell in cells for part in parts)])
    return stream.getvalue()


@dataclass(frozen=True)
class Measure:
    """One number of every method.

    Attributes:
        estimates: by method; None where a method has none.
        chance: what no effect would give; None where that is not defined.
        is_exact: whether `chance` is known; the reference's own number is measured, and an interval that excludes it proves
            nothing.
    """

    name: str
    estimates: dict[str, Estimate | float | None]
    chance: float | None = None
    digits: int = 2
    is_exact: bool = True

    @property
    def is_there(self) -> bool:
        return any(estimate is not None for estimate in self.estimates.values())


def _of(metrics: Mapping[str, dict[str, Any]], *keys: str) -> dict[str, Any]:
    """The value below `keys` in every method's file, None where the path ends."""

    def descend(value: Any) -> Any:
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return {method: descend(found) for method, found in metrics.items()}


def _measure(metrics: Mapping[str, dict[str, Any]], name: str, *keys: str, digits: int = 2) -> Measure:
    """A measure with the chance level its own estimates carry."""
    estimates = _of(metrics, *keys)
    chances = (e["chance"] for e in estimates.values() if isinstance(e, dict) and "chance" in e)
    return Measure(name, estimates, next(chances, None), digits)


def _beside_reference(metrics: Mapping[str, dict[str, Any]], name: str, *keys: str) -> Measure:
    """A measure whose chance level is what the reference has, by its estimates or as its own number."""
    found = _measure(metrics, name, *keys)
    own = (found.estimates.get(REFERENCE) or {}).get("value")
    return replace(found, chance=own if found.chance is None else found.chance, is_exact=False)


def headline_measures(metrics: Mapping[str, dict[str, Any]]) -> list[Measure]:
    """The numbers of the headline table."""
    found = [_measure(metrics, f"win rate, {k}", "objectives", k, "win_rate") for k in _objectives(metrics)]
    found += [
        _measure(metrics, "win rate, worst objective", "worst_objective", "win_rate"),
        _beside_reference(metrics, "mean of minimum", "mean_of_min"),
        _measure(metrics, "KL, nats per response", "kl", "per_response"),
        _measure(metrics, "length, tokens", "length"),
    ]
    return [measure for measure in found if measure.is_there]


def judge_measures(metrics: Mapping[str, dict[str, Any]]) -> list[Measure]:
    """What the judges' verdicts and the samples themselves say, beside the headline."""
    objectives = _objectives(metrics)
    found = [
        _measure(metrics, f"{label}, {k}", "objectives", k, *keys)
        for label, keys in (
            ("mean reward", ("mean_reward",)),
            ("win rate at equal length", ("length_controlled", "win_rate")),
            ("effect of length, log-odds", ("length_controlled", "length_effect")),
        )
        for k in objectives
    ]
    found += [
        _beside_reference(metrics, "minimum, mean of the worst 10 % of prompts", "cvar_10"),
        _beside_reference(metrics, "dominates a reference sample", "dominance", "dominates"),
        _beside_reference(metrics, "dominated by a reference sample", "dominance", "dominated"),
        _measure(metrics, "hypervolume above the reference", "hypervolume", digits=3),
        _measure(metrics, "KL, nats per token", "kl", "per_token", digits=4),
        _measure(metrics, "KL by the log-ratio k1, nats per response", "kl", "k1"),
        _measure(metrics, "KL by k3, nats per token", "kl", "k3_per_token", digits=4),
        _measure(metrics, "share cut at the token limit", "truncated_share"),
    ]
    return [measure for measure in found if measure.is_there]


def worst_at_equal_length(rows: Sequence[dict[str, Any]]) -> Measure:
    """The worst objective at equal length, which comparison.json alone holds."""
    found = {row["method"]: row.get("worst_length_controlled") for row in rows}
    return Measure("win rate at equal length, worst objective", found, 0.5)


def outcome_measures(metrics: Mapping[str, dict[str, Any]]) -> list[Measure]:
    """Shares of sample pairs won, tied and lost against the reference."""
    found = [
        _measure(metrics, f"{k}: {outcome}", "objectives", k, "outcomes", outcome)
        for k in _objectives(metrics)
        for outcome in ("won", "tied", "lost")
    ]
    return [measure for measure in found if measure.is_there]


def proxy_measures(metrics: Mapping[str, dict[str, Any]]) -> list[Measure]:
    """What the training ensemble says (P15 to P17 of the draft); empty where it was not there."""
    objectives = _objectives(metrics)
    found = [
        *(_measure(metrics, f"mean reward, {k}", "proxy", "mean_reward", k) for k in objectives),
        *(
            _beside_reference(metrics, f"mean of the worst member (P15), {k}", "proxy", "worst_member", k)
            for k in objectives
        ),
        _beside_reference(metrics, "the lowest of these (P16)", "proxy", "worst_objective", "reward"),
        _beside_reference(metrics, "violation rate (P17)", "proxy", "violation_rate"),
    ]
    return [measure for measure in found if measure.is_there]


def _objectives(metrics: Mapping[str, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(k for found in metrics.values() for k in found.get("objectives") or {}))


def measure_table(measures: Sequence[Measure], methods: Sequence[str], caption: str) -> Table | None:
    """One row per measure: its name, chance level, number of prompts, and one column per method."""
    if not measures:
        return None
    rows = tuple(
        (
            measure.name,
            format_number(measure.chance, measure.digits),
            _counts(measure),
            *(_cell(measure, method) for method in methods),
        )
        for measure in measures
    )
    return Table(("measure", "chance", "n", *methods), rows, caption)


def _counts(measure: Measure) -> str:
    found = (e.get("n") for e in measure.estimates.values() if isinstance(e, dict))
    return "/".join(dict.fromkeys(str(n) for n in found if n is not None)) or NOTHING


def _cell(measure: Measure, method: str) -> str:
    estimate = measure.estimates.get(method)
    if isinstance(estimate, dict) and measure.chance is not None and measure.is_exact and method != REFERENCE:
        return with_mark(estimate, measure.chance, measure.digits)
    return format_estimate(estimate, measure.digits)


def measures_csv(measures: Sequence[Measure], samples_per_prompt: int | None) -> str:
    """One line per measure and method: value, interval, chance, prompts (the clusters), responses behind them."""
    stream = text_io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    parts = ("value", "low", "high", "n", "method")
    writer.writerow(
        ["measure", "method", "value", "low", "high", "clusters", "interval", "responses", "chance"]
    )
    for measure in measures:
        for method, estimate in measure.estimates.items():
            if estimate is None:
                continue
            found = estimate if isinstance(estimate, dict) else {"value": estimate}
            n = found.get("n")
            responses = n * samples_per_prompt if n and samples_per_prompt else ""
            cells = ["" if found.get(part) is None else found[part] for part in parts]
            chance = "" if measure.chance is None else measure.chance
            writer.writerow([measure.name, method, *cells, responses, chance])
    return stream.getvalue()
