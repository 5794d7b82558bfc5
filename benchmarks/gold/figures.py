"""The figures of the gold-reward study: true rewards over length bias, over-optimisation, ablations.

What lives here: `plot_gold_reward`, a pure function of `benchmarks/results/gold_reward.json`. What does not: numbers and
intervals (`benchmarks.gold.summary` makes them, they are only drawn here), the canvas and palette (`report.figures`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.closed_form.picture import plot_members
from benchmarks.closed_form.scenarios import SCENARIOS
from benchmarks.gold.labels import UNBIASED
from benchmarks.gold.summary import DPO, OURS, TODAY
from prmd.artifacts import io
from prmd.report.figures import GREY, MARKERS, PALETTE, Axes, canvas, legend_below

Row = Mapping[str, Any]
_WORST, _MINIMUM = "worst-objective win rate", "E[min over objectives], sd"


def plot_gold_reward(results_json: Path) -> list[Path]:
    """Every figure of the trained study that its results have the data for.

    Args:
        results_json: the results; figures lie beside the file and are named after it.

    Returns:
        Paths of `<name>_bias`, and with ablations `<name>_overoptimisation` and `<name>_ablations`, in this order.
    """
    results, folder = io.read_json(results_json), results_json.parent

    def path(part: str) -> Path:
        return folder / f"{results_json.stem}_{part}.png"

    drawn = [_draw_bias(path("bias"), results["summary"], results["paired"], results["setup"])]
    if "ablations" in results:
        setup = results["ablations_setup"]
        drawn.append(_draw_over_optimisation(path("overoptimisation"), results["over_optimisation"], setup))
        drawn.append(_draw_ablations(path("ablations"), results["ablations"], setup))
    return drawn


def plot_closed_form(results_json: Path) -> list[Path]:
    """Worst objective over the share of longer responses chosen: DPO, today's heads, the family, and the ceiling."""
    results, folder = io.read_json(results_json), results_json.parent
    kl = results["closed_form"][0]["kl"]
    biases = {name: s.bias for name, s in SCENARIOS.items() if name.startswith("L")}
    rows = {(r["family"], r["method"], r["scenario"]): r for r in results["closed_form"] if r["kl"] == kl}
    path = folder / f"{results_json.stem}_closed_form.png"
    with canvas(path, height=4.6) as axes:
        for i, (label, family, method) in enumerate(_CLOSED_FORM_LINES):
            own = [rows[family, method, name] for name in biases]
            axes.errorbar(
                [bias + (i - 1.5) * 0.003 for bias in biases.values()],
                [row["worst_per_world"] for row in own],
                yerr=np.hstack([_bars(row, "worst_per_world", "worst_per_world_ci") for row in own]),
                elinewidth=0.9,
                capsize=2,
                label=label,
                linestyle=":" if i == len(_CLOSED_FORM_LINES) - 1 else "-",
                **_style(i),
            )
        axes.axhline(0.5, color="black", linewidth=1, linestyle=":")
        seeds = rows["none", "dpo", "L90"]["seeds"]
        axes.set_xlabel(
            f"length bias ρ: helpful pairs preferring the longer\n{kl:g} nats, {seeds} worlds; members of hard_min"
        )
        axes.set_ylabel(_WORST)
        axes.set_title(_closed_form_message(rows))
        legend_below(axes)
    return [path, plot_members(folder / f"{results_json.stem}_members.png", results["closed_form_members"])]


_CLOSED_FORM_LINES = (
    ("DPO", "none", "dpo"),
    ("on the labels", "bootstrap", "hard_min"),
    ("over the bias", "strengths", "hard_min"),
    ("unbiased labels", "unbiased labels", "hard_min"),
)


def _closed_form_message(rows: Mapping[tuple[str, str, str], Row]) -> str:
    """What the figure shows, in the numbers of the strongest selection that all studies have."""
    own, dpo = rows["strengths", "hard_min", "L90"], rows["none", "dpo", "L90"]
    return f"At ρ = .9: family {own['worst_per_world']:.2f}, DPO {dpo['worst_per_world']:.2f}"


def _bars(row: Row, value: str, ends: str) -> np.ndarray:
    """Distances below and above a value, [2, 1], as `errorbar` wants them."""
    low, high = row[ends]
    return np.array([[max(0.0, row[value] - low)], [max(0.0, high - row[value])]])


