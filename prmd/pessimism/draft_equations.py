"""The margin-level objectives of the AT-PRMD draft, kept for fidelity.

Here: Eqs. (P5), (P6), (P7) and (P9) as they stand, on calibrated rewards. Not here: the response-level methods that
are the default (`aggregation.py`, to be read next). The difference: these take the worst case of a reward DIFFERENCE
after the label has chosen its sign, so for P6, P7 and P9 swapping chosen and rejected does not change the sign of
the target; no reward function, and no policy, has such margins. Of two conflicting models both orders of a pair get
a negative target.
"""

import torch
from torch import Tensor

from prmd.pessimism.cvar import check_weights, cvar

PAPER_METHODS = ("paper_eq5", "paper_eq6", "paper_eq7", "paper_eq9")


def paper_margins(
    pair_margins: Tensor, *, method: str, alpha: float = 0.1, cvar_estimator: str = "empirical"
) -> Tensor:
    """Target margins of the draft, one row for each squared term of its loss.

    With ``d[k, m] = r[k, m](y_w) - r[k, m](y_l)``:

    * paper_eq5 (P5): ``mean_m d[k, m]`` for every objective, the weighted-sum comparator;
    * paper_eq6 (P6): ``min_m d[k, m]`` for every objective, the worst member;
    * paper_eq7 (P7): ``CVaR_alpha,m d[k, .]`` for every objective, the worst share of members;
    * paper_eq9 (P9): ``min_k min_m d[k, m]``, one term over everything.

    Args:
        pair_margins: calibrated reward margins of every member, [K, M, B].
        method: one of `PAPER_METHODS`.
        alpha: tail share of paper_eq7, in (0, 1].
        cvar_estimator: estimator of paper_eq7.

    Returns:
        Unscaled target margins, [K, B]; [1, B] for paper_eq9.

    Raises:
        ValueError: unknown method, margins that are not [K, M, B] or not finite.

    Source: Eqs. (P5), (P6), (P7), (P9) of the AT-PRMD draft, on calibrated instead of raw rewards.
    """
    if pair_margins.ndim != 3 or not bool(torch.isfinite(pair_margins).all()):
        raise ValueError(f"paper_margins: needs finite margins [K, M, B], got {list(pair_margins.shape)}")
    if method == "paper_eq5":
        return pair_margins.mean(dim=1)
    if method == "paper_eq6":
        return pair_margins.amin(dim=1)
    if method == "paper_eq7":
        return cvar(pair_margins.transpose(0, 1), alpha=alpha, estimator=cvar_estimator)
    if method == "paper_eq9":
        return pair_margins.amin(dim=(0, 1))[None]
    raise ValueError(f"paper_margins: method must be one of {', '.join(PAPER_METHODS)}, got {method!r}")


def paper_loss(*, implicit_margins: Tensor, objective_targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of squared distances to the targets of all objectives.

    ``sum_k lambda_k * (target[k, i] - implicit[i])**2``; its gradient is that of the squared loss to the weighted mean
    of the targets, from which it differs by their spread.

    Args:
        implicit_margins: [B].
        objective_targets: scaled and clipped `draft_equations`, [K, B] or, for paper_eq9, [1, B].
        weights: objective weights lambda, [K]; not read where there is one row.

    Returns:
        Loss of each pair, [B].

    Raises:
        ValueError: weights that do not fit or do not sum to one.

    Source: the outer sum of Eqs. (P5)-(P7) of the AT-PRMD draft.
    """
    errors = (objective_targets.to(implicit_margins.dtype) - implicit_margins).square()
    if len(errors) == 1:
        return errors[0]
    shares = check_weights(weights, len(errors), errors.device).to(errors.dtype)
    return (shares[:, None] * errors).sum(dim=0)


def negative_target_share(target_margins: Tensor) -> float:
    """Share of targets below zero: pairs for which the policy is asked to prefer the rejected response.

    Args:
        target_margins: any shape.

    Returns:
        A number in [0, 1].
    """
    return float((target_margins < 0).double().mean())
