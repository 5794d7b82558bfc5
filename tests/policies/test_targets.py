"""Targets and losses of the methods beyond the response-level aggregates, each against numpy."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_scores import K, M, N, random_scores, reference, scale_of

from prmd.artifacts.paths import PROJECT_ROOT
from prmd.config.policy import PolicySection
from prmd.errors import ConfigError
from prmd.objectives import OBJECTIVES
from prmd.policies.methods import unread_settings
from prmd.policies.notes import label_notes, method_notes
from prmd.policies.pairs import PairScores, ScaleResponses
from prmd.policies.robust_reward import solve_reward
from prmd.policies.targets import (
    Targets,
    clipping_warning,
    describe_targets,
    method_targets,
    policy_loss,
    refuse_signs,
    with_clip,
)

UNEVEN = {"helpful": 0.5, "harmless": 0.3, "honest": 0.2}
LAMBDA = np.array([0.5, 0.3, 0.2])
SCALE, CLIP = 0.4, 1.1


def settings(**changes: Any) -> PolicySection:
    return PolicySection(**({"weights": UNEVEN, "reward_scale": SCALE, "margin_clip": CLIP} | changes))


def targets_of(
    method: str, scores: PairScores, scale: ScaleResponses | None = None, **changes: Any
) -> Targets:
    policy = settings(**changes)
    return method_targets(policy, method, train=scores, held_out=scores, scale=scale or scale_of(scores))


def margins_of(scores: PairScores) -> np.ndarray:
    rewards = scores.rewards.numpy()
    return rewards[..., 0] - rewards[..., 1]


def clipped(margins: np.ndarray) -> np.ndarray:
    return np.clip(SCALE * margins, -CLIP, CLIP)


# ------------------------------------------------------------------ from R to the loss
def test_the_loss_of_hard_min_is_computed_in_two_files_behind_its_reward() -> None:
    """Of these and `aggregation.py` CONTRIBUTING.md says that they are all one needs to read."""
    scores, policy, opened = random_scores(8), settings(), set()
    robust = scores.rewards.numpy().min(axis=(0, 1))
    targets = clipped(robust[:, 0] - robust[:, 1])
    found = targets_of("hard_min", scores)
    np.testing.assert_allclose(found.train.numpy(), targets, atol=1e-9)
    logps = scores.ref_logps + torch.linspace(-30, 30, 2 * N).reshape(N, 2)
    columns = found.columns[0] | {"ref_logps": scores.ref_logps, "chosen_length": torch.ones(N)}
    sys.setprofile(lambda frame, event, argument: opened.add(frame.f_code.co_filename))
    try:
        loss = policy_loss(logps, columns, policy, kind="distil").loss
    finally:
        sys.setprofile(None)
    implicit = 0.1 * (logps - scores.ref_logps).numpy() @ np.array([1.0, -1.0])
    np.testing.assert_allclose(loss.numpy(), (targets - implicit) ** 2, rtol=1e-4, atol=1e-5)
    ours = {Path(file).name for file in opened if PROJECT_ROOT / "prmd" in Path(file).parents}
    assert ours == {"targets.py", "losses.py"}


# ------------------------------------------------------------------ margins
@pytest.mark.parametrize("method", ["hard_min", "hierarchical", "cvar", "mean"])
def test_margin_level_aggregates_the_differences(method: str) -> None:
    scores = random_scores(3)
    d = margins_of(scores)
    worst_two = np.sort(d, axis=1)[:, :2].mean(axis=1)
    atoms, order = d.reshape(60, N), np.argsort(d.reshape(60, N), axis=0)
    weights = np.take_along_axis(np.repeat(LAMBDA / M, M)[:, None].repeat(N, 1), order, 0)
    before = np.cumsum(weights, axis=0) - weights
    taken = np.clip(0.1 - before, 0, weights)
    expected = {
        "hard_min": d.min(axis=(0, 1)),
        "hierarchical": worst_two.min(axis=0),
        "cvar": (taken * np.take_along_axis(atoms, order, 0)).sum(0) / 0.1,
        "mean": LAMBDA @ d.mean(axis=1),
    }[method]
    found = targets_of(method, scores, level="margin")
    np.testing.assert_allclose(found.train.numpy(), clipped(expected), atol=1e-9)
    response = targets_of(method, scores).train
    assert torch.allclose(found.train, response) is (method == "mean")


def test_paper_equations_have_a_row_of_targets_for_each_objective() -> None:
    scores = random_scores(4)
    d = margins_of(scores)
    expected = {
        "paper_eq5": d.mean(axis=1),
        "paper_eq6": d.min(axis=1),
        "paper_eq7": np.sort(d, axis=1)[:, :2].mean(axis=1),
        "paper_eq9": d.min(axis=(0, 1))[None],
    }
    logps = scores.ref_logps + torch.linspace(-30, 30, 2 * N).reshape(N, 2)
    implicit = 0.1 * (logps - scores.ref_logps).numpy() @ np.array([1.0, -1.0])
    for method, rows in expected.items():
        found = targets_of(method, scores)
        columns = found.columns[0]
        np.testing.assert_allclose(columns["objective_targets"].numpy(), clipped(rows).T, atol=1e-9)
        lam = LAMBDA if len(rows) == K else np.ones(1)
        np.testing.assert_allclose(found.train.numpy(), lam @ clipped(rows), atol=1e-9)
        columns = columns | {"ref_logps": scores.ref_logps, "chosen_length": torch.ones(N)}
        loss = policy_loss(logps, columns, settings(), kind="paper").loss
        np.testing.assert_allclose(loss.numpy(), lam @ (clipped(rows) - implicit) ** 2, rtol=1e-4, atol=1e-5)
        share = (found.train < 0).double().mean()
        assert f"{share:.0%} of the targets are negative: against the label" in found.notes
        summary = describe_targets(found)["target_margins"]
        assert summary["negative_share"] == pytest.approx(float(share))


def test_edpo_regresses_on_the_nearest_member_of_each_objective() -> None:
    scores = random_scores(5)
    found = targets_of("edpo", scores)
    members = clipped(margins_of(scores))
    np.testing.assert_allclose(
        found.columns[0]["member_targets"].numpy(), members.transpose(2, 0, 1), atol=1e-9
    )
    columns = {name: values.float() for name, values in found.columns[0].items()}
    columns |= {"ref_logps": scores.ref_logps, "chosen_length": torch.ones(N)}
    logps = scores.ref_logps + torch.tensor([3.0, -1.0])
    errors = (members - 0.4) ** 2
    nearest = errors.mean(axis=2).argmin(axis=1)
    loss = policy_loss(logps, columns, settings(), kind="edpo").loss
    expected = LAMBDA @ np.stack([errors[k, nearest[k]] for k in range(K)])
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-4)
    given = torch.tensor([4, 0, 19])
    loss = policy_loss(logps, columns | {"selected": given}, settings(), kind="edpo").loss
    np.testing.assert_allclose(
        loss.numpy(), LAMBDA @ np.stack([errors[k, m] for k, m in enumerate(given)]), rtol=1e-4
    )


def test_modpo_shifts_by_the_other_objectives_margins() -> None:
    scores = random_scores(6)
    labelled = torch.arange(N) % K
    scores = PairScores(scores.rewards, scores.ref_logps, labelled)
    found = targets_of("modpo", scores)
    d = margins_of(scores).mean(axis=1)
    others = np.array([sum(LAMBDA[j] * d[j, i] for j in range(K) if j != i % K) for i in range(N)])
    np.testing.assert_allclose(found.train.numpy(), others, atol=1e-12)
    assert found.reward_scale == 1.0  # rewards enter the margin in calibrated units
    columns = found.columns[0] | {"ref_logps": scores.ref_logps, "chosen_length": torch.ones(N)}
    logps = scores.ref_logps + torch.tensor([5.0, -2.0])
    expected = np.log1p(np.exp(-(0.7 - others) / LAMBDA[labelled.numpy()]))
    loss = policy_loss(logps, columns, settings(), kind="modpo").loss
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-5)


def test_ipo_pulls_every_pair_to_the_same_difference() -> None:
    logps, ref = torch.tensor([[-3.0, -9.0], [-5.0, -4.0]]), torch.tensor([[-4.0, -8.0], [-5.0, -5.0]])
    columns = {"ref_logps": ref, "chosen_length": torch.ones(2)}
    loss = policy_loss(logps, columns, PolicySection(beta=0.3, ipo_beta=0.25), kind="ipo").loss
    assert loss.tolist() == pytest.approx([(2.0 - 2.0) ** 2, (-1.0 - 2.0) ** 2], abs=1e-4)


def test_length_and_bias_are_added_to_the_margin_of_dpo() -> None:
    """The formulas anew: -log sigma(Delta + alpha (|y_w| - |y_l|)), of arXiv:2403.19159, and -log sigma(Delta + a)."""
    logps, ref = torch.tensor([[-3.0, -9.0], [-5.0, -4.0]]), torch.tensor([[-4.0, -8.0], [-5.0, -5.0]])
    margins = 0.3 * np.array([(-3 + 4) - (-9 + 8), (-5 + 5) - (-4 + 5)])
    columns = {"ref_logps": ref, "chosen_length": torch.ones(2)}
    columns |= {"length_difference": torch.tensor([12.0, -7.0]), "offsets": torch.tensor([-1.5, 2.0])}
    policy = PolicySection(beta=0.3, rdpo_alpha=0.05)
    for kind, offset in (("rdpo", [0.6, -0.35]), ("dpo_debiased", [-1.5, 2.0]), ("dpo", [0.0, 0.0])):
        found = policy_loss(logps, columns, policy, kind=kind)
        assert found.loss.tolist() == pytest.approx(np.log1p(np.exp(-(margins + offset))).tolist(), rel=1e-5)
        assert found.metrics["rewards/margins"].tolist() == pytest.approx(margins.tolist(), abs=1e-5)
    plain = policy_loss(logps, columns, PolicySection(beta=0.3, rdpo_alpha=0.0), kind="rdpo").loss
    assert torch.equal(plain, policy_loss(logps, columns, policy, kind="dpo").loss)


def test_gamma_adds_the_likelihood_of_the_reference_samples() -> None:
    scores = random_scores(7, n=3)
    samples = torch.tensor([[-4.0, -6.0], [-1.0, -2.0], [-8.0, -8.0]])
    columns = {
        "ref_logps": scores.ref_logps,
        "chosen_length": torch.ones(3),
        "target_margins": torch.zeros(3),
    }
    policy = PolicySection(gamma=0.3)
    with_samples = torch.cat([scores.ref_logps, samples], dim=1)
    result = policy_loss(with_samples.reshape(-1, 2), columns, policy)  # the trainer reads pairs of responses
    plain = policy_loss(scores.ref_logps, columns, policy).loss
    assert (result.loss - plain).tolist() == pytest.approx([0.3 * 5.0, 0.3 * 1.5, 0.3 * 8.0])
    assert result.metrics["logps/reference_samples"].tolist() == [-5.0, -1.5, -8.0]
    assert result.metrics["logps/chosen"].tolist() == scores.ref_logps[:, 0].tolist()


def test_pairs_without_a_human_choice_get_no_likelihood_term() -> None:
    logps = torch.tensor([[-6.0, -5.0], [-4.0, -8.0]])
    columns = {"ref_logps": logps, "chosen_length": torch.tensor([3.0, math.inf])}
    policy = PolicySection(nll_weight=0.5)
    plain = policy_loss(logps, columns, PolicySection()).loss
    assert (policy_loss(logps, columns, policy).loss - plain).tolist() == pytest.approx([1.0, 0.0])


# ------------------------------------------------------------------ what is solved for
def tilted(scores: np.ndarray, kl: float) -> np.ndarray:
    """Softmax over samples at a temperature found by bisection, so that the mean KL from uniform is `inference.kl`."""
    low, high = 1e-3, 1e3
    for _ in range(200):
        tau = math.sqrt(low * high)
        p = np.exp((scores - scores.max(axis=1, keepdims=True)) / tau)
        p /= p.sum(axis=1, keepdims=True)
        reached = (p * np.log(np.maximum(p, 1e-300) * p.shape[1])).sum(axis=1).mean()
        low, high = (tau, high) if reached > kl else (low, tau)
    return p


def test_maxmin_weights_make_the_gains_of_active_objectives_equal() -> None:
    scale, scores = reference(), random_scores(8)
    policy = PolicySection()
    found = method_targets(policy, "maxmin", train=scores, held_out=scores, scale=scale)
    reward = solve_reward(policy, "maxmin", scale)
    w = reward.weights.numpy()
    r = scale.rewards.mean(dim=1).numpy().reshape(K, 30, 24)
    r = r - r.mean(axis=2, keepdims=True)
    p = tilted(np.tensordot(w, r, axes=1), math.log(6))  # what 24 samples can represent of 4 nats
    gains = (p * r).sum(axis=2).mean(axis=1)
    active = w > 1e-3
    assert active.sum() >= 2 and np.ptp(gains[active]) < 1e-3 and (gains[~active] > gains[active].max()).all()
    # no other weights have a larger smallest gain
    best = gains.min()
    for other in np.random.default_rng(0).dirichlet(np.ones(K), 50):
        q = tilted(np.tensordot(other, r, axes=1), math.log(6))
        assert (q * r).sum(axis=2).mean(axis=1).min() <= best + 1e-6
    # its targets: the weighted mean member at the scale of kl_target
    flat = np.tensordot(w, scale.rewards.mean(dim=1).numpy(), axes=1).reshape(30, 24)
    expected_scale = 0.1 * math.sqrt(8 / flat.var(axis=1, ddof=1).mean())
    assert found.reward_scale == pytest.approx(expected_scale)
    d = margins_of(scores).mean(axis=1)
    np.testing.assert_allclose(found.train.numpy(), np.clip(expected_scale * (w @ d), -5, 5), atol=1e-9)
    assert any(
        "maxmin weights helpful" in n and "solved at 1.79 nats on 24 samples of 30" in n for n in found.notes
    )


def test_maxmin_with_lower_bounds_within() -> None:
    scale = reference()
    mean, lcb = (solve_reward(PolicySection(within=w), "maxmin", scale) for w in (None, "lcb"))
    r = scale.rewards.numpy()
    bound = r.mean(axis=1) - r.std(axis=1)
    expected = np.tensordot(lcb.weights.numpy(), bound, axes=1)
    np.testing.assert_allclose(lcb(scale.rewards).numpy(), expected, atol=1e-9)
    assert not torch.allclose(mean.weights, lcb.weights, atol=1e-4)


def test_maxmin_without_reference_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"maxmin needs samples .*pairs\.reference_samples=16"):
        targets_of("maxmin", random_scores())


def test_a_constraint_lifts_its_objective_to_the_threshold() -> None:
    scale = reference(n=40)
    r = scale.rewards.mean(dim=1).numpy().reshape(K, 30, 40)
    free = solve_reward(
        PolicySection(weights={"helpful": 1.0, "harmless": 0.0, "honest": 0.0}), "mean", scale
    )
    without = (tilted(r[0], math.log(10)) * r[2]).sum(axis=1).mean()
    threshold = float(without) + 0.25
    policy = PolicySection(
        weights={"helpful": 1.0, "harmless": 0.0, "honest": 0.0},
        constraints={"honest": threshold, "helpful": -9.0},
    )
    reward = solve_reward(policy, "mean", scale)
    mu = reward.multipliers.numpy()
    assert mu[2] > 0.01 and mu[0] == pytest.approx(0, abs=1e-6) and mu[1] == 0 and not free.multipliers.any()
    robust = reward(scale.rewards).numpy().reshape(30, 40)
    np.testing.assert_allclose(robust, r[0] + mu[2] * r[2] + mu[0] * r[0], atol=1e-9)
    assert (tilted(robust, math.log(10)) * r[2]).sum(axis=1).mean() == pytest.approx(threshold, abs=1e-3)
    assert any("multipliers helpful 0, harmless 0, honest" in note for note in reward.notes)


def test_a_constraint_out_of_reach_names_the_best_value() -> None:
    policy = PolicySection(constraints={"honest": 50.0})
    with pytest.raises(
        ConfigError, match=r"policy\.constraints: hard_min: .*objective 2 is out of reach.*best value is"
    ) as refusal:
        solve_reward(policy, "hard_min", reference())
    assert "2 honest" in str(refusal.value) and "\n" not in str(refusal.value)


def test_constraints_leave_the_other_methods_alone() -> None:
    policy = PolicySection(constraints={"honest": 0.2})
    for method in ("edpo", "paper_eq6"):
        assert not solve_reward(policy, method, reference()).multipliers.any()
        scores = random_scores(2)
        assert f"{method} does not read policy.constraints" in method_notes(
            policy, method, scores, torch.ones(N)
        )
    assert label_notes(PolicySection(level="margin", gamma=0.1), "dpo") == (
        "dpo does not read policy.level, policy.gamma",
    )
    assert label_notes(PolicySection(nll_weight=0.1), "dpo") == ()
    assert unread_settings(PolicySection(within="min", across="min"), "maxmin") == ("across",)
    assert (
        unread_settings(PolicySection(within="min", across="min", constraints={"honest": 0.2}), "mean") == ()
    )


def test_the_scale_of_margin_methods_is_that_of_their_reward() -> None:
    scores = random_scores(9)
    r = scores.rewards.numpy()
    per_method = {
        "paper_eq6": np.tensordot(np.full(3, 1 / 3), r.min(axis=1), axes=1),
        "paper_eq9": r.min(axis=(0, 1)),
        "edpo": r.mean(axis=(0, 1)),
    }
    for method, robust in per_method.items():
        expected = 0.1 * math.sqrt(8 / ((robust[:, 0] - robust[:, 1]) ** 2 / 2).mean())
        found = method_targets(PolicySection(), method, train=scores, held_out=scores, scale=scale_of(scores))
        assert found.reward_scale == pytest.approx(expected)


@pytest.mark.parametrize(
    ("method", "changes", "atoms"),
    [
        ("hierarchical", {}, 2.0),  # a tenth of 20 members
        ("cvar", {}, 0.1 * 20 / 0.38),  # of 60 rewards weighted .5, .3 and .2 by objective
        ("paper_eq7", {"alpha": 0.05}, 1.0),
        ("mean", {"across": "cvar", "alpha": 0.5}, 0.5 / 0.38),  # of three objectives
        ("cvar", {"weights": {"helpful": 0.8, "harmless": 0.1, "honest": 0.1}}, 0.1 * 20 / 0.66),
        ("hard_min", {}, None),
        ("edpo", {}, None),
    ],
)
def test_rewards_that_cvar_averages_are_in_the_results(
    method: str, changes: dict[str, Any], atoms: float | None
) -> None:
    described = describe_targets(targets_of(method, random_scores(2), **changes))
    assert described.get("cvar_effective_atoms") == (None if atoms is None else pytest.approx(atoms))


@pytest.mark.parametrize("method", ["hard_min", "paper_eq6", "edpo"])
def test_auto_clips_at_three_root_mean_squares_of_the_training_targets(method: str) -> None:
    scores, column = (
        random_scores(7),
        {"paper_eq6": "objective_targets", "edpo": "member_targets"}.get(method),
    )
    rewards = scores.rewards.clone()
    rewards[:, :, 3, 0] -= 40.0  # one pair far out
    scores = PairScores(rewards, scores.ref_logps)
    wide = targets_of(method, scores, margin_clip=1e9)
    found = targets_of(method, scores, margin_clip="auto")
    column = column or "target_margins"
    unclipped = wide.columns[0][column]
    clip = 3 * float(unclipped.square().mean().sqrt())
    assert found.margin_clip == pytest.approx(clip, rel=1e-6)
    np.testing.assert_allclose(
        found.columns[0][column].numpy(), unclipped.clamp(-clip, clip).numpy(), rtol=1e-6
    )
    share = float((unclipped.abs() >= clip).double().mean())
    assert 0 < share < 0.2 and found.clipped_share == pytest.approx(share)
    summary = describe_targets(found)["target_margins"]
    assert (summary["margin_clip"], summary["clipped_share"]) == (found.margin_clip, found.clipped_share)
    if method == "hard_min":  # and in the log, of the float32 that the loss reads
        columns = {"target_margins": found.train.float(), "ref_logps": scores.ref_logps}
        logged = policy_loss(
            scores.ref_logps, columns, with_clip(settings(margin_clip="auto"), found)
        ).metrics
        assert float(logged["margins/clipped"].mean()) == pytest.approx(share)


def test_many_clipped_targets_are_warned_of_and_all_of_them_refused() -> None:
    assert clipping_warning("hard_min", targets_of("hard_min", random_scores(8), margin_clip="auto")) is None
    tight = targets_of("hard_min", random_scores(8), margin_clip=SCALE * 0.5)
    assert 0.05 < tight.clipped_share < 1
    refuse_signs("hard_min", tight)
    assert f"hard_min: {tight.clipped_share:.1%} of the targets are clipped" in clipping_warning(
        "hard_min", tight
    )
    with pytest.raises(
        ConfigError, match=r"hard_min would learn signs only, all its .* are clipped at 1e-06"
    ):
        refuse_signs("hard_min", targets_of("hard_min", random_scores(8), margin_clip=1e-6))


def test_weights_name_objectives_in_order() -> None:
    assert list(UNEVEN) == list(OBJECTIVES)
