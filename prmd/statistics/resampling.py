"""One way to make every interval of an evaluation: the same resamples of prompts, from one seed.

What lives here: `Resampling`, which binds the number of resamples and the seed to the intervals of `intervals` and the
length control of `paired_tests`. What does not: the formulas of the intervals. Read `evaluation.metrics` next.
"""

from dataclasses import dataclass

import numpy as np

from prmd.statistics.intervals import (
    Estimate,
    bootstrap_mean,
    bootstrap_statistic,
    lower_tail_interval,
    paired_bootstrap,
    wilson_interval,
)
from prmd.statistics.outcomes import hypervolume
from prmd.statistics.paired_tests import LengthControlled, length_controlled_win_rate

WORST_SHARE = 0.1
"""Share of prompts in the lower tail that is reported."""
_LENGTH_RESAMPLES = 2000
"""Every resample of the length control is a logistic regression; more of them change no second digit."""


@dataclass(frozen=True)
class Resampling:
    """How every interval is made: resamples of prompts, and their seed."""

    resamples: int
    seed: int

    def mean(self, values: np.ndarray, confidence: float = 0.95) -> Estimate:
        """Mean over prompts [X]."""
        return bootstrap_mean(values, n_resamples=self.resamples, seed=self.seed, confidence=confidence)

    def win_rate(self, wins: np.ndarray, confidence: float = 0.95) -> Estimate:
        """Mean of per-prompt shares [X] in [0, 1]; Wilson where all prompts agree, as resampling would claim certainty."""
        if np.ptp(wins) == 0:
            return wilson_interval(float(wins.sum()), wins.size, confidence)
        return self.mean(wins, confidence)

    def ratio(self, numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
        """Sum over prompts of one [X] over the sum of the other."""
        matrix = np.stack([numerators, denominators], axis=1)
        return bootstrap_statistic(
            lambda rows: rows[..., 0].sum(axis=1) / rows[..., 1].sum(axis=1),
            matrix,
            n_resamples=self.resamples,
            seed=self.seed,
        )

    def lower_tail(self, values: np.ndarray) -> Estimate:
        """Mean of the worst `WORST_SHARE` of prompts [X]."""
        return lower_tail_interval(values, WORST_SHARE, n_resamples=self.resamples, seed=self.seed)

    def difference(self, ours: np.ndarray, theirs: np.ndarray) -> Estimate:
        """Mean of ours - theirs over the same prompts [X]."""
        return paired_bootstrap(ours, theirs, n_resamples=self.resamples, seed=self.seed)

    def length_controlled(self, wins: np.ndarray, length_differences: np.ndarray) -> LengthControlled:
        """Win rate [X] at equal length."""
        draws = min(self.resamples, _LENGTH_RESAMPLES)
        return length_controlled_win_rate(wins, length_differences, n_resamples=draws, seed=self.seed)

    def volume(self, points: np.ndarray) -> Estimate:
        """Volume above the origin that the means of P methods dominate, [P, K, X].

        A volume grows with every coordinate, so the volumes of the lowest and of the highest corners hold it wherever all
        P*K intervals, each at confidence 1 - .05/(P*K), hold. (Resampling the volume itself would fail at zero, where it
        is cut off.)
        """
        p, k, x = points.shape
        means = [self.mean(values, 1 - 0.05 / (p * k)) for values in points.reshape(p * k, x)]

        def volume(part: str) -> float:
            corners = np.array([getattr(estimate, part) for estimate in means]).reshape(p, k)
            return hypervolume(corners, np.zeros(k))

        method = f"volume of {p * k}: {means[0].method} each"
        return Estimate(volume("value"), volume("low"), volume("high"), x, method)


def by_definition(value: float, n: int) -> Estimate:
    """A number that is known and not measured."""
    return Estimate(value, value, value, n, "by definition")


def with_chance(estimate: Estimate, chance: float | None) -> dict[str, float | int | str | None]:
    """The fields of an estimate with what no effect, or guessing, would give; None where that is not defined."""
    return estimate.to_json() | {"chance": chance}
