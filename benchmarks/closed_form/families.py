"""Families of linear reward models of one objective, and what a suspected bias does to their members.

    bootstrap   members with their own Poisson bootstrap and random prior, on the labels as they are
    debiased    the same members, every one with the whole offset of the bias (strengths [1, 1])
    strengths   the same members, from no offset to the whole (strengths [0, 1])
    twins       half as many members on the labels as they are, and what is left of each behind its regression on the feature

All have the same M, so that a minimum over one is over as many atoms as over another.
"""

from collections.abc import Mapping

import numpy as np

from benchmarks.closed_form.fits import RIDGE, fit_linear
from prmd.pessimism.debias import bias_columns, bias_offsets, fit_log_odds, member_strengths, root_mean_square

STRENGTHS: Mapping[str, tuple[float, float]] = {
    "bootstrap": (0.0, 0.0),
    "debiased": (1.0, 1.0),
    "strengths": (0.0, 1.0),
}
TWINS = "twins"
PRIOR_SCALE = 1.0
"""sd of a prior's margin in those of the fitted margin."""


def offsets_of(differences: np.ndarray) -> np.ndarray:
    """a [n] of pairs whose features differ by `differences` [n, F], fitted on these pairs (`pessimism.debias`)."""
    columns = bias_columns(differences, root_mean_square(differences))
    return bias_offsets(columns, fit_log_odds(columns))


def members_of(
    family: str,
    differences: np.ndarray,
    offsets: np.ndarray,
    *,
    members: int,
    rng: np.random.Generator,
    ridge: float = RIDGE,
) -> np.ndarray:
    """The members of a family that has strengths.

    Args:
        family: a key of `STRENGTHS`.
        differences: features of chosen less rejected, [n, d].
        offsets: a of the pairs, [n].
        rng: of bootstraps and priors; the same state gives the same draws to every family.

    Returns:
        theta of every member, [M, d].
    """
    margin_sd = float((differences @ fit_linear(differences, ridge=ridge)).std())
    found = []
    for strength in member_strengths(STRENGTHS[family], members):
        weights = rng.poisson(1.0, len(differences)).astype(np.float64)
        prior = rng.standard_normal(differences.shape[1])
        prior *= PRIOR_SCALE * margin_sd / float((differences @ prior).std())
        offset = strength * offsets
        found.append(fit_linear(differences, ridge=ridge, weights=weights, offset=offset, prior=prior))
    return np.stack(found)


def with_twins(scores: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The first half of the members, and each of them less its regression on a feature within prompts.

    Args:
        scores: of M members, [M, X, n].
        features: phi of the same responses, [F, X, n]; each enters with its square.

    Returns:
        [M, X, n], M even.
    """
    half = scores[: len(scores) // 2]
    columns = np.concatenate([features, (features - features.mean(axis=(1, 2), keepdims=True)) ** 2])
    centered = columns - columns.mean(axis=2, keepdims=True)
    design = centered.reshape(len(columns), -1).T
    targets = (half - half.mean(axis=2, keepdims=True)).reshape(len(half), -1).T
    fitted, *_ = np.linalg.lstsq(design, targets, rcond=None)
    return np.concatenate([half, half - (design @ fitted).T.reshape(half.shape)])
