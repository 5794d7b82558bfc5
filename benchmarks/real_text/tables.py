"""The real-text study as Markdown; its numbers are made in `real_text/summary.py`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from prmd.objectives import OBJECTIVES
from prmd.report.tables import Table, format_estimate, format_number, to_markdown

Row = dict[str, Any]


def markdown(results: Row) -> str:
    """The study as Markdown: methods over prompts, the same over seeds, paired differences, judges, reward models."""
    setup = results["setup"]
    seeds = sorted({seed for row in results["summary"] for seed in row["seeds"]})
    tables = [
        _method_table(
            results, "prompts", "95 % over the prompts of all seeds (bootstrap), for these trainings"
        ),
        _method_table(results, "seeds", "95 % over seeds (Student's t)"),
        _seed_table(results, seeds),
        _paired_table(results),
        _judge_table(results["judges"]),
        _reward_table(results["reward_models"]),
    ]
    head = ["# Length-biased preferences on real text", "", setup["about"], ""]
    return "\n".join([*head, *map(to_markdown, tables)])


def _interval(found: Row, over: str, digits: int = 2) -> str:
    ends = found[over]
    low, high = ends if ends else (None, None)
    return format_estimate({"value": found["value"], "low": low, "high": high}, digits)


def _method_table(results: Row, over: str, caption: str) -> Table:
    columns = ("method", "KL", *OBJECTIVES, "worst", "mean of minimum", "tokens", "reached")
    rows = [
        (
            row["method"],
            format_number(float(np.mean(row["kl"]))),
            *(_interval(row["win_rate"][k], over) for k in OBJECTIVES),
            _interval(row["worst_win_rate"], over),
            _interval(row["mean_of_min"], over),
            _interval(row["length"], over, 1),
            f"{sum(row['reached'])} of {len(row['seeds'])}",
        )
        for row in results["summary"]
    ]
    start = results["reference"]
    last = (_interval(start["mean_of_min"], over), _interval(start["length"], over, 1))
    reference = ("reference", "0.00", *["0.50"] * len(OBJECTIVES), "0.50", *last, "")
    kl = results["setup"]["matched_kl"]
    text = f"Win rates against the reference at {kl:g} nats per response; {caption}."
    return Table(columns, (reference, *rows), text)


def _seed_table(results: Row, seeds: Sequence[int]) -> Table:
    rows = []
    for row in results["summary"]:
        for name in ("worst_win_rate", "mean_of_min", "length"):
            values = dict(zip(row["seeds"], row[name]["by_seed"], strict=True))
            cells = (format_number(values.get(seed)) for seed in seeds)
            rows.append((row["method"], name.replace("_", " "), *cells))
        ends = dict(zip(row["seeds"], row["at_end"]["kl"], strict=True))
        rows.append((row["method"], "KL at the end", *(format_number(ends.get(seed)) for seed in seeds)))
    columns = ("method", "measure", *(f"seed {seed}" for seed in seeds))
    return Table(
        columns, tuple(rows), "Every seed by itself; its worst win rate is the smallest of its own three."
    )


def _paired_table(results: Row) -> Table:
    rows = tuple(
        (
            f"{row['method']} less {row['against']}",
            row["measure"].replace("win_rate/", "win rate, ").replace("_", " "),
            _interval(row, "prompts"),
            _interval(row, "seeds"),
        )
        for row in results["paired"]
    )
    columns = ("methods", "measure", "over prompts", "over seeds")
    return Table(
        columns,
        rows,
        "Differences on the same prompts at the matched KL; 95 %, not corrected for their number.",
    )


def _judge_table(judges: Sequence[Row]) -> Table:
    rows = tuple(
        (
            row["objective"],
            str(row["pairs"]),
            format_estimate(row["accuracy"]),
            format_estimate(row["length_only_accuracy"]),
            format_number(row["longer_share"]),
            format_number(row["prefers_longer"]),
        )
        for row in judges
    )
    columns = (
        "judge",
        "pairs",
        "accuracy",
        "longer-is-better accuracy",
        "longer chosen in its pairs",
        "prefers longer",
    )
    return Table(columns, rows, "Judges on unbiased test pairs; accuracies with 95 % Wilson intervals.")


def _reward_table(models: Sequence[Row]) -> Table:
    rows = tuple(
        (
            f"{row['objective']}, seed {row['seed']}",
            str(row["longer_is_chosen"]["pairs"]),
            " → ".join(format_number(row["longer_is_chosen"][when]) for when in ("before", "after")),
            format_estimate(row["accuracy"]),
            format_estimate(row["mean_member_accuracy"]),
            format_number(row["member_correlation"]),
            format_number(row["prefers_longer"]),
        )
        for row in models
    )
    columns = (
        "reward model",
        "pairs",
        "longer chosen in them",
        "accuracy",
        "of the mean member",
        "member correlation",
        "prefers longer",
    )
    return Table(
        columns,
        rows,
        "Reward models: share of pairs that prefer the longer response before and after choosing; accuracy on unbiased test pairs.",
    )
