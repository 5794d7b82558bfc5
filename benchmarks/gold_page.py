"""The numbers of the gold-reward study as Markdown tables.

Pure functions of the study's results (`gold_run.assemble`); its figures are in `prmd.plotting_study`.
"""

from collections.abc import Sequence
from typing import Any

from prmd.objectives import OBJECTIVES


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    head = ("method", "bias", "KL", "worst win rate", "95 %", *OBJECTIVES, "E min", "95 %", "tokens", "seeds")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        wins = [f"{row['win_rate'][k]:.3f}" for k in OBJECTIVES]
        cells = [row.get("label", row["method"]), f"{row['bias']:g}", f"{row['kl']:.2f}"]
        cells += [f"{row['worst_win_rate']:.3f}", _range(row["ci"]), *wins]
        cells += [f"{row['mean_of_min']:.3f}", _range(row["mean_of_min_ci"]), f"{row['length']:.1f}"]
        lines.append("| " + " | ".join([*cells, str(row["seeds"])]) + " |")
    return "\n".join(lines)


def heads_table(rows: Sequence[dict[str, Any]]) -> str:
    """What the settings of the heads are worth, as a Markdown table."""
    methods = list(rows[0]["gate"])
    head = (
        "fit share",
        "anchor",
        "accuracy of r_0",
        "of the mean member",
        "member correlation",
        *methods,
        "seeds",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{row['fit_fraction']:g}", f"{row['anchor']:g}", f"{row['accuracy_single']:.3f}"]
        cells += [f"{row['accuracy_ensemble']:.3f}", f"{row['member_correlation']:.2f}"]
        gates = [row["gate"][method] for method in methods]
        cells += [f"{gate['worst_gain']:+.3f} / {gate['mean_of_min_gain']:+.3f}" for gate in gates]
        lines.append("| " + " | ".join([*cells, str(row["seeds"])]) + " |")
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """All numbers of the study as Markdown."""
    setup, paired = (
        results["setup"],
        ["| method | bias | measure | minus dpo | 95 % |", "|---|---|---|---|---|"],
    )
    for row in results["paired"]:
        cells = (
            row["method"],
            f"{row['bias']:g}",
            row["measure"],
            f"{row['difference']:+.3f}",
            _range(row["ci"]),
        )
        paired.append("| " + " | ".join(cells) + " |")
    about = (
        f"{setup['policies']} policies, {len(setup['seeds'])} seeds, compared at {setup['matched_kl']:g} nats per response; "
        f"true rewards, E min of the reference {setup['reference_mean_of_min']:.3f}. {setup['intervals']}. Ablations: bias "
        f"{setup['ablation_bias']:g}, {len(setup['ablation_seeds'])} seeds."
    )
    parts = [f"# Gold-reward study\n\n{about}", table(results["summary"])]
    parts += ["## Same seeds, minus plain DPO", "\n".join(paired)]
    for name, rows in results["ablations"].items():
        parts += [f"## {name}", table(rows)]
    if results["heads"]:
        parts += [
            "## Heads: true gain of the worst objective / of the mean minimum",
            heads_table(results["heads"]),
        ]
    return "\n\n".join(parts) + "\n"


def _range(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"
