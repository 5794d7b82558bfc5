"""What the policies of the gold-reward study learn from: pooled pairs, calibrated rewards, the robust reward of a method.

Here: from labelled pairs and the reward models' scores to the columns of a training. The mathematics is the project's:
`calibration` for units, `policies.robust_reward.solve_reward` for R and its scale, `policies.targets.method_targets` for targets. Not here:
training and evaluation (`gold/policies.py`, to be read next).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.gold.ensembles import BOOTSTRAP, STRENGTHS, load_scores, objective_pairs, pair_rows
from benchmarks.gold.reference import World
from prmd.config.policy import PolicySection
from prmd.models.tokenization import PrefixRow
from prmd.objectives import OBJECTIVES
from prmd.pessimism.calibration import calibrate, fit_calibration, prompt_means
from prmd.policies.pairs import PairScores, ScaleResponses, pool_order
from prmd.policies.robust_reward import RobustReward, solve_reward
from prmd.policies.targets import Targets, method_targets
from prmd.training.trainer import PairData


@dataclass(frozen=True)
class PooledPairs:
    """The labelled pairs of all objectives, as every method sees them.

    Attributes:
        rows: tokens of (chosen, rejected).
        position: prompt, chosen and rejected sample of each pair, LongTensor [3, N].
        ref_logps: log pi_ref, float32 [N, 2], nats.
        stream: indices into `rows` in training order.
    """

    rows: list[PrefixRow]
    position: Tensor
    ref_logps: Tensor
    stream: list[int]


def pooled(world: World, bias: float) -> PooledPairs:
    """Pool the pairs of all objectives, equally often each (`policies.pairs.pool_order`)."""
    rows = world.rows(test=False, rewards=False)
    pairs = [objective_pairs(world, objective, bias) for objective in OBJECTIVES]
    fields = [[getattr(p, name) for p in pairs] for name in ("prompt", "chosen", "rejected")]
    position = torch.from_numpy(np.array([np.concatenate(field) for field in fields]))
    sizes = {objective: len(p) for objective, p in zip(OBJECTIVES, pairs, strict=True)}
    starts = dict(zip(OBJECTIVES, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    weights = {objective: 1 / len(OBJECTIVES) for objective in OBJECTIVES}
    wanted, total, stream = world.sizes.policy_steps * world.sizes.batch, sum(sizes.values()), []
    for epoch in range(-(-wanted // total)):
        drawn = pool_order(sizes, weights, total, world.seed + epoch)
        stream += [starts[objective] + index for objective, index in drawn]
    every_row = [row for p in pairs for row in pair_rows(rows, p)]
    return PooledPairs(every_row, position, take_sides(world.ref_logps, position), stream[:wanted])


def take_sides(values: Tensor, position: Tensor) -> Tensor:
    """Values of all samples [..., X, n] at (chosen, rejected) of every pair: [..., N, 2]."""
    prompt, *sides = position
    return torch.stack([values[..., prompt, side] for side in sides], dim=-1)


# ------------------------------------------------------------------ rewards
def choose_members(scores: Tensor, members: int, family: str = BOOTSTRAP) -> Tensor:
    """M members out of scores [K, 1 + M', ...]; one member is the single reward model r_0.

    The first ones, as every head has its own start and bootstrap; evenly spaced ones of a family whose strengths differ.
    """
    if members == 1:
        return scores[:, :1]
    low, high = STRENGTHS.get(family, (0.0, 0.0))
    if low == high:
        return scores[:, 1 : 1 + members]
    return scores[:, np.linspace(1, scores.shape[1] - 1, members).round().astype(int)]


def calibrated_like(scores: Tensor, reference: Tensor, *, raw: bool) -> Tensor:
    """Scores in the units of the reference samples: scale over all prompts, offset of each prompt.

    Args:
        scores: raw rewards, [K, M, X, n].
        reference: raw rewards of the samples of pi_ref for the same prompts, [K, M, X, m].
        raw: leave them as they are (the uncalibrated minimum of the study).

    Returns:
        float64 [K, M, X, n].
    """
    if raw:
        return scores.double()
    prompts, count = reference.shape[2:]
    index = torch.arange(prompts).repeat_interleave(count)
    units = []
    for values, own in zip(scores, reference, strict=True):
        flat = own.permute(1, 2, 0).reshape(-1, own.shape[0])
        offset = prompt_means(flat, index, prompts)[:, None]
        scaled = calibrate(values.permute(1, 2, 0), scale=fit_calibration(flat, index).scale, offset=offset)
        units.append(scaled.permute(2, 0, 1))
    return torch.stack(units)


@dataclass(frozen=True)
class Distilled:
    """What a method distils: R(x, y) with its scale, and its targets on the pooled pairs."""

    reward: RobustReward
    targets: Targets


def distilled(
    world: World,
    policy: PolicySection,
    method: str,
    *,
    bias: float,
    family: str,
    members: int,
    raw: bool,
    pairs: PooledPairs,
) -> Distilled:
    """Robust reward and target margins of a method on the pooled pairs."""
    scores = choose_members(load_scores(world, bias, family, test=False), members, family)
    rewards = calibrated_like(scores, scores, raw=raw)
    prompts, count = rewards.shape[2:]
    index = torch.arange(prompts).repeat_interleave(count)
    scale = ScaleResponses(rewards.flatten(2), index, "samples of pi_ref", count)
    reward = solve_reward(policy, method, scale)
    own = PairScores(take_sides(rewards, pairs.position), pairs.ref_logps)
    return Distilled(
        reward, method_targets(policy, method, train=own, held_out=own, scale=scale, reward=reward)
    )


def training_data(pairs: PooledPairs, targets: Targets | None) -> PairData:
    """Rows and columns of one training; without targets it learns from the labels."""
    won, lost = (torch.tensor([float(len(row.responses[side])) for row in pairs.rows]) for side in (0, 1))
    columns = {"ref_logps": pairs.ref_logps, "chosen_length": won, "length_difference": won - lost}
    own = targets.columns[0] if targets else {}
    return PairData(pairs.rows, columns | {name: values.float() for name, values in own.items()})
