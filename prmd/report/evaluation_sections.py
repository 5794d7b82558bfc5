"""What the report says of the evaluation: verdict, headline, measures, approaches, closed-form table, samples, limits."""

from dataclasses import replace
from typing import Any

from prmd.artifacts.paths import REFERENCE, ArtifactPaths, stage_command
from prmd.report.artifact_sections import Section, folders, load, load_rows, missing
from prmd.report.comparison_tables import (
    BETTER,
    WORSE,
    best_of_n_table,
    frontier_table,
    judge_faults,
    judge_warnings,
    judges_table,
    paired_table,
    significance_marks,
    win_matrix_tables,
    worst_marks,
)
from prmd.report.measures import KL, WORST, Estimates, Measure, headline_table, measure_table, measured
from prmd.report.policy_sections import policy_metrics, under_trained
from prmd.report.tables import (
    NOTHING,
    Table,
    format_estimate,
    format_number,
    listed,
    objectives_of,
)
from prmd.report.verdict import baseline_of, chips, verdict

EVALUATE = stage_command("compute_metrics")


# ------------------------------------------------------------------ headline
def headline_section(paths: ArtifactPaths) -> Section:
    """The verdict, the headline table, what it was measured on, who judged, and every other table of the comparison."""
    comparison = load(paths.metrics / "comparison.json")
    if not comparison or not comparison.get("rows"):
        command = missing(paths, EVALUATE)
        return {
            "missing": command,
            "rows": [],
            "verdict": verdict({}, {}, None),
            "chips": [],
            "on": [],
        }
    rows, left_out = comparison["rows"], comparison.get("missing") or []
    metrics = {r["method"]: (load(paths.metrics / f"{r['method']}.json") or {}) | {"row": r} for r in rows}
    evaluation = next((m["evaluation"] for m in metrics.values() if m.get("evaluation")), {})
    cards = evaluation.get("judges") or {}
    judging = metrics.get(REFERENCE, {}).get("judging")
    trained = {name: m for name, m in policy_metrics(paths).items() if name in metrics}
    targets = {name: found["kl_target"] for name, found in trained.items() if found.get("kl_target")}
    worst = {
        (name, WORST): (m.get("worst_objective") or {}).get("objective")
        for name, m in metrics.items()
        if name != REFERENCE
    }
    marks = significance_marks(comparison) | worst_marks(comparison)
    marks |= {(name, KL): f"of {format_number(target)}" for name, target in targets.items()}
    measures = measured(metrics)
    caption = _measured_on(paths, evaluation, comparison)
    return {
        "missing": None,
        "rows": rows,
        "verdict": verdict(comparison, cards, judging),
        "chips": chips(comparison, cards, judging, targets.values()),
        "on": _made_of(paths, evaluation),
        "table": _with_left_out(headline_table(rows, caption, before=worst, behind=marks), left_out),
        "summary": "" if judge_faults(cards, judging) else _summary(rows),
        "under_trained": under_trained(trained),
        "judges": judges_table(cards, judging),
        "judge_warnings": judge_warnings(cards, judging),
        "tables": _tables(paths, comparison, measures, list(metrics)),
        "folded": [*win_matrix_tables(comparison), _OUTCOMES],
        "measures": measures,
        "samples_per_prompt": evaluation.get("samples_per_prompt"),
        "notes": _notes(rows, left_out, metrics),
        "truncated": {n: m["truncated_share"] for n, m in metrics.items() if m.get("truncated_share")},
    }


def _notes(
    rows: list[dict[str, Any]], left_out: list[dict[str, str]], metrics: dict[str, dict[str, Any]]
) -> list[str]:
    """Who was not evaluated or not trained here, and what the methods' files say."""
    return [
        *(f"{one['method']}: not evaluated: {one['reason']}" for one in left_out),
        *(
            f"{row['method']}: not trained here: {', '.join(f'{k} {v}' for k, v in row['elsewhere'].items())}"
            for row in rows
            if row.get("elsewhere")
        ),
        *(f"{name}: {note}" for name, m in metrics.items() for note in m.get("notes") or []),
    ]


def _made_of(paths: ArtifactPaths, evaluation: dict[str, Any]) -> list[str]:
    """Model, data, prompts, date and commit of an evaluation, as far as its files say."""
    run = load(paths.metrics / "run.json") or {}
    trained = (load(folder / "run.json") or {} for folder in folders(paths.policies))
    bases = ((record.get("inputs") or {}).get("base") or {} for record in trained)
    model = next((base["name"] for base in bases if base.get("name")), None)
    prompts, samples = evaluation.get("prompts"), evaluation.get("samples_per_prompt")
    commit = (run.get("commit") or "")[:10]
    found = (
        model,
        f"data {paths.approach}",
        f"{prompts} prompts × {samples} samples" if prompts else None,
        (run.get("started") or "")[:10],
        f"commit {commit}{' + changes' if run.get('dirty') else ''}" if commit else None,
    )
    return [part for part in found if part]


