"""The figures in which KL is the price: the reward-KL frontier and the over-optimisation curve.

What lives here: what they draw, and the style of a method that all figures of stage 4 share. What does not: numbers
(`checkpoint_frontier`, `over_optimisation`), the other figures (`plotting_evaluation`), the canvas (`plotting`). Read
`report` next, which shows these figures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prmd.plotting import GREY, MARKERS, ORANGE, PALETTE, Axes, canvas, legend_below

Estimate = dict[str, Any]
Row = dict[str, Any]

_KL_LABEL = "KL from the reference, nats per response"


# ------------------------------------------------------------------ shared by the figures of stage 4
def method_style(rows: Sequence[Row], index: int) -> dict[str, Any]:
    """Colour and marker of one method; the reference is grey, so that colours mean policies only."""
    if rows[index]["method"] == "reference":
        return {"color": GREY, "marker": "*"}
    place = sum(row["method"] != "reference" for row in rows[:index])
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
    policies = [row for row in rows if row["method"] != "reference"]
    points = (frontier or {}).get("points") or policies
    points = [p for p in points if has_interval(p.get("kl")) and has_interval(p.get("worst"))]
    if not points:
        return None
    row = next((row for row in rows if row["method"] == "reference"), {})
    minimum = ((frontier or {}).get("reference") or row).get("mean_of_min") or {}
    with canvas(path, height=5.6, rows=2, share_x=True) as (top, bottom):
        _draw_paths(top, policies, points, "worst", 0.5)
        _draw_paths(bottom, policies, points, "mean_of_min", minimum.get("value"))
        top.set_ylabel("worst-objective win rate")
        bottom.set_ylabel("mean of the minimum, sd")
        bottom.set_xlabel(_KL_LABEL)
        bottom.locator_params(axis="x", nbins=5)  # small KL has long tick labels
        top.set_title(f"Reward–KL frontier (n = {points[0]['kl']['n']} prompts)")
        legend_below(top)
    return path


def _draw_paths(
    axes: Axes, policies: Sequence[Row], points: Sequence[Row], key: str, reference: float | None
) -> None:
    """One line per method from the reference over its checkpoints; the end has the marker and both intervals."""
    if reference is not None:
        axes.axhline(reference, color="black", linewidth=1)
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
        axes.errorbar(
            end["kl"]["value"],
            end[key]["value"],
            xerr=interval_bars(end["kl"]),
            yerr=interval_bars(end[key]),
            label=policy["method"],
            linestyle="none",
            markersize=7,
            elinewidth=1.2,
            **style,
        )


# ------------------------------------------------------------------ over-optimisation
def draw_over_optimisation(path: Path, found: dict[str, Any] | None) -> Path | None:
    """Gains of proxy and judges over the square root of KL: best of n as bands, policies as points."""
    if not found:
        return None
    policies = found["policies"]
    with canvas(path, height=6.4, rows=2, share_x=True) as panels:
        for axes, chooser in zip(panels, ("mean", "hard_min"), strict=True):
            curve = found["curves"][chooser]
            _band(axes, curve["points"], "proxy", ORANGE, "best of n: proxy")
            _band(axes, curve["points"], "gold", "black", "best of n: judges")
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
        legend_below(panels[0], 2)
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
        axes.plot(d, values, ":", color="black", linewidth=1.4, label="fit d (α − β d)")
