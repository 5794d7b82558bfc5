"""Targets of each method, the loss of a batch and its gradient, and the properties a policy's training must have."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_scores import ROWS, K, M, N, random_scores, scale_of
from torch import Tensor

from prmd.config.policy import PolicyConfig, PolicySection
from prmd.errors import ConfigError, DataError
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps
from prmd.pessimism.aggregation import METHODS
from prmd.policies.pairs import PairScores
from prmd.policies.targets import Targets, method_targets, policy_loss
from prmd.policies.train import train_hierarchical

SHIPPED = PolicyConfig().policy
DISTILLED = ("mean", "hard_min", "cvar", "hierarchical", "lcb", "softmin")


def targets_of(policy: PolicySection, method: str, scores: PairScores | None = None) -> Targets:
    scores = scores or random_scores()
    return method_targets(policy, method, train=scores, held_out=scores, scale=scale_of(scores))


def by_hand(rewards: np.ndarray, method: str) -> np.ndarray:
    """R [n, 2] of the shipped settings (alpha = .1, M = 20, K = 3), written out."""
    if method == "mean":
        return rewards.mean(axis=(0, 1))
    if method == "hard_min":
        return rewards.min(axis=(0, 1))
    if method == "cvar":  # 10 % of 60 atoms: the mean of the worst six
        return np.sort(rewards.reshape(60, *rewards.shape[2:]), axis=0)[:6].mean(axis=0)
    return np.sort(rewards, axis=1)[:, :2].mean(axis=1).min(axis=0)  # the worst two of each objective


@pytest.mark.parametrize("method", ["mean", "hard_min", "cvar", "hierarchical"])
def test_targets_of_the_shipped_configuration_written_out(method: str) -> None:
    assert (SHIPPED.alpha, PolicyConfig().shared.ensemble.members, SHIPPED.reward_scale) == (0.1, M, "auto")
    scores = random_scores()
    found = targets_of(SHIPPED, method, scores)
    robust = by_hand(scores.rewards.numpy(), method)
    # within-prompt variance of two responses a, b with divisor 1 is (a - b)^2 / 2
    variance = ((robust[:, 0] - robust[:, 1]) ** 2 / 2).mean()
    scale = SHIPPED.beta * math.sqrt(2 * SHIPPED.kl_target / variance)
    assert found.reward_scale == pytest.approx(scale)
    expected = np.clip(scale * (robust[:, 0] - robust[:, 1]), -SHIPPED.margin_clip, SHIPPED.margin_clip)
    assert found.train.numpy() == pytest.approx(expected) and torch.equal(found.train, found.held_out)


def test_methods_give_different_targets_on_the_shipped_configuration() -> None:
    methods = ("hard_min", "cvar", "hierarchical", "mean")
    for scale in ("auto", 1.0):
        policy = SHIPPED.model_copy(update={"reward_scale": scale})
        found = {method: targets_of(policy, method) for method in methods}
        for a in methods:
            for b in methods:
                if a < b:
                    differ = (found[a].train - found[b].train).abs() > 1e-6
                    assert differ.float().mean() > 0.9, (a, b)
        assert all(not [n for n in t.notes if " = " in n] for t in found.values())


def test_coinciding_methods_are_named() -> None:
    small = random_scores(m=3)
    notes = targets_of(SHIPPED, "cvar", small).notes
    assert any(note.startswith("cvar = hard_min") for note in notes)
    alone = random_scores(m=1)
    assert any("one member" in n for n in targets_of(SHIPPED, "hierarchical", alone).notes)
    assert not [n for n in targets_of(SHIPPED, "mean", small).notes if " = " in n]


@pytest.mark.parametrize("method", DISTILLED)
def test_swapping_chosen_and_rejected_turns_the_sign(method: str) -> None:
    scores = random_scores(1)
    swapped = PairScores(scores.rewards.flip(-1), scores.ref_logps.flip(-1))
    a, b = targets_of(SHIPPED, method, scores), targets_of(SHIPPED, method, swapped)
    assert torch.allclose(a.train, -b.train, atol=1e-9)


@pytest.mark.parametrize("method", [*DISTILLED, "edpo", *(f"paper_eq{number}" for number in (5, 6, 7, 9))])
def test_equal_members_and_objectives_make_every_method_the_mean(method: str) -> None:
    one = random_scores(2, k=1, m=1)
    scores = PairScores(one.rewards.expand(K, M, N, 2).contiguous(), one.ref_logps)
    found, mean = targets_of(SHIPPED, method, scores), targets_of(SHIPPED, "mean", scores).train
    assert torch.allclose(found.train, mean, atol=1e-9)
    for targets in found.columns[0].values():  # one for each objective and member, where the loss reads them
        assert torch.allclose(
            targets, mean.reshape(-1, *[1] * (targets.ndim - 1)).expand_as(targets), atol=1e-9
        )


def test_settings_replace_the_operators() -> None:
    hard = SHIPPED.model_copy(update={"within": "min", "across": "min"})
    for method in ("mean", "hierarchical", "cvar"):
        assert torch.equal(targets_of(hard, method).train, targets_of(SHIPPED, "hard_min").train)
    assert METHODS["hierarchical"].within == "cvar"  # the table itself is not changed


def test_weights_decide_the_mean() -> None:
    policy = PolicySection(weights={"helpful": 1.0, "harmless": 0.0, "honest": 0.0}, reward_scale=1.0)
    scores = random_scores(3)
    helpful = scores.rewards[0].mean(0)
    expected = (helpful[:, 0] - helpful[:, 1]).clamp(-5, 5)
    assert torch.allclose(targets_of(policy, "mean", scores).train, expected, atol=1e-12)


def test_larger_kl_target_scales_and_the_clip_cuts() -> None:
    wide = SHIPPED.model_copy(update={"margin_clip": 1e9})
    four = targets_of(wide.model_copy(update={"kl_target": 16.0}), "mean")
    one = targets_of(wide, "mean")
    assert four.reward_scale == pytest.approx(2 * one.reward_scale)
    assert torch.allclose(four.train, 2 * one.train)
    tight = targets_of(SHIPPED.model_copy(update={"margin_clip": 0.05}), "mean")
    assert tight.train.abs().max() == 0.05 and (tight.train.abs() == 0.05).float().mean() > 0.5


def test_rewards_that_do_not_vary_are_refused() -> None:
    constant = PairScores(torch.zeros(K, M, N, 2, dtype=torch.float64), torch.zeros(N, 2))
    with pytest.raises(ConfigError, match=r"policy\.reward_scale: auto failed for mean .*set a number"):
        targets_of(SHIPPED, "mean", constant)


# ------------------------------------------------------------------ loss and gradient
def logps_of(model: SequenceLogps) -> Tensor:
    return model(**collate_rows(ROWS, pad_id=0)).reshape(-1, 2)


def columns_of(model: SequenceLogps, targets: Tensor | None = None) -> dict[str, Tensor]:
    with torch.no_grad():
        columns = {"ref_logps": logps_of(model), "chosen_length": torch.tensor([4.0, 2.0, 3.0])}
    return columns if targets is None else columns | {"target_margins": targets.float()}


def gradient(model: SequenceLogps, columns: dict[str, Tensor]) -> Tensor:
    model.zero_grad()
    policy_loss(logps_of(model), columns, SHIPPED).loss.mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_at_the_start_the_loss_is_the_mean_squared_target_and_dpo_is_log_two(
    policy_model: SequenceLogps,
) -> None:
    targets = torch.tensor([0.5, -2.0, 5.0])
    result = policy_loss(logps_of(policy_model), columns_of(policy_model, targets), SHIPPED)
    assert float(result.loss.detach().mean()) == pytest.approx(float(targets.square().mean()), abs=1e-5)
    assert result.metrics["margins/clipped"].tolist() == [0.0, 0.0, 1.0]
    assert result.metrics["logratios/chosen"].abs().max() < 1e-5
    dpo = policy_loss(logps_of(policy_model), columns_of(policy_model), SHIPPED)
    assert dpo.loss.detach().numpy() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert "margins/target" not in dpo.metrics


def test_metrics_are_those_of_the_definitions() -> None:
    logps = torch.tensor([[-3.0, -5.0], [-4.0, -4.0], [-9.0, -2.0]], requires_grad=True)
    ref = torch.tensor([[-4.0, -4.5], [-4.0, -4.0], [-8.0, -3.0]])
    columns = {
        "ref_logps": ref,
        "chosen_length": torch.ones(3),
        "target_margins": torch.tensor([0.1, 0.0, 9.0]),
    }
    result = policy_loss(logps, columns, SHIPPED)
    implicit = 0.1 * torch.tensor([1.5, 0.0, -2.0])
    assert torch.allclose(result.metrics["rewards/margins"], implicit)
    assert result.metrics["rewards/accuracies"].tolist() == [1.0, 0.5, 0.0]
    assert torch.allclose(result.metrics["rewards/chosen"], 0.1 * torch.tensor([1.0, 0.0, -1.0]))
    assert torch.allclose(result.loss, (columns["target_margins"] - implicit).square())
    assert not any(value.requires_grad for value in result.metrics.values())


def test_likelihood_term_is_per_token_of_the_chosen_response() -> None:
    logps = torch.tensor([[-6.0, -5.0], [-4.0, -8.0]])
    columns = {"ref_logps": logps, "chosen_length": torch.tensor([3.0, 4.0])}
    plain = policy_loss(logps, columns, SHIPPED).loss
    weighted = policy_loss(logps, columns, SHIPPED.model_copy(update={"nll_weight": 0.5})).loss
    assert (weighted - plain).tolist() == pytest.approx([0.5 * 2.0, 0.5 * 1.0])


@pytest.mark.parametrize("method", DISTILLED)
def test_one_members_score_changes_the_gradient(method: str, policy_model: SequenceLogps) -> None:
    """The member that is lowest for the first chosen response gets a lower score still."""
    scores = random_scores(4, n=3)
    atom = int(scores.rewards[:, :, 0, 0].flatten().argmin())
    changed = scores.rewards.clone()
    changed[atom // M, atom % M, 0, 0] -= 1.5
    policy = SHIPPED.model_copy(update={"reward_scale": 1.0})
    found = []
    for rewards in (scores.rewards, changed):
        targets = targets_of(policy, method, PairScores(rewards, scores.ref_logps)).train
        found.append(gradient(policy_model, columns_of(policy_model, targets)))
    assert found[0].norm() > 0 and (found[0] - found[1]).norm() > 1e-3 * found[0].norm()


def test_gradient_is_that_of_the_written_out_loss(policy_model: SequenceLogps) -> None:
    targets = torch.tensor([0.5, -2.0, 1.0])
    columns = columns_of(policy_model, targets)
    columns["ref_logps"] = columns["ref_logps"] + torch.tensor([[0.5, -1.0], [2.0, 0.0], [-3.0, 1.0]])
    ours = gradient(policy_model, columns)
    policy_model.zero_grad()
    rho = logps_of(policy_model) - columns["ref_logps"]
    (targets - 0.1 * (rho[:, 0] - rho[:, 1])).pow(2).mean().backward()
    direct = torch.cat([p.grad.flatten() for p in policy_model.parameters() if p.grad is not None])
    assert torch.allclose(ours, direct, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ what is refused
def test_without_prepared_data_the_command_is_named(tmp_path: Path) -> None:
    values: dict[str, Any] = {"artifact_root": str(tmp_path)}
    shared = PolicyConfig().shared.model_copy(update=values)
    with pytest.raises(DataError, match=r"python 1_data_preparation/split_objectives\.py"):
        train_hierarchical(PolicyConfig(reward_model_config=shared))
    assert not list(tmp_path.iterdir())
