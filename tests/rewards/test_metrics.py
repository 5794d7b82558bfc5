"""Figures of a reward model against hand computations, and the extremes as text."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prmd.models.tokenization import PrefixRow
from prmd.pairs import PreferencePair
from prmd.rewards.metrics import HeldOut, extreme_examples, readable_examples, reward_metrics, warnings

MARGINS = [2.0, 1.0, 0.5, -0.25, 0.0, -3.0]


def held_out(margins: list[float], members: Tensor | None = None) -> HeldOut:
    """Pairs whose rejected reward is 0.125, so that chosen is margin + 0.125 (all exact in binary)."""
    n = len(margins)
    base = torch.tensor([[m + 0.125, 0.125] for m in margins])
    pairs = [
        PreferencePair(
            str(i), ({"role": "user", "content": f"q{i}"},), f"good {i}", f"bad {i}", "s", "helpful"
        )
        for i in range(n)
    ]
    rows = [PrefixRow((1,), ((2,) * (i + 1), (2,) * 3)) for i in range(n)]  # chosen longer from the fourth on
    return HeldOut(pairs, rows, base, base[..., None] if members is None else members)


def wilson(successes: float, n: int) -> tuple[float, float]:
    z, p = 1.959963984540054, successes / n
    centre, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - width) / (1 + z * z / n), (centre + width) / (1 + z * z / n)


def test_accuracy_counts_ties_half_and_apart() -> None:
    metrics = reward_metrics(held_out(MARGINS))
    low, high = wilson(3.5, 6)
    accuracy = metrics["accuracy"]
    assert accuracy["value"] == pytest.approx(3.5 / 6) and (accuracy["n"], accuracy["ties"]) == (6, 1)
    assert (accuracy["low"], accuracy["high"]) == pytest.approx((low, high))
    assert metrics["length_only_accuracy"]["value"] == pytest.approx(3.5 / 6)  # lengths 1..6 against 3
    assert metrics["margins"] == MARGINS and metrics["rewards_rejected"] == [0.125] * 6
    assert metrics["rewards_chosen"] == [m + 0.125 for m in MARGINS]


def test_log_odds_slope_is_where_the_likelihood_is_flat() -> None:
    slope = reward_metrics(held_out(MARGINS))["log_odds_slope"]
    d = np.array(MARGINS)
    grid = np.linspace(slope - 0.5, slope + 0.5, 2001)
    likelihood = -np.log1p(np.exp(-grid[:, None] * d)).sum(axis=1)
    assert grid[likelihood.argmax()] == pytest.approx(slope, abs=6e-4)


def test_calibration_error_of_single_pair_bins() -> None:
    """Six pairs make six bins of one: the error is the mean of |correct - sigmoid|margin||."""
    metrics = reward_metrics(held_out(MARGINS))
    confidence = [1 / (1 + math.exp(-abs(m))) for m in MARGINS]
    correct = [1.0, 1.0, 1.0, 0.0, 0.5, 0.0]
    expected = sum(abs(a - c) for a, c in zip(correct, confidence, strict=True)) / 6
    assert metrics["expected_calibration_error"] == pytest.approx(expected)
    assert sum(row["n"] for row in metrics["reliability"]) == 6
    assert [row["confidence"] for row in metrics["reliability"]] == pytest.approx(sorted(confidence))


def test_members_are_compared_by_their_margins() -> None:
    margins = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.5, 1.0, 1.0, -2.0], [2.0, -1.0, 0.25, 1.0]])  # [M, n]
    offsets = torch.tensor([5.0, -3.0, 0.5])  # a member's level must not matter
    members = torch.stack([margins + offsets[:, None], offsets[:, None].expand(3, 4)], dim=0).permute(2, 0, 1)
    metrics = reward_metrics(held_out([1.0, 1.0, 1.0, 1.0], members.contiguous()))
    expected = np.corrcoef(margins.numpy())
    assert np.array(metrics["member_correlation_matrix"]) == pytest.approx(expected, abs=1e-4)
    upper = [expected[0, 1], expected[0, 2], expected[1, 2]]
    assert (
        metrics["member_correlation"] == pytest.approx(np.mean(upper), abs=1e-6) and metrics["members"] == 3
    )
    mean = margins.mean(0)
    assert metrics["mean_member_accuracy"]["value"] == float((mean > 0).float().mean())
    assert metrics["member_accuracies"] == [0.75, 0.75, 0.75]
    disagreement = metrics["disagreement"]
    sd, wrong = margins.numpy().std(axis=0), (mean < 0).numpy()
    assert disagreement["auc"]["value"] == np.mean(
        [sd[i] > sd[j] for i in range(4) for j in range(4) if wrong[i] > wrong[j]]
    )
    assert sum(row["n"] for row in disagreement["bins"]) == 4


def test_calibrated_margins_are_measured_too() -> None:
    margins = torch.tensor([[1.0, 2.0, -1.0, 0.5], [3.0, -1.0, 1.0, -2.0]])  # [M, n]
    members = torch.stack([margins, torch.zeros(2, 4)], dim=0).permute(2, 0, 1).contiguous()
    scored = held_out([1.0, 1.0, 1.0, 1.0], members)
    assert reward_metrics(scored)["calibrated"] is None
    found = reward_metrics(replace(scored, scale=torch.tensor([0.5, 2.0])))["calibrated"]
    mean = (margins / torch.tensor([[0.5], [2.0]])).mean(0).tolist()  # 1.75, 1.75, -.75, 0
    confidence = [1 / (1 + math.exp(-abs(m))) for m in mean]  # of pairs that are right, right, wrong and tied
    assert found["expected_calibration_error"] == pytest.approx(
        (2 - 2 * confidence[0] + confidence[2] + abs(0.5 - confidence[3])) / 4
    )
    slope = found["log_odds_slope"]  # where the likelihood is flat
    assert sum(m / (1 + math.exp(slope * m)) for m in mean) == pytest.approx(0, abs=1e-6)


def test_what_is_undefined_is_none_and_stops_nothing() -> None:
    one_pair = reward_metrics(held_out([1.0], torch.randn(1, 2, 3)))
    assert one_pair["member_correlation"] is None and one_pair["disagreement"]["mistake_correlation"] is None
    assert one_pair["log_odds_slope"] is None  # a margin above zero alone has no maximum
    ties = reward_metrics(held_out([0.0, 0.0], torch.zeros(2, 2, 2)))
    assert ties["log_odds_slope"] is None and ties["member_correlation"] is None
    assert ties["accuracy"]["ties"] == 2 and ties["accuracy"]["value"] == 0.5
    alone = reward_metrics(held_out(MARGINS))
    assert alone["members"] == 1 and alone["member_correlation"] is None and alone["disagreement"] is None


def test_extremes_are_the_highest_and_the_lowest_margins_in_order() -> None:
    margins = [float(x) for x in np.random.default_rng(0).permutation(25) - 12]
    examples = extreme_examples(held_out(margins))
    assert [row["margin"] for row in examples["top"]] == [12.0 - i for i in range(10)]
    assert [row["margin"] for row in examples["bottom"]] == [-12.0 + i for i in range(10)]
    top = margins.index(12.0)
    first = examples["top"][0]
    assert (first["chosen"], first["rejected"], first["prompt"]) == (
        f"good {top}",
        f"bad {top}",
        f"user: q{top}",
    )
    text = readable_examples("helpful", examples)
    assert text.index("margin +12.000") < text.index("margin +3.000") < text.index("margin -12.000")
    assert f"  chosen:   good {top}" in text and f"  rejected: bad {top}" in text


def test_fewer_pairs_than_examples_are_all_shown() -> None:
    examples = extreme_examples(held_out([1.0, -1.0]))
    assert [len(rows) for rows in examples.values()] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"members": 1}, "one member"),
        ({"member_correlation": 0.97}, "in effect one model"),
        ({"accuracy": {"value": 0.6, "low": 0.45, "high": 0.7, "n": 30}}, "not distinguishable from chance"),
    ],
)
def test_warnings_say_what_to_distrust(changes: dict[str, Any], word: str) -> None:
    sound = {
        "members": 20,
        "member_correlation": 0.9,
        "accuracy": {"value": 0.8, "low": 0.7, "high": 0.9, "n": 99},
    }
    assert warnings(sound, "helpful") == []
    (note,) = warnings(sound | changes, "helpful")
    assert word in note and note.startswith("helpful: ")
