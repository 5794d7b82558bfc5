"""One picture of why a worst case over members needs members that differ in how far they believe a bias.

Of every member, how far its reward follows length, beside how far the true reward does. Numbers are those of
`letters.run_closed_form`, `with_length`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.closed_form.letters import TRUTH
from prmd.report.figures import PALETTE, canvas

_ROWS = {
    "bootstrap": "bootstrap: labels\nas they are",
    "debiased": "debiased:\nbias explained",
    "strengths": "strengths: from\nnot at all to fully",
}


def nearest(worlds: Sequence[Mapping[str, Any]], family: str) -> float:
    """Distance of the truth from the member that comes nearest to it, mean over worlds."""
    return float(np.mean([min(abs(r - world[TRUTH][0]) for r in world[family]) for world in worlds]))


def plot_members(path: Path, worlds: Sequence[Mapping[str, Any]]) -> Path:
    """Every member of the first world as a point, of the others pale; the truth of the first as a line."""
    with canvas(path, height=3.9) as axes:
        for place, family in enumerate(_ROWS):
            for world in reversed(worlds):
                first = world is worlds[0]
                axes.plot(
                    world[family],
                    place + np.linspace(-0.2, 0.2, len(world[family])),
                    linestyle="none",
                    marker="o",
                    markersize=6 if first else 3,
                    alpha=1.0 if first else 0.15,
                    color=PALETTE[place],
                )
        axes.axvline(worlds[0][TRUTH][0], color="black", linewidth=1.4)
        axes.text(worlds[0][TRUTH][0], -0.62, " truth", ha="left", va="center")
        axes.set_yticks(range(len(_ROWS)), list(_ROWS.values()))
        axes.set_ylim(2.6, -0.8)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"correlation with length, ρ = .9\nlarge: one world; pale: {len(worlds) - 1} more")
        told, labels = nearest(worlds, "strengths"), nearest(worlds, "bootstrap")
        axes.set_title(f"Nearest member off the truth by\nstrengths {told:.2f}, bootstrap {labels:.2f}")
    return path
