"""What is measured of every method, in one list: page, Markdown, LaTeX and CSV are made of it.

What lives here: the list, and the tables with one number per method and measure. What does not: what is between methods
(`comparison_tables`), how a table is written (`tables`). A number that no file has is left out.
"""

import csv
import io as text_io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prmd.artifacts.paths import REFERENCE
from prmd.report.tables import (
    NOTHING,
    Estimate,
    Table,
    format_estimate,
    format_number,
    objectives_of,
    with_agreed_mark,
    with_mark,
)

Rows = Sequence[Mapping[str, Any]]
Estimates = Mapping[str, Estimate | float | None]
"""By method; None where a method has none."""
Beside = Mapping[tuple[str, str], str | None]
"""Text by method and name of a measure."""

_K = "{k}"
_WORST_EQUAL = "worst_length_controlled"
WORST, KL = "win rate, worst objective", "KL, nats per response"


@dataclass(frozen=True)
class Measure:
    """One number of every method; with `{k}` in its name one for each objective.

    Attributes:
        path: keys of a method's file that lead to it, `row` to its row of `comparison.json`.
        row: keys of that row that lead to it; empty where it is not there.
        column: its name in the headline table; empty where it is not there.
        is_exact: whether the chance level is known; the reference's own number is measured, and an interval that excludes it
            proves nothing.
    """

    name: str
    path: tuple[str, ...]
    row: tuple[str, ...] = ()
    column: str = ""
    digits: int = 2
    is_exact: bool = True

    def of(self, objective: str) -> "Measure":
        """The measure of one objective."""
        name, column = (text.replace(_K, objective) for text in (self.name, self.column))
        path, row = (tuple(objective if key == _K else key for key in keys) for keys in (self.path, self.row))
        return replace(self, name=name, path=path, row=row, column=column)


MEASURES: dict[str, tuple[Measure, ...]] = {
    "headline": (
        Measure("win rate, {k}", ("objectives", _K, "win_rate"), ("win_rate", _K), _K),
        Measure(
            *("win rate at equal length, {k}", ("objectives", _K, "length_controlled", "win_rate")),
            row=("length_controlled", _K),
        ),
        Measure(WORST, ("worst_objective", "win_rate"), ("worst",), "worst objective"),
        Measure("win rate at equal length, worst objective", ("row", _WORST_EQUAL), (_WORST_EQUAL,)),
        Measure("mean of minimum", ("mean_of_min",), ("mean_of_min",), "mean of minimum", is_exact=False),
        Measure(KL, ("kl", "per_response"), ("kl",), "KL, nats/response"),
        Measure("length, tokens", ("length",), ("length",), "length, tokens", digits=1),
    ),
    "judges": (
        Measure("mean reward, {k}", ("objectives", _K, "mean_reward")),
        Measure("effect of length, log-odds, {k}", ("objectives", _K, "length_controlled", "length_effect")),
        Measure("minimum, mean of the worst 10 % of prompts", ("cvar_10",), is_exact=False),
        Measure("dominates a reference sample", ("dominance", "dominates"), is_exact=False),
        Measure("dominated by a reference sample", ("dominance", "dominated"), is_exact=False),
        Measure("hypervolume above the reference", ("hypervolume",), digits=3),
        Measure("KL, nats per token", ("kl", "per_token"), digits=4),
        Measure("KL by the log-ratio k1, nats per response", ("kl", "k1")),
        Measure("KL by k3, nats per token", ("kl", "k3_per_token"), digits=4),
        Measure("share cut at the token limit", ("truncated_share",)),
    ),
    "outcomes": tuple(
        Measure(f"{{k}}: {said}", ("objectives", _K, "outcomes", said)) for said in ("won", "tied", "lost")
    ),
    "proxies": (
        Measure("mean reward by the ensemble, {k}", ("proxy", "mean_reward", _K)),
        Measure("mean of the worst member (P15), {k}", ("proxy", "worst_member", _K), is_exact=False),
        Measure("the lowest of these (P16)", ("proxy", "worst_objective", "reward"), is_exact=False),
        Measure("violation rate (P17)", ("proxy", "violation_rate"), is_exact=False),
    ),
}
"""Every measure, in the order of all tables: of the headline (without a column: at equal length) and beside it."""


def measures_of(group: str, objectives: Sequence[str]) -> list[Measure]:
    """The measures of a group, those by objective once for each; what begins with the objective stands beside its others."""
    each = [(m, k) for m in MEASURES[group] for k in (objectives if _K in m.name else ("",))]
    each.sort(key=lambda pair: objectives.index(pair[1]) if pair[0].name.startswith(_K) else 0)
    return [measure.of(k) for measure, k in each]


def measured(files: Mapping[str, dict[str, Any]]) -> dict[str, dict[Measure, Estimates]]:
    """The numbers of every measure that a method has, by group.

    Args:
        files: contents of the methods' files, with `row` of `comparison.json`, by method.
    """
    objectives = objectives_of([found["row"] for found in files.values()])
    numbers = {
        group: {
            m: {name: _at(found, m.path) for name, found in files.items()}
            for m in measures_of(group, objectives)
        }
        for group in MEASURES
    }
    return {
        group: {m: found for m, found in each.items() if any(value is not None for value in found.values())}
        for group, each in numbers.items()
    }


