"""How good a reward model is: held-out accuracy, calibration of its margins, agreement of its members, extremes.

Everything is computed from features and rewards of held-out pairs that were scored once. Training is in
`train`; the figures are drawn by `report.figures` from the JSON this makes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prmd.models.tokenization import PrefixRow
from prmd.pairs import PreferencePair
from prmd.statistics.intervals import accuracy_with_ties
from prmd.statistics.reliability import (
    disagreement_measures,
    expected_calibration_error,
    log_odds_slope,
    mean_pairwise_correlation,
    reliability_bins,
)

EXAMPLES = 10
NEARLY_ONE_MODEL = 0.95
"""Mean correlation of members above which the ensemble is in effect one model."""


@dataclass(frozen=True)
class HeldOut:
    """Scores of held-out pairs: `base` [n, 2] of r_0, `members` [n, 2, M]; side 0 is chosen.

    `scale` [M] is the calibration's s of each member, or None of a reward model without one (a judge).
    """

    pairs: Sequence[PreferencePair]
    rows: Sequence[PrefixRow]
    base: Tensor
    members: Tensor
    scale: Tensor | None = None


def reward_metrics(held_out: HeldOut) -> dict[str, Any]:
    """The figures reported of a reward model; see the keys. Undefined ones are None."""
    base = (held_out.base[:, 0] - held_out.base[:, 1]).double().numpy()
    members = (held_out.members[:, 0] - held_out.members[:, 1]).double().T.numpy()
    longer = np.array([len(row.responses[0]) - len(row.responses[1]) for row in held_out.rows], dtype=float)
    several = len(members) > 1
    return {
        "accuracy": _accuracy(base),
        "mean_member_accuracy": _accuracy(members.mean(axis=0)),
        "length_only_accuracy": _accuracy(longer),
        "expected_calibration_error": expected_calibration_error(base),
        "log_odds_slope": _defined(log_odds_slope, base),
        "calibrated": _calibrated(members, held_out.scale),
        "reliability": reliability_bins(base),
        "members": len(members),
        "member_accuracies": [_accuracy(margins)["value"] for margins in members],
        "member_correlation": _defined(mean_pairwise_correlation, members) if several else None,
        "member_correlation_matrix": _correlations(members),
        "disagreement": disagreement_measures(members).to_json() if several else None,
        "margins": base.round(5).tolist(),
        "rewards_chosen": held_out.base[:, 0].double().numpy().round(5).tolist(),
        "rewards_rejected": held_out.base[:, 1].double().numpy().round(5).tolist(),
    }


def _calibrated(members: np.ndarray, scale: Tensor | None) -> dict[str, float | None] | None:
    """What `expected_calibration_error` and `log_odds_slope` are of the mean member's calibrated margins.

    These are in standard deviations of a prompt's responses, so the slope is log-odds per standard deviation.
    """
    if scale is None:
        return None
    margins = (members / scale.double().numpy()[:, None]).mean(axis=0)
    return {
        "expected_calibration_error": expected_calibration_error(margins),
        "log_odds_slope": _defined(log_odds_slope, margins),
    }


def _accuracy(margins: np.ndarray) -> dict[str, Any]:
    share = accuracy_with_ties(margins)
    return {"value": share.pop("accuracy"), **share}


def _correlations(members: np.ndarray) -> list[list[float]]:
    """Correlation of the members' margins, [M, M]; 0 with a member whose margins are all equal."""
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = np.atleast_2d(np.corrcoef(members))
    return np.nan_to_num(matrix).round(4).tolist()


def _defined(measure: Callable[[np.ndarray], float], margins: np.ndarray) -> float | None:
    """The measure of these margins; None where so few or such equal margins do not define it."""
    try:
        value = measure(margins)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def extreme_examples(held_out: HeldOut) -> dict[str, list[dict[str, Any]]]:
    """The pairs with the highest and the lowest margin of r_0, as text."""
    margins = held_out.base[:, 0] - held_out.base[:, 1]
    order = torch.argsort(margins, descending=True).tolist()

    def example(index: int) -> dict[str, Any]:
        pair = held_out.pairs[index]
        prompt = "\n".join(f"{m['role']}: {m['content']}" for m in pair.prompt)
        margin = round(float(margins[index]), 4)
        return {"margin": margin, "prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}

    return {
        "top": [example(i) for i in order[:EXAMPLES]],
        "bottom": [example(i) for i in order[::-1][:EXAMPLES]],
    }


def readable_examples(objective: str, examples: dict[str, list[dict[str, Any]]]) -> str:
    """The extremes as text a person reads: where the model is surest, and where it is most wrong."""
    lines = []
    for key, title in (
        ("top", "highest margins: surest and right"),
        ("bottom", "lowest margins: most wrong"),
    ):
        lines += [f"{objective}: {title}", ""]
        for number, row in enumerate(examples[key], start=1):
            lines += [f"{number}. margin {row['margin']:+.3f}", row["prompt"], f"  chosen:   {row['chosen']}"]
            lines += [f"  rejected: {row['rejected']}", ""]
    return "\n".join(lines)


def warnings(metrics: dict[str, Any], objective: str) -> list[str]:
    """What a user of this reward model should know before trusting it."""
    notes = []
    correlation, accuracy = metrics["member_correlation"], metrics["accuracy"]
    if metrics["members"] == 1:
        notes.append(f"{objective}: one member, so all operators within the objective coincide")
    elif correlation is not None and correlation > NEARLY_ONE_MODEL:
        notes.append(f"{objective}: members correlate {correlation:.2f}; the ensemble is in effect one model")
    if accuracy["low"] <= 0.5:
        notes.append(
            f"{objective}: held-out accuracy {accuracy['value']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}] "
            f"on {accuracy['n']} pairs is not distinguishable from chance"
        )
    return notes
