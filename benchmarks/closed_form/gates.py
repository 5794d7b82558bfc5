"""What the optimum of a robust reward is truly worth: reference samples tilted to a KL, judged by other rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.gold.targets import calibrated_like
from prmd.pessimism.kl_budget import matched_kl_scale, reweight


def in_reference_units(scores: np.ndarray) -> Tensor:
    """Rewards [K, M, X, n] of reference samples in their own units: offset of each prompt, scale over all prompts."""
    own = torch.from_numpy(np.ascontiguousarray(scores))
    return calibrated_like(own, own, raw=False)


@dataclass(frozen=True)
class Outcome:
    """What a policy is worth by a judge, prompt by prompt.

    Attributes:
        wins: against a reference sample of the prompt, ties one half, [K, X].
        least: E min_k in the judge's reference units, [X]; `reference_least` that of pi_ref.
        length: tokens, [X].
    """

    wins: np.ndarray
    least: np.ndarray
    reference_least: np.ndarray
    length: np.ndarray

    def summary(self, objectives: Sequence[str]) -> dict[str, float]:
        """win_rate/<objective>, worst_win_rate, mean_of_min, reference_mean_of_min and length over all prompts."""
        wins = self.wins.mean(axis=-1)
        return {
            **{f"win_rate/{k}": float(v) for k, v in zip(objectives, wins, strict=True)},
            "worst_win_rate": float(wins.min()),
            "mean_of_min": float(self.least.mean()),
            "reference_mean_of_min": float(self.reference_least.mean()),
            "length": float(self.length.mean()),
        }


def optimum(robust: Tensor, *, kl: float, beta: float) -> np.ndarray:
    """The policy pi_ref exp(R / tau) / Z on reference samples at a KL: weights [X, n] from R [X, n]."""
    scale = matched_kl_scale(robust, beta=beta, kl_target=kl)
    return reweight(robust, reward_scale=scale, beta=beta).numpy()


def outcome(weights: np.ndarray, truth: np.ndarray, length: np.ndarray) -> Outcome:
    """A policy on reference samples by the rewards of a judge.

    Args:
        weights: of the policy, [X, n].
        truth: the judge's raw rewards of the same samples, [K, X, n].
        length: tokens, [X, n].
    """
    least = in_reference_units(truth[:, None])[:, 0].numpy().min(axis=0)
    return Outcome(
        wins=(weights * _share_below(truth)).sum(axis=-1),
        least=(weights * least).sum(axis=-1),
        reference_least=least.mean(axis=-1),
        length=(weights * length).sum(axis=-1),
    )


def _share_below(rewards: np.ndarray) -> np.ndarray:
    """Share of the samples of the same prompt that a sample beats, ties one half: [K, X, n]."""
    ours, theirs = rewards[..., :, None], rewards[..., None, :]
    return ((ours > theirs) + 0.5 * (ours == theirs)).mean(axis=-1)
