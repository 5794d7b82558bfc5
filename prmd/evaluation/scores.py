"""Scores in reference standard deviations above the reference's mean, and what the training ensemble thinks of the policies.

    (P15)  E[min_m r~_km]     (P16)  min_k of it     (P17)  P(exists k: min_m r~_km < tau_k)

The ensemble's numbers are proxies, because policies were trained on these rewards; verdicts of judges alone say whether a
policy is good.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from prmd.pessimism.calibration import calibrate, fit_calibration, prompt_means
from prmd.statistics.intervals import minimum_band
from prmd.statistics.outcomes import violation_rate
from prmd.statistics.resampling import Resampling, with_chance


@dataclass(frozen=True)
class ReferenceScores:
    """Raw scores of the reference samples by every judge, and the units they define.

    Attributes:
        raw: [K, X, m] in the order of `objectives`.
        scale: within-prompt standard deviation per judge, [K].
        offset: mean per judge and prompt, [K, X].
    """

    objectives: tuple[str, ...]
    raw: np.ndarray
    scale: np.ndarray
    offset: np.ndarray

    @classmethod
    def fit(cls, objectives: Sequence[str], raw: np.ndarray) -> "ReferenceScores":
        """Scale and per-prompt offset of every judge from the reference samples, by `calibration`.

        Raises:
            ValueError: a judge gives all samples of every prompt the same score.
        """
        prompts, samples = raw.shape[1:]
        index = torch.arange(prompts).repeat_interleave(samples)
        flat = [torch.from_numpy(np.ascontiguousarray(r)).reshape(-1, 1) for r in raw]
        scale = np.array([float(fit_calibration(r, index).scale) for r in flat])
        offset = np.stack([prompt_means(r, index, prompts)[:, 0].numpy() for r in flat])
        return cls(tuple(objectives), raw, scale, offset)

    def calibrated(self, raw: np.ndarray) -> np.ndarray:
        """Raw scores [K, X, n] of any method in reference standard deviations above the reference's mean."""
        rewards, offset = (torch.from_numpy(np.moveaxis(a, 0, -1).copy()) for a in (raw, self.offset))
        found = calibrate(rewards, scale=torch.from_numpy(self.scale), offset=offset[:, None])
        return np.ascontiguousarray(np.moveaxis(found.numpy(), -1, 0))

    def centred(self, raw: np.ndarray, *, is_reference: bool) -> np.ndarray:
        """Scores of which a minimum may be taken: each sample centred on all reference samples but one.

        A reference sample is part of the mean it would be centred on, which shrinks its deviations by sqrt((m - 1)/m)
        where those of a policy grow by sqrt((m + 1)/m); the minimum would then rank a policy equal to the reference
        below it. Leaving out the sample itself (the reference), or each one in turn (policies), gives equal policies
        equal values. Means are unchanged by this.

        Args:
            raw: scores of the method, [K, X, n].

        Returns:
            [K, X, m] of the reference; [K, X, n*m] of a policy, every sample once per sample left out.
        """
        m = self.raw.shape[2]
        offsets = (self.raw.sum(axis=2, keepdims=True) - self.raw) / (m - 1)
        scale = self.scale[:, None, None]
        if is_reference:
            return (self.raw - offsets) / scale
        centred = (raw[:, :, :, None] - offsets[:, :, None, :]) / scale[..., None]
        return centred.reshape(*raw.shape[:2], -1)

    def mean_of_min(self, raw: np.ndarray, *, is_reference: bool) -> np.ndarray:
        """E[min_k r~_k] per prompt, [X], of scores [K, X, n], centred as `centred` says."""
        return self.centred(raw, is_reference=is_reference).min(axis=0).mean(axis=1)


VIOLATION_QUANTILE = 0.1
"""The threshold tau_k is this quantile of the reference's own min_m r~_km."""


@dataclass(frozen=True)
class MemberScores:
    """Raw rewards of the reference samples by every member of the training ensembles.

    Attributes:
        raw: [K, M, X, m].
        scale: within-prompt standard deviation each member was calibrated with, [K, M].
    """

    objectives: tuple[str, ...]
    raw: np.ndarray
    scale: np.ndarray

    @cached_property
    def _by_objective(self) -> list[ReferenceScores]:
        members = tuple(f"member {m}" for m in range(self.raw.shape[1]))
        return [
            ReferenceScores(members, raw, scale, raw.mean(axis=2))
            for raw, scale in zip(self.raw, self.scale, strict=True)
        ]

    def centred(self, raw: np.ndarray, *, is_reference: bool) -> np.ndarray:
        """Rewards [K, M, X, n] of a method in calibrated units, [K, M, X, n']; see `ReferenceScores.centred`."""
        pairs = zip(self._by_objective, raw, strict=True)
        return np.stack([scores.centred(values, is_reference=is_reference) for scores, values in pairs])

    @cached_property
    def reference(self) -> np.ndarray:
        """Calibrated rewards of the reference samples, [K, M, X, m]."""
        return self.centred(self.raw, is_reference=True)

    @cached_property
    def thresholds(self) -> np.ndarray:
        """tau_k, [K]."""
        worst = self.reference.min(axis=1).reshape(len(self.raw), -1)
        return np.quantile(worst, VIOLATION_QUANTILE, axis=1)


def proxy_metrics(
    raw: np.ndarray, members: MemberScores, resampling: Resampling, *, is_reference: bool
) -> dict[str, Any]:
    """The proxies of one method.

    Args:
        raw: rewards of its samples by every member, [K, M, X, n].

    Returns:
        `members`, `mean_reward`, `worst_member`, `worst_objective`, `violation_rate`, `thresholds`, `per_prompt`.

    Source: Eqs. (P15) to (P17) of the AT-PRMD draft.
    """
    rewards = members.centred(raw, is_reference=is_reference)
    names = members.objectives
    means = dict(zip(names, rewards.mean(axis=(1, 3)), strict=True))
    minima = dict(zip(names, rewards.min(axis=1).mean(axis=-1), strict=True))
    violations = violation_rate(rewards, members.thresholds)
    chance = float(violation_rate(members.reference, members.thresholds).mean())
    banded = {k: resampling.mean(v, 1 - 0.05 / len(names)) for k, v in minima.items()}
    worst = min(banded, key=lambda k: banded[k].value)
    return {
        "members": int(raw.shape[1]),
        "mean_reward": {k: with_chance(resampling.mean(v), 0.0) for k, v in means.items()},
        "worst_member": {k: resampling.mean(v).to_json() for k, v in minima.items()},
        "worst_objective": {"objective": worst, "reward": minimum_band(list(banded.values())).to_json()},
        "violation_rate": with_chance(resampling.win_rate(violations), chance),
        "thresholds": dict(zip(names, members.thresholds.tolist(), strict=True)),
        "per_prompt": {
            "mean_reward": {k: v.tolist() for k, v in means.items()},
            "violation": violations.tolist(),
        },
    }
