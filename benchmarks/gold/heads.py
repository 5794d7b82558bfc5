"""Which heads make a good ensemble: slice they are fit on and anchor, judged by the true rewards without training a policy.

For each share of the pairs kept from the backbone and each anchor: how well the mean member orders held-out samples, how
alike the members are, whether their disagreement predicts errors, and what the closed-form gate reaches in TRUE rewards
when the held-out samples of pi_ref are reweighted by a method's robust reward (`pessimism.kl_budget.gate_row`). Training the reward models
themselves is in `gold/ensembles.py`, policies are in `gold/policies.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gold.ensembles import (
    backbone_features,
    fit_backbone,
    fit_heads,
    measure,
    member_rewards,
    pair_rows,
    split_pairs,
)
from benchmarks.gold.reference import World
from benchmarks.gold.targets import calibrated_like
from prmd.artifacts import io
from prmd.config.policy import PolicySection
from prmd.config.shared import EnsembleConfig
from prmd.objectives import OBJECTIVES
from prmd.pessimism.aggregation import robust_rewards
from prmd.pessimism.kl_budget import gate_row, usable_kl_target
from prmd.policies.methods import aggregation
from prmd.policies.robust_reward import objective_weights

FIT_FRACTIONS, ANCHORS = (0.1, 0.3), (1.0, 10.0, 100.0)
METHODS = ("mean", "hard_min", "hierarchical")
_MEASURES = ("accuracy_single", "accuracy_ensemble", "member_correlation", "disagreement_error_correlation")


def heads_path(world_directory: Path, bias: float, fit_fraction: float) -> Path:
    """The file of one backbone split."""
    return world_directory / "heads" / f"{bias:g}-{fit_fraction:g}.json"


def study_heads(world: World, bias: float, fit_fraction: float) -> Path:
    """Fit and measure heads at every anchor on backbones that left `fit_fraction` of the pairs to them."""
    path = heads_path(world.directory, bias, fit_fraction)
    if path.is_file():
        return path
    rows, test_rows = world.rows(test=False, rewards=True), world.rows(test=True, rewards=True)
    scores: dict[float, list[Tensor]] = {anchor: [] for anchor in ANCHORS}
    for objective in OBJECTIVES:
        trained, unseen = split_pairs(world, objective, bias, fit_fraction)
        backbone = fit_backbone(world, pair_rows(rows, trained), path.parent)
        found, test = backbone_features(backbone, rows), backbone_features(backbone, test_rows)
        for anchor in ANCHORS:
            settings = EnsembleConfig(members=world.sizes.members, fit_fraction=fit_fraction, anchor=anchor)
            scores[anchor].append(member_rewards(fit_heads(world, unseen, found, settings), test))
    entries = [
        {"fit_fraction": fit_fraction, "anchor": anchor, **_judge(world, torch.stack(values).double())}
        for anchor, values in scores.items()
    ]
    return io.write_json(path, entries)


def _judge(world: World, scores: Tensor) -> dict[str, Any]:
    """Measures and gates of one setting; scores [K, X, n, 1 + M] of the held-out samples."""
    measured = [
        measure(world, objective, values)
        for objective, values in zip(OBJECTIVES, scores.numpy(), strict=True)
    ]
    means = {name: float(np.mean([entry[name] for entry in measured])) for name in _MEASURES}
    members = scores[..., 1:].permute(0, 3, 1, 2)
    rewards = calibrated_like(members, members, raw=False)
    truth, policy = torch.from_numpy(world.truth.calibrated(world.truth.raw)), PolicySection()
    budget = usable_kl_target(1.0, rewards.shape[-1])
    gates = {}
    for method in METHODS:
        robust = robust_rewards(
            rewards, aggregation=aggregation(policy, method), weights=objective_weights(policy)
        )
        row = gate_row(robust=robust, rewards=truth, beta=policy.beta, kl_target=budget)
        gain = row.mean_of_min - row.reference_mean_of_min
        gates[method] = {"worst_gain": row.worst_gain, "mean_of_min_gain": gain, "kl": row.kl}
    return {**means, "gate": gates}


def heads_rows(files: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Means over seeds of every setting.

    Args:
        files: contents of the files of `study_heads`.
    """
    groups: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for entry in (entry for entries in files for entry in entries):
        groups.setdefault((entry["fit_fraction"], entry["anchor"]), []).append(entry)
    return [
        {
            "fit_fraction": fraction,
            "anchor": anchor,
            **{name: float(np.mean([entry[name] for entry in entries])) for name in _MEASURES},
            "gate": {
                method: {
                    key: float(np.mean([entry["gate"][method][key] for entry in entries]))
                    for key in entries[0]["gate"][method]
                }
                for method in METHODS
            },
            "seeds": len(entries),
        }
        for (fraction, anchor), entries in sorted(groups.items())
    ]