def _draw_bias(path: Path, rows: Sequence[Row], paired: Sequence[Row], setup: Row) -> Path:
    """Worst objective and mean of the minimum over the length bias: DPO, today's heads, the family, and the ceiling.

    The ceiling is today's method on unbiased labels, at every bias the same.
    """
    found = {(row["method"], row["family"], row["bias"]): row for row in rows}
    biases = sorted({row["bias"] for row in rows})
    with canvas(path, height=6.4, rows=2, share_x=True) as panels:
        for axes, value, label in (
            (panels[0], "worst_per_world", _WORST),
            (panels[1], "mean_of_min", _MINIMUM),
        ):
            for i, (name, compared) in enumerate(_LINES.items()):
                own = [found[*compared, bias] for bias in biases]
                axes.errorbar(
                    [bias + (i - 1) * 0.006 for bias in biases],
                    [row[value] for row in own],
                    yerr=np.hstack([_bars(row, value, f"{value}_ci") for row in own]),
                    elinewidth=0.9,
                    capsize=2,
                    label=name,
                    **_style(i),
                )
            if unbiased := found.get((*TODAY, UNBIASED)):
                axes.axhline(
                    unbiased[value],
                    color=_style(3)["color"],
                    linestyle="--",
                    label="ceiling: unbiased labels",
                )
            axes.set_ylabel(label)
        _reference_lines(panels, setup)
        panels[1].set_xlabel(
            "length bias ρ: helpful pairs preferring the longer\n"
            f"{setup['matched_kl']:g} nats, {len(setup['seeds'])} worlds; hard_min on both heads"
        )
        panels[0].set_title(bias_message(paired, biases[-1]))
        legend_below(panels[0])
    return path


_LINES = {"DPO": DPO, "today's heads": TODAY, "family": OURS}


def bias_message(paired: Sequence[Row], bias: float) -> str:
    """What the paired differences show at the strongest bias, and no more."""
    (row,) = (
        row
        for row in paired
        if (row["method"], row["family"]) == OURS
        and (row["against"], row["bias"], row["measure"]) == ("dpo/none", bias, "worst_per_world")
    )
    low, high = row["ci"]
    apart = row["seeds"] > 1 and (low > 0 or high < 0)
    shown = ("beats DPO" if low > 0 else "loses to DPO") if apart else "and DPO not told apart"
    return (
        f"Family {shown} at ρ = {bias:g}:\n{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] worst objective"
    )


def _style(index: int) -> dict[str, str]:
    colours = (*PALETTE, GREY)
    return {"color": colours[index % len(colours)], "marker": MARKERS[index % len(MARKERS)]}


def _reference_lines(panels: Sequence[Axes], setup: Row) -> None:
    for axes, level in zip(panels, (0.5, setup["reference_mean_of_min"]), strict=True):
        axes.axhline(level, color="black", linewidth=1, linestyle=":")


def _draw_over_optimisation(path: Path, curves: Sequence[Row], setup: Row) -> Path:
    """Gains over sqrt(KL), true (solid) and by the method's own reward models (dashed), each in what the method maximises.

    Above, policies of a mean reward: the mean over objectives. Below, those of a worst case R: E min, and R itself.
    """
    of_means = [curve for curve in curves if curve["method"] == "mean"]
    of_minima = [curve for curve in curves if curve["method"] != "mean"]
    with canvas(path, height=6.4, rows=2, share_x=True) as panels:
        for axes, own, truth, proxy, label in (
            (panels[0], of_means, "gold", "proxy", "mean over objectives"),
            (panels[1], of_minima, "gold_min", "proxy_robust", "minimum over objectives"),
        ):
            for curve in own:
                points, style = curve["points"], _style(list(curves).index(curve))
                x = [point["distance"] for point in points]
                axes.plot(x, [point[truth] for point in points], label=curve["label"], **style)
                axes.plot(
                    x, [point[proxy] for point in points], color=style["color"], linestyle="--", linewidth=1.2
                )
                for name in (truth, proxy):
                    ends = zip(*(point[f"{name}_ci"] for point in points), strict=True)
                    axes.fill_between(x, *ends, color=style["color"], alpha=0.12)
            axes.axhline(0, color="black", linewidth=1, linestyle=":")
            axes.set_ylabel(f"{label}, sd")
            axes.legend(loc="upper left")
        panels[1].set_xlabel(
            f"√KL from the reference (KL in nats)\nρ = {setup['bias']:g}, n = {len(setup['seeds'])} worlds"
        )
        panels[0].set_title("True gain; dashed: by reward models")
    return path


def _draw_ablations(path: Path, rows: Sequence[Row], setup: Row) -> Path:
    """Worst-objective win rate of every value of every ablation, at the matched KL and where training ends."""
    with canvas(path, height=1.8 + 0.24 * len(rows)) as axes:
        for i, name in enumerate(dict.fromkeys(row["ablation"] for row in rows)):
            own = [(place, row) for place, row in enumerate(rows) if row["ablation"] == name]
            places = [place for place, _ in own]
            axes.errorbar(
                [row["worst_win_rate"] for _, row in own],
                places,
                xerr=np.hstack([_bars(row, "worst_win_rate", "ci") for _, row in own]),
                linestyle="none",
                marker="o",
                color=PALETTE[i % len(PALETTE)],
                elinewidth=1,
            )
            ends = [row["at_end"]["worst_win_rate"] for _, row in own]
            axes.plot(ends, places, "x", color=PALETTE[i % len(PALETTE)], markersize=5)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.axvline(0.5, color="black", linewidth=1, linestyle=":")
        axes.set_xlabel(f"{_WORST}\n● {setup['matched_kl']:g} nats, × end of training")
        axes.set_title(f"Ablations, ρ = {setup['bias']:g}, n = {len(setup['seeds'])}")
    return path
