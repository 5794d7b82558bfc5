"""Tables of everything measured of each method beside the headline: by judges and by the training ensemble.

What lives here: contents of the method files in, `Table` and CSV out. What does not: numbers (they are read, never
computed), the headline table (`report_tables`), what is between methods (`report_comparisons`, to be read next). A number
that a file lacks is left out.
"""

import csv
import io as text_io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prmd.report_tables import NOTHING, Estimate, Table, format_estimate, format_number, with_mark

REFERENCE = "reference"


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
