"""What a policy learns from: target margins of a method, and the loss on prefix-shared pairs.

    Delta* = clip(reward_scale [R(x, y_w) - R(x, y_l)], +-margin_clip) ,   L = (Delta* - Delta_theta)^2

The second of the three files that `hard_min`'s loss is understood from. `pessimism.aggregation` makes R [n, 2] of calibrated
rewards [K, M, n, 2]; here `method_targets` makes Delta* [n] of R, once, and `policy_loss` L [B] of the log-probabilities of a
batch; the equations that both apply are in `pessimism.losses`, to be read next. Beside the path: what else methods learn from
(`methods`), the weights and scale that are solved for (`robust_reward`), frozen rewards (`scores`), the training (`train`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prmd.config.policy import PolicySection
from prmd.errors import ConfigError
from prmd.pessimism.draft_equations import paper_loss, paper_margins
from prmd.pessimism.losses import (
    distillation_loss,
    dpo_loss,
    implicit_margins,
    ipo_loss,
    margin_moments,
    modpo_loss,
    offset_dpo_loss,
    target_margins,
)
from prmd.policies.edpo import edpo_pair_loss
from prmd.policies.methods import method_of
from prmd.policies.notes import cvar_atoms, method_notes
from prmd.policies.pairs import PairScores, ScaleResponses
from prmd.policies.robust_reward import (
    RobustReward,
    objective_weights,
    positive_weights,
    solve_reward,
    weighted_objectives,
)
from prmd.training.trainer import Columns, PairLoss

AUTO_CLIP = 3.0
"""Root mean squares of the unclipped training targets at which `margin_clip: auto` cuts: 0.3 % of Gaussian ones."""
CLIPPED_WARNING = 0.05
"""Share of clipped targets from which it is warned of."""


@dataclass(frozen=True)
class Targets:
    """Target margins of training and held-out pairs for one method, and how they came about.

    Attributes:
        train: Delta* of each training pair, [n]; where a loss has several targets a pair (the draft's equations, e-DPO)
            their mean by the objective weights; for modpo, the margin of the other objectives.
        held_out: the same of the held-out pairs.
        margin_clip: where targets are cut, nats; infinity where nothing is.
        clipped_share: of all training targets, those of every objective and member where a loss has several a pair.
        cvar_effective_atoms: rewards that CVaR averages; None for a method without it.
        columns: what the loss reads of each pair, [n, ...] by name, of training and held-out pairs.
    """

    train: Tensor
    held_out: Tensor
    reward_scale: float
    notes: tuple[str, ...]
    columns: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))
    cvar_effective_atoms: float | None = None
    margin_clip: float = math.inf
    clipped_share: float = 0.0


def method_targets(
    policy: PolicySection,
    method: str,
    *,
    train: PairScores,
    held_out: PairScores,
    scale: ScaleResponses,
    reward: RobustReward | None = None,
) -> Targets:
    """Targets of one method: aggregate, fix the scale, take the margin, clip.

    R is `aggregation.robust_rewards` by the method's row of `aggregation.METHODS`, with the configured weights where a method
    solves for none; `losses.target_margins` scales and clips.

    Args:
        train: scored training pairs, rewards [K, M, n, 2]; `held_out` likewise.
        scale: responses that fix `reward_scale: auto`; samples of the reference for maxmin and constraints.
        reward: R of this method where it is solved already.

    Raises:
        ConfigError: the robust rewards do not vary, so that no scale reaches `kl_target`, or as `solve_reward`.
    """
    kind, clip, clipped = method_of(method).loss, math.inf, 0.0
    if kind == "modpo":
        columns = tuple(_modpo_columns(policy, scores) for scores in (train, held_out))
        found, notes, reward_scale = [c["other_margins"] for c in columns], (), 1.0
    else:
        reward = reward or solve_reward(policy, method, scale)
        margins = [_margins(policy, method, reward, scores) for scores in (train, held_out)]
        clip = _clip(policy, reward.reward_scale * margins[0])
        how = {"reward_scale": reward.reward_scale, "margin_clip": clip}
        targets = [
            target_margins(chosen_rewards=m, rejected_rewards=torch.zeros_like(m), **how) for m in margins
        ]
        clipped = float((targets[0].abs() >= clip).double().mean())
        columns = tuple(_columns(kind, policy, own) for own in targets)
        found = [c["target_margins"] for c in columns]
        notes, reward_scale = reward.notes, reward.reward_scale
    notes = (*notes, *method_notes(policy, method, train, found[0]))
    atoms = cvar_atoms(policy, method, train.rewards.shape[1])
    return Targets(*found, reward_scale, notes, columns, atoms, clip, clipped)


def _margins(policy: PolicySection, method: str, reward: RobustReward, scores: PairScores) -> Tensor:
    """What the reward scale makes targets of: [n]; of each objective [K', n] (draft) and of each member [K', M, n] (e-DPO).

    K' objectives have a positive weight; R itself leaves the others out.
    """
    kind, values = method_of(method).loss, scores.rewards
    if kind == "distil" and policy.level == "response":
        robust = reward(values)
        return robust[:, 0] - robust[:, 1]
    margins = values[..., 0] - values[..., 1]
    if kind == "distil":  # the draft's own form: the operators meet reward differences
        return reward(margins)
    margins = margins[weighted_objectives(policy)]
    if kind == "paper":
        estimator = {"alpha": policy.alpha, "cvar_estimator": policy.cvar_estimator}
        return paper_margins(margins, method=method, **estimator)
    return margins


def _columns(kind: str, policy: PolicySection, targets: Tensor) -> dict[str, Tensor]:
    """What the loss reads of each pair, of the clipped targets of `_margins`."""
    if kind == "distil":
        return {"target_margins": targets}
    if kind == "paper":
        mean = targets[0] if len(targets) == 1 else positive_weights(policy) @ targets
        return {"target_margins": mean, "objective_targets": targets.T.contiguous()}
    mean = positive_weights(policy) @ targets.mean(dim=1)
    return {"target_margins": mean, "member_targets": targets.permute(2, 0, 1).contiguous()}


def _modpo_columns(policy: PolicySection, scores: PairScores) -> dict[str, Tensor]:
    """Margins of the objectives a pair is not labelled for, and the weight of the one it is."""
    weights, margins = objective_weights(policy), scores.rewards.mean(dim=1)
    weighted = weights[:, None] * (margins[..., 0] - margins[..., 1])
    own = weighted.gather(0, scores.labelled_for[None])[0]
    return {"other_margins": weighted.sum(dim=0) - own, "label_weight": weights[scores.labelled_for]}


def _clip(policy: PolicySection, unclipped: Tensor) -> float:
    """Where targets are cut, nats: as configured, or `AUTO_CLIP` root mean squares of those of training."""
    if policy.margin_clip != "auto":
        return policy.margin_clip
    found = AUTO_CLIP * float(unclipped.double().square().mean().sqrt())
    # A float32, as the targets that the loss reads: what is cut is then equal to it there too.
    return float(np.float32(found)) or math.inf


def with_clip(policy: PolicySection, targets: Targets | None) -> PolicySection:
    """The settings with the clip of these targets in the place of `auto`."""
    return policy.model_copy(update={"margin_clip": targets.margin_clip}) if targets else policy


def refuse_signs(method: str, targets: Targets) -> None:
    """Refuse a clip that leaves nothing but the sign of every target.

    Raises:
        ConfigError: all training targets are cut.
    """
    if targets.clipped_share == 1.0:
        raise ConfigError(
            f"policy.margin_clip: {method} would learn signs only, all its {targets.train.numel()} target margins are clipped "
            f"at {targets.margin_clip:.3g} nats; set margin_clip: auto, or a number above the margins of reward_scale "
            f"{targets.reward_scale:.3g}"
        )


def clipping_warning(method: str, targets: Targets) -> str | None:
    """What is warned of where many targets are clipped."""
    if targets.clipped_share <= CLIPPED_WARNING:
        return None
    return (
        f"{method}: {targets.clipped_share:.1%} of the targets are clipped at {targets.margin_clip:.3g} nats, so that much of "
        "what R says of how far responses differ is lost; set policy.margin_clip: auto or a larger number"
    )


def describe_targets(targets: Targets) -> dict[str, Any]:
    """What is reported of the training pairs' target margins: moments, shares, histogram, reward scale, notes."""
    values = targets.train.numpy()
    counts, edges = np.histogram(values, bins=30)
    histogram = {"edges": edges.round(6).tolist(), "counts": counts.tolist()}
    summary = {
        "mean": float(values.mean()),
        "sd": float(values.std()),
        "margin_clip": targets.margin_clip if math.isfinite(targets.margin_clip) else None,
        "clipped_share": targets.clipped_share,
        "histogram": histogram,
    }
    summary["negative_share"] = float((values < 0).mean())
    described = {
        "target_margins": summary,
        "reward_scale": targets.reward_scale,
        "notes": list(targets.notes),
    }
    if targets.cvar_effective_atoms is not None:
        described["cvar_effective_atoms"] = targets.cvar_effective_atoms
    return described


# ------------------------------------------------------------------ losses
def _distil(implicit: Tensor, columns: Columns, policy: PolicySection) -> Tensor:
    return distillation_loss(
        implicit_margins=implicit,
        target_margins=columns["target_margins"],
        kind=policy.loss,
        huber_delta=policy.huber_delta,
    )


def _paper(implicit: Tensor, columns: Columns, policy: PolicySection) -> Tensor:
    return paper_loss(
        implicit_margins=implicit,
        objective_targets=columns["objective_targets"].T,
        weights=positive_weights(policy),
    )


LOSSES: dict[str, Callable[[Tensor, Columns, PolicySection], Tensor]] = {
    "distil": _distil,
    "paper": _paper,
    "edpo": edpo_pair_loss,
    "dpo": lambda implicit, columns, policy: dpo_loss(implicit_margins=implicit),
    "rdpo": lambda implicit, columns, policy: offset_dpo_loss(
        implicit_margins=implicit, offsets=policy.rdpo_alpha * columns["length_difference"]
    ),
    "dpo_debiased": lambda implicit, columns, policy: offset_dpo_loss(
        implicit_margins=implicit, offsets=columns["offsets"]
    ),
    "ipo": lambda implicit, columns, policy: ipo_loss(
        implicit_margins=implicit, beta=policy.beta, ipo_beta=policy.ipo_beta
    ),
    "modpo": lambda implicit, columns, policy: modpo_loss(
        implicit_margins=implicit, other_margins=columns["other_margins"], weight=columns["label_weight"]
    ),
}
"""Implicit margins [B], columns, settings -> loss of each pair [B]; `methods.Method.loss` names them."""


def policy_loss(
    logps: Tensor, columns: Columns, policy: PolicySection, *, kind: str | None = None
) -> PairLoss:
    """Loss of a batch and what is logged.

    ``L = loss(Delta_theta) + gamma * mean_j(-log pi_theta(y_j|x)) - nll_weight * log pi_theta(y_w|x) / |y_w|``,
    y_j reference samples: their negative log-likelihood is KL(pi_ref || pi_theta) up to the entropy of pi_ref.

    Args:
        logps: log pi_theta of (chosen, rejected, reference samples...) of each pair in turn, nats; B times as many as
            responses a pair, in any shape. The gamma term is over the reference samples, absent without any.
        columns: `ref_logps` [B, 2], `chosen_length` [B] tokens (infinity: no likelihood term), and what the loss reads:
            `target_margins` [B] and others of `Targets.columns`.
        policy: its `margin_clip` is that of the targets, a number.
        kind: key of `LOSSES`; None: distillation where there are target margins, else DPO.

    Source: the gamma term is the pessimistic penalty of arXiv:2405.19316.
    """
    ref = columns["ref_logps"]
    logps = logps.reshape(len(ref), -1)
    implicit = implicit_margins(
        policy_chosen_logps=logps[:, 0],
        policy_rejected_logps=logps[:, 1],
        ref_chosen_logps=ref[:, 0],
        ref_rejected_logps=ref[:, 1],
        beta=policy.beta,
    )
    metrics = _policy_metrics(logps[:, :2].detach(), ref, implicit.detach(), policy.beta)
    if "target_margins" in columns:
        target = columns["target_margins"]
        metrics["margins/target"] = target
        metrics |= margin_moments(implicit.detach(), target)
        if policy.margin_clip != "auto":
            metrics["margins/clipped"] = (target.abs() >= policy.margin_clip).float()
    kind = kind or ("distil" if "target_margins" in columns else "dpo")
    loss = LOSSES[kind](implicit, columns, policy)
    if policy.nll_weight:
        loss = loss - policy.nll_weight * logps[:, 0] / columns["chosen_length"]
    if logps.shape[1] > 2:
        samples = logps[:, 2:].mean(dim=1)
        loss = loss - policy.gamma * samples
        metrics["logps/reference_samples"] = samples.detach()
    return PairLoss(loss, metrics)


def _policy_metrics(logps: Tensor, ref: Tensor, implicit: Tensor, beta: float) -> dict[str, Tensor]:
    logratios = logps - ref
    return {
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
        "logratios/chosen": logratios[:, 0],
        "logratios/rejected": logratios[:, 1],
        "rewards/chosen": beta * logratios[:, 0],
        "rewards/rejected": beta * logratios[:, 1],
        "rewards/margins": implicit,
        "rewards/accuracies": (implicit > 0).float() + 0.5 * (implicit == 0).float(),
    }
