"""What the report says of the benchmarks: their metrics by method, what they mean, who judged, what did not run.

What lives here: the files of `benchmark_eval` in, text and tables for the template out. What does not: the sections of
`compute_metrics` (`evaluation_sections`), tables between methods (`comparison_tables`).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prmd.artifacts.paths import REFERENCE, ArtifactPaths, stage_command
from prmd.config.evaluation import BenchmarksConfig
from prmd.report.artifact_sections import Section, benchmark_names, load, missing
from prmd.report.comparison_tables import (
    Results,
    benchmark_judge_warnings,
    benchmark_judges_table,
    paired_table,
)
from prmd.report.tables import NOTHING, Table, format_number, listed, with_mark


def benchmarks_section(paths: ArtifactPaths) -> Section:
    """One row per benchmark and metric, one column per method; what did not run is one line that says why."""
    configured = BenchmarksConfig().run
    results = {name: found for name, found in benchmark_results(paths).items() if found or name in configured}
    methods = sorted({m for found in results.values() for m in found}, key=lambda m: (m != REFERENCE, m))
    table = benchmark_table(results, methods)
    folded = {
        "What the metrics mean": _meanings(row[1] for row in table.rows),
        "Paired comparisons on benchmarks": paired_table(load(paths.benchmark_comparison) or {}),
        "Who judged the benchmarks": benchmark_judges_table(results),
    }
    return {
        "table": table if table.rows else None,
        "not_run": _not_run(results),
        "missing": None if any(results.values()) else missing(paths, stage_command("benchmark_eval")),
        "warnings": benchmark_judge_warnings(results),
        "folded": {name: found for name, found in folded.items() if found},
    }


def benchmark_table(results: Results, methods: Sequence[str]) -> Table:
    """One row per benchmark and metric, one column per method."""
    rows = tuple(row for name, found in results.items() for row in _benchmark_rows(name, found, methods))
    caption = (
        "Brackets: 95 % intervals. Chance is what guessing scores, where it has a score; ↑ ↓: the interval excludes it. Of "
        "toxicity (rtp), non-refusals, attack success and refusals of benign requests (jbb) less is better. Constant "
        "answer: what a policy would have that answers nothing."
    )
    return Table(("benchmark", "metric", "chance", "n", *methods), rows, caption)


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


def benchmark_results(paths: ArtifactPaths) -> Results:
    """Every benchmark's results that are there, by method; of this run of `benchmark_eval` or an earlier one."""
    return {name: _results_in(paths.benchmark(name)) for name in benchmark_names(paths)}


def _results_in(folder: Path) -> dict[str, dict[str, Any]]:
    found = {path.stem: load(path) for path in sorted(folder.glob("*.json")) if path.name != "run.json"}
    return {method: result for method, result in found.items() if result and result.get("status")}


def _not_run(results: Results) -> str:
    """`Not run: a and b (why); c, only x (why).`: benchmarks with one reason share it; empty where everything ran."""
    by_reason: dict[str, list[str]] = {}
    for name, found in results.items():
        refused = {m: r.get("reason") or "no reason given" for m, r in found.items() if r["status"] != "done"}
        for reason in dict.fromkeys(refused.values() if found else ["not there yet"]):
            who = [method for method, why in refused.items() if why == reason]
            named = name if len(who) == len(found) else f"{name} of {listed(who)}"
            by_reason.setdefault(reason, []).append(named)
    said = (f"{listed(names)} ({reason})" for reason, names in by_reason.items())
    return f"Not run: {'; '.join(said)}." if by_reason else ""


def _benchmark_rows(
    name: str, found: Mapping[str, dict[str, Any]], methods: Sequence[str]
) -> Iterable[tuple[str, ...]]:
    done = {method: result["metrics"] for method, result in found.items() if result["status"] == "done"}
    label = next((r.get("benchmark") for r in found.values() if r["status"] == "done"), None) or name
    for metric in dict.fromkeys(metric for metrics in done.values() for metric in metrics):
        estimates = {m: metrics[metric] for m, metrics in done.items() if metric in metrics}
        chance = next((e["chance"] for e in estimates.values() if e.get("chance") is not None), None)
        counts = "/".join(dict.fromkeys(str(e.get("n", NOTHING)) for e in estimates.values()))
        neutral = float("nan") if chance is None else chance
        cells = (with_mark(estimates.get(m), neutral) for m in methods)
        yield (label, metric, format_number(chance, 3), counts, *cells)
