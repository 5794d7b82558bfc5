"""Pair losses: reward-model training, reward-model distillation and the preference baselines.

Here: functions from margins to one loss per pair; every one takes and returns tensors, and reduction is the
caller's. Not here: how targets are made pessimistic (`aggregation.py`), how log-probabilities are computed
(`models/sequence_models.py`), the reference-sample and likelihood anchors (`policies/targets.py`), and how a loss is trained
(`training/trainer.py`, to be read next).
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    *,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    centering_coefficient: float = 0.01,
    offsets: Tensor | None = None,
) -> Tensor:
    """Bradley-Terry negative log-likelihood with a penalty that keeps rewards centred on zero.

    ``-log sigmoid(r_chosen - r_rejected + o) + c * (r_chosen + r_rejected)**2``

    Args:
        chosen_rewards: rewards of the preferred responses, [B].
        rejected_rewards: rewards of the other responses, [B].
        centering_coefficient: c >= 0; zero leaves plain Bradley-Terry, whose rewards drift by a constant.
        offsets: o of each pair, the log-odds that are explained without the rewards (`debias.bias_offsets`), [B].

    Returns:
        Loss of each pair in nats, [B].

    Source: Bradley-Terry as Eq. 2 of arXiv:2305.18290; the centring term is that of arXiv:2312.09244.
    """
    margins = chosen_rewards - rejected_rewards
    likelihood = -F.logsigmoid(margins if offsets is None else margins + offsets.to(margins.dtype))
    return likelihood + centering_coefficient * (chosen_rewards + rejected_rewards).square()


def implicit_margins(
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """Reward margin that the policy implies by its log-ratios to the reference.

    ``beta * [(log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))]``

    Args:
        policy_chosen_logps: log-probabilities summed over response tokens, nats, [B]; likewise the other three.
        policy_rejected_logps: [B].
        ref_chosen_logps: [B].
        ref_rejected_logps: [B].
        beta: inverse temperature of the implicit reward, > 0.

    Returns:
        Implicit margins, [B]; zero where policy and reference agree.

    Source: the argument of sigma in Eq. 7 of arXiv:2305.18290.
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    return beta * (chosen_logratios - rejected_logratios)


def target_margins(
    *, chosen_rewards: Tensor, rejected_rewards: Tensor, reward_scale: float, margin_clip: float
) -> Tensor:
    """Margin the policy is asked to imply: scaled reward difference, clipped.

    ``clip(reward_scale * [R(y_w) - R(y_l)], -margin_clip, +margin_clip)``

    Args:
        chosen_rewards: robust rewards in calibrated units, [B].
        rejected_rewards: the same for the rejected responses, [B].
        reward_scale: > 0; `calibration.scale_of_variance` chooses it from a KL budget.
        margin_clip: > 0, in units of the implicit margin; ``math.inf`` never clips.

    Returns:
        Target margins, [B]; swapping chosen and rejected changes the sign and nothing else.

    Raises:
        ValueError: reward_scale or margin_clip not positive.

    Source: reward differences as regression targets are those of arXiv:2405.19316; scale and clip are ours.
    """
    if not reward_scale > 0 or not margin_clip > 0:
        raise ValueError(
            f"target_margins: reward_scale and margin_clip must be > 0, got {reward_scale} and {margin_clip}"
        )
    return (reward_scale * (chosen_rewards - rejected_rewards)).clamp(-margin_clip, margin_clip)


def _squared(implicit: Tensor, targets: Tensor, huber_delta: float) -> Tensor:
    return (targets - implicit).square()


def _huber(implicit: Tensor, targets: Tensor, huber_delta: float) -> Tensor:
    # Twice the textbook Huber, so that it IS the squared loss for errors below delta.
    return 2 * F.huber_loss(implicit, targets, reduction="none", delta=huber_delta)


def _bce(implicit: Tensor, targets: Tensor, huber_delta: float) -> Tensor:
    agree = torch.sigmoid(targets) * F.logsigmoid(implicit)
    return -agree - torch.sigmoid(-targets) * F.logsigmoid(-implicit)


PAIR_LOSSES = {"squared": _squared, "huber": _huber, "bce": _bce}


