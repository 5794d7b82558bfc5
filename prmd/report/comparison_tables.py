"""Tables of what is between methods, and of who judged them.

What lives here: contents of `comparison.json`, `frontier.json` and the judges' cards in, `Table` out. What does not: the
numbers of single methods (`tables`), sections and words (`evaluation_sections`, to be read next).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prmd.report.measures import WORST
from prmd.report.tables import (
    NOTHING,
    SIGNIFICANT,
    Estimate,
    Table,
    format_estimate,
    format_number,
    with_agreed_mark,
    with_mark,
)

BETTER, WORSE = "▲", "▼"
READ_ENOUGH = 0.9
"""A judge of which a smaller share of verdicts can be read is warned of."""

Results = Mapping[str, Mapping[str, dict[str, Any]]]
"""Benchmark -> method -> contents of its file."""


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
    """▲ or ▼ by (method, measure) where the paired test against the baseline is significant after Holm's correction.

    Where reward models were debiased, the difference at equal length has to agree.
    """
    return {
        (test["method"], test["measure"]): BETTER if test["difference"]["value"] > 0 else WORSE
        for test in comparison.get("paired") or []
        if test.get("p_holm", 1.0) < SIGNIFICANT and (not test.get("needs_both") or _agrees(test))
    }


def worst_marks(comparison: dict[str, Any]) -> dict[tuple[str, str], str]:
    """▲ or ▼ by (method, `WORST`) where the test of the worst objective against the baseline is significant."""
    return {
        (test["method"], WORST): BETTER if test["difference"] > 0 else WORSE
        for test in comparison.get("worst_objective") or []
        if test["p_holm"] < SIGNIFICANT and (not test.get("needs_both") or test["agrees"])
    }


def _agrees(test: dict[str, Any]) -> bool:
    """Whether the interval of the difference at equal length lies on the side of the plain difference."""
    at_equal_length = test["difference_at_equal_length"]
    return at_equal_length["low"] > 0 if test["difference"]["value"] > 0 else at_equal_length["high"] < 0


def win_matrix_tables(comparison: dict[str, Any]) -> dict[str, Table]:
    """Per objective: the win rate of the method of the row over the method of the column."""
    tables = {}
    for objective, duels in (comparison.get("win_matrix") or {}).items():
        names = list(dict.fromkeys(name for duel in duels for name in (duel["method"], duel["against"])))
        cells = {}
        for duel in duels:
            a, b = duel["method"], duel["against"]
            rates = [duel["win_rate"], duel.get("length_controlled")]
            both = bool(duel.get("needs_both"))
            cells[a, b] = _both_rates(rates, both)
            cells[b, a] = _both_rates([_mirrored(rate) if rate else None for rate in rates], both)
        rows = tuple((a, *(cells.get((a, b), NOTHING) for b in names)) for a in names)
        caption = (
            "Row against column, over all pairs of samples of a prompt; after the stroke at equal length. ↑ ↓: the interval "
            "excludes ½; of methods with debiased reward models both have to."
        )
        if rows:
            tables[f"Who beats whom: {objective}"] = Table(("method", *names), rows, caption)
    return tables


def _both_rates(rates: Sequence[Estimate | None], needs_both: bool) -> str:
    plain, controlled = with_agreed_mark(*rates, needs_both=needs_both)
    return plain if rates[1] is None else f"{plain} / {controlled}"


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
            *with_agreed_mark(
                point["worst"],
                point.get("worst_length_controlled"),
                needs_both=bool(point.get("debiased")),
            ),
            format_estimate(point["mean_of_min"]),
            str(point["kl"]["n"]),
        )
        for point in frontier["points"]
    )
    caption = f"The first {frontier['prompts']} of the prompts; the same judges and decoding as above."
    columns = (
        *("method", "trained", "KL, nats/response", "worst objective", "at equal length"),
        *("mean of minimum", "n"),
    )
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


AT_CHANCE, LIKES_NOTHING = "cannot be told from chance", "prefers a constant answer"


def judge_faults(
    cards: Mapping[str, dict[str, Any]], judging: Mapping[str, Any] | None
) -> dict[str, list[str]]:
    """What makes judges useless, with the objectives of those it holds for; an accuracy that is not known is no fault."""
    measured = (judging or {}).get("objectives") or {}
    constant = {k: (found.get("win_rate") or {}).get("low") or 0.0 for k, found in measured.items()}
    accuracy = {k: (card.get("accuracy") or {}).get("low", 1.0) for k, card in cards.items()}
    found = {
        AT_CHANCE: [k for k, low in accuracy.items() if low <= 0.5],  # chance: half of the pairs
        LIKES_NOTHING: [k for k, low in constant.items() if low > 0.5],
    }
    return {what: objectives for what, objectives in found.items() if objectives}


_WARNINGS = {
    AT_CHANCE: "the judge's accuracy is not distinguishable from chance, so its win rates say nothing.",
    LIKES_NOTHING: "the judge prefers the constant answer to the reference; it rewards something else than answers.",
}


def judge_warnings(cards: Mapping[str, dict[str, Any]], judging: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with which judges, in words."""
    return [f"{', '.join(names)}: {_WARNINGS[what]}" for what, names in judge_faults(cards, judging).items()]


