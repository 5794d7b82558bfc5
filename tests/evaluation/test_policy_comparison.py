"""`evaluation.comparison`: paired tests, win matrix, front and refusals, from method files made of arrays."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from prmd.errors import DataError
from prmd.evaluation import comparison
from prmd.evaluation.comparison import (
    SHARED_PARTS,
    check_comparable,
    compare_methods,
    win_matrix,
    worst_objective_test,
)
from prmd.evaluation.metrics import SampledMethod, method_metrics
from prmd.evaluation.scores import ReferenceScores
from prmd.objectives import OBJECTIVES
from prmd.report.comparison_tables import BETTER, significance_marks, win_matrix_tables
from prmd.report.evaluation_sections import _summary
from prmd.report.measures import headline_table
from prmd.report.tables import DOWN, UP
from prmd.report.verdict import verdict
from prmd.statistics.resampling import Resampling

RESAMPLING = Resampling(200, 0)


def method_files(
    scores: dict[str, np.ndarray], lengths: dict[str, np.ndarray] | None = None
) -> list[dict[str, Any]]:
    """Contents of the files of methods with these raw scores [K, X, n], the reference's first."""
    raw = scores["reference"]
    reference, zeros = ReferenceScores.fit(OBJECTIVES, raw), np.zeros(raw.shape[1:])
    files = []
    for method, values in scores.items():
        tokens = lengths or dict.fromkeys(scores, zeros + 4)
        sampled = SampledMethod(method, zeros, zeros, zeros, tokens[method], np.ones(zeros.shape, bool))
        metrics = method_metrics(
            sampled, values, reference, RESAMPLING, reference_lengths=tokens["reference"]
        )
        metrics["per_prompt"]["ids"] = list(range(len(zeros)))
        shared = {"compared_on": dict.fromkeys(SHARED_PARTS, "same")}
        files.append({"method": method, "approach": "embedded", "evaluation": shared, **metrics})
    return files


def at_equal_length(wins: np.ndarray, longer: np.ndarray) -> float:
    """The win rate at a length difference of zero by scipy's minimiser, with the ridge that keeps separated wins finite."""
    x = np.tanh(longer / longer.std()) if longer.std() else 0 * longer

    def loss(p: np.ndarray) -> float:
        z = p[0] + p[1] * x
        return np.mean(np.logaddexp(0, z) - wins * z) + 0.5e-6 * (p @ p)

    return float(1 / (1 + np.exp(-minimize(loss, np.zeros(2), tol=1e-12).x[0])))


def by_length(bias: float, *, debiased: bool) -> dict[str, Any]:
    """The comparison of a policy that a judge likes for its length alone (bias > 0) or also without it."""
    rng = np.random.default_rng(11)
    reference, dpo, noise = rng.normal(size=(3, 3, 120, 4))
    lengths = {"reference": np.full((120, 4), 10.0), "dpo": np.full((120, 4), 10.0)}
    lengths["cvar"] = 10 + rng.uniform(-2, 6, 120)[:, None] * np.ones(4)
    gain = bias * (lengths["cvar"] - 10) / 2 if bias else 1.2
    scores = {"reference": reference, "dpo": dpo, "cvar": noise + gain}
    files = method_files(scores, lengths)
    if debiased:
        files[2]["debiased"] = {"helpful": ["length"]}
    return compare_methods(files, scores, RESAMPLING)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_a_verdict_on_debiased_reward_models_needs_equal_length_to_agree(bias: float, debiased: bool) -> None:
    found = by_length(bias, debiased=debiased)
    tests = {t["measure"]: t for t in found["paired"]}
    test, row = tests["win rate, helpful"], found["rows"][2]
    assert test["p_holm"] < 0.05 and test.get("needs_both", False) is debiased
    low = test["difference_at_equal_length"]["low"]
    assert (low > 0) is (bias == 0)
    marked = significance_marks(found).get(("cvar", "win rate, helpful"))
    assert marked == (None if debiased and bias else BETTER)
    assert "difference_at_equal_length" not in tests["mean of minimum"]
    cells = headline_table(found["rows"], "", before={}, behind={}).rows[2]
    controlled = row["length_controlled"]["helpful"]
    assert cells[1].endswith(UP) is not (debiased and bool(bias)) and (controlled["low"] > 0.5) is not bool(
        bias
    )
    assert row["worst"]["low"] > 0.5 and (row["worst_length_controlled"]["low"] > 0.5) is not bool(bias)
    matrix = win_matrix_tables(found)["Who beats whom: helpful"]
    cell = matrix.rows[1][3]  # dpo against cvar
    assert (DOWN in cell) is not (debiased and bool(bias)) and " / " in cell
    said = _summary(found["rows"])
    assert ("cvar beat the reference" in said) is not (debiased and bool(bias))


