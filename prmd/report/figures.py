"""The canvas every figure is drawn on, and the figures of data and training: JSON in, PNG and SVG beside it.

What lives here: the palette, its variant for dark pages, `canvas` (the only place that imports matplotlib; figures are closed by going out of scope,
because pyplot's global list is never used) and the plots of stages 1 and 3. Each function is a pure function of its file
and returns what it wrote (the PNG; the SVG of the page has its name). Figures are 4.6 inches wide, so that 11-point text stays readable on a 390-pixel phone.
No number is computed here that a table does not also hold. Figures of reward models are in `reward_figures`, those of
stage 4 in `evaluation_figures`; read `page` next.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import AutoLocator, LogLocator, MaxNLocator, NullFormatter

from prmd.artifacts import io
from prmd.objectives import OBJECTIVES

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
GREY, INK = "#5F6670", "#1B1F24"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
"""Okabe and Ito's colours, told apart with every common colour vision; yellow is too pale for lines on white."""
OBJECTIVE_COLOURS = (*PALETTE, "#882255", "#332288", "#999933", "#661100", "#44AA99", "#1B1F24")
"""Twelve: after Okabe and Ito's six, darker ones of Paul Tol's, and black."""
_LIGHT_ON_DARK = {
    BLUE: "#4BA3DC",
    VERMILION: "#F07A2B",
    GREEN: "#2BC194",
    GREY: "#A3ADB8",
    INK: "#E6E9ED",
    "#8A919A": "#6E7781",
    "#E3E6EA": "#2C333B",
    "#882255": "#D873A8",
    "#332288": "#9C8CF0",
    "#999933": "#C3C356",
    "#661100": "#D88A6B",
}
"""Colours of figures that are too dark for a dark page, and what stands for them there; the others serve both."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
CHOSEN, REJECTED = BLUE, VERMILION

_STYLE: dict[str, Any] = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "svg.hashsalt": "report",  # the same identifiers in every drawing
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A919A",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E6EA",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "lines.linewidth": 1.8,
    "errorbar.capsize": 3,
}


@contextmanager
def canvas(
    path: Path,
    *,
    height: float = 3.4,
    rows: int = 1,
    polar: bool = False,
    share_x: bool = False,
    vector: bool = False,
) -> Iterator[Any]:
    """Yield axes (one, or an array of `rows`) of a fresh figure; on leaving, write it to `path` as PNG.

    Args:
        path: the PNG that appears, whole or not at all.
        height: inches; the width is always 4.6.
        rows: panels, one above the other.
        polar: polar axes.
        share_x: panels share the horizontal axis.
        vector: write the same as SVG beside it, on no background.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, height), dpi=160, layout="constrained", facecolor="white")
        axes = figure.subplots(rows, sharex=share_x, subplot_kw={"polar": True} if polar else None)
        yield axes
        for panel in figure.axes:
            if not polar and isinstance(panel.xaxis.get_major_locator(), AutoLocator):
                panel.locator_params(axis="x", nbins=5)  # tick labels of small numbers are long
        with io.atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
        if vector:
            figure.set_layout_engine("none")  # where everything stands in the PNG, found once
            known = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            with io.atomic_path(path.with_suffix(".svg")) as temporary:
                figure.savefig(temporary, format="svg", metadata=known, facecolor="none")


page_canvas = partial(canvas, vector=True)
"""The canvas of what the page shows: sharp on every screen, and with colours that can be changed."""


def for_dark_pages(svg: str) -> str:
    """The drawing in colours that are legible on a dark page."""
    for colour, other in _LIGHT_ON_DARK.items():
        svg = svg.replace(colour.lower(), other)
    return svg


def legend_below(*panels: Axes | PolarAxes, columns: int | None = None) -> None:
    """Put the legend of these panels under the figure, where it covers no data; 2 or 3 columns unless told."""
    found = [axes.get_legend_handles_labels() for axes in panels]
    handles, labels = ([one for both in found for one in both[i]] for i in (0, 1))
    if handles:
        columns = columns or (2 if len(handles) in (2, 4) else 3)
        panels[0].figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def objective_colour(objective: str, objectives: Sequence[str] = OBJECTIVES) -> str:
    """The same colour for the same objective in every figure of an approach.

    Args:
        objectives: those drawn, in their order; a built-in one keeps its colour where others of them are left out.
    """
    order = OBJECTIVES if set(objectives) <= set(OBJECTIVES) else tuple(objectives)
    place = order.index(objective) if objective in order else len(OBJECTIVE_COLOURS)
    return OBJECTIVE_COLOURS[place] if place < len(OBJECTIVE_COLOURS) else GREY


def finite(values: Sequence[float | None]) -> np.ndarray:
    """The values that are numbers, as float64 [n]."""
    array = np.array([np.nan if v is None else v for v in values], dtype=float)
    return array[np.isfinite(array)]


def draw_line(
    axes: Axes, curve: Sequence[dict[str, Any]], keys: Sequence[str], *, colour: str, label: str
) -> None:
    """Draw the first of `keys` that the logged rows hold against `step`."""
    for key in keys:
        points = [(row["step"], row[key]) for row in curve if row.get(key) is not None and "step" in row]
        if points:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            style = {"marker": "o" if len(points) < 30 else "", "markersize": 4, "color": colour}
            axes.plot(*zip(*points, strict=True), label=label, **style)
            return


