"""The numbers of the gold-reward study as Markdown tables.

Pure functions of the study's results (`gold.run.assemble`); its figures are in `benchmarks.gold.figures`.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.gold.summary import OURS
from prmd.objectives import OBJECTIVES

Row = dict[str, Any]
FIGURES = {
    "bias": "over length bias",
    "overoptimisation": "over-optimisation",
    "ablations": "ablations",
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, *rows]
    shown = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([shown[0], "|---" * len(head) + "|", *shown[1:]])


def _summary_head() -> tuple[str, ...]:
    first = ("method", "family", "bias", "KL", "reached", "worst win rate", "95 %", "per world", *OBJECTIVES)
    return (*first, "E min", "95 %", "tokens", "seeds")


def _summary_cells(row: Row) -> list[str]:
    wins = [f"{row['win_rate'][k]:.3f}" for k in OBJECTIVES]
    cells = [row.get("label", row["method"]), row["family"], f"{row['bias']:g}", f"{row['kl']:.2f}"]
    cells += [str(row["reached"]), f"{row['worst_win_rate']:.3f}", _range(row["ci"])]
    cells += [f"{row['worst_per_world']:.3f}", *wins]
    cells += [f"{row['mean_of_min']:.3f}", _range(row["mean_of_min_ci"]), f"{row['length']:.1f}"]
    return [*cells, str(row["seeds"])]


def table(rows: Sequence[Row]) -> str:
    """The summary."""
    return markdown(_summary_head(), [_summary_cells(row) for row in rows])


def ablation_table(rows: Sequence[Row]) -> str:
    """An ablation: its rows, and each less its method in the main comparison."""

    def less(row: Row) -> list[str]:
        found = [row["against_shipped"].get(name) for name in ("worst_per_world", "mean_of_min")]
        return ["–" if one is None else _difference(one) for one in found]

    head = (*_summary_head(), "worst per world, minus main", "E min, minus main")
    return markdown(head, [[*_summary_cells(row), *less(row)] for row in rows])


_DECLARED = (
    "Differences of worlds that share prompts, samples and labels. p: Student's paired t test of the declared comparisons, "
    "`hard_min` on the family against DPO and against today's heads in two measures at every bias, Holm-corrected together."
)


def _paired_table(rows: Sequence[Row]) -> str:
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["method"], row["family"], row["against"], row["bias"])
        groups.setdefault(key, {})[row["measure"]] = row
    cells = []
    for (method, family, against, bias), found in groups.items():
        worst, least, length = (found[name] for name in ("worst_per_world", "mean_of_min", "length"))
        shown = [_difference(worst), _p(worst), _difference(least), _p(least), f"{length['difference']:+.1f}"]
        cells.append([method, family, against, f"{bias:g}", *shown, str(worst["seeds"])])
    head = ("method", "family", "minus", "bias", "worst per world", "p", "E min", "p", "tokens", "seeds")
    return markdown(head, cells)


def _difference(row: Row) -> str:
    return _signed(row["difference"], row["ci"])


def _p(row: Row) -> str:
    return "–" if row["p_holm"] is None else f"{row['p_holm']:.3f}"


def wanted_table(paired: Sequence[Row], falls: Sequence[Row]) -> str:
    """What was asked of `hard_min` on the family before it was run, beside the differences."""
    found = {
        (row["against"], row["bias"], row["measure"]): row
        for row in paired
        if (row["method"], row["family"]) == OURS
    }
    names = {"worst_per_world": "worst objective", "mean_of_min": "E min"}
    cells = []
    for (against, bias, measure), row in found.items():
        wanted = _WANTED.get((against, bias), {}).get(measure)
        if wanted:
            cells.append([f"{names[measure]} less {against}, bias {bias:g}", wanted, _difference(row)])
    for row in falls:
        if (row["method"], row["family"], row["measure"]) == (*OURS, "worst_per_world"):
            what = f"fall of the worst objective from {row['from']:g} to {row['to']:g}"
            cells.append([what, "at most +.03", _signed(row["fall"], row["fall_ci"])])
    return markdown(("hard_min on the family", "wanted", "seen"), cells)


_GAINS = {
    "worst_per_world": "at least +.05, interval above 0",
    "mean_of_min": "at least +.2, interval above 0",
}
_WANTED = {
    ("dpo/none", 0.8): _GAINS,
    ("dpo/none", 0.9): _GAINS,
    ("hard_min/bootstrap", 0.5): dict.fromkeys(_GAINS, "no loss"),
}
"""By what is compared with, and bias."""


def harm_table(rows: Sequence[Row]) -> str:
    """The rows of where length is truly good, and each less DPO."""

    def less(row: Row) -> list[str]:
        found = [row["less_dpo"].get(name) for name in ("worst_per_world", "mean_of_min")]
        return ["–" if one is None else _difference(one) for one in found]

    head = (*_summary_head(), "worst per world, minus DPO", "E min, minus DPO")
    return markdown(head, [[*_summary_cells(row), *less(row)] for row in rows])


def _falls_table(rows: Sequence[Row]) -> str:
    head = ("method", "family", "measure", "from bias", "to", "fall", "95 %", "more than dpo", "95 %")
    cells = []
    for row in rows:
        ends = [f"{row['from']:g}", f"{row['to']:g}", f"{row['fall']:+.3f}", _range(row["fall_ci"])]
        more = row["more_than_dpo"]
        ends += ["–", "–"] if more is None else [f"{more:+.3f}", _range(row["more_than_dpo_ci"])]
        cells.append([row["method"], row["family"], row["measure"], *ends])
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
        [
            *(row["objective"], row["family"], f"{row['bias']:g}", f"{row['length_cost']:g}"),
            *(*(f"{row[name]:.3f}" for name in columns), str(row["seeds"])),
        ]
        for row in rows
    ]
    return markdown(("objective", "family", "bias", "length costs", *columns.values(), "seeds"), cells)


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
    """All tables of the trained study as Markdown.

    Args:
        name: of the results' file, after which the figures are named.
    """
    parts = ["# Gold-reward study", _about(results["setup"])]
    figures = [f"[{what}]({name}_{part}.png)" for part, what in FIGURES.items()]
    shown = figures if "ablations" in results else figures[:1]
    parts += [
        f"Figures: {', '.join(shown)}. Every number: [{name}.json]({name}.json).",
        "## Main comparison",
        table(results["summary"]),
        "## What was wanted of the family, and what was seen",
        wanted_table(results["paired"], results["falls"]),
        "## Within worlds",
        _DECLARED,
        _paired_table(results["paired"]),
    ]
    if results["falls"]:
        parts += ["## Loss from the smallest to the largest bias", _falls_table(results["falls"])]
    parts += ["## Where length is truly good", _about_harm(results["setup"]), harm_table(results["harm"])]
    if "ablations" in results:
        parts += _ablation_parts(results)
    parts += ["## Reward models, on true preferences of held-out responses"]
    parts += [_reward_models_table(results["reward_models"])]
    return "\n\n".join(parts) + "\n"


def _ablation_parts(results: dict[str, Any]) -> list[str]:
    setup = results["ablations_setup"]
    title = "## Over-optimisation: gains over the reference half-way and at the end, true and by the reward models"
    parts = [title, f"Here and in all ablations: bias {setup['bias']:g}, worlds: {len(setup['seeds'])}."]
    parts += [_over_optimisation_table(results["over_optimisation"])]
    rows = results["ablations"]
    for name in dict.fromkeys(row["ablation"] for row in rows):
        parts += [f"## Ablation: {name}", ablation_table([row for row in rows if row["ablation"] == name])]
    title = "## Heads: true gain of the closed-form optimum at 1 nat, worst objective / mean of the minimum"
    return [*parts, title, heads_table(results["heads"])]


def _about(setup: Row) -> str:
    changed = [
        f"`{method}` with {', '.join(f'{name} {value:g}' for name, value in settings.items())}"
        for method, settings in setup["changed_settings"].items()
    ]
    return (
        f"{setup['policies']} policies, {len(setup['seeds'])} worlds (seeds), compared at {setup['matched_kl']:g} nats per "
        "response, interpolated between checkpoints; `reached` counts the trainings that got there, the others stand at "
        f"their last checkpoint. Shipped settings, but {'; '.join(changed)}. Families of heads: on the labels as they are "
        "(bootstrap), on backbones told of length with heads told of it in full (debiased) or from not at all to in full "
        "(strengths). Columns of objectives: true win rate against the reference. `worst win rate`: the smallest of these "
        "means; `per world`: the mean of every world's own smallest, which can be paired. E min: mean of the smallest true "
        "reward of a response, in standard deviations of the reference, whose own is "
        f"{setup['reference_mean_of_min']:.3f}. {setup['intervals']}."
    )


def _about_harm(setup: Row) -> str:
    return (
        f"Every letter beyond eight adds {-setup['harm']['length_cost']:g} to the true helpful reward, and longer responses are "
        f"selected with {setup['harm']['bias']:g}: to take length for a bias is wrong here. Worlds: {len(setup['harm_seeds'])}."
    )


def _range(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def _signed(value: float, ends: Sequence[float]) -> str:
    return f"{value:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]"