def distillation_loss(
    *, implicit_margins: Tensor, target_margins: Tensor, kind: str, huber_delta: float = 1.0
) -> Tensor:
    """Distance between the margin the policy implies and the margin it should imply.

    squared: ``(target - implicit)**2``; huber: the same for errors below delta, ``delta * (2|e| - delta)`` beyond;
    bce: ``-sigmoid(target) log sigmoid(implicit) - sigmoid(-target) log sigmoid(-implicit)``, which is DPO with a
    soft label of its own for every pair and becomes DPO as target -> +infinity. All three are minimal exactly at
    implicit = target.

    Args:
        implicit_margins: margins of the policy being trained, [B].
        target_margins: margins to distil, [B]; cast to the dtype of `implicit_margins`.
        kind: a key of `PAIR_LOSSES`.
        huber_delta: error at which huber becomes linear, > 0; read by huber only.

    Returns:
        Loss of each pair, [B].

    Raises:
        ValueError: unknown kind.

    Source: squared is the distillation loss of arXiv:2405.19316; bce with target = infinity is Eq. 7 of arXiv:2305.18290.
    """
    if kind not in PAIR_LOSSES:
        raise ValueError(f"distillation_loss: kind must be one of {', '.join(PAIR_LOSSES)}, got {kind!r}")
    targets = target_margins.to(implicit_margins.dtype)
    return PAIR_LOSSES[kind](implicit_margins, targets, huber_delta)


def dpo_loss(*, implicit_margins: Tensor) -> Tensor:
    """Direct preference optimisation, ``-log sigmoid(implicit margin)``; log 2 before the first step.

    Args:
        implicit_margins: [B].

    Returns:
        Loss of each pair in nats, [B].

    Source: Eq. 7 of arXiv:2305.18290.
    """
    return -F.logsigmoid(implicit_margins)


def offset_dpo_loss(*, implicit_margins: Tensor, offsets: Tensor) -> Tensor:
    """DPO whose labels are partly explained without the policy, ``-log sigmoid(implicit margin + offset)``.

    With ``alpha (|y_w| - |y_l|)`` as offset it is length-regularised DPO, with a of `debias.bias_offsets` DPO debiased.

    Args:
        implicit_margins: [B].
        offsets: log-odds of the label that need no learning, [B]; cast to the dtype of `implicit_margins`.

    Returns:
        Loss of each pair in nats, [B].

    Source: arXiv:2403.19159 (R-DPO) for lengths.
    """
    return -F.logsigmoid(implicit_margins + offsets.to(implicit_margins.dtype))


def ipo_loss(*, implicit_margins: Tensor, beta: float, ipo_beta: float) -> Tensor:
    """Squared DPO: pull the log-ratio difference of every pair towards the same constant.

    ``(implicit_margin / beta - 1 / (2 * ipo_beta))**2``

    Args:
        implicit_margins: [B], as made with `beta`.
        beta: the factor inside `implicit_margins`, taken out again here.
        ipo_beta: regularisation of IPO (tau in the paper), > 0; the target is 1/(2 ipo_beta) nats.

    Returns:
        Loss of each pair, [B].

    Source: Eq. 17 of arXiv:2310.12036.
    """
    return (implicit_margins / beta - 1.0 / (2.0 * ipo_beta)).square()


def modpo_loss(*, implicit_margins: Tensor, other_margins: Tensor, weight: Tensor | float) -> Tensor:
    """DPO on one objective's labels with the other objectives' rewards as a margin.

    ``-log sigmoid((implicit_margin - sum_{j != k} lambda_j * margin_j) / lambda_k)``

    Args:
        implicit_margins: margins of pairs labelled for objective k, [B].
        other_margins: ``sum_{j != k} lambda_j * (r_j(y_w) - r_j(y_l))``, weights already applied, [B].
        weight: lambda_k of the objective each pair is labelled for, scalar or [B], > 0.

    Returns:
        Loss of each pair in nats, [B].

    Raises:
        ValueError: a weight that is not positive; it is looked at on the host alone.

    Source: the margin loss of arXiv:2310.03708 (MODPO).
    """
    weights = torch.as_tensor(weight)
    if weights.device.type == "cpu" and not bool((weights > 0).all()):  # a GPU would have to be waited for
        raise ValueError(
            f"modpo_loss: objective weights must be > 0, got {weight}; drop pairs of unused objectives"
        )
    return -F.logsigmoid((implicit_margins - other_margins) / weight)