def benchmark_judges_table(results: Results) -> Table | None:
    """The judge's card of every judged benchmark result: who it was, how much could be read, what is known of its errors."""
    rows = tuple(
        (
            f"{result['benchmark']}, {method}",
            f"{card.get('name', NOTHING)} ({card.get('kind', 'reward model')})",
            _read_share(card),
            "; ".join(_agreements(card)) or "not measured: no labels",
            readable(card.get("position_bias")),
            _constant_answer(card),
            str(card.get("empty_responses", NOTHING)),
            readable(card.get("usage")),
        )
        for method, result, card in _cards(results)
    )
    columns = (
        *("result", "judge", "verdicts that could be read", "agreement with labels"),
        *("position bias", "constant answer", "empty responses", "usage"),
    )
    caption = (
        "Agreement: right verdicts with their interval, κ (0: chance, 1: perfect), shares of false positives and negatives. "
        "Position bias: how often what is shown first wins (½: no bias), and pairs judged alike in both orders. Constant "
        "answer: what an answer without content gets; a good judge gives it little."
    )
    return Table(columns, rows, caption) if rows else None


def benchmark_judge_warnings(results: Results) -> list[str]:
    """What is wrong with which judge of a benchmark, in words."""
    found: dict[tuple[str, str], list[str]] = {}
    for method, result, card in _cards(results):
        for what in _faults(card):
            found.setdefault((result["benchmark"], what), []).append(method)
    return [f"{benchmark} ({', '.join(methods)}): {what}" for (benchmark, what), methods in found.items()]


def _cards(results: Results) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(method, result, card) of every judged result."""
    for by_method in results.values():
        for method, result in by_method.items():
            if card := result.get("judge"):
                yield method, result, card


def _read_share(card: dict[str, Any]) -> str:
    if not card.get("parse_rate"):
        return "all: it gives numbers"
    read = card["verdicts"] - card["parse_failures"]
    return f"{read} of {card['verdicts']}: {format_estimate(card['parse_rate'])}"


def _agreements(card: dict[str, Any]) -> Iterator[str]:
    """Every measurement of a judge against labels, in words."""
    if accuracy := card.get("accuracy"):
        yield f"{format_estimate(accuracy)} on {accuracy['n']} held-out pairs"
    if validation := card.get("validation"):
        yield (
            f"AUC {format_estimate(validation['auc'])}, rank correlation "
            f"{format_estimate(validation['rank_correlation'])} with {validation['against']}"
        )
    found = card.get("agreement") or {}
    measured = {"": found} if "agree" in found else {k: v for k, v in found.items() if isinstance(v, dict)}
    measured |= {
        name.removeprefix("agreement_with_").replace("_", " "): card[name]
        for name in ("agreement_with_reference_answers", "agreement_with_people")
        if card.get(name)
    }
    for name, one in measured.items():
        errors = ", ".join(
            f"{label} {readable(one[key])}"
            for key, label in (("kappa", "κ"), ("fpr", "false positives"), ("fnr", "false negatives"))
            if one.get(key) is not None
        )
        labels = one.get("labels") or found.get("labels")
        said = f"{format_estimate(one['agree'])}, {errors}, n = {one.get('n', NOTHING)}"
        yield (f"{name}: " if name else "") + said + (f" ({labels})" if labels else "")


def _constant_answer(card: dict[str, Any]) -> str:
    found = card.get("constant_answer") or {}
    return readable({name: value for name, value in found.items() if name != "text"})


def _faults(card: dict[str, Any]) -> Iterator[str]:
    rate = card.get("parse_rate")
    if rate and rate["value"] < READ_ENOUGH:
        read = card["verdicts"] - card["parse_failures"]
        yield (
            f"only {read} of {card['verdicts']} of the judge's replies could be read; its figures rest on those alone"
            if read
            else f"none of {card['verdicts']} of the judge's replies could be read, so it has no figures"
        )
    first = (card.get("position_bias") or {}).get("first_wins")
    if first and not first["low"] <= 0.5 <= first["high"]:
        place = "first" if first["low"] > 0.5 else "second"
        yield f"the judge prefers the answer that is shown {place}, whichever it is"
    if any(_at_chance(one) for one in _labelled(card)):
        yield "the judge's agreement with labels cannot be told from chance"


def _at_chance(measured: dict[str, Any]) -> bool:
    """Whether the interval of the agreement holds what chance gives, which is (agreement − κ) / (1 − κ)."""
    kappa, agree = measured.get("kappa"), measured.get("agree") or {}
    if kappa is None or agree.get("low") is None:
        return False
    return kappa <= 0 or agree["low"] <= (agree["value"] - kappa) / (1 - kappa) if kappa < 1 else False


def _labelled(card: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measurements of the judge itself against labels, without those of phrases beside it."""
    found = card.get("agreement") or {}
    yield from (one for one in (found, found.get(card.get("name"))) if one)
    yield from (card[name] for name in ("agreement_with_people",) if card.get(name))