def _at(found: Any, path: Sequence[str]) -> Any:
    """What lies below these keys; None where the path ends."""
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


# ------------------------------------------------------------------ the headline
_AT_EQUAL_LENGTH = {"win_rate": "length_controlled", "worst": _WORST_EQUAL}


def headline_table(rows: Rows, caption: str, *, before: Beside, behind: Beside) -> Table:
    """Method × (win rate per objective, worst objective, mean of the minimum, KL, length).

    Args:
        rows: of `comparison.json`.
        caption: what the numbers were measured on.
        before, behind: what is put before and behind a number.
    """

    def cell(row: Mapping[str, Any], measure: Measure) -> str:
        place, (key, *rest), estimate = (row["method"], measure.name), measure.row, _at(row, measure.row)
        text = format_estimate(estimate, measure.digits)
        if key in _AT_EQUAL_LENGTH:
            controlled = _at(row, (_AT_EQUAL_LENGTH[key], *rest))
            text, _ = with_agreed_mark(estimate, controlled, needs_both=bool(row.get("debiased")))
        return " ".join(filter(None, (before.get(place), text, behind.get(place))))

    objectives = objectives_of(rows)
    shown = [measure for measure in measures_of("headline", objectives) if measure.column]
    aimed = " (of kl_target)" if any(name == KL for _, name in behind) else ""
    columns = ("method", *(m.column + (aimed if m.name == KL else "") for m in shown))
    body = tuple((row["method"], *(cell(row, measure) for measure in shown)) for row in rows)
    win_rates = ("win rate against the reference (0.50 = no change)", 1, len(objectives) + 1)
    return Table(columns, body, caption, win_rates)


_CSV_NAMES = {"length_controlled": "win_rate_at_equal_length"}


def headline_csv(rows: Rows) -> str:
    """The headline's numbers, win rates at equal length among them: four columns (value, low, high, n) for every measure."""
    measures, parts = measures_of("headline", objectives_of(rows)), ("value", "low", "high", "n")
    names = ("_".join((_CSV_NAMES.get(m.row[0], m.row[0]), *m.row[1:])) for m in measures)
    return _csv(
        ["method", *(f"{name}_{part}" for name in names for part in parts)],
        (
            [row["method"], *((_at(row, m.row) or {}).get(part, "") for m in measures for part in parts)]
            for row in rows
        ),
    )


# ------------------------------------------------------------------ beside the headline
def measure_table(
    measures: Mapping[Measure, Estimates], methods: Sequence[str], caption: str
) -> Table | None:
    """One row per measure: its name, chance level, number of prompts, and one column per method."""
    rows = tuple(
        (
            measure.name,
            format_number(_chance(measure, found), measure.digits),
            _counts(found),
            *(_cell(measure, found, method) for method in methods),
        )
        for measure, found in measures.items()
    )
    return Table(("measure", "chance", "n", *methods), rows, caption) if rows else None


def _chance(measure: Measure, found: Estimates) -> float | None:
    """What no effect would give: what the estimates carry, else the reference's own number where that is not exact."""
    carried = (e["chance"] for e in found.values() if isinstance(e, dict) and "chance" in e)
    chance = next(carried, None)
    return (found.get(REFERENCE) or {}).get("value") if chance is None and not measure.is_exact else chance


def _counts(found: Estimates) -> str:
    counts = (e.get("n") for e in found.values() if isinstance(e, dict))
    return "/".join(dict.fromkeys(str(n) for n in counts if n is not None)) or NOTHING


def _cell(measure: Measure, found: Estimates, method: str) -> str:
    estimate, chance = found.get(method), _chance(measure, found)
    if isinstance(estimate, dict) and chance is not None and measure.is_exact and method != REFERENCE:
        return with_mark(estimate, chance, measure.digits)
    return format_estimate(estimate, measure.digits)


def measures_csv(measures: Mapping[str, Mapping[Measure, Estimates]], samples_per_prompt: int | None) -> str:
    """One line per measure and method: value, interval, chance, prompts (the clusters), responses behind them."""

    def line(measure: Measure, method: str, found: Estimates) -> list[Any]:
        estimate = found[method] if isinstance(found[method], dict) else {"value": found[method]}
        n, chance = estimate.get("n"), _chance(measure, found)
        numbers = [estimate.get(part) for part in ("value", "low", "high", "n", "method")]
        responses = n * samples_per_prompt if n and samples_per_prompt else None
        return [measure.name, method, *numbers, responses, chance]

    return _csv(
        ["measure", "method", "value", "low", "high", "clusters", "interval", "responses", "chance"],
        (
            line(measure, method, found)
            for group in measures.values()
            for measure, found in group.items()
            for method, estimate in found.items()
            if estimate is not None
        ),
    )


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """What is None is an empty cell."""
    stream = text_io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    return stream.getvalue()