def test_the_difference_at_equal_length_is_that_of_two_fits() -> None:
    found = by_length(1.0, debiased=True)
    files = {row["method"]: row for row in found["rows"]}
    test = found["paired"][0]
    assert test["measure"] == "win rate, helpful"
    rates = [files[name]["length_controlled"]["helpful"]["value"] for name in ("cvar", "dpo")]
    assert test["difference_at_equal_length"]["value"] == pytest.approx(rates[0] - rates[1], abs=1e-9)
    worst = files["cvar"]["worst_length_controlled"]
    assert worst["value"] == pytest.approx(
        min(v["value"] for v in files["cvar"]["length_controlled"].values())
    )


def compared(scores: dict[str, np.ndarray]) -> dict[str, Any]:
    return compare_methods(method_files(scores), scores, RESAMPLING)


def test_without_a_baseline_policies_are_compared_with_the_reference_and_equal_ones_do_not_differ() -> None:
    raw = np.random.default_rng(4).normal(size=(3, 12, 3))
    against_reference = compared({"reference": raw, "cvar": raw})
    assert {t["against"] for t in against_reference["paired"]} == {"reference"}
    against_dpo = compared({"reference": raw, "cvar": raw, "dpo": raw})["paired"]
    assert {t["method"] for t in against_dpo} == {"cvar"} and {t["against"] for t in against_dpo} == {"dpo"}
    assert all(t["difference"]["value"] == 0.0 and t["p"] == 1.0 for t in against_dpo)
    alone = compared({"reference": raw})
    assert alone["paired"] == [] and alone["hypervolume"] is None and alone["over_optimisation"] is None


def test_a_method_that_is_better_on_one_objective_is_found_to_be() -> None:
    rng = np.random.default_rng(5)
    reference, dpo, noise = rng.normal(size=(3, 3, 80, 4))
    shift = np.array([2.0, 0.0, 0.0])[:, None, None]
    found = compared({"reference": reference, "baseline_dpo": dpo, "mean": noise + shift})["paired"]
    p = {t["measure"]: t["p_holm"] for t in found}
    assert p["win rate, helpful"] < 0.03  # 4 of 201, the least that 200 sign patterns can say
    assert p["win rate, harmless"] > 0.05 and p["win rate, honest"] > 0.05
    assert all(t["p"] <= t["p_holm"] <= 1.0 for t in found)


def worst_test(shift: list[float], base: list[float], prompts: int = 120) -> dict[str, Any]:
    """The test of the worst objective of a policy against dpo, whose rewards are shifted by objective."""
    rng = np.random.default_rng(8)
    reference, dpo, noise = rng.normal(size=(3, 3, prompts, 4))
    own, other = (np.array(values)[:, None, None] for values in (shift, base))
    (found,) = compared({"reference": reference, "dpo": dpo + other, "mean": noise + own})["worst_objective"]
    return found


def test_the_lowest_win_rate_is_compared_with_the_lowest() -> None:
    up, down = worst_test([0.5, 0.5, 0.5], [2.0, 2.0, 0.0]), worst_test([2.0, 2.0, 0.0], [0.5, 0.5, 0.5])
    assert up["difference"] > 0 and up["p_holm"] < 0.05  # worse on two objectives, but not on the lowest
    assert down["difference"] < 0 and down["p_holm"] < 0.05
    better_elsewhere = worst_test([2.0, 2.0, 0.0], [0.0, 0.0, 0.0])
    assert better_elsewhere["p_holm"] > 0.05
    assert verdict_of([2.0, 2.0, 0.0], [0.0, 0.0, 0.0]) == "mean is not shown to beat DPO"
    assert verdict_of([0.5] * 3, [2.0, 2.0, 0.0]).startswith("mean beats DPO on the worst objective, 0.6")
    assert verdict_of([2.0, 2.0, 0.0], [0.5] * 3).endswith("; mean is worse on the worst objective")


def verdict_of(shift: list[float], base: list[float]) -> str:
    rng = np.random.default_rng(8)
    reference, dpo, noise = rng.normal(size=(3, 3, 120, 4))
    own, other = (np.array(values)[:, None, None] for values in (shift, base))
    return verdict(compared({"reference": reference, "dpo": dpo + other, "mean": noise + own}), {}, None)


