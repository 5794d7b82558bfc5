"""An objective of weight 0 is no part of R: of no method's targets, scale, weights, notes or fingerprint."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_scores import K, M, N, random_scores, reference
from tiny_workspace import policy_config

from prmd.config.policy import PolicySection
from prmd.models.loading import load_tokenizer
from prmd.objectives import OBJECTIVES
from prmd.pessimism.aggregation import METHODS, Parameters, method_aggregation, robust_rewards
from prmd.policies.inputs import policy_fingerprints
from prmd.policies.methods import POLICY_METHODS
from prmd.policies.notes import method_notes
from prmd.policies.pairs import PairScores, ScaleResponses
from prmd.policies.robust_reward import solve_reward
from prmd.policies.sample_pairs import sides_by_reward
from prmd.policies.targets import Targets, method_targets, policy_loss

WITHOUT_HARMLESS = {"helpful": 0.7, "harmless": 0.0, "honest": 0.3}
HONEST_ALONE = {"helpful": 0.0, "harmless": 0.0, "honest": 1.0}
REWARDED = tuple(name for name, method in POLICY_METHODS.items() if method.reads_rewards)


def with_rewards(scores: PairScores, k: int, values: torch.Tensor) -> PairScores:
    """The same pairs, with other rewards of one objective."""
    rewards = scores.rewards.clone()
    rewards[k] = values
    return replace(scores, rewards=rewards)


def labelled_for_others(scores: PairScores, without: int) -> PairScores:
    """Pairs labelled for the objectives that have weight, as they are drawn."""
    drawn = [k for k in range(K) if k != without]
    return replace(scores, labelled_for=torch.tensor([drawn[i % len(drawn)] for i in range(N)]))


def targets_of(
    method: str, scores: PairScores, scale: ScaleResponses, weights: dict[str, float], **changes: Any
) -> Targets:
    policy = PolicySection(weights=weights, alpha=0.3, **changes)
    return method_targets(policy, method, train=scores, held_out=scores, scale=scale)


# ------------------------------------------------------------------ R
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("across", [None, "min", "cvar", "softmin", "mean"])
def test_r_is_that_of_the_other_objectives_alone(name: str, across: str | None) -> None:
    chosen = method_aggregation(name, across=across, parameters=Parameters(alpha=0.3))
    rewards = random_scores(1).rewards
    weights = torch.tensor([0.7, 0.0, 0.3])
    alone = robust_rewards(rewards[[0, 2]], aggregation=chosen, weights=weights[[0, 2]])
    odd = rewards.clone()
    odd[1] = float("nan")  # nothing looks at it
    assert torch.equal(robust_rewards(odd, aggregation=chosen, weights=weights), alone)


def test_the_minimum_over_objectives_by_hand() -> None:
    rewards = torch.tensor([[[3.0, 1.0]], [[-9.0, -9.0]], [[2.0, 4.0]]])
    chosen = METHODS["hard_min"]
    assert robust_rewards(rewards, aggregation=chosen, weights=torch.tensor([0.5, 0.0, 0.5])).tolist() == [
        2,
        1,
    ]
    assert robust_rewards(rewards, aggregation=chosen, weights=torch.ones(3) / 3).tolist() == [-9, -9]


# ------------------------------------------------------------------ targets
@pytest.mark.parametrize("method", REWARDED)
@pytest.mark.parametrize("level", ["response", "margin"])
def test_other_rewards_of_it_change_no_bit_of_what_is_trained(method: str, level: str) -> None:
    scores, scale = labelled_for_others(random_scores(2), without=1), reference()
    other = with_rewards(
        scores, 1, 5 * torch.randn(M, N, 2, generator=torch.Generator().manual_seed(8)).double()
    )
    moved = scale.rewards.clone()
    moved[1] = moved[1].flip(-1) * 3
    before = targets_of(method, scores, scale, WITHOUT_HARMLESS, level=level)
    after = targets_of(method, other, replace(scale, rewards=moved), WITHOUT_HARMLESS, level=level)
    assert torch.equal(before.train, after.train) and before.reward_scale == after.reward_scale
    assert before.notes == after.notes and before.columns[0].keys() == after.columns[0].keys()
    for name, values in before.columns[0].items():
        assert torch.equal(values, after.columns[0][name]), name
    logps = scores.ref_logps + torch.tensor([3.0, -1.0])
    losses = [
        policy_loss(
            logps,
            {k: v.float() if k != "labelled_for" else v for k, v in found.columns[0].items()}
            | {"ref_logps": scores.ref_logps, "chosen_length": torch.ones(N)},
            PolicySection(weights=WITHOUT_HARMLESS),
            kind=POLICY_METHODS[method].loss,
        ).loss
        for found in (before, after)
    ]
    assert torch.equal(*losses) and bool(torch.isfinite(losses[0]).all())


def test_paper_eq9_is_the_worst_of_the_objectives_with_weight() -> None:
    scores = random_scores(4)
    found = targets_of("paper_eq9", scores, reference(), WITHOUT_HARMLESS, reward_scale=1.0, margin_clip=1e9)
    margins = (scores.rewards[..., 0] - scores.rewards[..., 1]).numpy()
    np.testing.assert_allclose(found.train.numpy(), margins[[0, 2]].min(axis=(0, 1)), atol=1e-12)


def test_maxmin_is_solved_over_the_objectives_with_weight() -> None:
    scale = reference()
    policy = PolicySection(weights=WITHOUT_HARMLESS)
    reward = solve_reward(policy, "maxmin", scale)
    assert reward.weights[1] == 0 and float(reward.weights.sum()) == pytest.approx(1)
    r = scale.by_prompt()[[0, 2]].mean(dim=1).numpy()
    r = r - r.mean(axis=-1, keepdims=True)
    budget = np.log(r.shape[-1] / 4)
    grid = np.linspace(0, 1, 101)  # the dual, by search: the least of tau (log-mean-exp + budget) over both
    taus = np.geomspace(0.1, 3, 100)
    dual = [
        min(t * (np.log(np.exp((w * r[0] + (1 - w) * r[1]) / t).mean(-1)).mean() + budget) for t in taus)
        for w in grid
    ]
    assert float(reward.weights[0]) == pytest.approx(grid[int(np.argmin(dual))], abs=0.02)


def test_which_samples_are_paired_does_not_depend_on_it() -> None:
    policy, scale = PolicySection(weights=WITHOUT_HARMLESS), reference()
    moved = scale.rewards.clone()
    moved[1] = -100 * moved[1]
    drawn = [SimpleNamespace(prompt=i, sides=None) for i in range(30)]
    sides = [
        sides_by_reward(drawn, solve_reward(policy, "hard_min", one)(one.by_prompt()))
        for one in (scale, replace(scale, rewards=moved))
    ]
    assert torch.equal(*sides)


# ------------------------------------------------------------------ what is said
def notes_of(method: str, weights: dict[str, float], **policy: Any) -> tuple[str, ...]:
    return method_notes(PolicySection(weights=weights, **policy), method, random_scores(), torch.ones(N))


def test_a_method_says_which_objectives_are_left_out() -> None:
    assert "weight 0 leaves harmless out of hard_min" in notes_of("hard_min", WITHOUT_HARMLESS)
    assert not any("weight" in note for note in notes_of("hard_min", {k: 1 / 3 for k in OBJECTIVES}))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("hierarchical", "hierarchical = cvar: one objective"),
        ("maxmin", "maxmin = mean: one objective"),
        ("modpo", "modpo = dpo: one objective"),
        ("paper_eq9", "paper_eq9 = paper_eq6: one objective"),
    ],
)
def test_a_single_objective_is_said_by_the_methods_that_need_two(method: str, said: str) -> None:
    notes = notes_of(method, HONEST_ALONE, alpha=0.3)
    assert (
        said in notes
        and f"honest has all the weight, so {method} combines nothing across objectives" in notes
    )


def test_members_of_an_objective_without_weight_are_not_spoken_of() -> None:
    scores = random_scores()
    same = scores.rewards.clone()
    same[1] = same[1, :1] + 0.01 * torch.randn(M, N, 2, generator=torch.Generator().manual_seed(0)).double()
    scores = replace(scores, rewards=same)
    said = method_notes(PolicySection(weights=WITHOUT_HARMLESS), "hard_min", scores, torch.ones(N))
    assert not any("correlate" in note for note in said)


# ------------------------------------------------------------------ fingerprints
def keys_of(folder: Path, method: str, models: list[str], policy: PolicySection) -> tuple[str, ...]:
    config = policy_config(folder).model_copy(update={"policy": policy})
    return policy_fingerprints(
        config,
        method,
        tokenizer=load_tokenizer(config.shared.model, config.paths),
        train={objective: [] for objective in config.paths.objectives},
        models=[SimpleNamespace(fingerprint=key) for key in models],
    )


def test_its_reward_model_is_no_part_of_the_key(tmp_path: Path) -> None:
    policy = PolicySection(weights=WITHOUT_HARMLESS)
    for method in ("hard_min", "cvar", "maxmin", "edpo", "paper_eq9", "modpo"):
        first, again = (keys_of(tmp_path, method, ["a", b, "c"], policy) for b in ("b", "trained anew"))
        assert first[0] == again[0]
        assert keys_of(tmp_path, method, ["other", "b", "c"], policy)[0] != first[0]
    held = policy.model_copy(update={"constraints": {"harmless": 0.1}})
    assert (
        keys_of(tmp_path, "mean", ["a", "b", "c"], held)[0]
        != keys_of(tmp_path, "mean", ["a", "x", "c"], held)[0]
    )


def test_what_was_finished_with_the_same_r_stays_finished(tmp_path: Path) -> None:
    models, thirds = ["a", "b", "c"], PolicySection()
    forms = len(
        keys_of(tmp_path, "hard_min", models, thirds)
    )  # of settings, today's and those of earlier versions
    policy = PolicySection(weights=WITHOUT_HARMLESS)
    assert (
        len(keys_of(tmp_path, "cvar", models, policy)) == 2 * forms
    )  # and each with all reward models in it
    assert len(keys_of(tmp_path, "hard_min", models, policy)) == forms  # its minimum was another one