def _with_left_out(table: Table, left_out: list[dict[str, str]]) -> Table:
    """The table with a row for each policy that could not be evaluated, and why behind its caption."""
    blank = (NOTHING,) * (len(table.columns) - 2)
    rows = tuple((one["method"], "not evaluated", *blank) for one in left_out)
    why = "".join(f" {one['method']} is not evaluated: {one['reason']}." for one in left_out)
    return replace(table, rows=(*table.rows, *rows), caption=table.caption + why)


def _tables(
    paths: ArtifactPaths,
    comparison: dict[str, Any],
    measures: dict[str, dict[Measure, Estimates]],
    methods: list[str],
) -> dict[str, Table]:
    """Every table beside the headline and the judges' by its heading; those without data are left out."""
    beside = {measure: found for measure, found in measures["headline"].items() if not measure.column}
    front = comparison.get("hypervolume_left_out") or format_estimate(comparison.get("hypervolume"), 3)
    asked = {"paired": comparison.get("worst_objective"), "declared": _VERDICT_TEST}
    found = {
        "The verdict's test: worst objective": paired_table(asked),
        "Paired comparisons": paired_table(comparison),
        "Everything else the judges say": measure_table(
            beside | measures["judges"],
            methods,
            f"{_CHANCE} Rewards in standard deviations of a prompt's reference samples. Hypervolume: what the mean "
            f"rewards dominate above the reference; of all policies together {front}. {_RESAMPLED}",
        ),
        _OUTCOMES: measure_table(
            measures["outcomes"],
            methods[1:],
            "Shares of all pairs of a policy's and a reference sample.",
        ),
        **win_matrix_tables(comparison),
        "Proxies: what the training ensemble says": measure_table(
            measures["proxies"],
            methods,
            f"{_CHANCE} Policies were trained on these rewards, so their gains here are no evidence. P15: mean over "
            "responses of the lowest member. P17: share of responses below the reference's 10 % quantile of P15 on some "
            "objective; its chance level is the reference's own.",
        ),
        "Over-optimisation": best_of_n_table(comparison),
        "Reward–KL frontier": frontier_table(load(paths.metrics / "frontier.json")),
    }
    return {name: table for name, table in found.items() if table}


_VERDICT_TEST = (
    "is a policy's lowest win rate above or below the baseline's; p is the larger one of the tests that each of its win rates "
    "exceeds some of the baseline's, Holm-corrected over policies"
)
_OUTCOMES = "Won, tied and lost"
_CHANCE = "Chance: what no effect gives, 0 or ½ (↑ ↓: the interval excludes it), else what the reference itself has."
_RESAMPLED = "n counts prompts, the units that are resampled."


def _summary(rows: list[dict[str, Any]]) -> str:
    policies = [
        row for row in rows if row["method"] != REFERENCE and (row.get("worst") or {}).get("low") is not None
    ]
    if not policies:
        return "No policy has been evaluated yet."
    better = [row["method"] for row in policies if min(_verdict_on(row, "low")) > 0.5]
    worse = [row["method"] for row in policies if max(_verdict_on(row, "high")) < 0.5]
    one = len(policies) == 1
    said = "The policy has no" if one else f"None of {len(policies)} policies has a"
    said += " worst-objective band wholly above ½."
    if better:
        said = (
            f"Even on the worst objective, {listed(better)} beat the reference: the whole band lies above ½."
        )
    if worse:
        said += f" For {listed(worse)} the whole band lies below ½."
    undecided = len(policies) - len(better) - len(worse)
    whose = "The" if one else f"For {undecided} of {len(policies)} the"
    return said + (f" {whose} band contains ½: not decided." if undecided else "")


def _verdict_on(row: dict[str, Any], end: str) -> list[float]:
    """That end of the worst objective's band, and of its band at equal length where reward models were debiased."""
    controlled = row.get("worst_length_controlled") if row.get("debiased") else None
    return [band[end] for band in (row["worst"], controlled) if band]


def _measured_on(paths: ArtifactPaths, evaluation: dict[str, Any], comparison: dict[str, Any]) -> str:
    paired = (
        f" {BETTER} {WORSE}: better or worse than {baseline_of(comparison)} on the same prompts, p < .05 after Holm's "
        "correction."
        if comparison.get("paired")
        else ""
    )
    if debiased := [row["method"] for row in comparison["rows"] if row.get("debiased")]:
        paired += (
            f" The reward models of {listed(debiased)} were debiased, so a mark needs the win rate and the one at equal length "
            "to agree; the mean of the minimum has no counterpart at equal length."
        )
    if elsewhere := [row["method"] for row in comparison["rows"] if row.get("elsewhere")]:
        paired += f" Not trained here: {listed(elsewhere)}, see the notes."
    return (
        f"Approach {paths.approach}: {evaluation.get('prompts', '?')} held-out prompts × "
        f"{evaluation.get('samples_per_prompt', '?')} samples of at most {evaluation.get('max_new_tokens', '?')} "
        f"tokens at temperature {evaluation.get('temperature', '?')}. Win rate: share of sample pairs the judge "
        "prefers to the reference, ties ½. Brackets: 95 % intervals over prompts; for the worst objective a band, lowest "
        f"lower to lowest upper end. ↑ ↓: the interval excludes ½; win rates at equal length stand below.{paired}"
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
            row | {"method": f"{_trained_on(row)}: {row['method'].removeprefix(row['approach'] + '@')}"}
            for row in sorted(rows, key=lambda row: compared.index(row["approach"]))
        ]
        caption = f"Same prompts, decoding, reference and judges for every row: those of {paths.approach}."
        table = headline_table(named, caption, before={}, behind={})
    if table is None and not apart:
        return None
    command = f'{missing(paths, EVALUATE)} "generation.other_approaches=[{",".join(apart)}]"'
    return {"table": table, "apart": apart, "command": command if apart else None}


