"""One way to make every interval of an evaluation: the same resamples of prompts, from one seed.

What lives here: `Resampling`, which binds the number of resamples and the seed to the intervals of `intervals` and the
length control of `paired_tests`. What does not: the formulas of the intervals. Read `evaluation.metrics` next.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from prmd.statistics.intervals import (
    Estimate,
    bootstrap_mean,
    lower_tail_interval,
    paired_bootstrap,
    studentized_ratio,
    widened_tail,
    wilson_interval,
)
from prmd.statistics.outcomes import dominated_volumes
from prmd.statistics.paired_tests import (
    LengthControlled,
    length_controlled_difference,
    length_controlled_win_rate,
    length_share,
)

WORST_SHARE = 0.1
"""Share of prompts in the lower tail that is reported."""
_LENGTH_RESAMPLES = 2000
"""Every resample of the length control is a logistic regression; more of them change no second digit."""
_VOLUME_RESAMPLES = 2000
_ZERO_REACH = 0.85
"""Chosen by simulation: of three normal means, all .1 or all .5, at 15 or 60 prompts .95 to .99 are held; the whole t: .97 to 1."""


@dataclass(frozen=True)
class Resampling:
    """How every interval is made: resamples of prompts, and their seed."""

    resamples: int
    seed: int

    def mean(self, values: np.ndarray, confidence: float = 0.95) -> Estimate:
        """Mean over prompts [X] of what has no bounds and may be skewed."""
        options = {"n_resamples": self.resamples, "seed": self.seed, "confidence": confidence}
        return studentized_ratio(values, np.ones_like(values, dtype=np.float64), **options)

    def win_rate(self, wins: np.ndarray, confidence: float = 0.95) -> Estimate:
        """Mean of per-prompt shares [X] in [0, 1]; Wilson where all prompts agree, as resampling would claim certainty."""
        if np.ptp(wins) == 0:
            return wilson_interval(float(wins.sum()), wins.size, confidence)
        return bootstrap_mean(wins, n_resamples=self.resamples, seed=self.seed, confidence=confidence)

    def ratio(self, numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
        """Sum over prompts of one [X] over the sum of the other."""
        return studentized_ratio(numerators, denominators, n_resamples=self.resamples, seed=self.seed)

    def lower_tail(self, values: np.ndarray) -> Estimate:
        """Mean of the worst `WORST_SHARE` of prompts [X]."""
        return lower_tail_interval(values, WORST_SHARE, n_resamples=self.resamples, seed=self.seed)

    def difference(self, ours: np.ndarray, theirs: np.ndarray) -> Estimate:
        """Mean of ours - theirs over the same prompts [X]."""
        return paired_bootstrap(ours, theirs, n_resamples=self.resamples, seed=self.seed)

    def length_controlled(
        self, wins: np.ndarray, length_differences: np.ndarray, confidence: float = 0.95
    ) -> LengthControlled:
        """Win rate [X] at equal length."""
        draws = min(self.resamples, _LENGTH_RESAMPLES)
        return length_controlled_win_rate(
            wins, length_differences, n_resamples=draws, seed=self.seed, confidence=confidence
        )

    def length_controlled_difference(
        self, ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]
    ) -> Estimate:
        """Difference of two win rates at equal length; each method is its wins and its length differences [X]."""
        draws = min(self.resamples, _LENGTH_RESAMPLES)
        return length_controlled_difference(ours, theirs, n_resamples=draws, seed=self.seed)

    def length_share(self, wins: np.ndarray, length_differences: np.ndarray) -> Estimate:
        """Win rate [X] minus the one at equal length."""
        draws = min(self.resamples, _LENGTH_RESAMPLES)
        return length_share(wins, length_differences, n_resamples=draws, seed=self.seed)

    def volume(self, points: np.ndarray) -> Estimate:
        """Volume above the origin that the means of P methods dominate, [P, K, X].

        The interval is that of the percentiles of resampled volumes with three corrections. The volume of equally good
        methods is too large and that of resamples too large again, so the lower end is lowered by twice the bias of the
        resamples; the upper end is at least the lower one mirrored at the volume; and where the percentiles reach zero, at
        which a volume is cut off, it is at least the volume of means that are `_ZERO_REACH` of Student's t higher.
        """
        p, k, x = points.shape
        rows, means = points.reshape(p * k, x).T, points.mean(axis=2)
        value = float(dominated_volumes(means[None])[0])
        method = f"bootstrap of the volume of {p * k} means 0.95"
        if x == 1:
            return Estimate(value, value, value, 1, "single observation, no interval")
        draws = min(self.resamples, _VOLUME_RESAMPLES)
        counts = np.random.default_rng(self.seed).multinomial(x, np.full(x, 1 / x), size=draws)
        volumes = dominated_volumes((counts @ rows / x).reshape(draws, p, k))
        tail = widened_tail(0.025, x)
        least, most = (float(end) for end in np.quantile(volumes, [tail, 1 - tail]))
        bias = max(0.0, float(volumes.mean()) - value)
        low, high = max(0.0, min(value, least - 2 * bias)), max(most, 2 * value - least)
        if least == 0:
            reach = _ZERO_REACH * stats.t.ppf(0.975, x - 1) / math.sqrt(x)
            corner = means + reach * points.std(axis=2, ddof=1)
            high = max(high, float(dominated_volumes(corner[None])[0]))
        return Estimate(value, low, high, x, method)


def by_definition(value: float, n: int) -> Estimate:
    """A number that is known and not measured."""
    return Estimate(value, value, value, n, "by definition")


def with_chance(estimate: Estimate, chance: float | None) -> dict[str, float | int | str | None]:
    """The fields of an estimate with what no effect, or guessing, would give; None where that is not defined."""
    return estimate.to_json() | {"chance": chance}