# ------------------------------------------------------------------ stage 1
def plot_split_sizes(sizes_json: Path) -> Path:
    """Pairs per objective and split, from `{"approach", "objectives": {objective: {split: n}}}`."""
    sizes = io.read_json(sizes_json)
    objectives = sizes["objectives"]
    splits = [s for s in ("train", "val", "test", "judge") if any(s in row for row in objectives.values())]
    path = sizes_json.with_suffix(".png")
    with page_canvas(path, height=1.6 + 0.9 * len(objectives)) as axes:
        height = 0.8 / max(1, len(splits))
        for i, split in enumerate(splits):
            counts = [row.get(split, 0) for row in objectives.values()]
            places = np.arange(len(counts)) + (i - (len(splits) - 1) / 2) * height
            bars = axes.barh(places, counts, height * 0.92, color=PALETTE[i], label=split)
            axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
        total = sum(sum(row.values()) for row in objectives.values())
        axes.set_yticks(range(len(objectives)), list(objectives))
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("preference pairs")
        axes.set_title(f"Pairs per split, {sizes['approach']} (n = {total:,})")
        legend_below(axes, columns=4)
    return path


def plot_length_distributions(lengths_json: Path) -> list[Path]:
    """Cumulative length distributions of prompt, chosen and rejected: one figure per unit (words, characters, tokens)."""
    objectives = io.read_json(lengths_json)["objectives"]
    written = []
    for unit in ("words", "characters", "tokens"):
        present = {name: units[unit] for name, units in objectives.items() if units.get(unit)}
        if present:
            path = lengths_json.with_name(f"{lengths_json.stem}_{unit}.png")
            _draw_lengths(path, unit, present)
            written.append(path)
    return written


def _draw_lengths(path: Path, unit: str, objectives: dict[str, dict[str, list[int]]]) -> None:
    with page_canvas(path, height=1.0 + 1.7 * len(objectives), rows=len(objectives), share_x=True) as panels:
        for axes, (objective, parts) in zip(np.atleast_1d(panels), objectives.items(), strict=True):
            medians = []
            for part, colour in (("prompt", GREY), ("chosen", CHOSEN), ("rejected", REJECTED)):
                values = np.sort(finite(parts.get(part, [])))
                if values.size:
                    share = np.arange(1, values.size + 1) / values.size
                    axes.step(values + 1, share, where="post", color=colour, label=part)
                    medians.append(f"{np.median(values):.0f}")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())  # its labels would lie on each other
            axes.set_ylabel("share ≤ length")
            told = f", medians {', '.join(medians)}" if medians else ""
            axes.set_title(f"{objective} (n = {len(parts.get('chosen', [])):,}{told})")
        axes.set_xlabel(f"length + 1, {unit} (log scale)")
        legend_below(np.atleast_1d(panels)[0])


# ------------------------------------------------------------------ stage 3
_IMPLICIT = ("margins/implicit", "implicit_margins", "rewards/margins")
_TARGET = ("margins/target", "target_margins")


def plot_policy_training(metrics_json: Path, directory: Path) -> list[Path]:
    """Training curve and target histogram of one policy, whichever its `metrics.json` holds, into `directory`."""
    metrics = io.read_json(metrics_json)
    written = []
    if metrics.get("curve"):
        written.append(directory / f"policy_{metrics['method']}_training.png")
        _draw_policy_curve(written[-1], metrics)
    if (metrics.get("target_margins") or {}).get("histogram"):
        written.append(directory / f"policy_{metrics['method']}_targets.png")
        _draw_targets(written[-1], metrics)
    return written


def _draw_policy_curve(path: Path, metrics: dict[str, Any]) -> None:
    curve = metrics["curve"]
    with page_canvas(path, height=5.2, rows=2, share_x=True) as (top, bottom):
        draw_line(top, curve, ("loss", "train_loss"), colour=BLUE, label="training loss")
        draw_line(top, curve, ("eval_loss",), colour=ORANGE, label="held-out loss")
        draw_line(bottom, curve, _IMPLICIT, colour=GREEN, label="implicit Δθ")
        draw_line(bottom, curve, _TARGET, colour=VERMILION, label="target Δ*")
        top.set_ylabel("loss")
        bottom.set_ylabel("mean margin (β · nats)")
        bottom.set_xlabel("optimiser step")
        top.set_title(f"{metrics['method']} (n = {len(curve)} logged rows)")
        legend_below(top, bottom, columns=2)


def _draw_targets(path: Path, metrics: dict[str, Any]) -> None:
    targets = metrics["target_margins"]
    edges, counts = targets["histogram"]["edges"], targets["histogram"]["counts"]
    with page_canvas(path) as axes:
        axes.stairs(counts, edges, fill=True, color=SKY)
        axes.stairs(counts, edges, color=BLUE)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel("target margin Δ* (β · nats)")
        axes.set_ylabel("training pairs")
        axes.set_title(
            f"{metrics['method']} (n = {sum(counts):,}, {targets.get('clipped_share') or 0:.0%} clipped)"
        )
