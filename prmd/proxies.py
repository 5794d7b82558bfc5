"""What the training ensemble thinks of the policies: proxies, because policies were trained on these rewards.

    (P15)  E[min_m r~_km]     (P16)  min_k of it     (P17)  P(exists k: min_m r~_km < tau_k)

What lives here: raw rewards of all members in, the `proxy` part of `outputs/metrics/<approach>/<method>.json` out. What
does not: scoring (`policy_evaluation`), verdicts of judges (`policy_metrics`), which alone say whether a policy is good.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from prmd.reference_scores import ReferenceScores
from prmd.statistics.intervals import minimum_band
from prmd.statistics.outcomes import violation_rate
from prmd.statistics.resampling import Resampling, with_chance

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
