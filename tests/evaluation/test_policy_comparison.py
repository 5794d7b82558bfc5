"""`evaluation.comparison`: paired tests, win matrix, front and refusals, from method files made of arrays."""

from typing import Any

import numpy as np
import pytest

from prmd.errors import DataError
from prmd.evaluation.comparison import SHARED_PARTS, check_comparable, compare_methods, win_matrix
from prmd.evaluation.metrics import SampledMethod, method_metrics
from prmd.evaluation.scores import ReferenceScores
from prmd.objectives import OBJECTIVES
from prmd.statistics.resampling import Resampling

RESAMPLING = Resampling(200, 0)


def method_files(scores: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Contents of the files of methods with these raw scores [K, X, n], the reference's first."""
    raw = scores["reference"]
    reference, zeros = ReferenceScores.fit(OBJECTIVES, raw), np.zeros(raw.shape[1:])
    files = []
    for method, values in scores.items():
        sampled = SampledMethod(method, zeros, zeros, zeros, zeros + 4, np.ones(zeros.shape, bool))
        metrics = method_metrics(sampled, values, reference, RESAMPLING, reference_lengths=zeros + 4)
        metrics["per_prompt"]["ids"] = list(range(len(zeros)))
        shared = {"compared_on": dict.fromkeys(SHARED_PARTS, "same")}
        files.append({"method": method, "approach": "embedded", "evaluation": shared, **metrics})
    return files


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


def test_win_matrix_counts_every_pair_of_samples() -> None:
    rng = np.random.default_rng(6)
    rewards = {name: rng.integers(0, 4, (3, 7, 2)).astype(float) for name in ("reference", "a", "b")}
    matrix = win_matrix(rewards, OBJECTIVES, RESAMPLING)
    for k, objective in enumerate(OBJECTIVES):
        duels = [(d["method"], d["against"]) for d in matrix[objective]]
        assert duels == [("reference", "a"), ("reference", "b"), ("a", "b")]
        for duel in matrix[objective]:
            ours, theirs = rewards[duel["method"]][k], rewards[duel["against"]][k]
            pairs = [(p, q) for x in range(7) for p in ours[x] for q in theirs[x]]
            assert duel["win_rate"]["value"] == pytest.approx(
                np.mean([(p > q) + (p == q) / 2 for p, q in pairs])
            )


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
