"""The figures of stage 4: win rates, worst objective, Pareto ellipses, lengths, the reward-KL frontier, over-optimization.

`plot_metrics` is a pure function of `outputs/metrics/<approach>/comparison.json` and the `<method>.json` beside it;
intervals are read, only the Pareto ellipses come from the per-prompt scores.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prmd.artifacts import io
from prmd.artifacts.paths import REFERENCE
from prmd.report.artifact_sections import load
from prmd.report.figures import (
    GREY,
    INK,
    MARKERS,
    ORANGE,
    PALETTE,
    Axes,
    legend_below,
    objective_colour,
    page_canvas,
)

Estimate = dict[str, Any]
Row = dict[str, Any]

_KL_LABEL = "KL from the reference, nats per response"


# ------------------------------------------------------------------ shared by the figures of stage 4
def method_style(rows: Sequence[Row], index: int) -> dict[str, Any]:
    """Colour and marker of one method; the reference is grey, so that colours mean policies only."""
    if rows[index]["method"] == REFERENCE:
        return {"color": GREY, "marker": "*"}
    place = sum(row["method"] != REFERENCE for row in rows[:index])
    return {"color": PALETTE[place % len(PALETTE)], "marker": MARKERS[place % len(MARKERS)]}


def interval_bars(estimate: Estimate) -> np.ndarray:
    """Distances below and above the value, [2, 1], as `errorbar` wants them."""
    low, value, high = estimate["low"], estimate["value"], estimate["high"]
    return np.array([[max(0.0, value - low)], [max(0.0, high - value)]])


def has_interval(estimate: Estimate | None) -> bool:
    """Whether there is a value with both ends."""
    return bool(estimate) and all(estimate.get(key) is not None for key in ("value", "low", "high"))


def prompts_of(rows: Sequence[Row]) -> str:
    """`n = 16 prompts`, over all rows."""
    counts = sorted({e["n"] for row in rows for e in row["win_rate"].values() if e and e.get("n")})
    return "n = " + "–".join(str(n) for n in dict.fromkeys((*counts[:1], *counts[-1:]))) + " prompts"


# ------------------------------------------------------------------ reward-KL frontier
def draw_frontier(path: Path, rows: Sequence[Row], frontier: dict[str, Any] | None) -> Path | None:
    """Worst objective and mean of the minimum against KL; lines join the kept checkpoints where they were sampled.

    Args:
        rows: of `comparison.json`; drawn where there is no frontier.
        frontier: contents of `frontier.json`.
    """
    policies = [row for row in rows if row["method"] != REFERENCE]
    points = (frontier or {}).get("points") or policies
    points = [p for p in points if has_interval(p.get("kl")) and has_interval(p.get("worst"))]
    if not points:
        return None
    row = next((row for row in rows if row["method"] == REFERENCE), {})
    minimum = ((frontier or {}).get("reference") or row).get("mean_of_min") or {}
    with page_canvas(path, height=5.6, rows=2, share_x=True) as (top, bottom):
        _draw_paths(top, policies, points, "worst", 0.5)
        _draw_paths(bottom, policies, points, "mean_of_min", minimum.get("value"))
        top.set_ylabel("worst-objective win rate")
        bottom.set_ylabel("mean of the minimum, sd")
        bottom.set_xlabel(_KL_LABEL)
        top.set_title(f"Reward–KL frontier (n = {points[0]['kl']['n']} prompts)")
        legend_below(top)
    return path


def _draw_paths(
    axes: Axes, policies: Sequence[Row], points: Sequence[Row], key: str, reference: float | None
) -> None:
    """One line per method from the reference over its checkpoints; the end has the marker and both intervals."""
    if reference is not None:
        axes.axhline(reference, color=INK, linewidth=1)
        axes.plot([0], [reference], "*", color=GREY, markersize=12, label="reference", linestyle="none")
    for i, policy in enumerate(policies):
        stages = [p for p in points if p["method"] == policy["method"] and has_interval(p.get(key))]
        if not stages:
            continue
        style, end = method_style(policies, i), stages[-1]
        if len(stages) > 1 and reference is not None:
            x, y = ([p[name]["value"] for p in stages] for name in ("kl", key))
            axes.plot([0, *x], [reference, *y], color=style["color"], linewidth=1.4, zorder=1.5)
            axes.plot(x[:-1], y[:-1], ".", color=style["color"], markersize=8)
        _draw_point(axes, end["kl"], end[key], label=policy["method"], **style)


def _draw_point(axes: Axes, x: Estimate, y: Estimate, **style: Any) -> None:
    """A marker with both intervals."""
    bars = {"xerr": interval_bars(x), "yerr": interval_bars(y), "elinewidth": 1.2}
    axes.errorbar(x["value"], y["value"], linestyle="none", markersize=7, **bars, **style)


# ------------------------------------------------------------------ over-optimisation
def draw_over_optimisation(path: Path, found: dict[str, Any] | None) -> Path | None:
    """Gains of proxy and judges over the square root of KL: best of n as bands, policies as points."""
    if not found:
        return None
    policies = found["policies"]
    with page_canvas(path, height=6.4, rows=2, share_x=True) as panels:
        for axes, chooser in zip(panels, ("mean", "hard_min"), strict=True):
            curve = found["curves"][chooser]
            _band(axes, curve["points"], "proxy", ORANGE, "best of n: proxy")
            _band(axes, curve["points"], "gold", INK, "best of n: judges")
            _draw_fit(axes, curve)
            axes.axhline(0, color=GREY, linewidth=1)
            axes.set_ylabel("gain, sd of a prompt")
            by = {"mean": "mean", "hard_min": "lowest"}[chooser]
            axes.set_title(f"By the {by} reward (n = {curve['points'][0]['gold']['n']} prompts)")
        for i, point in enumerate(policies):
            style = method_style(policies, i) | {"markersize": 7, "linestyle": "none"}
            panels[0].plot(point["distance"], point["gold"]["value"], label=point["method"], **style)
            panels[0].plot(point["distance"], point["proxy"]["value"], fillstyle="none", **style)
        panels[1].set_xlabel("√KL, √nats (hollow: a policy's gain by the proxy)")
        legend_below(panels[0], columns=2)
    return path


def _band(axes: Axes, points: Sequence[dict[str, Any]], name: str, colour: str, label: str) -> None:
    distances = [p["distance"] for p in points]
    axes.plot(distances, [p[name]["value"] for p in points], ".-", color=colour, label=label)
    axes.fill_between(
        distances,
        [p[name]["low"] for p in points],
        [p[name]["high"] for p in points],
        color=colour,
        alpha=0.15,
    )


def _draw_fit(axes: Axes, curve: dict[str, Any]) -> None:
    fit = curve.get("fit")
    if fit:
        d = np.linspace(0, curve["points"][-1]["distance"], 60)
        values = d * (fit["alpha"]["value"] - fit["beta"]["value"] * d)
        axes.plot(d, values, ":", color=INK, linewidth=1.4, label="fit d (α − β d)")


_CHI2_95_TWO_DIMENSIONS = 5.991464547107979
"""95 % quantile of chi-square with two degrees of freedom: -2 ln 0.05."""
_RADAR_LIMITS = (0.0, 1.0)


def plot_metrics(comparison_json: Path) -> list[Path]:
    """Every figure of one comparison that its rows have the data for.

    Args:
        comparison_json: `comparison.json`, with the per-method files beside it; the PNGs go there too.

    Returns:
        Paths of `win_rates`, `worst_objective`, `kl_frontier`, `pareto`, `evaluation.over_optimisation`, `length_win_rate`, `radar`, in
        this order.
    """
    comparison = io.read_json(comparison_json)
    rows, frontier = comparison["rows"], load(comparison_json.with_name("frontier.json"))
    folder = comparison_json.parent
    methods = {row["method"]: load(folder / f"{row['method']}.json") or {} for row in rows}
    policies = [row for row in rows if row["method"] != REFERENCE]
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


def _judged(rows: Sequence[Row]) -> list[str]:
    """Objectives of which every row has a win rate with its interval."""
    return [k for k in rows[0]["win_rate"] if all(has_interval(row["win_rate"].get(k)) for row in rows)]


def _win_rates(path: Path, rows: list[Row]) -> Path | None:
    """Horizontal bars that start at ½, one colour per objective, with intervals."""
    objectives = _judged(rows)
    if not objectives:
        return None
    height = 0.8 / len(objectives)
    with page_canvas(path, height=1.5 + 0.26 * len(rows) * len(objectives)) as axes:
        for i, objective in enumerate(objectives):
            places = np.arange(len(rows)) + (i - (len(objectives) - 1) / 2) * height
            values = np.array([row["win_rate"][objective]["value"] for row in rows])
            spread = np.hstack([interval_bars(row["win_rate"][objective]) for row in rows])
            axes.barh(
                places,
                values - 0.5,
                height * 0.9,
                left=0.5,
                color=objective_colour(objective, objectives),
                label=objective,
            )
            axes.errorbar(values, places, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.2)
        axes.axvline(0.5, color=INK, linewidth=1)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("win rate against the reference (0.50 = no change)", fontsize=10)
        axes.set_title(f"Win rates, 95 % ({prompts_of(rows)})")
        legend_below(axes)
    return path


def _worst_objective(path: Path, rows: list[Row]) -> Path | None:
    rows = [row for row in rows if has_interval(row.get("worst"))]
    if not rows:
        return None
    with page_canvas(path, height=1.5 + 0.36 * len(rows)) as axes:
        for i, row in enumerate(rows):
            axes.errorbar(
                row["worst"]["value"],
                i,
                xerr=interval_bars(row["worst"]),
                **method_style(rows, i),
                markersize=7,
            )
        axes.axvline(0.5, color=INK, linewidth=1)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("lowest win rate over objectives, with its band")
        axes.set_title(f"Worst objective ({prompts_of(rows)})")
    return path


def _lengths(path: Path, rows: list[Row]) -> Path | None:
    """Worst-objective win rate against response length, with both intervals; the reference is the star at ½."""
    points = [r for r in rows if has_interval(r.get("length")) and has_interval(r.get("worst"))]
    if not points:
        return None
    with page_canvas(path, height=3.9) as axes:
        axes.axhline(0.5, color=INK, linewidth=1)
        for i, row in enumerate(points):
            style = method_style(points, i)
            _draw_point(axes, row["length"], row["worst"], label=row["method"], **style)
        axes.set_xlabel("response length, tokens")
        axes.set_ylabel("worst-objective win rate")
        axes.set_title(f"Length ({prompts_of(rows)})")
        legend_below(axes)
    return path


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
    """Win rate on the first against that on the second objective, ellipses from per-prompt scores."""
    objectives = _judged(rows)
    if len(objectives) < 2:
        return None
    x, y = objectives[:2]
    with page_canvas(path, height=4.3) as axes:
        axes.axhline(0.5, color=INK, linewidth=1)
        axes.axvline(0.5, color=INK, linewidth=1)
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
    objectives = _judged(rows)
    if len(objectives) < 3:
        return None
    angles = np.linspace(0, 2 * math.pi, len(objectives) + 1)
    with page_canvas(path, height=4.2, polar=True) as axes:
        axes.plot(np.linspace(0, 2 * math.pi, 90), np.full(90, 0.5), color=GREY, linestyle="--", linewidth=1)
        for i, row in enumerate(rows):
            values = [row["win_rate"][k]["value"] for k in objectives]
            style = method_style(rows, i)
            axes.plot(angles, [*values, values[0]], label=row["method"], markersize=5, **style)
        axes.set_xticks(angles[:-1], objectives)
        axes.tick_params(axis="x", pad=10)
        axes.set_yticks([0.25, 0.5, 0.75])
        axes.set_rlabel_position(180 / len(objectives))  # between the first two spokes
        axes.set_ylim(*_RADAR_LIMITS)
        axes.set_title(f"Win rates ({prompts_of(rows)}; dashed: ½)")
        legend_below(axes)
    return path
