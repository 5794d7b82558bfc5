"""Preferences drawn from true rewards: Bradley-Terry, label noise, and a length bias that differs between objectives.

    P(a preferred to b) = (1 - e) sigma(kappa (r*(a) - r*(b)) / s*) + e / 2

A bias of strength rho is made as in arXiv:2405.19316 (`SELECTION`), by choosing which labelled pairs are in the training set, never by
changing a label: pairs whose longer response won are kept ((rho / (1 - rho))^u_k : 1) times as often as pairs whose
shorter one won, u = `BIAS_SHARE` of the objective. At rho = .5 nothing is chosen; where labels do not favour a length, rho
is the share of pairs (of unequal length, u = 1) that prefer the longer response. Biased raters (`RATERS`) are another thing:
u_k log(rho / (1 - rho)) d / mean|d|, d the difference in length, is added to the log-odds of a label and no pair is left out.
The world is in `gold/world.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KAPPA = 1.5
"""Steepness of Bradley-Terry in standard deviations of the true reward within a prompt."""
LABEL_NOISE = 0.1
"""Share e of labels that are a coin flip."""
UNBIASED = 0.5
"""The rho at which nothing is chosen."""
SELECTION, RATERS = "selection", "raters"
BIAS_SHARE = {"helpful": 1.0, "harmless": 0.0, "honest": 0.5}
"""Exponent u_k: raters take length for help fully, for honesty by half (in log-odds), for harmlessness not at all."""


@dataclass(frozen=True)
class LabelledPairs:
    """Preferences over the samples of X prompts.

    Attributes:
        prompt: prompt of each pair, [N].
        chosen, rejected: positions among that prompt's samples, [N].
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt)

    def responses(self, samples: Sequence[Sequence[object]], index: int) -> tuple[object, object]:
        """(chosen, rejected) of a pair out of the samples it was drawn from."""
        group = samples[self.prompt[index]]
        return group[self.chosen[index]], group[self.rejected[index]]


def preference_probability(margins: np.ndarray) -> np.ndarray:
    """P(first preferred) of margins r*(first) - r*(second) in reference standard deviations."""
    return (1 - LABEL_NOISE) / (1 + np.exp(-KAPPA * margins)) + LABEL_NOISE / 2


def keep_odds(bias: float, objective: str) -> float:
    """How many times as often a pair is kept whose longer response won: (rho / (1 - rho))^u_k."""
    return (bias / (1 - bias)) ** BIAS_SHARE[objective]


def label_pairs(
    rng: np.random.Generator,
    *,
    rewards: np.ndarray,
    lengths: np.ndarray,
    objective: str,
    bias: float,
    count: int,
    kind: str = SELECTION,
) -> LabelledPairs:
    """Draw labelled pairs of samples of the same prompt, biased by length with strength `bias`.

    Args:
        rewards: true rewards in reference standard deviations, [X, n].
        lengths: tokens of the samples, or what else the bias is by, [X, n].
        bias: rho in [.5, 1).
        count: pairs N.
        kind: `SELECTION` or `RATERS`.

    Raises:
        ValueError: a bias outside [.5, 1), or more pairs wanted than the samples offer at this bias.
    """
    if not 0.5 <= bias < 1:
        raise ValueError(f"label_pairs: the bias must be in [.5, 1), got {bias}")
    prompts, n = rewards.shape
    first, second = np.triu_indices(n, k=1)
    prompt = np.repeat(np.arange(prompts), len(first))
    first, second = np.tile(first, prompts), np.tile(second, prompts)
    order = rng.permutation(len(prompt))
    prompt, first, second = prompt[order], first[order], second[order]
    margin = rewards[prompt, first] - rewards[prompt, second]
    if kind == RATERS:
        difference = (lengths[prompt, first] - lengths[prompt, second]).astype(np.float64)
        margin = margin + np.log(keep_odds(bias, objective)) / KAPPA * difference / np.abs(difference).mean()
    won = rng.random(len(prompt)) < preference_probability(margin)
    chosen, rejected = np.where(won, first, second), np.where(won, second, first)
    longer = np.sign(lengths[prompt, chosen] - lengths[prompt, rejected])
    # Pairs of equal length are kept at the geometric mean of the two rates.
    odds = 1.0 if kind == RATERS else keep_odds(bias, objective)
    kept = rng.random(len(prompt)) < odds ** ((longer - 1) / 2)
    if kept.sum() < count:
        raise ValueError(f"label_pairs: {kept.sum()} pairs at bias {bias}, {count} wanted; give more samples")
    picked = np.flatnonzero(kept)[:count]
    return LabelledPairs(prompt[picked], chosen[picked], rejected[picked])


def longer_share(pairs: LabelledPairs, lengths: np.ndarray) -> float:
    """Share of pairs of unequal length whose longer response is the chosen one."""
    difference = lengths[pairs.prompt, pairs.chosen] - lengths[pairs.prompt, pairs.rejected]
    return float((difference > 0).sum() / max(1, (difference != 0).sum()))
