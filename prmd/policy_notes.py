"""What has to be said of a method on the configured ensemble: with which others it coincides, and why.

A method that coincides with another is no second result, so it says so when it starts and in its `metrics.json`. Which
coincide is found by trying them on random rewards (`pessimism.aggregation.coinciding_methods`).
"""

import torch
from torch import Tensor

from prmd.config.policy import PolicySection
from prmd.objectives import OBJECTIVES
from prmd.pessimism.aggregation import METHODS, coincidence_notes, effective_atoms, robust_rewards
from prmd.pessimism.draft_equations import PAPER_METHODS, negative_target_share, paper_margins
from prmd.policy_data import PairScores
from prmd.policy_methods import POLICY_METHODS, aggregation, unread_settings
from prmd.policy_rewards import objective_weights
from prmd.statistics.reliability import mean_pairwise_correlation

ONE_MODEL = 0.95
"""Correlation of the members' margins above which an ensemble is effectively one model."""


def method_notes(policy: PolicySection, method: str, train: PairScores, targets: Tensor) -> tuple[str, ...]:
    """Lines on one method: coincidences, members that are one model, and targets against the labels.

    Args:
        train: scored training pairs.
        targets: its target margins, [n].
    """
    kind, (k, m) = POLICY_METHODS[method].loss, train.rewards.shape[:2]
    notes = _unread(policy, method)
    if kind == "distil":
        notes += _same_rewards(policy, method, k, m)
    if kind in ("distil", "paper", "edpo"):
        notes += _same_margins(policy, method, k, m)
        notes += _one_model(policy, method, train.rewards)
    if method == "paper_eq5" and policy.loss == "squared":
        notes.append("paper_eq5: wherever no target is clipped its gradient is that of mean")
    if kind == "paper" or (policy.level == "margin" and kind == "distil"):
        share = negative_target_share(targets)
        notes.append(f"{share:.0%} of the targets are negative: against the label")
    return tuple(notes)


def cvar_atoms(policy: PolicySection, method: str, n_members: int) -> float | None:
    """Rewards that the method's CVaR averages (`pessimism.aggregation.effective_atoms`); None for a method without CVaR."""
    if POLICY_METHODS[method].reward is None:
        return None
    chosen = aggregation(policy, method)
    return effective_atoms(chosen, n_members=n_members, weights=objective_weights(policy))


def label_notes(policy: PolicySection, method: str) -> tuple[str, ...]:
    """Lines on a method that learns from labels alone."""
    objective, notes = POLICY_METHODS[method].objective, _unread(policy, method)
    if objective is not None and policy.weights[objective] == 1.0:
        notes.append(f"{method} = dpo: {objective} has all the weight")
    return tuple(notes)


def _unread(policy: PolicySection, method: str) -> list[str]:
    names = [f"policy.{name}" for name in unread_settings(policy, method)]
    return [f"{method} does not read {', '.join(names)}"] if names else []


def _same_rewards(policy: PolicySection, method: str, k: int, m: int) -> list[str]:
    """Methods whose R is the same on an ensemble of this size."""
    weights = objective_weights(policy)
    shown = {*policy.methods, "mean", "hard_min", "cvar", "hierarchical", method} & set(METHODS)
    aggregations = {name: aggregation(policy, name) for name in sorted(shown)}
    notes = coincidence_notes(k, m, aggregations=aggregations, weights=weights)
    return [note for note in notes if note.startswith(f"{method} = ")]


def _same_margins(policy: PolicySection, method: str, k: int, m: int) -> list[str]:
    """Methods whose targets of each objective are the same, among those that aggregate margins."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(k, m, 64, generator=generator, dtype=torch.float64)
    estimator = {"alpha": policy.alpha, "cvar_estimator": policy.cvar_estimator}
    rows = {name: paper_margins(probe, method=name, **estimator) for name in PAPER_METHODS}
    if m == 1:
        rows["edpo"] = probe[:, 0]
    if policy.level == "margin" and policy.loss == "squared" and method != "maxmin":
        weights = objective_weights(policy)
        for name in {*policy.methods, method} & set(METHODS) - {"maxmin"}:
            chosen = aggregation(policy, name)
            rows[name] = robust_rewards(probe, aggregation=chosen, weights=weights)[None]
    own = rows.get(method)
    same = [
        other
        for other, row in rows.items()
        if own is not None and other != method and row.shape == own.shape and torch.allclose(row, own)
    ]
    reason = "one member per objective" if m == 1 else "the same worst case of the margins"
    if m > 1 and "paper_eq6" in (method, *same) and "paper_eq7" in (method, *same):
        reason = f"CVaR averages {policy.alpha * m:.3g} <= 1 members"
    return [f"{method} = {', '.join(sorted(same))}: {reason}"] if same else []


def _one_model(policy: PolicySection, method: str, rewards: Tensor) -> list[str]:
    """Objectives whose members agree so much that no operator over them differs from their mean."""
    if rewards.shape[1] == 1 or (aggregation(policy, method).within == "mean" and method != "edpo"):
        return []
    margins, notes = rewards[..., 0] - rewards[..., 1], []
    for objective, own in zip(OBJECTIVES, margins, strict=False):
        if own.shape[1] < 2 or bool((own.std(dim=1) == 0).any()):
            continue
        correlation = mean_pairwise_correlation(own)
        if correlation > ONE_MODEL:
            notes.append(
                f"members of {objective} correlate {correlation:.3f} (over {ONE_MODEL}: effectively one model), so within "
                f"it {method} hardly differs from the mean of the members"
            )
    return notes
