"""`evaluation.scores`: P15 to P17 by loops over members and samples, and what equal policies get."""

import numpy as np
import pytest

from prmd.evaluation.scores import MemberScores, proxy_metrics
from prmd.objectives import OBJECTIVES
from prmd.statistics.resampling import Resampling

RESAMPLING = Resampling(200, 0)


def by_loops(raw: np.ndarray, reference: np.ndarray, scale: np.ndarray, *, same: bool) -> np.ndarray:
    """min_m of the calibrated rewards [K, X, n'], each sample centred on the reference samples but one."""
    objectives, members, prompts, n = raw.shape
    m = reference.shape[3]
    out = np.empty((objectives, prompts, n if same else n * m))
    for k in range(objectives):
        for x in range(prompts):
            values = []
            for i in range(n):
                for left_out in [i] if same else range(m):
                    rest = [j for j in range(m) if j != left_out]
                    values.append(
                        min(
                            (raw[k, h, x, i] - reference[k, h, x, rest].mean()) / scale[k, h]
                            for h in range(members)
                        )
                    )
            out[k, x] = values
    return out


def test_proxies_are_those_of_loops_over_members() -> None:
    rng = np.random.default_rng(0)
    reference, policy = rng.normal(size=(2, 3, 4, 6, 3))
    scale = rng.uniform(0.5, 2.0, size=(3, 4))
    members = MemberScores(OBJECTIVES, reference, scale)
    theirs = by_loops(reference, reference, scale, same=True)
    tau = [np.quantile(theirs[k], 0.1) for k in range(3)]
    for raw, same in ((reference, True), (policy, False)):
        minima = by_loops(raw, reference, scale, same=same)
        found = proxy_metrics(raw, members, RESAMPLING, is_reference=same)
        p15 = {k: minima[i].mean() for i, k in enumerate(OBJECTIVES)}
        assert {k: v["value"] for k, v in found["worst_member"].items()} == pytest.approx(p15)
        worst = found["worst_objective"]
        assert worst["reward"]["value"] == pytest.approx(min(p15.values()))
        assert p15[worst["objective"]] == min(p15.values())
        broken = (minima < np.array(tau)[:, None, None]).any(axis=0)
        assert found["violation_rate"]["value"] == pytest.approx(broken.mean())
        assert found["per_prompt"]["violation"] == pytest.approx(broken.mean(axis=1).tolist())
        assert found["violation_rate"]["n"] == 6 and found["members"] == 4
    chance = (theirs < np.array(tau)[:, None, None]).any(axis=0).mean()
    assert found["violation_rate"]["chance"] == pytest.approx(chance)


def test_a_policy_equal_to_the_reference_violates_as_often() -> None:
    rng = np.random.default_rng(1)
    reference, policy = rng.normal(size=(2, 3, 5, 4000, 2))
    members = MemberScores(OBJECTIVES, reference, np.ones((3, 5)))
    found = proxy_metrics(policy, members, Resampling(100, 0), is_reference=False)
    assert found["violation_rate"]["value"] == pytest.approx(found["violation_rate"]["chance"], abs=0.015)
    assert found["violation_rate"]["chance"] == pytest.approx(1 - 0.9**3, abs=0.02)


def test_scaling_and_shifting_a_member_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    reference, policy = rng.normal(size=(2, 3, 4, 8, 3))
    scale, factor = np.ones((3, 4)), rng.uniform(0.1, 9.0, size=(3, 4))
    shift = rng.normal(size=(3, 4, 8, 1))
    moved = [values * factor[..., None, None] + shift for values in (reference, policy)]
    plain = proxy_metrics(policy, MemberScores(OBJECTIVES, reference, scale), RESAMPLING, is_reference=False)
    other = proxy_metrics(
        moved[1], MemberScores(OBJECTIVES, moved[0], scale * factor), RESAMPLING, is_reference=False
    )
    for k in OBJECTIVES:
        assert plain["worst_member"][k]["value"] == pytest.approx(other["worst_member"][k]["value"], abs=1e-9)
    assert plain["violation_rate"] == other["violation_rate"]
