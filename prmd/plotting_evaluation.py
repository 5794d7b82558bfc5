"""The figures of stage 4: win rates, worst objective, Pareto ellipses, lengths; drawn from `comparison.json`.

What lives here: `plot_metrics`, a pure function of `outputs/metrics/<approach>/comparison.json` and the `<method>.json`
beside it. What does not: the canvas and palette (`plotting`), intervals (they are read, not computed; only the Pareto
ellipses come from the per-prompt scores). What depends on KL is drawn in `plotting_frontier`, to be read next.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from prmd.artifacts import io
from prmd.plotting import GREY, canvas, legend_below, objective_colour
from prmd.plotting_frontier import (
    Row,
    draw_frontier,
    draw_over_optimisation,
    has_interval,
    interval_bars,
    method_style,
    prompts_of,
)

_CHI2_95_TWO_DIMENSIONS = (
    5.991464547107979  # 95 % quantile of chi-square with two degrees of freedom: -2 ln 0.05
)
_RADAR_LIMITS = (0.0, 1.0)


def plot_metrics(comparison_json: Path, directory: Path | None = None) -> list[Path]:
    """Every figure of one comparison that its rows have the data for.

    Args:
        comparison_json: `comparison.json`, with the per-method files beside it.
        directory: where the PNGs go; beside the file by default.

    Returns:
        Paths of `win_rates`, `worst_objective`, `kl_frontier`, `pareto`, `over_optimisation`, `length_win_rate`, `radar`, in
        this order.
    """
    comparison = io.read_json(comparison_json)
    rows, frontier = comparison["rows"], _read(comparison_json.with_name("frontier.json"))
    folder = directory or comparison_json.parent
    methods = {row["method"]: _read(comparison_json.parent / f"{row['method']}.json") for row in rows}
    policies = [row for row in rows if row["method"] != "reference"]
    if not policies:
        return []
    drawn = [
        _win_rates(folder / "win_rates.png", policies),
        _worst_objective(folder / "worst_objective.png", policies),
        draw_frontier(folder / "kl_frontier.png", rows, frontier),
        _pareto(folder / "pareto.png", policies, methods),
        draw_over_optimisation(folder / "over_optimisation.png", comparison.get("over_optimisation")),
        _lengths(folder / "length_win_rate.png", rows),
        _radar(folder / "radar.png", policies),
    ]
    return [path for path in drawn if path is not None]


def _read(path: Path) -> dict[str, Any]:
    return io.read_json(path) if path.exists() else {}


def _win_rates(path: Path, rows: list[Row]) -> Path | None:
    """Horizontal bars that start at ½, one colour per objective, with intervals."""
    objectives = [k for k in rows[0]["win_rate"] if all(has_interval(row["win_rate"].get(k)) for row in rows)]
    if not objectives:
        return None
    height = 0.8 / len(objectives)
    with canvas(path, height=1.5 + 0.26 * len(rows) * len(objectives)) as axes:
        for i, objective in enumerate(objectives):
            places = np.arange(len(rows)) + (i - (len(objectives) - 1) / 2) * height
            values = np.array([row["win_rate"][objective]["value"] for row in rows])
            spread = np.hstack([interval_bars(row["win_rate"][objective]) for row in rows])
            axes.barh(
                places,
                values - 0.5,
                height * 0.9,
                left=0.5,
                color=objective_colour(objective),
                label=objective,
            )
            axes.errorbar(values, places, xerr=spread, fmt="none", ecolor="#1B1F24", elinewidth=1.2)
        axes.axvline(0.5, color="black", linewidth=1)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("win rate against the reference (½ = no change)")
        axes.set_title(f"Win rates, 95 % ({prompts_of(rows)})")
        legend_below(axes)
    return path


def _worst_objective(path: Path, rows: list[Row]) -> Path | None:
    rows = [row for row in rows if has_interval(row.get("worst"))]
    if not rows:
        return None
    with canvas(path, height=1.5 + 0.36 * len(rows)) as axes:
        for i, row in enumerate(rows):
            axes.errorbar(
                row["worst"]["value"],
                i,
                xerr=interval_bars(row["worst"]),
                **method_style(rows, i),
                markersize=7,
            )
        axes.axvline(0.5, color="black", linewidth=1)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("lowest win rate over objectives, with its band")
        axes.set_title(f"Worst objective ({prompts_of(rows)})")
    return path


def _lengths(path: Path, rows: list[Row]) -> Path | None:
    """Worst-objective win rate against response length, with both intervals; the reference is the star at ½."""
    points = [
        r
        for r in rows
        if has_interval(r.get("length")) and (has_interval(r.get("worst")) or _is_reference(r))
    ]
    if not points:
        return None
    with canvas(path, height=3.9) as axes:
        axes.axhline(0.5, color="black", linewidth=1)
        for i, row in enumerate(points):
            worst = {"value": 0.5, "low": 0.5, "high": 0.5} if _is_reference(row) else row["worst"]
            axes.errorbar(
                row["length"]["value"],
                worst["value"],
                xerr=interval_bars(row["length"]),
                yerr=interval_bars(worst),
                label=row["method"],
                linestyle="none",
                markersize=7,
                elinewidth=1.2,
                **method_style(points, i),
            )
        axes.set_xlabel("response length, tokens")
        axes.set_ylabel("worst-objective win rate")
        axes.set_title(f"Length ({prompts_of(rows)})")
        legend_below(axes)
    return path


def _is_reference(row: Row) -> bool:
    return row["method"] == "reference"


def ellipse_95(first: list[float | None], second: list[float | None]) -> np.ndarray | None:
    """Outline of the 95 % confidence ellipse of the mean of two per-prompt scores.

    The covariance of the mean is S / n (what a bootstrap over prompts converges to).

    Args:
        first, second: scores of the same n prompts; prompts without both are left out.

    Returns:
        Points [2, 90] of the outline, or None below three prompts.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(pairs) < 3:
        return None
    scores = np.array(pairs, dtype=float)
    covariance = np.cov(scores, rowvar=False) / len(scores)
    values, vectors = np.linalg.eigh(covariance)
    angle = np.linspace(0, 2 * math.pi, 90)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    radii = np.sqrt(np.clip(values, 0, None) * _CHI2_95_TWO_DIMENSIONS)
    return scores.mean(axis=0)[:, None] + vectors @ (radii[:, None] * circle)