def edpo_member_losses(
    *, implicit_margins: Tensor, member_targets: Tensor, pair_weights: Tensor | None = None
) -> Tensor:
    """Mean squared distillation loss of a batch against every ensemble member.

    ``L[k, m] = mean_i w[i] (target[k, m, i] - implicit[i])**2``

    e-DPO takes its minimum over members for the EFFECTIVE batch, so average these over all micro-batches and
    processes (weighted by their sizes) before `edpo_select`.

    Args:
        implicit_margins: [B].
        member_targets: target margins of every member, [K, M, B].
        pair_weights: w of each pair, [B]; None: 1.

    Returns:
        [K, M].

    Raises:
        ValueError: shapes that do not fit.

    Source: e-DPO of arXiv:2405.19316.
    """
    if member_targets.ndim != 3 or member_targets.shape[-1] != implicit_margins.shape[0]:
        raise ValueError(
            f"edpo_member_losses: member_targets must be [K, M, {implicit_margins.shape[0]}], "
            f"got {list(member_targets.shape)}"
        )
    errors = (member_targets.to(implicit_margins.dtype) - implicit_margins).square()
    return (errors if pair_weights is None else errors * pair_weights.to(errors.dtype)).mean(dim=-1)


def edpo_select(member_losses: Tensor) -> Tensor:
    """Member of each objective that the policy is closest to: ``argmin_m L[k, m]``, LongTensor [K].

    Args:
        member_losses: effective-batch losses, [K, M].

    Source: e-DPO of arXiv:2405.19316.
    """
    return member_losses.argmin(dim=1)


def edpo_loss(
    *, implicit_margins: Tensor, member_targets: Tensor, selected: Tensor, weights: Tensor
) -> Tensor:
    """Squared distillation loss against the selected member of every objective.

    ``sum_k lambda_k * (target[k, selected_k, i] - implicit[i])**2``

    Args:
        implicit_margins: [B].
        member_targets: [K, M, B].
        selected: member of each objective from `edpo_select`, LongTensor [K].
        weights: objective weights lambda, [K].

    Returns:
        Loss of each pair, [B].

    Source: e-DPO of arXiv:2405.19316, summed over objectives.
    """
    rows = torch.arange(len(selected), device=selected.device)
    targets = member_targets[rows, selected].to(implicit_margins.dtype)
    errors = (targets - implicit_margins).square()
    return (weights.to(errors, non_blocking=True)[:, None] * errors).sum(dim=0)


# ------------------------------------------------------------------ how far targets are reached
_MOMENTS = ("implicit", "target", "implicit_squared", "target_squared", "product")


def margin_moments(implicit: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What `learning_measures` needs the means of, of each pair: implicit and target margins [B], their squares and product."""
    values = (implicit, target, implicit**2, target**2, implicit * target)
    return {f"moments/{name}": value for name, value in zip(_MOMENTS, values, strict=True)}


UNDER_TRAINED = 0.5
"""Ratio of held-out standard deviations below which a training is warned of: about a quarter of kl_target is reached there."""


def learning_measures(means: Mapping[str, float]) -> dict[str, float]:
    """How far implicit margins have come to their targets, in the place of the means of `margin_moments`.

        slope = cov(Delta_theta, Delta*) / var(Delta*)     sd_ratio = sd(Delta_theta) / sd(Delta*)
        explained = 1 - mean (Delta_theta - Delta*)^2 / mean Delta*^2

    For Gaussian margins the KL reached is about kl_target sd_ratio^2. All are 0 before training; slope and explained fall
    behind sd_ratio where margins move without going where they should.

    Args:
        means: of logged values, by name.

    Returns:
        The others, and `targets/slope`, `targets/sd_ratio`, `targets/explained` where targets vary.
    """
    kept = {name: value for name, value in means.items() if not name.startswith("moments/")}
    if len(kept) == len(means):
        return kept
    implicit, target, implicit_2, target_2, product = (means[f"moments/{name}"] for name in _MOMENTS)
    variance = target_2 - target**2
    if variance <= 1e-12 * target_2 or target_2 == 0:  # rounding of equal targets
        return kept
    return kept | {
        "targets/slope": (product - implicit * target) / variance,
        "targets/sd_ratio": math.sqrt(max(0.0, implicit_2 - implicit**2) / variance),
        "targets/explained": (2 * product - implicit_2) / target_2,
    }
