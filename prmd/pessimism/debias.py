"""A suspected bias of the labels: how far a feature of the responses predicts the label by itself.

    z_i = ( sign(d_i), clip(d_i / rms, +-3) ),   d_i = phi(y_w) - phi(y_l)      two columns for each feature
    b   = argmin sum_i -log sigma(b . z_i) + 0.005 ||b||^2                        no intercept
    a_i = clip(b . z_i, +-3)                                                      the offset of a pair, in log-odds

A reward model is trained with `s a_i` added to its margin (`losses.bradley_terry_loss`): at s = 0 on the labels as they are,
at s = 1 on what the feature does not predict. Members spread over s, so a worst case over them is one over the strength of
the bias. Pairs cannot tell a bias from a true association, so a person names the feature. What is a feature is in
`prmd.features`; nothing here enters a score.

Sources: the prior-corrected fit of case-control logistic regression; arXiv:2404.04475 corrects a judge so for length.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

CLIP = 3.0
"""Largest size of a scaled difference, in root mean squares, and of an offset, in log-odds."""
RIDGE = 0.005
FEWEST_DIFFERENT = 20
"""Pairs in which a feature must differ before anything is fitted to it."""
IS_THE_LABEL = 0.95
"""A feature that predicts this share of the labels by itself is the objective, or the labels are broken."""
_NORMAL_95 = 1.959963984540054
_NEWTON_STEPS = 100


@dataclass(frozen=True)
class Coefficients:
    """Log-odds per column with 95 % intervals (sandwich), each [C]."""

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray


def root_mean_square(differences: np.ndarray) -> np.ndarray:
    """Root mean square [F] of the differences [n, F]; not centred, so that swapping a pair changes a sign and no size."""
    return np.sqrt(np.square(np.asarray(differences, np.float64)).mean(axis=0))


def bias_columns(differences: np.ndarray, rms: np.ndarray) -> np.ndarray:
    """Sign and clipped size of each difference.

    Args:
        differences: phi(chosen) - phi(rejected), [n, F].
        rms: of the pairs b is fitted on, [F], > 0.

    Returns:
        [n, 2 F]: (sign, size) of each feature in turn; 0 where a feature is equal.

    Raises:
        ValueError: an rms that is not positive.
    """
    d, rms = np.asarray(differences, np.float64), np.asarray(rms, np.float64)
    if not (rms > 0).all():
        raise ValueError(f"bias_columns: every rms must be > 0, got {rms.tolist()}")
    columns = np.stack([np.sign(d), np.clip(d / rms, -CLIP, CLIP)], axis=2)
    return columns.reshape(len(d), -1)


def fit_log_odds(columns: np.ndarray, *, ridge: float = RIDGE) -> np.ndarray:
    """Logistic regression of the label on columns that change sign with the order of a pair, without an intercept.

    Damped Newton on ``sum_i -log sigma(b . z_i) + ridge ||b||^2``, which is strictly convex.

    Args:
        columns: z, chosen first, [n, C].
        ridge: > 0.

    Returns:
        b, [C].
    """
    z = np.asarray(columns, np.float64)

    def loss(b: np.ndarray) -> float:
        return float(np.logaddexp(0.0, -z @ b).sum() + ridge * (b @ b))

    b = np.zeros(z.shape[1])
    value = loss(b)
    for _ in range(_NEWTON_STEPS):
        gradient, hessian = _derivatives(z, b, ridge)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while loss(b - size * step) > value and size > 1e-9:
            size /= 2
        b = b - size * step
        value = loss(b)
        if np.abs(size * step).max() < 1e-12:
            break
    return b


def _derivatives(z: np.ndarray, b: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    p = expit(-z @ b)
    hessian = (z * (p * (1 - p))[:, None]).T @ z + 2 * ridge * np.eye(z.shape[1])
    return -z.T @ p + 2 * ridge * b, hessian


def log_odds_with_intervals(
    columns: np.ndarray, clusters: np.ndarray, *, ridge: float = RIDGE
) -> Coefficients:
    """`fit_log_odds` with the sandwich's 95 % intervals, pairs of one cluster taken together.

    Args:
        columns: z, [n, C].
        clusters: of each pair, integers [n]; pairs of one prompt are not independent.

    Source: H^-1 (sum over clusters of g g') H^-1 of Huber 1967, as for clusters by Liang and Zeger 1986.
    """
    z = np.asarray(columns, np.float64)
    b = fit_log_odds(z, ridge=ridge)
    _, hessian = _derivatives(z, b, ridge)
    _, index = np.unique(clusters, return_inverse=True)
    scores = np.zeros((index.max() + 1, z.shape[1]))
    np.add.at(scores, index, z * expit(-z @ b)[:, None])
    scores -= scores.mean(axis=0)  # the ridge's share of the gradient is no noise
    inverse = np.linalg.inv(hessian)
    half = _NORMAL_95 * np.sqrt(np.diag(inverse @ scores.T @ scores @ inverse))
    return Coefficients(b, b - half, b + half)


def bias_offsets(columns: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """a [n], the log-odds with which the features alone predict the label, within +-3; changes sign with the pair's order."""
    return np.clip(np.asarray(columns, np.float64) @ np.asarray(coefficients, np.float64), -CLIP, CLIP)


def predicted_share(differences: np.ndarray) -> float:
    """Share of labels that one feature predicts by itself, ties one half.

    Args:
        differences: of the feature, [n].
    """
    d = np.asarray(differences, np.float64)[:, None]
    if not d.any():
        return 0.5
    z = bias_columns(d, root_mean_square(d))
    predicted = z @ fit_log_odds(z)
    return float(np.where(predicted == 0, 0.5, predicted > 0).mean())


def member_strengths(strengths: tuple[float, float], members: int) -> list[float]:
    """s_m = low + (high - low) (m - 1) / (M - 1) of M > 1 members, the first one low."""
    low, high = strengths
    return [low + (high - low) * m / (members - 1) for m in range(members)]


def reached_strength(margins: np.ndarray, offsets: np.ndarray, clusters: np.ndarray) -> Coefficients | None:
    """The strength that a member's margins have: how much of the offset they leave to the feature.

    t of the logistic regression of the label on margin and offset, ``sigma(alpha margin + t a)``, which is s for a member
    that its training with ``s a`` left at the optimum. It is 0 where margins hold all that the feature predicts and 1 where
    they hold none of it, whatever their unit.

    Args:
        margins: r_m(chosen) - r_m(rejected) of held-out pairs, [n].
        offsets: a of the same pairs, [n].
        clusters: as for `log_odds_with_intervals`.

    Returns:
        t, [1], whose interval is wide where margins are little else than the feature; None where margins or offsets do not vary, or together separate the pairs.
    """
    d, a = np.asarray(margins, np.float64), np.asarray(offsets, np.float64)
    if len(d) < FEWEST_DIFFERENT or np.ptp(a) == 0 or np.ptp(d) == 0:
        return None
    columns = np.stack([d / np.sqrt(np.square(d).mean()), a], axis=1)
    fitted = log_odds_with_intervals(columns, clusters, ridge=1e-6)
    if (columns @ fitted.values > 0).all():
        return None
    return Coefficients(fitted.values[1:], fitted.low[1:], fitted.high[1:])


def margin_slope(margins: np.ndarray, sizes: np.ndarray) -> float | None:
    """Change of a member's margin with the feature: least squares with an intercept, the chosen response first.

    The intercept is what labels tell of every pair alike; without it pairs selected by the feature would give a slope to
    margins that do not know it.

    Args:
        margins: r_m(chosen) - r_m(rejected), [n].
        sizes: clipped size of the feature's difference (`bias_columns`), [n].

    Returns:
        Margin per root mean square of the feature; None where the feature does not vary.
    """
    d, x = np.asarray(margins, np.float64), np.asarray(sizes, np.float64)
    centred = x - x.mean() if len(x) else x
    spread = float(centred @ centred)
    return float(centred @ d) / spread if spread > 0 else None