def _trained_on(row: dict[str, Any]) -> str:
    return "elsewhere" if row.get("elsewhere") else row["approach"]


MAX_BROWSED_PROMPTS = 60


# ------------------------------------------------------------------ closed-form gate
def gate_section(paths: ArtifactPaths) -> Section | None:
    """The closed-form gate: what each method reaches on reference samples at one KL, by the training ensemble.

    None where it was not computed: without scored reference samples there is none.
    """
    gate = load(paths.reward_analysis / "gate.json")
    if not gate:
        return None
    rows = tuple(
        (
            row["method"],
            *(format_number(row["gains"].get(k)) for k in paths.objectives),
            format_number(row["worst_gain"]),
            format_number(row["mean_of_min"]),
            format_number(row["effective_sample_size"], 1),
        )
        for row in gate["rows"]
    )
    reference = next((format_number(row["reference_mean_of_min"]) for row in gate["rows"]), NOTHING)
    caption = (
        f"Before any training: the optimal policy of each reward on {gate['samples_per_prompt']} samples of "
        f"{gate['prompts']} {gate['source'].removeprefix('reference samples of the ')}, at {format_number(gate['kl'])} nats for all (kl_target "
        f"{gate['kl_target']:g}). Gains over the reference in calibrated units by the mean members of the training "
        f"ensemble, a proxy; weights of maxmin and constraints are solved on these very samples. E min of the reference: "
        f"{reference}. Below about 4 effective samples a row is mostly noise."
    )
    columns = ("method", *paths.objectives, "worst gain, min E", "E min", "effective samples")
    notes = [f"{row['method']}: {row['reason']}" for row in gate.get("refused") or []]
    return {"table": Table(columns, rows, caption), "notes": notes}


# ------------------------------------------------------------------ samples
def samples_section(paths: ArtifactPaths, methods: list[str]) -> Section:
    """Prompts with every method's responses, the reference first; at most `MAX_BROWSED_PROMPTS` of them."""
    order = sorted(methods, key=lambda name: name != REFERENCE)
    by_method = {}
    for name in order:
        record = load(paths.metrics / f"{name}.json") or {}
        rows = load_rows(paths.metrics / record["samples"]) if record.get("samples") else []
        if rows:
            by_method[name] = {row["prompt_id"]: row for row in rows}
    prompts: dict[str, dict[str, Any]] = {}
    for rows in by_method.values():
        prompts |= {key: row for key, row in rows.items() if key not in prompts}
    shown = [_browsed(key, row, by_method) for key, row in list(prompts.items())[:MAX_BROWSED_PROMPTS]]
    return {"prompts": shown, "total": len(prompts), "missing": None if shown else missing(paths, EVALUATE)}


def _browsed(key: str, row: dict[str, Any], by_method: dict[str, dict[str, Any]]) -> dict[str, Any]:
    responses = [
        {"method": name, "samples": rows[key]["responses"]} for name, rows in by_method.items() if key in rows
    ]
    prompt = (
        row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    )
    return {"id": key, "objective": row.get("objective", ""), "prompt": prompt, "responses": responses}


# ------------------------------------------------------------------ limits
def limits_section(paths: ArtifactPaths, headline: Section) -> list[str]:
    """What the reader must not conclude from these numbers, as sentences."""
    truncated = headline.get("truncated") or {}
    cut = ", ".join(f"{name} {share:.0%}" for name, share in truncated.items())
    said = [
        "Win rates are the verdict of reward models, not of people; each judge errs as often as its held-out accuracy says.",
        "Intervals cover the choice of prompts. They do not cover the training seed: each policy was trained once.",
        "Differences between methods at different KL are differences of strength as much as of method; read the frontier.",
    ]
    if cut:
        said.append(
            f"Responses cut at the token limit: {cut}. For those the KL is that of the part that was sampled, a lower bound."
        )
    if paths.approach == "embedded":
        said.append(EMBEDDED_CAVEAT)
    if paths.approach == "pku_safe":
        said.append(
            "PKU-SafeRLHF has no honesty label: its honest objective is a proxy unless TruthfulQA is used for it."
        )
    if headline["rows"] and len(objectives_of(headline["rows"])) < len(paths.objectives):
        said.append("Not every objective was judged; the worst objective is the worst of those that were.")
    return said


EMBEDDED_CAVEAT = "A few hundred embedded pairs and a small model: this shows that the machinery works, and is no result about any method."
