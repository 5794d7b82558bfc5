"""Published and independently computed values in `tests/golden`: RewardBench, MT-Bench, length-controlled win rates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.rewardbench import EXAMPLE_COUNTS, SECTIONS, overall_score, section_scores
from prmd.benchmarks.mt_bench_data import parse_rating, parse_verdict
from prmd.judges.cards import pairwise_both_orders
from prmd.statistics.paired_tests import length_controlled_win_rate

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_rewardbench_sections() -> None:
    values = golden("rewardbench_sections")
    sections = section_scores(values["accuracies"])
    assert {name: round(score, 6) for name, score in sections.items()} == values["sections"]
    assert overall_score(sections) == pytest.approx(np.mean(list(values["sections"].values())), abs=1e-6)
    assert {n: sum(EXAMPLE_COUNTS[s] for s in subsets) for n, subsets in SECTIONS.items()} == values[
        "examples"
    ]


@pytest.mark.parametrize("case", golden("mt_bench_ratings")["cases"], ids=lambda case: case["reply"][:20])
def test_mt_bench_ratings(case: dict[str, Any]) -> None:
    assert parse_rating(case["reply"]) == case["rating"]


def test_mt_bench_wins_and_ties() -> None:
    values = golden("mt_bench_pairs")
    assert {reply: parse_verdict(reply) for reply in values["verdicts"]} == values["verdicts"]
    orders = iter(zip(*[(first, second) for first, second, _ in values["cases"]], strict=True))
    result = pairwise_both_orders(
        lambda pairs: [parse_verdict(reply) for reply in next(orders)],
        candidate=list(values["cases"]),
        baseline=list(values["cases"]),
    )
    assert list(result.outcomes) == [outcome for _, _, outcome in values["cases"]]
    assert result.win_rate == pytest.approx(values["win_rate_adjusted"])


@pytest.mark.parametrize("case", golden("length_controlled")["cases"], ids=lambda case: case["name"])
def test_length_controlled_win_rate(case: dict[str, Any]) -> None:
    found = length_controlled_win_rate(
        np.array(case["wins"]), np.array(case["length_differences"]), n_resamples=100
    )
    assert found.estimate.value == pytest.approx(case["win_rate"], abs=1e-5)
    assert found.length_effect == pytest.approx(case["phi"], abs=1e-4)
    assert found.raw == pytest.approx(case["raw"])
