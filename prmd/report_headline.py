"""What the report says of the evaluation: the headline, everything measured beside it, approaches side by side.

What lives here: sections built from `outputs/metrics`, in words and tables. What does not: the tables themselves
(`report_measures`, `report_comparisons`), numbers (they are read, never computed), benchmarks and samples (`report_evaluation`, to be read next).
"""

from typing import Any

from prmd.artifacts.paths import ArtifactPaths, stage_command
from prmd.report_comparisons import (
    BETTER,
    WORSE,
    best_of_n_table,
    frontier_table,
    judge_warnings,
    judges_table,
    paired_table,
    significance_marks,
    win_matrix_tables,
)
from prmd.report_measures import (
    REFERENCE,
    headline_measures,
    judge_measures,
    measure_table,
    outcome_measures,
    proxy_measures,
)
from prmd.report_sections import Section, folders, load, missing
from prmd.report_tables import Table, format_estimate, headline_table

EVALUATE = stage_command("compute_metrics")


# ------------------------------------------------------------------ headline
def headline_section(paths: ArtifactPaths) -> Section:
    """The headline table, what it was measured on, who judged, and every other table of the comparison."""
    comparison = load(paths.metrics / "comparison.json")
    if not comparison or not comparison.get("rows"):
        return {"missing": missing(paths, EVALUATE), "rows": []}
    rows = comparison["rows"]
    metrics = {row["method"]: load(paths.metrics / f"{row['method']}.json") or {} for row in rows}
    evaluation = next((m["evaluation"] for m in metrics.values() if m.get("evaluation")), {})
    worst = {
        name: (m.get("worst_objective") or {}).get("objective", "")
        for name, m in metrics.items()
        if name != REFERENCE
    }
    cards = evaluation.get("judges") or {}
    judging = metrics.get(REFERENCE, {}).get("judging")
    marks = significance_marks(comparison)
    return {
        "missing": None,
        "rows": rows,
        "table": headline_table(rows, worst, _measured_on(paths, evaluation, comparison), marks),
        "summary": _summary(rows),
        "judges": judges_table(cards, judging),
        "judge_warnings": judge_warnings(cards, judging),
        "tables": _tables(paths, comparison, metrics),
        "folded": [*win_matrix_tables(comparison), _OUTCOMES],
        "measures": [
            measure
            for group in (headline_measures, judge_measures, outcome_measures, proxy_measures)
            for measure in group(metrics)
        ],
        "samples_per_prompt": evaluation.get("samples_per_prompt"),
        "notes": [f"{name}: {note}" for name, m in metrics.items() for note in m.get("notes") or []],
        "truncated": {n: m["truncated_share"] for n, m in metrics.items() if m.get("truncated_share")},
    }


def _tables(
    paths: ArtifactPaths, comparison: dict[str, Any], metrics: dict[str, dict[str, Any]]
) -> dict[str, Table]:
    """Every table beside the headline and the judges' by its heading; those without data are left out."""
    methods = list(metrics)
    front = format_estimate(comparison.get("hypervolume"), 3)
    found = {
        "Paired comparisons": paired_table(comparison),
        "Everything else the judges say": measure_table(
            judge_measures(metrics),
            methods,
            f"{_CHANCE} Rewards in standard deviations of a prompt's reference samples. Hypervolume: what the mean "
            f"rewards dominate above the reference; of all policies together {front}. {_RESAMPLED}",
        ),
        _OUTCOMES: measure_table(
            outcome_measures(metrics),
            methods[1:],
            "Shares of all pairs of a policy's and a reference sample.",
        ),
        **win_matrix_tables(comparison),
        "Proxies: what the training ensemble says": measure_table(
            proxy_measures(metrics),
            methods,
            f"{_CHANCE} Policies were trained on these rewards, so their gains here are no evidence. P15: mean over "
            "responses of the lowest member. P17: share of responses below the reference's 10 % quantile of P15 on some "
            "objective; its chance level is the reference's own.",
        ),
        "Over-optimisation": best_of_n_table(comparison),
        "Reward–KL frontier": frontier_table(load(paths.metrics / "frontier.json")),
    }
    return {name: table for name, table in found.items() if table}


_OUTCOMES = "Won, tied and lost"
_CHANCE = "Chance: what no effect gives, 0 or ½ (↑ ↓: the interval excludes it), else what the reference itself has."
_RESAMPLED = "n counts prompts, the units that are resampled."


def _summary(rows: list[dict[str, Any]]) -> str:
    policies = [
        row
        for row in rows
        if row["method"] != "reference" and (row.get("worst") or {}).get("low") is not None
    ]
    if not policies:
        return "No policy has been evaluated yet."
    better = [row["method"] for row in policies if row["worst"]["low"] > 0.5]
    worse = [row["method"] for row in policies if row["worst"]["high"] < 0.5]
    one = len(policies) == 1
    said = "The policy has no" if one else f"None of {len(policies)} policies has a"
    said += " worst-objective band wholly above ½."
    if better:
        said = (
            f"Even on the worst objective, {_listed(better)} beat the reference: the whole band lies above ½."
        )
    if worse:
        said += f" For {_listed(worse)} the whole band lies below ½."
    undecided = len(policies) - len(better) - len(worse)
    whose = "The" if one else f"For {undecided} of {len(policies)} the"
    return said + (f" {whose} band contains ½: not decided." if undecided else "")


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _measured_on(paths: ArtifactPaths, evaluation: dict[str, Any], comparison: dict[str, Any]) -> str:
    against = next((test["against"] for test in comparison.get("paired") or []), None)
    paired = (
        f" {BETTER} {WORSE}: better or worse than {against} on the same prompts, p < .05 after Holm's correction."
        if against
        else ""
    )
    return (
        f"Approach {paths.approach}: {evaluation.get('prompts', '?')} held-out prompts × "
        f"{evaluation.get('samples_per_prompt', '?')} samples of at most {evaluation.get('max_new_tokens', '?')} "
        f"tokens at temperature {evaluation.get('temperature', '?')}. Win rate: share of sample pairs the judge "
        "prefers to the reference, ties ½ (chance: 0.50). Brackets: 95 % intervals over prompts; for the worst objective a "
        f"band, lowest lower to lowest upper end. ↑ ↓: the interval excludes ½.{paired}"
    )


# ------------------------------------------------------------------ approaches side by side
def approaches_section(paths: ArtifactPaths) -> Section | None:
    """Policies of several approaches on the same prompts by the same judges; None where there is one approach only.

    Approaches that were evaluated on prompts and by judges of their own are named with the command that compares them.
    """
    comparison = load(paths.metrics / "comparison.json") or {}
    rows = [row for row in comparison.get("rows") or [] if row["method"] != REFERENCE]
    compared = list(dict.fromkeys(row.get("approach", paths.approach) for row in rows))
    known = [folder.name for folder in folders(paths.metrics.parent) if (folder / "comparison.json").exists()]
    apart = [name for name in known if name not in compared and name != paths.approach]
    table = None
    if len(compared) > 1:
        named = [
            row | {"method": f"{row['approach']}: {row['method'].removeprefix(row['approach'] + '@')}"}
            for row in sorted(rows, key=lambda row: compared.index(row["approach"]))
        ]
        caption = f"Same prompts, decoding, reference and judges for every row: those of {paths.approach}."
        table = headline_table(named, {}, caption)
    if table is None and not apart:
        return None
    command = f'{missing(paths, EVALUATE)} "generation.other_approaches=[{",".join(apart)}]"'
    return {"table": table, "apart": apart, "command": command if apart else None}
