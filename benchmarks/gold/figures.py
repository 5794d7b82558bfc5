"""The figures of the gold-reward study: true rewards over length bias, over-optimisation, balance, ablations.

What lives here: `plot_gold_reward`, a pure function of `benchmarks/results/gold_reward.json`. What does not: numbers and
intervals (`benchmarks.gold.summary` makes them, they are only drawn here), the canvas and palette (`report.figures`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.closed_form.picture import plot_members
from benchmarks.closed_form.scenarios import SCENARIOS
from prmd.artifacts import io
from prmd.report.figures import GREY, MARKERS, PALETTE, Axes, canvas, legend_below, objective_colour

Row = Mapping[str, Any]
_WORST, _MINIMUM = "worst-objective win rate", "E[min over objectives], sd"


def plot_gold_reward(results_json: Path, directory: Path | None = None) -> list[Path]:
    """Every figure of the study that its results have the data for.

    Args:
        results_json: the results; figures are named after the file.
        directory: where the PNGs go; beside the file by default.

    Returns:
        Paths of `<name>_bias`, `<name>_overoptimisation`, `<name>_balance` and `<name>_ablations`, in this order.
    """
    results, folder = io.read_json(results_json), directory or results_json.parent
    setup = results["setup"]

    def path(part: str) -> Path:
        return folder / f"{results_json.stem}_{part}.png"

    drawn = [_draw_bias(path("bias"), results["summary"], setup)]
    tables = dict(results["ablations"])
    if results["over_optimisation"]:
        drawn.append(_draw_over_optimisation(path("overoptimisation"), results["over_optimisation"], setup))
    if rows := tables.pop("calibration", None):
        dpo = [row for row in tables.get("beta", []) if row["method"] == "dpo" and not row["against_shipped"]]
        drawn.append(_draw_balance(path("balance"), [*dpo, *rows], setup))
    if tables:
        drawn.append(_draw_ablations(path("ablations"), tables, setup))
    return drawn


def plot_closed_form(results_json: Path, directory: Path | None = None) -> list[Path]:
    """Worst objective over the share of longer responses chosen: DPO, today's heads, the family, and the ceiling."""
    results, folder = io.read_json(results_json), directory or results_json.parent
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


def _draw_bias(path: Path, rows: Sequence[Row], setup: Row) -> Path:
    """Worst-objective win rate and mean of the minimum over the length bias, a line per method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    width = 0.006 if len({row["bias"] for row in rows}) > 1 else 0.0
    with canvas(path, height=6.4, rows=2, share_x=True) as panels:
        for axes, value, ends, label in (
            (panels[0], "worst_win_rate", "ci", _WORST),
            (panels[1], "mean_of_min", "mean_of_min_ci", _MINIMUM),
        ):
            for i, method in enumerate(methods):
                own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bias"])
                axes.errorbar(
                    [row["bias"] + (i - (len(methods) - 1) / 2) * width for row in own],
                    [row[value] for row in own],
                    yerr=np.hstack([_bars(row, value, ends) for row in own]),
                    elinewidth=0.9,
                    capsize=2,
                    label=method,
                    **_style(i),
                )
            axes.set_ylabel(label)
        _reference_lines(panels, setup)
        panels[1].set_xlabel("length bias ρ: helpful pairs preferring the longer")
        panels[0].set_title(f"True rewards at {setup['matched_kl']:g} nats, {len(setup['seeds'])} seeds")
        legend_below(panels[0])
    return path


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
        panels[1].set_xlabel(f"√KL from the reference (KL in nats), {len(setup['ablation_seeds'])} seeds")
        panels[0].set_title("True gain; dashed: by reward models")
    return path


def _draw_balance(path: Path, shown: Sequence[Row], setup: Row) -> Path:
    """Win rates of all objectives side by side: raw and calibrated minima, distillation and DPO."""
    with canvas(path, height=1.8 + 0.42 * len(shown)) as axes:
        places = np.arange(len(shown))
        for k, objective in enumerate(shown[0]["win_rate"]):
            low, high = np.array([row["win_rate_ci"][objective] for row in shown]).T
            values = np.array([row["win_rate"][objective] for row in shown])
            axes.errorbar(
                values,
                places + (k - 1) * 0.16,
                xerr=np.stack([(values - low).clip(0), (high - values).clip(0)]),
                linestyle="none",
                marker=MARKERS[k],
                color=objective_colour(objective),
                elinewidth=1,
                label=objective,
            )
        axes.axvline(0.5, color="black", linewidth=1, linestyle=":")
        axes.set_yticks(places, [row["label"] for row in shown])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("true win rate against the reference")
        seeds = len(setup["ablation_seeds"])
        axes.set_title(f"{setup['matched_kl']:g} nats, bias {setup['ablation_bias']:g}, {seeds} seeds")
        legend_below(axes, 3)
    return path


def _draw_ablations(path: Path, tables: Mapping[str, Sequence[Row]], setup: Row) -> Path:
    """Worst-objective win rate of every value of every ablation, at the matched KL and where training ends."""
    rows = [(name, row) for name, table in tables.items() for row in table]
    with canvas(path, height=1.8 + 0.24 * len(rows)) as axes:
        for i, name in enumerate(tables):
            own = [(place, row) for place, (table, row) in enumerate(rows) if table == name]
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
        axes.set_yticks(range(len(rows)), [row["label"] for _, row in rows])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.axvline(0.5, color="black", linewidth=1, linestyle=":")
        axes.set_xlabel(f"{_WORST}\n● {setup['matched_kl']:g} nats, × end of training")
        axes.set_title(f"Ablations, n = {len(setup['ablation_seeds'])} seeds")
    return path
