"""`evaluation.comparison`: which outcome of an item is compared, with which test, on which items."""

import numpy as np
import pytest
from scipy import stats

from prmd.evaluation.comparison import compare_benchmarks, item_outcomes
from prmd.statistics.resampling import Resampling

RESAMPLING = Resampling(500, 0)


def test_outcomes_are_told_from_descriptions() -> None:
    question = {"id": "q", "question": "Why?", "mc1": 1.0, "mc2": 0.4, "mc3": 0.5, "best": {"logp": -3.0}}
    assert item_outcomes(question) == {"mc1": 1.0, "mc2": 0.4, "mc3": 0.5}
    pair = {"id": "p", "objective": "helpful", "logp_margin": 9.0, "length_margin": 3}
    assert item_outcomes(pair) == {}
    for margin, right in ((2.0, 1.0), (-0.1, 0.0), (0.0, 0.5)):
        assert item_outcomes(pair | {"logratio_margin": margin}) == {"implicit_accuracy": right}
    request = {
        "id": "b",
        "category": "x",
        "verdicts": {"jailbreak[j]": "unsafe"},
        "outcomes": {"asr[j]": 1.0},
    }
    assert item_outcomes(request) == {"asr[j]": 1.0}
    answer = {"id": "g", "question": "Why?", "answer": "So.", "score": -0.3}
    assert item_outcomes(answer | {"true": False}) == {"true": 0.0}
    assert item_outcomes(answer | {"true": None}) == {}  # the judge could not be read
    assert item_outcomes(question | {"true": [{"text": "So.", "logp": -3.0}]}) == item_outcomes(question)
    assert item_outcomes({"id": "r", "prompt_toxicity": 0.9, "emt25": 0.6, "tp25": 1.0}) == {
        "emt25": 0.6,
        "tp25": 1.0,
    }
    assert item_outcomes({"id": "m", "rating_1": 7, "rating_2": None}) == {"rating_1": 7.0}


def test_yes_and_no_are_tested_by_mcnemar_and_the_rest_by_the_mean_difference() -> None:
    rng = np.random.default_rng(0)
    values = {m: rng.random(60) for m in ("baseline_dpo", "cvar")}
    right = {m: (rng.random(60) < share).astype(float) for m, share in (("baseline_dpo", 0.3), ("cvar", 0.7))}
    items = {m: [{"id": i, "mc1": right[m][i], "mc2": values[m][i]} for i in range(60)] for m in values} | {
        "reference": [{"id": i, "mc1": 0.0, "mc2": 0.5} for i in range(60)]
    }
    items["cvar"].reverse()  # items are paired by id, not by order
    found = compare_benchmarks({"truthfulqa": items}, RESAMPLING)["paired"]
    assert [(t["method"], t["against"], t["outcome"]) for t in found] == [
        ("cvar", "baseline_dpo", "mc1"),
        ("cvar", "baseline_dpo", "mc2"),
    ]
    mc1, mc2 = found
    gained, lost = (
        (right["cvar"] > right["baseline_dpo"]).sum(),
        (right["cvar"] < right["baseline_dpo"]).sum(),
    )
    assert mc1["p"] == pytest.approx(stats.binomtest(int(gained), int(gained + lost)).pvalue)
    assert mc1["test"] == f"McNemar, {gained} against {lost} of 60"
    assert mc1["difference"]["value"] == pytest.approx((gained - lost) / 60)
    assert mc2["difference"]["value"] == pytest.approx((values["cvar"] - values["baseline_dpo"]).mean())
    assert mc2["p"] == pytest.approx(stats.ttest_rel(values["cvar"], values["baseline_dpo"]).pvalue, abs=0.06)
    assert mc1["p_holm"] == pytest.approx(min(1.0, 2 * mc1["p"])) and mc2["p_holm"] >= mc2["p"]


def test_generated_answers_are_compared_where_both_verdicts_could_be_read() -> None:
    said = {
        "baseline_dpo": [False, False, False, True, None, False],
        "cvar": [True, True, False, False, True, None],
    }
    items = {m: [{"id": i, "true": v} for i, v in enumerate(values)] for m, values in said.items()}
    (test,) = compare_benchmarks({"truthfulqa_generation": items}, RESAMPLING)["paired"]
    assert (test["outcome"], test["test"]) == ("true", "McNemar, 2 against 1 of 4")
    assert test["p"] == pytest.approx(stats.binomtest(2, 3).pvalue)


def test_only_items_that_both_methods_have_are_compared() -> None:
    items = {
        "reference": [{"id": i, "mc1": 1.0} for i in range(4)],
        "mean": [{"id": i, "mc1": 0.0} for i in range(2, 9)],
    }
    (test,) = compare_benchmarks({"truthfulqa": items}, RESAMPLING)["paired"]
    assert test["test"] == "McNemar, 0 against 2 of 2" and test["against"] == "reference"
    assert compare_benchmarks({"x": {"mean": items["mean"]}}, RESAMPLING)["paired"] == []
    assert compare_benchmarks({"x": {"reference": items["reference"]}}, RESAMPLING)["paired"] == []
