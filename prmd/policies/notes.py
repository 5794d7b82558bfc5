"""What has to be said of a method on the configured ensemble: with which others it coincides, and why.

A method that coincides with another is no second result, so it says so when it starts and in its `metrics.json`. Which
coincide is found by trying them on random rewards.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from prmd.config.policy import PolicySection
from prmd.pessimism.aggregation import (
    METHODS,
    Aggregation,
    effective_atoms,
    robust_rewards,
)
from prmd.pessimism.draft_equations import PAPER_METHODS, negative_target_share, paper_margins
from prmd.policies.methods import aggregation, method_of, unread_settings
from prmd.policies.pairs import PairScores
from prmd.policies.robust_reward import objective_weights, weighted_objectives
from prmd.rewards.metrics import NEARLY_ONE_MODEL
from prmd.statistics.reliability import mean_pairwise_correlation


def coinciding_methods(
    n_objectives: int, n_members: int, *, aggregations: Mapping[str, Aggregation], weights: Tensor
) -> dict[str, list[str]]:
    """Which methods give the same robust rewards for an ensemble of this size, found by trying.

    One member makes all operators within an objective equal, ``alpha * M <= 1`` makes CVaR the minimum, and one
    objective makes all operators across equal. A method that coincides with another is no second result.

    Args:
        n_objectives: K.
        n_members: M.
        aggregations: method names and their aggregations; "maxmin" is tried with weights of its own.
        weights: objective weights, [K].

    Returns:
        For every method that coincides with some other, the names it coincides with.

    Raises:
        ValueError: as `robust_rewards`.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (n_objectives, n_members, 64)
    probe = torch.randn(shape, generator=generator, dtype=torch.float64)
    own = torch.rand(n_objectives, generator=generator, dtype=torch.float64) + 0.1
    own = own * (weights > 0)
    own_weights = {"maxmin": own / own.sum()}
    results = {
        name: robust_rewards(probe, aggregation=aggregation, weights=own_weights.get(name, weights))
        for name, aggregation in aggregations.items()
    }
    same = {
        name: [
            other for other, R in results.items() if other != name and torch.allclose(R, robust, atol=1e-9)
        ]
        for name, robust in results.items()
    }
    return {name: others for name, others in same.items() if others}


def coincidence_notes(
    n_objectives: int, n_members: int, *, aggregations: Mapping[str, Aggregation], weights: Tensor
) -> list[str]:
    """One readable line for each method that coincides with others, with the reason the sizes give.

    Args:
        n_objectives: K.
        n_members: M.
        aggregations: as in `coinciding_methods`.
        weights: objective weights, [K].

    Returns:
        Lines such as "hierarchical = hard_min: its CVaR averages 0.5 <= 1 members"; empty where all differ.
    """
    notes = []
    same = coinciding_methods(n_objectives, n_members, aggregations=aggregations, weights=weights)
    for name, others in same.items():
        chosen, reasons = aggregations[name], []
        atoms = effective_atoms(chosen, n_members=n_members, weights=weights)
        if n_members == 1:
            reasons.append("one member per objective")
        elif atoms is not None and atoms <= 1:
            reasons.append(f"its CVaR averages {atoms:.3g} <= 1 members")
        if int((weights > 0).sum()) == 1:
            reasons.append("one objective")
        notes.append(f"{name} = {', '.join(others)}" + (f": {'; '.join(reasons)}" if reasons else ""))
    return notes


def method_notes(policy: PolicySection, method: str, train: PairScores, targets: Tensor) -> tuple[str, ...]:
    """Lines on one method: coincidences, members that are one model, and targets against the labels.

    Args:
        train: scored training pairs.
        targets: its target margins, [n].
    """
    kind, (k, m) = method_of(method).loss, train.rewards.shape[:2]
    notes = [*_unread(policy, method), *_without_weight(policy, method)]
    if kind == "distil":
        notes += _same_rewards(policy, method, k, m)
    if method_of(method).reads_rewards:
        notes += _without_margins(policy, train.rewards)
    if method_of(method).reward is not None:
        notes += _same_margins(policy, method, m)
        notes += _one_model(policy, method, train.rewards)
    if method == "paper_eq5" and policy.loss == "squared":
        notes.append("paper_eq5: wherever no target is clipped its gradient is that of mean")
    if kind == "paper" or (policy.level == "margin" and kind == "distil"):
        share = negative_target_share(targets)
        notes.append(f"{share:.0%} of the targets are negative: against the label")
    return tuple(notes)


