"""The figures of one reward model: rewards, margins, reliability, members, disagreement, held-out curve.

What lives here: functions from the analysis file of `rewards.fitting.measure` to PNGs beside it. What does not: the canvas
(`figures`) and every number, which `rewards.metrics` computes. Read `evaluation_figures` next.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prmd.artifacts import io
from prmd.report.figures import (
    BLUE,
    CHOSEN,
    GREEN,
    GREY,
    INK,
    REJECTED,
    Axes,
    draw_line,
    finite,
    legend_below,
    page_canvas,
)
from prmd.statistics.reliability import merged_bins

RELIABILITY_PAIRS = 15
"""Pairs that a drawn bin of reliability holds at least; of fewer, Wilson's interval covers half of the axis."""


def plot_reward_model(analysis_json: Path) -> list[Path]:
    """Every figure of one reward model that its analysis file has the data for.

    Returns:
        Paths ending in _rewards, _margins, _reliability, _members, _disagreement, _curve, in this order.
    """
    analysis = io.read_json(analysis_json)
    drawings = (
        ("rewards", "rewards_chosen", _draw_rewards),
        ("margins", "margins", _draw_margins),
        ("reliability", "reliability", _draw_reliability),
        ("members", "member_correlation_matrix", _draw_members),
        ("disagreement", "disagreement", _draw_disagreement),
        ("curve", "curve", _draw_reward_curve),
    )
    written = []
    for name, needs, draw in drawings:
        # One member agrees with itself, and one checkpoint is no curve.
        fewest = 2 if name in ("members", "curve") else 1
        if len(analysis.get(needs) or ()) >= fewest:
            path = analysis_json.with_name(f"{analysis_json.stem}_{name}.png")
            draw(path, analysis)
            written.append(path)
    return written


def _draw_rewards(path: Path, analysis: dict[str, Any]) -> None:
    chosen, rejected = finite(analysis["rewards_chosen"]), finite(analysis["rewards_rejected"])
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins=24)
    with page_canvas(path) as axes:
        for values, colour, label in ((chosen, CHOSEN, "chosen"), (rejected, REJECTED, "rejected")):
            axes.hist(values, edges, color=colour, alpha=0.35)
            axes.hist(values, edges, color=colour, histtype="step", linewidth=1.6, label=label)
            axes.axvline(values.mean(), color=colour, linestyle="--", linewidth=1.2)
        axes.set_xlabel("reward (raw, dashed: mean)")
        axes.set_ylabel("test responses")
        axes.set_title(f"{analysis['objective']}: rewards (n = {chosen.size:,} pairs)")
        legend_below(axes)


def _draw_margins(path: Path, analysis: dict[str, Any]) -> None:
    margins = finite(analysis["margins"])
    width = max(float(np.ptp(margins)), 1e-9) / 24
    # Zero is an edge, so that no bar mixes pairs ordered right and wrong.
    edges = width * np.arange(np.floor(margins.min() / width), np.ceil(margins.max() / width) + 1)
    with page_canvas(path) as axes:
        axes.hist(margins[margins > 0], edges, color=CHOSEN, label="chosen scored higher")
        axes.hist(margins[margins <= 0], edges, color=REJECTED, label="rejected scored higher, or tie")
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel("margin: reward of chosen − rejected")
        axes.set_ylabel("test pairs")
        axes.set_title(f"{analysis['objective']}: margins (n = {margins.size:,})")
        legend_below(axes, columns=1)


def _draw_reliability(path: Path, analysis: dict[str, Any]) -> None:
    bins = merged_bins([b for b in analysis["reliability"] if b.get("n")], least=RELIABILITY_PAIRS)
    with page_canvas(path, height=3.8) as axes:
        axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=1.2, label="perfect calibration")
        _draw_accuracy(axes, "confidence", bins)
        axes.set(xlabel="confidence σ(|margin|)", ylabel="accuracy", ylim=(0, 1.03))
        axes.set_title(f"{analysis['objective']}: reliability (n = {sum(b['n'] for b in bins):,})")
        legend_below(axes, columns=2)


def _draw_accuracy(axes: Axes, key: str, bins: Sequence[dict[str, Any]]) -> None:
    """Accuracy in bins against the mean of `key` in each, with Wilson bars."""
    accuracy = np.array([b["accuracy"] for b in bins])
    bars = np.abs(np.array([[b["low"] for b in bins], [b["high"] for b in bins]]) - accuracy)
    axes.errorbar(
        [b[key] for b in bins], accuracy, yerr=bars, fmt="o-", color=BLUE, label="measured, 95 % Wilson"
    )


def _draw_members(path: Path, analysis: dict[str, Any]) -> None:
    matrix = np.array(analysis["member_correlation_matrix"], dtype=float)
    with page_canvas(path, height=3.9) as axes:
        image = axes.imshow(
            matrix, cmap="cividis", interpolation="none", vmin=min(0.0, np.nanmin(matrix)), vmax=1.0
        )
        axes.grid(visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="member", ylabel="member")
        axes.figure.colorbar(image, ax=axes, label="correlation of margins", shrink=0.85)
        pairs = len(analysis.get("margins") or [])
        axes.set_title(f"{analysis['objective']}: {len(matrix)} members (n = {pairs:,} pairs)")


def _draw_disagreement(path: Path, analysis: dict[str, Any]) -> None:
    measures = analysis["disagreement"]
    bins, auc = measures["bins"], measures["auc"]
    n = sum(b["n"] for b in bins)
    overall = sum(b["n"] * b["accuracy"] for b in bins) / n
    told = auc and not auc["low"] <= 0.5 <= auc["high"]
    known = f"; AUC of errors {auc['value']:.2f} [{auc['low']:.2f}, {auc['high']:.2f}]" if told else ""
    with page_canvas(path, height=3.9) as axes:
        axes.axhline(overall, color=GREY, linestyle="--", linewidth=1.2, label=f"all pairs{known}")
        _draw_accuracy(axes, "disagreement", bins)
        axes.set(xlabel="disagreement: sd of the members' margins", ylabel="accuracy", ylim=(0, 1.03))
        axes.margins(x=0.1)
        axes.set_title(f"{analysis['objective']}: disagreement (n = {n:,})")
        legend_below(axes, columns=1)


def _draw_reward_curve(path: Path, analysis: dict[str, Any]) -> None:
    with page_canvas(path, height=4.2, rows=2, share_x=True) as (top, bottom):
        draw_line(top, analysis["curve"], ("eval_loss",), colour=BLUE, label="held-out loss")
        draw_line(bottom, analysis["curve"], ("eval_accuracy",), colour=GREEN, label="held-out accuracy")
        top.set_ylabel("loss (nats)")
        bottom.set_ylabel("accuracy")
        bottom.set_xlabel("optimiser step")
        validation = (analysis.get("sizes") or {}).get("val", "?")
        top.set_title(f"{analysis['objective']}: held-out curve (n = {validation} pairs)")
