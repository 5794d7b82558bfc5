"""The numbers of the gold-reward study as Markdown tables.

Pure functions of the study's results (`gold.run.assemble`); its figures are in `benchmarks.gold.figures`.
"""

from collections.abc import Sequence
from typing import Any

from prmd.objectives import OBJECTIVES

Row = dict[str, Any]
FIGURES = {
    "bias": "over length bias",
    "overoptimisation": "over-optimisation",
    "balance": "balance",
    "ablations": "ablations",
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, *rows]
    shown = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([shown[0], "|---" * len(head) + "|", *shown[1:]])


def _summary_head() -> tuple[str, ...]:
    first = ("method", "bias", "KL", "reached", "worst win rate", "95 %", *OBJECTIVES)
    return (*first, "E min", "95 %", "tokens", "seeds")


def _summary_cells(row: Row) -> list[str]:
    wins = [f"{row['win_rate'][k]:.3f}" for k in OBJECTIVES]
    cells = [row.get("label", row["method"]), f"{row['bias']:g}", f"{row['kl']:.2f}", str(row["reached"])]
    cells += [f"{row['worst_win_rate']:.3f}", _range(row["ci"]), *wins]
    cells += [f"{row['mean_of_min']:.3f}", _range(row["mean_of_min_ci"]), f"{row['length']:.1f}"]
    return [*cells, str(row["seeds"])]


def table(rows: Sequence[Row]) -> str:
    """The summary."""
    return markdown(_summary_head(), [_summary_cells(row) for row in rows])


def ablation_table(rows: Sequence[Row]) -> str:
    """An ablation: its rows, and each less the shipped value of its method."""

    def less(row: Row) -> list[str]:
        found = [row["against_shipped"].get(name) for name in ("worst_per_world", "mean_of_min")]
        return ["shipped" if one is None else _signed(one["difference"], one["ci"]) for one in found]

    head = (*_summary_head(), "worst per world, minus shipped", "E min, minus shipped")
    return markdown(head, [[*_summary_cells(row), *less(row)] for row in rows])


def _paired_table(rows: Sequence[Row]) -> str:
    cells = [
        [row["method"], f"{row['bias']:g}", row["measure"], f"{row['difference']:+.3f}", _range(row["ci"])]
        for row in rows
    ]
    return markdown(("method", "bias", "measure", "minus dpo", "95 %"), cells)


def _falls_table(rows: Sequence[Row]) -> str:
    head = ("method", "measure", "from bias", "to", "fall", "95 %", "more than dpo", "95 %")
    cells = []
    for row in rows:
        ends = [f"{row['from']:g}", f"{row['to']:g}", f"{row['fall']:+.3f}", _range(row["fall_ci"])]
        more = row["more_than_dpo"]
        ends += ["–", "–"] if more is None else [f"{more:+.3f}", _range(row["more_than_dpo_ci"])]
        cells.append([row["method"], row["measure"], *ends])
    return markdown(head, cells)


def _over_optimisation_table(curves: Sequence[Row]) -> str:
    head = ("policy", "KL", *("mean: true", "95 %", "mean: reward models", "95 %"))
    head += ("E min: true", "95 %", "own R: reward models", "95 %")
    cells = []
    for curve in curves:
        points = curve["points"]
        for point in (points[len(points) // 2], points[-1]):
            row = [curve["label"], f"{point['kl']:.2f}"]
            for name in ("gold", "proxy", "gold_min", "proxy_robust"):
                row += [f"{point[name]:+.3f}", _range(point[f"{name}_ci"])]
            cells.append(row)
    return markdown(head, cells)


def _reward_models_table(rows: Sequence[Row]) -> str:
    columns = {
        "longer_share": "longer preferred",
        "accuracy_single": "true accuracy, r_0",
        "accuracy_ensemble": "mean member",
        "length_correlation": "correlation with length",
        "member_correlation": "of members",
        "disagreement_error_correlation": "of disagreement with error",
    }
    cells = [
        [row["objective"], f"{row['bias']:g}", *(f"{row[name]:.3f}" for name in columns), str(row["seeds"])]
        for row in rows
    ]
    return markdown(("objective", "bias", *columns.values(), "seeds"), cells)


def heads_table(rows: Sequence[Row]) -> str:
    """What the settings of the heads are worth."""
    methods = list(rows[0]["gate"])
    head = ("fit share", "anchor", "accuracy of r_0", "of the mean member", "member correlation")
    cells = []
    for row in rows:
        gates = [row["gate"][method] for method in methods]
        gains = [f"{gate['worst_gain']:+.3f} / {gate['mean_of_min_gain']:+.3f}" for gate in gates]
        cells.append(
            [
                *(f"{row['fit_fraction']:g}", f"{row['anchor']:g}", f"{row['accuracy_single']:.3f}"),
                *(f"{row['accuracy_ensemble']:.3f}", f"{row['member_correlation']:.2f}"),
                *(*gains, str(row["seeds"])),
            ]
        )
    return markdown((*head, *methods, "seeds"), cells)


def page(results: dict[str, Any], name: str) -> str:
    """All tables of the study as Markdown.

    Args:
        name: of the results' file, after which the figures are named.
    """
    parts = ["# Gold-reward study", _about(results["setup"])]
    figures = [f"[{what}]({name}_{part}.png)" for part, what in FIGURES.items()]
    parts += [
        f"Figures: {', '.join(figures)}. Every number: [{name}.json]({name}.json).",
        "## Main comparison",
    ]
    parts += [table(results["summary"]), "## Same worlds, minus plain DPO", _paired_table(results["paired"])]
    if results["falls"]:
        parts += ["## Loss from the smallest to the largest bias", _falls_table(results["falls"])]
    if results["over_optimisation"]:
        title = "## Over-optimisation: gains over the reference half-way and at the end, true and by the reward models"
        parts += [title, _over_optimisation_table(results["over_optimisation"])]
    for ablation, rows in results["ablations"].items():
        parts += [f"## Ablation: {ablation}", ablation_table(rows)]
    parts += ["## Reward models, on true preferences of held-out responses"]
    parts += [_reward_models_table(results["reward_models"])]
    if results["heads"]:
        title = (
            "## Heads: true gain of the closed-form optimum at 1 nat, worst objective / mean of the minimum"
        )
        parts += [title, heads_table(results["heads"])]
    return "\n\n".join(parts) + "\n"


def _about(setup: Row) -> str:
    changed = [
        f"`{method}` with {', '.join(f'{name} {value:g}' for name, value in settings.items())}"
        for method, settings in setup["changed_settings"].items()
    ]
    return (
        f"{setup['policies']} policies, {len(setup['seeds'])} worlds (seeds), compared at {setup['matched_kl']:g} nats per "
        "response, interpolated between checkpoints; `reached` counts the trainings that got there, the others stand at "
        f"their last checkpoint. Shipped settings, but {'; '.join(changed)}. Columns of objectives: true win rate against the "
        "reference. `worst win rate`: the smallest of these means; `worst_per_world`: the mean of every world's own smallest, "
        "which can be paired. E min: mean of the smallest true reward of a response, in standard deviations of the reference, "
        f"whose own is {setup['reference_mean_of_min']:.3f}. {setup['intervals']}. Ablations: bias "
        f"{setup['ablation_bias']:g}, {len(setup['ablation_seeds'])} worlds."
    )


def _range(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def _signed(value: float, ends: Sequence[float]) -> str:
    return f"{value:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]"
