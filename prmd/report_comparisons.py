"""Tables of what is between methods, and of who judged them.

What lives here: contents of `comparison.json`, `frontier.json` and the judges' cards in, `Table` out. What does not: the
numbers of single methods (`report_measures`), sections and words (`report_headline`, to be read next).
"""

from collections.abc import Mapping
from typing import Any

from prmd.report_tables import NOTHING, Estimate, Table, format_estimate, format_number, with_mark

BETTER, WORSE = "▲", "▼"
SIGNIFICANT = 0.05


# ------------------------------------------------------------------ between methods
def paired_table(comparison: dict[str, Any]) -> Table | None:
    """The paired tests as they were written: one column per key, estimates with their intervals."""
    tests = comparison.get("paired") or []
    columns = tuple(dict.fromkeys(key for test in tests for key in test))
    if not columns:
        return None
    rows = tuple(tuple(readable(test.get(key)) for key in columns) for test in tests)
    names = tuple(key.replace("_", " ") for key in columns)
    return Table(names, rows, f"Declared before looking: {comparison.get('declared') or 'nothing'}.")


def readable(value: Any) -> str:
    """A value of a result file as a cell: estimates with their intervals, what is nested as `name value, name value`."""
    if isinstance(value, dict):
        parts = (f"{name.replace('_', ' ')} {readable(v)}" for name, v in value.items() if v is not None)
        return format_estimate(value) if "value" in value else ", ".join(parts) or NOTHING
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NOTHING}[value]
    return format_number(value, 3) if isinstance(value, float) else str(value)


def significance_marks(comparison: dict[str, Any]) -> dict[tuple[str, str], str]:
    """▲ or ▼ by (method, measure) where the paired test against the baseline is significant after Holm's correction."""
    return {
        (test["method"], test["measure"]): BETTER if test["difference"]["value"] > 0 else WORSE
        for test in comparison.get("paired") or []
        if test.get("p_holm", 1.0) < SIGNIFICANT
    }


def win_matrix_tables(comparison: dict[str, Any]) -> dict[str, Table]:
    """Per objective: the win rate of the method of the row over the method of the column."""
    tables = {}
    for objective, duels in (comparison.get("win_matrix") or {}).items():
        names = list(dict.fromkeys(name for duel in duels for name in (duel["method"], duel["against"])))
        rates = {(d["method"], d["against"]): d["win_rate"] for d in duels}
        rates |= {(b, a): _mirrored(rate) for (a, b), rate in rates.items()}
        rows = tuple((a, *(with_mark(rates.get((a, b))) for b in names)) for a in names)
        caption = "Row against column, over all pairs of samples of a prompt. ↑ ↓: the interval excludes ½."
        if rows:
            tables[f"Who beats whom: {objective}"] = Table(("method", *names), rows, caption)
    return tables


def _mirrored(rate: Estimate) -> Estimate:
    return rate | {"value": 1 - rate["value"], "low": 1 - rate["high"], "high": 1 - rate["low"]}


def best_of_n_table(comparison: dict[str, Any]) -> Table | None:
    """Gains of the best of n reference samples, chosen by the proxy: by the proxy and by the judges."""
    found = comparison.get("over_optimisation")
    if not found:
        return None
    rows = tuple(
        (
            f"best of {point['n']}, {chooser.replace('_', ' ')}",
            format_number(point["kl"]),
            format_estimate(point["proxy"]),
            with_mark(point["gold"], 0.0),
            str(point["gold"]["n"]),
        )
        for chooser, curve in found["curves"].items()
        for point in curve["points"][1:]
    )
    return Table(
        ("chosen by", "KL at most, nats", "gain by the proxy", "gain by the judges", "n"),
        rows,
        "Estimated without bias from the reference samples, none drawn anew. Proxy: the ensemble policies are trained on "
        "(mean: its average; hard min: the lowest of all members and objectives); gains in standard deviations of a "
        f"prompt's samples.{_fits(found['curves'])}",
    )


def _fits(curves: dict[str, Any]) -> str:
    said = ""
    for chooser, curve in curves.items():
        fit = curve.get("fit")
        if fit:
            peak = fit["peak_distance"]
            said += (
                f" {chooser.replace('_', ' ')}: judges' gain ≈ d (α − β d) with d = √KL, α "
                f"{format_estimate(fit['alpha'])}, β {format_estimate(fit['beta'])}, "
                + (f"highest at d = {peak:.1f}." if peak else "still rising.")
            )
    return said