def cvar_atoms(policy: PolicySection, method: str, n_members: int) -> float | None:
    """Rewards that the method's CVaR averages (`pessimism.aggregation.effective_atoms`); None for a method without CVaR."""
    if method_of(method).reward is None:
        return None
    chosen = aggregation(policy, method)
    return effective_atoms(chosen, n_members=n_members, weights=objective_weights(policy))


def label_notes(policy: PolicySection, method: str) -> tuple[str, ...]:
    """Lines on a method that learns from labels alone."""
    objective, notes = method_of(method).objective, _unread(policy, method)
    if objective is not None and policy.weights[objective] == 1.0:
        notes.append(f"{method} = dpo: {objective} has all the weight")
    return tuple(notes)


def _unread(policy: PolicySection, method: str) -> list[str]:
    names = [f"policy.{name}" for name in unread_settings(policy, method)]
    return [f"{method} does not read {', '.join(names)}"] if names else []


def _without_weight(policy: PolicySection, method: str) -> list[str]:
    """What weights of zero leave of a method that reads rewards; nothing where all are positive."""
    names = list(policy.weights)
    kept = [names[k] for k in weighted_objectives(policy)]
    if len(kept) == len(names):
        return []
    out = ", ".join(objective for objective in names if objective not in kept)
    notes = [f"weight 0 leaves {out} out of {method}"]
    if len(kept) == 1:
        notes.append(f"{kept[0]} has all the weight, so {method} combines nothing across objectives")
        notes += ["modpo = dpo: one objective"] if method == "modpo" else []
    return notes


def _same_rewards(policy: PolicySection, method: str, k: int, m: int) -> list[str]:
    """Methods whose R is the same on an ensemble of this size."""
    weights = objective_weights(policy)
    shown = {*policy.methods, "mean", "hard_min", "cvar", "hierarchical", method} & set(METHODS)
    aggregations = {name: aggregation(policy, name) for name in sorted(shown)}
    notes = coincidence_notes(k, m, aggregations=aggregations, weights=weights)
    return [note for note in notes if note.startswith(f"{method} = ")]


def _same_margins(policy: PolicySection, method: str, m: int) -> list[str]:
    """Methods whose targets of each objective are the same, among those that aggregate margins."""
    generator, kept = torch.Generator().manual_seed(0), weighted_objectives(policy)
    probe = torch.randn(len(kept), m, 64, generator=generator, dtype=torch.float64)
    estimator = {"alpha": policy.alpha, "cvar_estimator": policy.cvar_estimator}
    rows = {name: paper_margins(probe, method=name, **estimator) for name in PAPER_METHODS}
    if m == 1:
        rows["edpo"] = probe[:, 0]
    if policy.level == "margin" and policy.loss == "squared" and method != "maxmin":
        weights = objective_weights(policy)[kept]
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
    if len(kept) == 1 and m > 1:
        reason = "one objective"
    if m > 1 and "paper_eq6" in (method, *same) and "paper_eq7" in (method, *same):
        reason = f"CVaR averages {policy.alpha * m:.3g} <= 1 members"
    return [f"{method} = {', '.join(sorted(same))}: {reason}"] if same else []


def _without_margins(policy: PolicySection, rewards: Tensor) -> list[str]:
    """Objectives that reward both sides of every pair alike, as a constant reward model does."""
    margins = rewards[..., 0] - rewards[..., 1]
    names = list(policy.weights)
    return [
        f"{names[k]} rewards both sides of all {margins.shape[-1]} training pairs alike: nothing is learned from it"
        for k in weighted_objectives(policy)
        if not bool(margins[k].any())
    ]


def _one_model(policy: PolicySection, method: str, rewards: Tensor) -> list[str]:
    """Objectives whose members agree so much that no operator over them differs from their mean."""
    if rewards.shape[1] == 1 or (aggregation(policy, method).within == "mean" and method != "edpo"):
        return []
    margins, notes = rewards[..., 0] - rewards[..., 1], []
    names = list(policy.weights)
    for objective, own in ((names[k], margins[k]) for k in weighted_objectives(policy)):
        if own.shape[1] < 2 or bool((own.std(dim=1) == 0).any()):
            continue
        correlation = mean_pairwise_correlation(own)
        if correlation > NEARLY_ONE_MODEL:
            notes.append(
                f"members of {objective} correlate {correlation:.3f} (over {NEARLY_ONE_MODEL}: effectively one model), so within "
                f"it {method} hardly differs from the mean of the members"
            )
    return notes
