"""How good a reward model is: held-out accuracy, calibration of its margins, agreement of its members, extremes.

Everything is computed from features and rewards of held-out pairs that were scored once. Training is in
`train`; the figures are drawn by `report.figures` from the JSON this makes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prmd.models.tokenization import PrefixRow
from prmd.pairs import PreferencePair
from prmd.pessimism.debias import margin_slope, reached_strength
from prmd.statistics.intervals import accuracy_with_ties, wilson_interval
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
class HeldOutBias:
    """What the features that are held to be a bias say of the held-out pairs.

    Attributes:
        offsets: a of each pair, log-odds, [n].
        strength: s_0 that r_0 was trained with.
        strengths: s_m of each member, [M].
        sizes: by feature, its clipped difference in root mean squares, [n].
        prompts: a key of each pair's prompt, [n].
        record: what was fitted, the contents of `debias.json`.
    """

    offsets: np.ndarray
    strength: float
    strengths: Sequence[float]
    sizes: Mapping[str, np.ndarray]
    prompts: Sequence[str]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """Scores of held-out pairs: `base` [n, 2] of r_0, `members` [n, 2, M]; side 0 is chosen.

    `scale` [M] is the calibration's s of each member, or None of a reward model without one (a judge). `bias` is there where
    the reward model was debiased: labels are then predicted by margin and offset together, and ordered by the margin alone.
    """

    pairs: Sequence[PreferencePair]
    rows: Sequence[PrefixRow]
    base: Tensor
    members: Tensor
    scale: Tensor | None = None
    bias: HeldOutBias | None = None


def reward_metrics(held_out: HeldOut) -> dict[str, Any]:
    """The figures reported of a reward model; see the keys. Undefined ones are None."""
    base = (held_out.base[:, 0] - held_out.base[:, 1]).double().numpy()
    members = (held_out.members[:, 0] - held_out.members[:, 1]).double().T.numpy()
    longer = np.array([len(row.responses[0]) - len(row.responses[1]) for row in held_out.rows], dtype=float)
    several, bias = len(members) > 1, held_out.bias
    likely = base if bias is None else base + bias.strength * bias.offsets
    return {
        "accuracy": accuracy_with_ties(base),
        "mean_member_accuracy": accuracy_with_ties(members.mean(axis=0)),
        "length_balanced_accuracy": balanced_accuracy(base, longer),
        "length_only_accuracy": accuracy_with_ties(longer),
        "expected_calibration_error": expected_calibration_error(likely),
        "log_odds_slope": _defined(log_odds_slope, likely),
        "calibrated": _calibrated(members, held_out.scale, bias),
        "reliability": reliability_bins(likely),
        "members": len(members),
        "member_accuracies": [accuracy_with_ties(margins)["value"] for margins in members],
        "member_correlation": _defined(mean_pairwise_correlation, members) if several else None,
        "member_correlation_matrix": _correlations(members),
        "disagreement": disagreement_measures(members).to_json() if several else None,
        "margins": base.round(5).tolist(),
        "rewards_chosen": held_out.base[:, 0].double().numpy().round(5).tolist(),
        "rewards_rejected": held_out.base[:, 1].double().numpy().round(5).tolist(),
        **({} if bias is None else {"debias": _debias(base, members, bias)}),
    }


def balanced_accuracy(margins: np.ndarray, feature: np.ndarray) -> dict[str, Any] | None:
    """Accuracy where the chosen response has more of a feature in half of the pairs that differ in it.

    Pairs with more and with less in the chosen response get half of the weight of all that differ, pairs alike keep theirs:
    margins that follow the feature alone score one half. The interval is Wilson's at Kish's effective number of pairs.

    Args:
        margins: [n].
        feature: phi(chosen) - phi(rejected), [n].

    Returns:
        `value`, `low`, `high`, `n`, `method`; None where one of the two kinds is absent.
    """
    more, less = feature > 0, feature < 0
    if not more.any() or not less.any():
        return None
    weights = np.ones(len(margins))
    half = (more.sum() + less.sum()) / 2
    weights[more], weights[less] = half / more.sum(), half / less.sum()
    weights /= weights.sum()
    value = float(weights @ np.where(margins == 0, 0.5, margins > 0))
    effective = max(1, int(1 / float((weights**2).sum())))
    found = wilson_interval(min(value, 1.0) * effective, effective)  # rounding may exceed 1
    return {**found.to_json(), "value": value, "n": len(margins), "method": f"{found.method}, balanced"}


def _debias(base: np.ndarray, members: np.ndarray, bias: HeldOutBias) -> dict[str, Any]:
    """What debiasing was asked for and what it reached, on held-out pairs."""
    mean, margins_of = members.mean(axis=0), list(members)
    clusters = np.unique(list(bias.prompts), return_inverse=True)[1]

    def reached(margins: np.ndarray) -> dict[str, float] | None:
        found = reached_strength(margins, bias.offsets, clusters)
        ends = (found.values, found.low, found.high) if found else ()
        return {k: float(end[0]) for k, end in zip(("value", "low", "high"), ends, strict=False)} or None

    fitted = {
        name: {
            **bias.record["features"][name],
            "slope": margin_slope(base, sizes),
            "member_slopes": [margin_slope(margins, sizes) for margins in margins_of],
            "balanced_accuracy": balanced_accuracy(base, sizes),
            "mean_member_balanced_accuracy": balanced_accuracy(mean, sizes),
        }
        for name, sizes in bias.sizes.items()
    }
    return {
        "strength": bias.strength,
        "strength_reached": reached(base),
        "member_strengths": list(bias.strengths),
        "member_strengths_reached": [reached(margins) for margins in margins_of],
        "features": fitted,
        "left_out": bias.record["left_out"],
    }


def debias_notes(metrics: Mapping[str, Any], objective: str) -> list[str]:
    """What debiasing reached, in words; nothing where no feature was named."""
    if not (found := metrics.get("debias")):
        return []
    asked, reached = found["member_strengths"], found["member_strengths_reached"]
    notes = [
        f"{objective}: debiased at strength {found['strength']:g}, {_estimate(found['strength_reached'])} reached; members asked "
        f"for {asked[0]:g} to {asked[-1]:g} reached {_estimate(reached[0])} to {_estimate(reached[-1])}"
    ]
    for name, one in found["features"].items():
        slopes, balanced = one["member_slopes"], one["balanced_accuracy"]
        told = (
            f"{balanced['value']:.3f} [{balanced['low']:.3f}, {balanced['high']:.3f}]"
            if balanced
            else "not defined"
        )
        notes.append(
            f"{objective}: slope of the margin on {name}: reward model {_number(one['slope'])}, first and last member "
            f"{_number(slopes[0])} and {_number(slopes[-1])}; accuracy on pairs balanced by {name} {told}"
        )
    return notes


def _estimate(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "not defined"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:+.2f}"


def _calibrated(
    members: np.ndarray, scale: Tensor | None, bias: HeldOutBias | None
) -> dict[str, float | None] | None:
    """What `expected_calibration_error` and `log_odds_slope` are of the mean member's calibrated margins.

    These are in standard deviations of a prompt's responses, so the slope is log-odds per standard deviation.
    """
    if scale is None:
        return None
    if bias is not None:
        members = members + np.array(bias.strengths)[:, None] * bias.offsets
    margins = (members / scale.double().numpy()[:, None]).mean(axis=0)
    return {
        "expected_calibration_error": expected_calibration_error(margins),
        "log_odds_slope": _defined(log_odds_slope, margins),
    }


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