def _pareto(path: Path, rows: list[Row], methods: dict[str, dict[str, Any]]) -> Path | None:
    """Helpful against harmless win rate (or the first two objectives there are), ellipses from per-prompt scores."""
    objectives = list(rows[0]["win_rate"])[:2]
    if len(objectives) < 2 or not all(
        has_interval(row["win_rate"].get(k)) for row in rows for k in objectives
    ):
        return None
    x, y = objectives
    with canvas(path, height=4.3) as axes:
        axes.axhline(0.5, color="black", linewidth=1)
        axes.axvline(0.5, color="black", linewidth=1)
        for i, row in enumerate(rows):
            style = method_style(rows, i)
            scores = methods[row["method"]].get("per_prompt", {}).get("win_rate", {})
            outline = ellipse_95(scores[x], scores[y]) if x in scores and y in scores else None
            if outline is not None:
                axes.fill(*outline, color=style["color"], alpha=0.12)
                axes.plot(*outline, color=style["color"], linewidth=1)
            axes.plot(
                row["win_rate"][x]["value"],
                row["win_rate"][y]["value"],
                label=row["method"],
                linestyle="none",
                markersize=8,
                **style,
            )
        axes.set_xlabel(f"{x} win rate")
        axes.set_ylabel(f"{y} win rate")
        axes.set_title(f"Trade-off, 95 % ellipses ({prompts_of(rows)})")
        legend_below(axes)
    return path


def _radar(path: Path, rows: list[Row]) -> Path | None:
    """Decoration: the same win rates on a wheel, without intervals."""
    objectives = list(rows[0]["win_rate"])
    if len(objectives) < 3 or not all(
        has_interval(row["win_rate"].get(k)) for row in rows for k in objectives
    ):
        return None
    angles = np.linspace(0, 2 * math.pi, len(objectives) + 1)
    with canvas(path, height=4.2, polar=True) as axes:
        axes.plot(np.linspace(0, 2 * math.pi, 90), np.full(90, 0.5), color=GREY, linestyle="--", linewidth=1)
        for i, row in enumerate(rows):
            values = [row["win_rate"][k]["value"] for k in objectives]
            style = method_style(rows, i)
            axes.plot(angles, [*values, values[0]], label=row["method"], markersize=5, **style)
        axes.set_xticks(angles[:-1], objectives)
        axes.set_ylim(*_RADAR_LIMITS)
        axes.set_title(f"Win rates ({prompts_of(rows)}; dashed: ½)")
        legend_below(axes)
    return path
