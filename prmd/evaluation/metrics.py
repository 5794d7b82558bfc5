"""From judged samples to results: what is measured of one method, and how far its judges can be trusted.

Arrays in, the dictionaries of `outputs/metrics/<approach>/<method>.json` out. Every estimate has its n (prompts, which are
the clusters) and its interval over prompts. A judge's sanity is what it gives an answer that says nothing, and how much it
likes length.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from prmd.artifacts.paths import REFERENCE
from prmd.evaluation.scores import ReferenceScores
from prmd.statistics.intervals import minimum_band
from prmd.statistics.outcomes import pairwise_win_rate, pareto_dominance_rate
from prmd.statistics.resampling import Resampling, by_definition, with_chance


def judge_sanity_checks(
    reference: ReferenceScores, constant: np.ndarray, lengths: np.ndarray, resampling: Resampling
) -> dict[str, Any]:
    """The constant answer's win rate against the reference, and the correlation of reward and length, per judge.

    A judge that prefers one answer to every prompt over the reference rewards something else than answers.

    Args:
        constant: scores of the constant answer, [K, X, 1].
        lengths: tokens of the reference samples, [X, m].

    Returns:
        Per objective `win_rate` and `length_correlation` (None where lengths or scores do not vary).
    """
    found = {}
    for k, objective in enumerate(reference.objectives):
        wins = pairwise_win_rate(constant[k], reference.raw[k])
        found[objective] = {
            "win_rate": with_chance(resampling.win_rate(wins), 0.5),
            "length_correlation": _within_prompt_correlation(reference.raw[k], lengths),
        }
    return found


def _within_prompt_correlation(scores: np.ndarray, lengths: np.ndarray) -> float | None:
    """Correlation of [X, m] and [X, m] after taking each prompt's mean out of both."""
    a, b = (values - values.mean(axis=1, keepdims=True) for values in (scores, lengths))
    spread = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / spread) if spread > 0 else None


LENGTH_WARNING = 0.1
"""A length-controlled win rate this far from the plain one is pointed out, where that is no chance."""
_KL_ERRORS = 4
"""Standard errors by which two unbiased estimators of one KL may differ: a few of many policies exceed three by chance."""


@dataclass(frozen=True)
class SampledMethod:
    """What was sampled from one method on X prompts, n responses each.

    Attributes:
        method: its name; `reference` for the reference.
        kl: exact KL of each response from the reference, nats, [X, n].
        k1: log-ratio of each response, nats, [X, n].
        k3: non-negative estimator of each response, summed over its tokens, nats, [X, n].
        lengths: tokens of each response, end of turn included, [X, n].
        finished: whether the turn was ended before the token limit, bool [X, n].
    """

    method: str
    kl: np.ndarray
    k1: np.ndarray
    k3: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray

    @property
    def is_reference(self) -> bool:
        return self.method == REFERENCE


def method_metrics(
    sampled: SampledMethod,
    raw: np.ndarray,
    reference: ReferenceScores,
    resampling: Resampling,
    *,
    reference_lengths: np.ndarray,
) -> dict[str, Any]:
    """Everything the judges' verdicts say of one method.

    Args:
        raw: scores of its samples, [K, X, n].
        reference_lengths: tokens of the reference samples, [X, m].

    Returns:
        `objectives`, `worst_objective`, `mean_of_min`, `cvar_10`, `dominance`, `hypervolume`, `kl`, `length`,
        `truncated_share`, `per_prompt`, `notes`.
    """
    names, same = reference.objectives, sampled.is_reference
    half = np.full(raw.shape[1], 0.5)
    wins = {k: half if same else pairwise_win_rate(raw[i], reference.raw[i]) for i, k in enumerate(names)}
    means = dict(zip(names, reference.calibrated(raw).mean(axis=2), strict=True))
    minima = reference.mean_of_min(raw, is_reference=same)
    longer = sampled.lengths.mean(axis=1) - reference_lengths.mean(axis=1)
    objectives = {
        k: {"mean_reward": with_chance(resampling.mean(means[k]), 0.0)}
        | _wins(wins[k], longer, (raw[i], reference.raw[i]), same, resampling)
        for i, k in enumerate(names)
    }
    volume = by_definition(0.0, len(minima)) if same else resampling.volume(np.stack([*means.values()])[None])
    own = [] if same else [*_length_notes(objectives, wins, longer, resampling), *_kl_notes(sampled)]
    return {
        "objectives": objectives,
        "worst_objective": _worst_objective(wins, same, resampling),
        "mean_of_min": resampling.mean(minima).to_json(),
        "cvar_10": resampling.lower_tail(minima).to_json(),
        "dominance": None if same else _dominance(raw, reference.raw, resampling),
        "hypervolume": with_chance(volume, 0.0),
        "kl": _kl(sampled, resampling),
        "length": resampling.mean(sampled.lengths.mean(axis=1)).to_json(),
        "truncated_share": float(1.0 - sampled.finished.mean()),
        "per_prompt": {
            "win_rate": {k: v.tolist() for k, v in wins.items()},
            "mean_reward": {k: v.tolist() for k, v in means.items()},
            "mean_of_min": minima.tolist(),
            "kl": sampled.kl.mean(axis=1).tolist(),
            "length": sampled.lengths.mean(axis=1).tolist(),
        },
        "notes": [_REFERENCE_NOTE] if same else own,
    }


