"""The verdict in one sentence, and what it rests on in three: the title of the page and the last line of a run.

What lives here: from the contents of `comparison.json`, the judges' cards and what is known of the policies to words.
What does not: tests and intervals (`evaluation.comparison`), tables (`tables`). Read `evaluation_sections` next.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prmd.artifacts.paths import REFERENCE, ArtifactPaths
from prmd.report.artifact_sections import load
from prmd.report.comparison_tables import BETTER, judge_faults, significance_marks, worst_marks
from prmd.report.tables import format_estimate, format_number, listed

_SHOWN = {"baseline_dpo": "DPO", "dpo": "DPO", REFERENCE: "the reference"}
_MOST_NAMED = 3


def conclusion(paths: ArtifactPaths) -> str:
    """The verdict's sentence, from the finished files of an approach."""
    comparison = load(paths.metrics / "comparison.json") or {}
    reference = load(paths.metrics / f"{REFERENCE}.json") or {}
    cards = (reference.get("evaluation") or {}).get("judges") or {}
    return verdict(comparison, cards, reference.get("judging"))


def verdict(
    comparison: Mapping[str, Any],
    cards: Mapping[str, dict[str, Any]],
    judging: Mapping[str, Any] | None,
) -> str:
    """Whether a method is shown to beat the baseline on the worst objective; without usable judges, that there is no verdict.

    Args:
        cards: of the judges, by objective.
        judging: what the judges make of a constant answer.
    """
    rows = {row["method"]: row for row in comparison.get("rows") or []}
    baseline = baseline_of(comparison)
    others = [name for name in rows if name not in (REFERENCE, baseline)]
    if not rows:
        return "No verdict yet: no methods have been compared"
    if faults := judge_faults(cards, judging):
        return f"No verdict: {'; '.join(f'{_judges(names)} {what}' for what, names in faults.items())}"
    if not others:
        return f"Nothing to compare: {shown_baseline(baseline)} alone was evaluated"
    tests = comparison.get("worst_objective") or []
    if not tests:
        return f"No verdict: the worst objective was not tested against {shown_baseline(baseline)}"
    return _compared(
        rows, baseline, {name: mark for (name, _), mark in worst_marks(comparison).items()}, others
    )


def _compared(
    rows: Mapping[str, dict[str, Any]], baseline: str, marks: Mapping[str, str], others: Sequence[str]
) -> str:
    whom = shown_baseline(baseline)
    better = sorted(
        (k for k, mark in marks.items() if mark == BETTER), key=lambda k: -rows[k]["worst"]["value"]
    )
    worse = [name for name in marks if name not in better]
    if better:
        named = better if len(better) <= _MOST_NAMED else [better[0], f"{len(better) - 1} other methods"]
        rates = " and ".join(
            format_estimate(rows[name]["worst"]) for name in better[: len(named)] if name in named
        )
        against = format_number(rows[baseline]["worst"]["value"])
        does = "beats" if len(better) == 1 else "beat"
        return f"{listed(named)} {does} {whom} on the worst objective, {rates} against {against}"
    said = f"{others[0]} is not" if len(others) == 1 else "No method is"
    lower = (
        f"; {listed(worse)} {'is' if len(worse) == 1 else 'are'} worse on the worst objective"
        if worse
        else ""
    )
    return f"{said} shown to beat {whom}{lower}"


def baseline_of(comparison: Mapping[str, Any]) -> str:
    """What methods were compared with; results of earlier versions say so in their tests alone."""
    tested = next((test["against"] for test in comparison.get("paired") or []), REFERENCE)
    return comparison.get("baseline") or tested


def shown_baseline(baseline: str) -> str:
    """The baseline as a sentence calls it."""
    return _SHOWN.get(baseline, baseline)


def _judges(names: Sequence[str]) -> str:
    return f"the judge{'s' if len(names) > 1 else ''} of {listed(names)}"


# ------------------------------------------------------------------ what it rests on
def chips(
    comparison: Mapping[str, Any],
    cards: Mapping[str, dict[str, Any]],
    judging: Mapping[str, Any] | None,
    targets: Iterable[float | None],
) -> list[str]:
    """Usable judges, significant tests against the baseline, and the range of KL, a few words each.

    Args:
        targets: `kl_target` of the policies; None where one has none.
    """
    faulty = {name for names in judge_faults(cards, judging).values() for name in names}
    unknown = [k for k, card in cards.items() if not card.get("accuracy") and k not in faulty]
    judges = f"{len(cards) - len(faulty) - len(unknown)} of {len(cards)} judges usable"
    judges += f", {len(unknown)} of unknown accuracy" if unknown else ""
    tests = [*(comparison.get("worst_objective") or []), *(comparison.get("paired") or [])]
    passed = len(worst_marks(comparison)) + len(significance_marks(comparison))
    whom = shown_baseline(baseline_of(comparison))
    said = [judges, f"{passed} of {len(tests)} tests against {whom} significant"]
    kls = [
        row["kl"]["value"]
        for row in comparison.get("rows") or []
        if row["method"] != REFERENCE and row.get("kl")
    ]
    if kls:
        ends = dict.fromkeys(format_number(value) for value in (min(kls), max(kls)))
        aims = dict.fromkeys(format_number(value) for value in sorted(filter(None, targets)))
        aimed = f", {' or '.join(aims)} aimed at" if aims else ""
        said.append(f"KL {' to '.join(ends)} nats{aimed}")
    return said