def test_equal_worst_objectives_are_told_apart_no_more_often_than_they_may_be() -> None:
    """Both have their lowest win rate on different objectives and equally low: p below .1 in at most a tenth of worlds."""
    rng, found = np.random.default_rng(9), []
    reference = {"per_prompt": {"length": [0.0] * 30}}
    for _ in range(60):
        rates = rng.normal([[0.4, 0.6, 0.6], [0.6, 0.4, 0.6]], 0.2, (30, 2, 3)).clip(0, 1)
        files = [
            {
                "method": str(i),
                "per_prompt": {"win_rate": dict(zip("abc", rates[:, i].T.tolist(), strict=True))},
            }
            for i in range(2)
        ]
        found.append(worst_objective_test(*files, reference, RESAMPLING)["p"])
    assert np.mean(np.array(found) < 0.1) < 0.1 + 3 * np.sqrt(0.1 * 0.9 / 60)


def test_win_matrix_counts_every_pair_of_samples() -> None:
    rng = np.random.default_rng(6)
    rewards = {name: rng.integers(0, 4, (3, 7, 2)).astype(float) for name in ("reference", "a", "b")}
    lengths = {name: rng.integers(3, 9, 7).astype(float) for name in rewards}
    matrix = win_matrix(rewards, OBJECTIVES, RESAMPLING, lengths=lengths, debiased=("b",))
    for k, objective in enumerate(OBJECTIVES):
        duels = [(d["method"], d["against"]) for d in matrix[objective]]
        assert duels == [("reference", "a"), ("reference", "b"), ("a", "b")]
        for duel in matrix[objective]:
            ours, theirs = rewards[duel["method"]][k], rewards[duel["against"]][k]
            pairs = [(p, q) for x in range(7) for p in ours[x] for q in theirs[x]]
            assert duel["win_rate"]["value"] == pytest.approx(
                np.mean([(p > q) + (p == q) / 2 for p, q in pairs])
            )
            wins = np.array(
                [
                    np.mean([(p > q) + (p == q) / 2 for p in a for q in b])
                    for a, b in zip(ours, theirs, strict=True)
                ]
            )
            longer = lengths[duel["method"]] - lengths[duel["against"]]
            assert duel["length_controlled"]["value"] == pytest.approx(
                at_equal_length(wins, longer), abs=1e-4
            )
            assert duel.get("needs_both", False) is ("b" in (duel["method"], duel["against"]))


def test_the_front_of_all_policies_is_no_smaller_than_of_one() -> None:
    rng = np.random.default_rng(7)
    raw = rng.normal(size=(3, 40, 2))
    shifts = {"a": (2.0, 1.0, 1.0), "b": (1.0, 1.0, 2.0)}
    scores = {"reference": raw}
    scores |= {m: rng.normal(size=raw.shape) + np.array(s)[:, None, None] for m, s in shifts.items()}
    files = method_files(scores)
    means = {f["method"]: [v["mean_reward"]["value"] for v in f["objectives"].values()] for f in files[1:]}
    a, b = means["a"], means["b"]
    union = np.prod(a) + np.prod(b) - np.prod(np.minimum(a, b))
    found = compare_methods(files, scores, RESAMPLING)["hypervolume"]
    assert found["value"] == pytest.approx(union)
    assert found["low"] < found["value"] < found["high"]


@pytest.mark.parametrize("part", SHARED_PARTS)
def test_results_of_another_evaluation_are_refused_by_name(part: str) -> None:
    raw = np.random.default_rng(8).normal(size=(3, 4, 2))
    files = method_files({"reference": raw, "cvar": raw})
    check_comparable(files)
    files[1]["evaluation"] = {"compared_on": dict.fromkeys(SHARED_PARTS, "same") | {part: "other"}}
    with pytest.raises(DataError, match=f"reference and cvar were evaluated with different {part}, so"):
        compare_methods(files, {"reference": raw, "cvar": raw}, RESAMPLING)


def test_prompts_in_another_order_are_refused() -> None:
    raw = np.random.default_rng(9).normal(size=(3, 4, 2))
    files = method_files({"reference": raw, "cvar": raw})
    files[1]["per_prompt"]["ids"] = files[1]["per_prompt"]["ids"][::-1]
    with pytest.raises(DataError, match="different prompts"):
        check_comparable(files)


def test_a_volume_that_would_take_too_long_is_left_out_and_said() -> None:
    rng = np.random.default_rng(0)
    files = [
        {"per_prompt": {"mean_reward": {f"o{k}": list(rng.uniform(size=8)) for k in range(12)}}}
        for _ in range(12)
    ]
    found = comparison._front(files, RESAMPLING)
    assert found["hypervolume"] is None and "12 policies on 12 objectives" in found["hypervolume_left_out"]
    assert "hypervolume_left_out" not in comparison._front(files[:4], RESAMPLING)
    assert comparison._front(files[:1], RESAMPLING)["hypervolume"]["value"] == pytest.approx(
        np.prod([np.mean(v) for v in files[0]["per_prompt"]["mean_reward"].values()])
    )
