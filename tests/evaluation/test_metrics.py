"""`evaluation.metrics`: every number by loops or closed forms, from arrays alone."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from prmd.evaluation.metrics import SampledMethod, method_metrics
from prmd.evaluation.scores import ReferenceScores
from prmd.objectives import OBJECTIVES
from prmd.statistics.resampling import Resampling


def sampled(method: str, prompts: int, n: int) -> SampledMethod:
    zeros = np.zeros((prompts, n))
    return SampledMethod(method, zeros, zeros, zeros, zeros + 4, np.ones((prompts, n), bool))


def measured(
    scores: np.ndarray, base: np.ndarray, *, method: str = "cvar", lengths: np.ndarray | None = None
) -> dict[str, Any]:
    prompts, n = scores.shape[1:]
    found = sampled(method, prompts, n)
    if lengths is not None:
        found = dataclasses.replace(found, lengths=lengths)
    return method_metrics(
        found,
        scores,
        ReferenceScores.fit(OBJECTIVES, base),
        Resampling(100, 0),
        reference_lengths=np.full(base.shape[1:], 4.0),
    )


def test_mean_of_min_is_the_same_for_the_reference_and_an_equal_policy() -> None:
    rng = np.random.default_rng(0)
    prompts, n = 20_000, 2
    raw, policy = rng.normal(size=(2, 3, prompts, n))
    reference = ReferenceScores(OBJECTIVES, raw, np.ones(3), raw.mean(axis=2))
    ours = reference.mean_of_min(policy, is_reference=False).mean()
    theirs = reference.mean_of_min(raw, is_reference=True).mean()
    assert ours == pytest.approx(theirs, abs=0.03)
    # E min of three normals of variance 2 (a sample minus one other sample) is -0.8463 sqrt(2)
    assert theirs == pytest.approx(-0.8462843753 * math.sqrt(2), abs=0.03)
    plain = reference.calibrated(policy).min(axis=0).mean() - reference.calibrated(raw).min(axis=0).mean()
    assert plain < -0.3  # what centring on all samples would claim


def test_mean_of_min_by_loops() -> None:
    rng = np.random.default_rng(1)
    raw, policy = rng.normal(size=(3, 2, 3)), rng.normal(size=(3, 2, 4))
    scale = np.array([0.5, 1.0, 2.0])
    reference = ReferenceScores(OBJECTIVES, raw, scale, raw.mean(axis=2))
    for x in range(2):
        ours, theirs = [], []
        for j in range(3):
            rest = [i for i in range(3) if i != j]
            offset = [np.mean([raw[k, x, i] for i in rest]) for k in range(3)]
            theirs.append(min((raw[k, x, j] - offset[k]) / scale[k] for k in range(3)))
            ours += [min((policy[k, x, i] - offset[k]) / scale[k] for k in range(3)) for i in range(4)]
        assert reference.mean_of_min(policy, is_reference=False)[x] == pytest.approx(np.mean(ours))
        assert reference.mean_of_min(raw, is_reference=True)[x] == pytest.approx(np.mean(theirs))


def test_scaling_and_shifting_a_judge_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    raw, policy = rng.normal(size=(3, 12, 3)), rng.normal(size=(3, 12, 3))
    factor, shift = np.array([3.0, 0.1, 7.0])[:, None, None], rng.normal(size=(3, 12, 1))
    found = [
        measured(scores, base)
        for scores, base in ((policy, raw), (policy * factor + shift, raw * factor + shift))
    ]
    for key in ("mean_of_min", "cvar_10"):
        assert found[0][key]["value"] == pytest.approx(found[1][key]["value"], abs=1e-9)
    for k in OBJECTIVES:
        assert found[0]["objectives"][k]["win_rate"] == found[1]["objectives"][k]["win_rate"]


def test_cvar_is_the_mean_of_the_worst_tenth_of_prompts() -> None:
    rng = np.random.default_rng(3)
    raw, policy = rng.normal(size=(3, 40, 2)), rng.normal(size=(3, 40, 2))
    metrics = measured(policy, raw)
    minima = sorted(metrics["per_prompt"]["mean_of_min"])
    assert metrics["cvar_10"]["value"] == pytest.approx(np.mean(minima[:4])) and metrics["cvar_10"]["n"] == 40


def test_win_tie_and_loss_shares_and_dominance_by_loops() -> None:
    rng = np.random.default_rng(6)
    raw, policy = rng.integers(0, 3, (2, 3, 9, 2)).astype(float)
    found = measured(policy, raw)
    for k, objective in enumerate(OBJECTIVES):
        pairs = [(p, r) for x in range(9) for p in policy[k, x] for r in raw[k, x]]
        shares = {"won": np.mean([p > r for p, r in pairs]), "tied": np.mean([p == r for p, r in pairs])}
        shares["lost"] = 1 - shares["won"] - shares["tied"]
        outcomes = found["objectives"][objective]["outcomes"]
        assert {name: outcomes[name]["value"] for name in shares} == pytest.approx(shares)
        win_rate = found["objectives"][objective]["win_rate"]
        assert (
            win_rate["value"] == pytest.approx(shares["won"] + shares["tied"] / 2)
            and win_rate["chance"] == 0.5
        )
    both = [(policy[:, x, i], raw[:, x, j]) for x in range(9) for i in range(2) for j in range(2)]
    better = np.mean([(p >= r).all() and (p > r).any() for p, r in both])
    worse = np.mean([(r >= p).all() and (r > p).any() for p, r in both])
    own = np.mean(
        [
            (raw[:, x, i] >= raw[:, x, 1 - i]).all() and (raw[:, x, i] > raw[:, x, 1 - i]).any()
            for x in range(9)
            for i in range(2)
        ]
    )
    dominance = found["dominance"]
    assert dominance["dominates"]["value"] == pytest.approx(better)
    assert dominance["dominated"]["value"] == pytest.approx(worse)
    assert dominance["dominates"]["chance"] == pytest.approx(own) == dominance["dominated"]["chance"]


def test_hypervolume_is_the_box_of_mean_rewards_and_nothing_where_one_objective_lost() -> None:
    rng = np.random.default_rng(7)
    raw = rng.normal(size=(3, 60, 2))
    better = measured(rng.normal(1.0, size=raw.shape), raw)
    means = [better["objectives"][k]["mean_reward"]["value"] for k in OBJECTIVES]
    volume = better["hypervolume"]
    assert volume["value"] == pytest.approx(np.prod(means))
    assert 0 < volume["low"] < volume["value"] < volume["high"] and volume["chance"] == 0.0
    lost = rng.normal(size=raw.shape) + np.array([1.0, 1.0, -1.0])[:, None, None]
    assert measured(lost, raw)["hypervolume"]["value"] == 0.0


def test_a_win_that_is_only_length_is_pointed_out() -> None:
    rng = np.random.default_rng(8)
    prompts = 300
    longer = rng.normal(0.6, 1.0, size=(prompts, 1)).repeat(2, axis=1)
    raw = rng.normal(size=(3, prompts, 2))
    found = measured(raw + 2 * longer, raw, lengths=4.0 + longer)
    for objective in OBJECTIVES:
        plain, controlled = (
            found["objectives"][objective]["win_rate"]["value"],
            found["objectives"][objective]["length_controlled"]["win_rate"],
        )
        assert plain > 0.62 and controlled["low"] < 0.5 < controlled["high"] + 0.05
        assert found["objectives"][objective]["length_controlled"]["length_effect"] > 1
    assert len(found["notes"]) == 3 and "at equal length" in found["notes"][0]


def test_few_prompts_tell_nothing_of_length() -> None:
    """Where the policy has nothing to do with length, the note stays away, however far the two win rates are apart."""
    notes = apart = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        raw, longer = rng.normal(size=(2, 3, 6, 2)), rng.normal(0.6, 1.0, size=(6, 1)).repeat(2, axis=1)
        found = measured(raw[0], raw[1], lengths=4.0 + longer)
        notes += len(found["notes"])
        apart += sum(
            abs(m["win_rate"]["value"] - m["length_controlled"]["win_rate"]["value"]) > 0.1
            for m in found["objectives"].values()
        )
    assert apart >= 5 and notes <= 0.1 * 120  # of 120 win rates


def test_estimators_of_one_kl_that_contradict_each_other_are_pointed_out() -> None:
    rng = np.random.default_rng(9)
    exact = rng.gamma(2.0, size=(200, 2))
    noisy = exact + rng.normal(size=exact.shape)
    raw = rng.normal(size=(3, 200, 2))
    zeros = np.zeros((200, 2))

    def notes(k1: np.ndarray, k3: np.ndarray) -> list[str]:
        found = SampledMethod("cvar", exact, k1, k3, zeros + 4, zeros == 0)
        reference = ReferenceScores.fit(OBJECTIVES, raw)
        return method_metrics(found, raw, reference, Resampling(100, 0), reference_lengths=zeros + 4)["notes"]

    assert notes(noisy, noisy) == []
    (note,) = notes(noisy + 0.5, noisy)
    assert note.startswith("KL by k1 is") and "standard errors apart" in note
    assert notes(exact + 1e-6, exact) == []  # rounding is no contradiction


def test_unanimous_wins_are_not_certain():
    resampling = Resampling(resamples=200, seed=0)
    estimate = resampling.win_rate(np.ones(16))
    assert estimate.value == 1.0 and 0.75 < estimate.low < 0.85
    mixed = np.array([0.25, 0.5, 1.0, 0.75])
    assert resampling.win_rate(mixed) == resampling.mean(mixed)