def frontier_table(frontier: dict[str, Any] | None) -> Table | None:
    """Every kept checkpoint of every policy: how far it is from the reference, and how good."""
    if not frontier:
        return None
    rows = tuple(
        (
            point["method"],
            point["checkpoint"] if point["checkpoint"] == "end" else f"{point['checkpoint']} %",
            format_estimate(point["kl"], 3),
            with_mark(point["worst"]),
            format_estimate(point["mean_of_min"]),
            str(point["kl"]["n"]),
        )
        for point in frontier["points"]
    )
    caption = f"The first {frontier['prompts']} of the prompts; the same judges and decoding as above."
    columns = ("method", "trained", "KL, nats/response", "worst objective", "mean of minimum", "n")
    return Table(columns, rows, caption)


# ------------------------------------------------------------------ judges
def judges_table(cards: Mapping[str, dict[str, Any]], judging: dict[str, Any] | None) -> Table | None:
    """Card of every judge: accuracy on pairs it was not trained on, what a constant answer wins, love of length."""
    if not cards:
        return None
    measured = (judging or {}).get("objectives") or {}
    known = ("path", "fingerprint", "accuracy")
    extra = tuple(dict.fromkeys(key for card in cards.values() for key in card if key not in known))
    rows = []
    for objective, card in cards.items():
        accuracy, found = card.get("accuracy") or {}, measured.get(objective) or {}
        rows.append(
            (
                objective,
                str(card.get("path", NOTHING)),
                with_mark(accuracy) if accuracy else NOTHING,
                str(accuracy.get("n", NOTHING)),
                with_mark(found.get("win_rate")),
                format_number(found.get("length_correlation")),
                *(readable(card.get(key)) for key in extra),
            )
        )
    columns = (
        "judge of",
        "which",
        "accuracy (chance 0.50)",
        "n",
        "constant answer wins",
        "reward and length",
    )
    answer = (judging or {}).get("answer")
    caption = "Accuracy on held-out pairs. Reward and length: correlation over reference samples of a prompt."
    if answer:
        caption += f" Constant answer: “{answer}” to every prompt, against the reference; a good judge gives it little."
    return Table((*columns, *(key.replace("_", " ") for key in extra)), tuple(rows), caption)


def judge_warnings(cards: Mapping[str, dict[str, Any]], judging: dict[str, Any] | None) -> list[str]:
    """What is wrong with which judges, in words."""
    measured = (judging or {}).get("objectives") or {}
    constant = {k: (found.get("win_rate") or {}).get("low") or 0.0 for k, found in measured.items()}
    accuracy = {k: (card.get("accuracy") or {}).get("low", 1.0) for k, card in cards.items()}
    found = (
        (
            [k for k, low in accuracy.items() if low <= 0.5],  # chance: half of the pairs
            "the judge's accuracy is not distinguishable from chance, so its win rates say nothing.",
        ),
        (
            [k for k, low in constant.items() if low > 0.5],
            "the judge prefers the constant answer to the reference; it rewards something else than answers.",
        ),
    )
    return [f"{', '.join(objectives)}: {what}" for objectives, what in found if objectives]


def benchmark_judges_table(results: Mapping[str, Mapping[str, dict[str, Any]]]) -> Table | None:
    """The judge's card of every judged benchmark result: who it was, how much could be read, what is known of its errors.

    Args:
        results: benchmark -> method -> contents of its file.
    """
    keys = ("parse_rate", "agreement", "position_bias", "constant_answer", "empty_responses", "usage")
    rows = tuple(
        (
            f"{result['benchmark']}, {method}",
            f"{card.get('name', NOTHING)} ({card.get('kind', NOTHING)})",
            str(card.get("verdicts", NOTHING)),
            *(readable(card.get(key)) for key in keys),
        )
        for by_method in results.values()
        for method, result in by_method.items()
        if (card := result.get("judge"))
    )
    columns = ("result", "judge", "verdicts", *(key.replace("_", " ") for key in keys))
    caption = "Agreement: with the labels named. A good judge gives the constant answer little."
    return Table(columns, rows, caption) if rows else None
