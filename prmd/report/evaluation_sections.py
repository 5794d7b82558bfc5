"""What the report says of the evaluation: headline, measures, approaches, closed-form table, benchmarks, samples, limits."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from prmd.artifacts.paths import ArtifactPaths, stage_command
from prmd.config.evaluation import BenchmarksConfig
from prmd.report.artifact_sections import Section, benchmark_names, folders, load, load_rows, missing
from prmd.report.comparison_tables import (
    BETTER,
    WORSE,
    benchmark_judge_warnings,
    benchmark_judges_table,
    best_of_n_table,
    frontier_table,
    judge_warnings,
    judges_table,
    paired_table,
    significance_marks,
    win_matrix_tables,
)
from prmd.report.tables import (
    NOTHING,
    REFERENCE,
    Table,
    format_estimate,
    format_number,
    headline_measures,
    headline_table,
    judge_measures,
    measure_table,
    objectives_of,
    outcome_measures,
    proxy_measures,
    with_mark,
)

EVALUATE = stage_command("compute_metrics")


# ------------------------------------------------------------------ headline
def headline_section(paths: ArtifactPaths) -> Section:
    """The headline table, what it was measured on, who judged, and every other table of the comparison."""
    comparison = load(paths.metrics / "comparison.json")
    if not comparison or not comparison.get("rows"):
        return {"missing": missing(paths, EVALUATE), "rows": []}
    rows, left_out = comparison["rows"], comparison.get("missing") or []
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
        "table": _with_left_out(
            headline_table(rows, worst, _measured_on(paths, evaluation, comparison), marks), left_out
        ),
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
        "notes": [
            *(f"{one['method']}: not evaluated: {one['reason']}" for one in left_out),
            *(
                f"{row['method']}: not trained here: {', '.join(f'{k} {v}' for k, v in row['elsewhere'].items())}"
                for row in rows
                if row.get("elsewhere")
            ),
            *(f"{name}: {note}" for name, m in metrics.items() for note in m.get("notes") or []),
        ],
        "truncated": {n: m["truncated_share"] for n, m in metrics.items() if m.get("truncated_share")},
    }


def _with_left_out(table: Table, left_out: list[dict[str, str]]) -> Table:
    """The table with a row for each policy that could not be evaluated, and why behind its caption."""
    blank = (NOTHING,) * (len(table.columns) - 2)
    rows = tuple((one["method"], "not evaluated", *blank) for one in left_out)
    why = "".join(f" {one['method']} is not evaluated: {one['reason']}." for one in left_out)
    return replace(table, rows=(*table.rows, *rows), caption=table.caption + why)


def _tables(
    paths: ArtifactPaths, comparison: dict[str, Any], metrics: dict[str, dict[str, Any]]
) -> dict[str, Table]:
    """Every table beside the headline and the judges' by its heading; those without data are left out."""
    methods = list(metrics)
    front = comparison.get("hypervolume_left_out") or format_estimate(comparison.get("hypervolume"), 3)
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
    better = [row["method"] for row in policies if min(_verdict_on(row, "low")) > 0.5]
    worse = [row["method"] for row in policies if max(_verdict_on(row, "high")) < 0.5]
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


def _verdict_on(row: dict[str, Any], end: str) -> list[float]:
    """That end of the worst objective's band, and of its band at equal length where reward models were debiased."""
    controlled = row.get("worst_length_controlled") if row.get("debiased") else None
    return [band[end] for band in (row["worst"], controlled) if band]


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
        f"band, lowest lower to lowest upper end. At equal length: the win rate at the reference's length. ↑ ↓: the interval "
        f"excludes ½.{paired}{_both_needed(comparison)}{_not_trained_here(comparison)}"
    )


def _not_trained_here(comparison: dict[str, Any]) -> str:
    found = [row["method"] for row in comparison.get("rows") or [] if row.get("elsewhere")]
    return f" Not trained here: {_listed(found)}, see the notes." if found else ""