_REFERENCE_NOTE = "The reference against itself: win rate ½, mean reward 0 and KL 0 hold by definition and are not measured."


def _half(n: int) -> dict[str, Any]:
    return with_chance(by_definition(0.5, n), 0.5)


def _wins(
    wins: np.ndarray,
    longer: np.ndarray,
    scores: tuple[np.ndarray, np.ndarray],
    same: bool,
    resampling: Resampling,
) -> dict[str, Any]:
    """Win rate, the same at equal length, and shares of sample pairs won, tied and lost."""
    if same:
        return {"win_rate": _half(len(wins)), "length_controlled": None, "outcomes": None}
    controlled = resampling.length_controlled(wins, longer)
    ours, theirs = scores
    signs = np.sign(ours[:, :, None] - theirs[:, None, :])
    return {
        "win_rate": with_chance(resampling.win_rate(wins), 0.5),
        "length_controlled": {
            "win_rate": with_chance(controlled.estimate, 0.5),
            "length_effect": controlled.length_effect,
        },
        "outcomes": {
            name: resampling.win_rate((signs == sign).mean(axis=(1, 2))).to_json()
            for name, sign in (("won", 1), ("tied", 0), ("lost", -1))
        },
    }


def _length_notes(
    objectives: dict[str, dict[str, Any]],
    wins: dict[str, np.ndarray],
    longer: np.ndarray,
    resampling: Resampling,
) -> list[str]:
    """Objectives of which length makes much of the win rate, and that not by chance: its share has an interval without 0."""
    notes = []
    for name, measured in objectives.items():
        plain, controlled = (m["win_rate"]["value"] for m in (measured, measured["length_controlled"]))
        if abs(plain - controlled) <= LENGTH_WARNING:
            continue
        share = resampling.length_share(wins[name], longer)
        if not share.low <= 0 <= share.high:
            notes.append(
                f"{name}: win rate {plain:.2f}, but {controlled:.2f} at equal length; length makes "
                f"{share.value:+.2f} [{share.low:+.2f}, {share.high:+.2f}] of it"
            )
    return notes


def _dominance(raw: np.ndarray, reference: np.ndarray, resampling: Resampling) -> dict[str, Any]:
    """How often a sample is at least as good on all objectives and better on one, and how often it is dominated."""
    pairs = {"dominates": (raw, reference), "dominated": (reference, raw)}
    m = reference.shape[2]
    # What two samples of the reference do; a sample never dominates itself, which the factor takes out.
    chance = float(pareto_dominance_rate(reference, reference).mean()) * m / (m - 1)
    return {
        name: with_chance(resampling.win_rate(pareto_dominance_rate(*pair)), chance)
        for name, pair in pairs.items()
    }


def _worst_objective(wins: dict[str, np.ndarray], same: bool, resampling: Resampling) -> dict[str, Any]:
    """The objective with the lowest win rate, in a band of intervals at confidence 1 - .05/K."""
    n = len(next(iter(wins.values())))
    if same:
        return {"objective": None, "win_rate": _half(n)}
    estimates = {k: resampling.win_rate(v, 1 - 0.05 / len(wins)) for k, v in wins.items()}
    worst = min(estimates, key=lambda k: estimates[k].value)
    return {"objective": worst, "win_rate": with_chance(minimum_band(list(estimates.values())), 0.5)}


def _kl(sampled: SampledMethod, resampling: Resampling) -> dict[str, Any]:
    n = len(sampled.kl)
    if sampled.is_reference:
        names = ("per_response", "per_token", "k1", "k3_per_token")
        return {name: by_definition(0.0, n).to_json() for name in names}
    tokens = sampled.lengths.sum(axis=1)
    return {
        "per_response": resampling.mean(sampled.kl.mean(axis=1)).to_json(),
        "per_token": resampling.ratio(sampled.kl.sum(axis=1), tokens).to_json(),
        "k1": resampling.mean(sampled.k1.mean(axis=1)).to_json(),
        "k3_per_token": resampling.ratio(sampled.k3.sum(axis=1), tokens).to_json(),
    }


def _kl_notes(sampled: SampledMethod) -> list[str]:
    """Say where k1 or k3 contradict the exact KL: then the samples are not the policy's own, or a number is wrong."""
    notes = []
    for name, values in (("k1", sampled.k1), ("k3", sampled.k3)):
        gaps = (values - sampled.kl).mean(axis=1)
        error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
        # The slack is float32's: a policy close to the reference has gaps of rounding alone.
        if abs(gaps.mean()) > _KL_ERRORS * error + 1e-4 * (1 + abs(sampled.kl.mean())):
            notes.append(
                f"KL by {name} is {values.mean():.3f} and exactly {sampled.kl.mean():.3f} nats per response, more than "
                f"{_KL_ERRORS} standard errors apart"
            )
    return notes