def _both_needed(comparison: dict[str, Any]) -> str:
    debiased = [row["method"] for row in comparison.get("rows") or [] if row.get("debiased")]
    if not debiased:
        return ""
    return (
        f" The reward models of {_listed(debiased)} were debiased, so a mark needs the win rate and the one at equal length to "
        "agree; the mean of the minimum has no counterpart at equal length."
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
        table = headline_table(named, {}, caption)
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


# ------------------------------------------------------------------ benchmarks
def benchmarks_section(paths: ArtifactPaths) -> Section:
    """One row per benchmark and metric, one column per method; what did not run is a row that says why."""
    configured = BenchmarksConfig().run
    results = {name: found for name, found in benchmark_results(paths).items() if found or name in configured}
    methods = sorted({m for found in results.values() for m in found}, key=lambda m: (m != "reference", m))
    rows = [row for name, found in results.items() for row in _benchmark_rows(paths, name, found, methods)]
    caption = (
        "Brackets: 95 % intervals. Chance is what guessing scores, where it has a score; ↑ ↓: the interval excludes it. Of "
        "toxicity (rtp), non-refusals, attack success and refusals of benign requests (jbb) less is better. Constant "
        "answer: what a policy would have that answers nothing."
    )
    table = Table(("benchmark", "metric", "chance", "n", *methods), tuple(rows), caption)
    folded = {
        "What the metrics mean": _meanings(row[1] for row in rows),
        "Paired comparisons on benchmarks": paired_table(load(paths.benchmark_comparison) or {}),
        "Who judged the benchmarks": benchmark_judges_table(results),
    }
    return {
        "table": table,
        "warnings": benchmark_judge_warnings(results),
        "folded": {name: found for name, found in folded.items() if found},
    }


_MEANINGS = (
    (
        "implicit_reward_accuracy",
        "pairs in which the policy raised the chosen response more than the other",
        "higher",
    ),
    (
        "reference_free_accuracy",
        "pairs in which the chosen response is the likelier one, the reference left out",
        "higher",
    ),
    (
        "longer_is_chosen",
        "pairs in which the longer response is the chosen one: of the data, not of a model",
        NOTHING,
    ),
    ("mc1", "questions whose best answer is likelier than every false one", "higher"),
    ("mc2", "probability of the true answers among all listed ones", "higher"),
    ("mc3", "true answers that are likelier than every false one", "higher"),
    ("true", "generated answers that the judge in brackets calls true", "higher"),
    ("declines", "generated answers that decline to answer, which is never untrue", NOTHING),
    (
        "rtp_emt",
        "expected toxicity of the worst of so many continuations, by the scorer in brackets",
        "lower",
    ),
    ("rtp_tp", "prompts with a toxic one (above ½) among so many continuations", "lower"),
    ("rtp_chat_emt", "as rtp_emt, asked by the chat template", "lower"),
    ("rtp_chat_tp", "as rtp_tp, asked by the chat template", "lower"),
    (
        "jbb_nonrefusal",
        "harmful requests answered without the words of a refusal: not yet a successful attack",
        "lower",
    ),
    ("jbb_asr", "harmful requests whose answer the judge calls harmful", "lower"),
    ("jbb_benign_refusal", "benign requests that were refused", "lower"),
    ("average", "the judge's ratings from 1 to 10, both turns", "higher"),
    ("turn", "the judge's ratings of the first and of the second answer", "higher"),
    ("win rate", "wins over the reference in both orders, ties and disagreement ½", "higher"),
    (
        "win rate against the reference, at equal length",
        "the same had both as many tokens: the logistic fit of the headline's length control",
        "higher",
    ),
    ("unreadable", "replies of the judge without a verdict, which count in no other metric", "lower"),
    ("empty", "answers without a word", "lower"),
)
"""Beginning of a metric's name, what it is a share or a mean of, and which way is better."""


def _meanings(metrics: Iterable[str]) -> Table | None:
    """The meaning of every metric that is there, by the longest beginning that fits."""
    told = {}
    for metric in metrics:
        fitting = [row for row in _MEANINGS if metric.startswith(row[0])]
        if fitting:
            name, meaning, better = max(fitting, key=lambda row: len(row[0]))
            told[name] = (name, meaning, better)
    rows = tuple(told[name] for name, _, _ in _MEANINGS if name in told)
    return Table(("metric", "what it is", "better"), rows) if rows else None


def benchmark_results(paths: ArtifactPaths) -> dict[str, dict[str, dict[str, Any]]]:
    """Every benchmark's results that are there, by method; of this run of `benchmark_eval` or an earlier one."""
    return {name: _results_in(paths.benchmark(name)) for name in benchmark_names(paths)}


def _results_in(folder: Path) -> dict[str, dict[str, Any]]:
    found = {path.stem: load(path) for path in sorted(folder.glob("*.json")) if path.name != "run.json"}
    return {method: result for method, result in found.items() if result and result.get("status")}


def _benchmark_rows(
    paths: ArtifactPaths, name: str, found: dict[str, dict[str, Any]], methods: list[str]
) -> Iterable[tuple[str, ...]]:
    blank = (NOTHING,) * (2 + len(methods))
    if not found:
        yield (name, f"not there yet: run {missing(paths, stage_command('benchmark_eval'))}", *blank)
    done = {method: result["metrics"] for method, result in found.items() if result["status"] == "done"}
    refused = {m: r.get("reason") or "no reason given" for m, r in found.items() if r["status"] != "done"}
    for reason in dict.fromkeys(refused.values()):
        who = "" if not done else f" ({', '.join(m for m, why in refused.items() if why == reason)})"
        yield (name, f"not run: {reason}{who}", *blank)
    label = next((r.get("benchmark") for r in found.values() if r["status"] == "done"), None) or name
    for metric in dict.fromkeys(metric for metrics in done.values() for metric in metrics):
        estimates = {m: metrics[metric] for m, metrics in done.items() if metric in metrics}
        chance = next((e["chance"] for e in estimates.values() if e.get("chance") is not None), None)
        counts = "/".join(dict.fromkeys(str(e.get("n", NOTHING)) for e in estimates.values()))
        neutral = float("nan") if chance is None else chance
        cells = (with_mark(estimates.get(m), neutral) for m in methods)
        yield (label, metric, format_number(chance, 3), counts, *cells)


# ------------------------------------------------------------------ samples
def samples_section(paths: ArtifactPaths, methods: list[str]) -> Section:
    """Prompts with every method's responses, the reference first; at most `MAX_BROWSED_PROMPTS` of them."""
    order = sorted(methods, key=lambda name: name != "reference")
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


EMBEDDED_CAVEAT = (
    "The embedded data are a few hundred pairs and the model is small: at this size the page shows that the machinery "
    "works, and is not a result about any method."
)
