"""Calibration: bring rewards of different models to one unit.

Here: the within-prompt scale and the offset that make rewards comparable, and the reward scale that meets a KL
budget. Not here: reading and writing calibration files (`rewards/reward_model.py`), how good a reward model's
margins are (`statistics/reliability.py`), pessimism over calibrated rewards (`aggregation.py`, to be read next).

Bradley-Terry fixes a reward only up to a positive factor and a constant per prompt. A minimum over two raw rewards
therefore follows whichever has the lower offset or the larger scale; calibrated rewards are
``(r - b(x)) / s`` and know neither.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Scale and global offset of each ensemble member.

    Attributes:
        scale: within-prompt standard deviation s of each member, float64 [M].
        offset: mean reward b of each member over all responses, float64 [M].
        n_prompts: prompts it was fitted on.
        n_responses: responses it was fitted on.
    """

    scale: Tensor
    offset: Tensor
    n_prompts: int
    n_responses: int

    def to_json(self) -> dict[str, object]:
        """The fields as plain lists and numbers; `from_json` reads them back exactly."""
        return {
            "scale": self.scale.tolist(),
            "offset": self.offset.tolist(),
            "n_prompts": self.n_prompts,
            "n_responses": self.n_responses,
        }

    def repeated(self, members: int) -> "Calibration":
        """That of one member as that of `members` equal ones."""
        return replace(self, scale=self.scale.expand(members), offset=self.offset.expand(members))

    @classmethod
    def from_json(cls, fields: dict[str, object]) -> "Calibration":
        """Rebuild a calibration from the dictionary `to_json` made."""
        scale = torch.tensor(fields["scale"], dtype=torch.float64)
        offset = torch.tensor(fields["offset"], dtype=torch.float64)
        return cls(scale, offset, int(fields["n_prompts"]), int(fields["n_responses"]))


def _check_rewards(rewards: Tensor, prompt_index: Tensor, caller: str) -> None:
    if rewards.ndim != 2 or len(rewards) != len(prompt_index) or len(rewards) == 0:
        raise ValueError(
            f"{caller}: rewards must be [R, M] with one prompt_index each, "
            f"got {list(rewards.shape)} and {list(prompt_index.shape)}"
        )
    if not bool(torch.isfinite(rewards).all()):
        row = int((~torch.isfinite(rewards)).any(dim=1).nonzero()[0])
        raise ValueError(f"{caller}: the reward of response {row} is not finite; score it again")


def _group_sums(values: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    sums = torch.zeros(n_groups, *values.shape[1:], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, groups, values.double())


def _squared_deviations(rewards: Tensor, prompt_index: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squared deviations from the prompt's mean [X, M] and number of responses [X] of each prompt seen."""
    prompts, groups, counts = torch.unique(prompt_index, return_inverse=True, return_counts=True)
    means = _group_sums(rewards, groups, len(prompts)) / counts[:, None]
    deviations = rewards.double() - means[groups]
    return _group_sums(deviations.square(), groups, len(prompts)), counts


def within_prompt_scale(rewards: Tensor, prompt_index: Tensor) -> Tensor:
    """Within-prompt standard deviation of each member, unbiased and pooled over prompts.

    ``s**2 = sum_x sum_j (r_xj - mean_j r_x.)**2 / sum_x (n_x - 1)``

    Args:
        rewards: raw rewards of R responses by M members, [R, M].
        prompt_index: prompt of each response, LongTensor [R]; any integers.

    Returns:
        float64 [M], > 0.

    Raises:
        ValueError: every prompt has one response, a member gives all responses of a prompt the same reward, or a
            reward is not finite.

    Source: pooled within-group variance; the reason is the invariance of Eq. 2 of arXiv:2305.18290.
    """
    _check_rewards(rewards, prompt_index, "within_prompt_scale")
    deviations, counts = _squared_deviations(rewards, prompt_index)
    degrees = int((counts - 1).sum())
    if degrees == 0:
        raise ValueError(
            f"within_prompt_scale: all {len(counts)} prompts have one response; give at least two for some prompt"
        )
    scale = (deviations.sum(dim=0) / degrees).sqrt()
    flat = scale <= 1e-12 * rewards.double().abs().amax(dim=0).clamp_min(1e-30)
    if bool(flat.any()):
        raise ValueError(
            f"within_prompt_scale: member {int(flat.nonzero()[0])} gives all responses of a prompt the same reward; "
            "its head is untrained or its inputs are truncated to the prompt"
        )
    return scale


def fit_calibration(rewards: Tensor, prompt_index: Tensor) -> Calibration:
    """Fit the within-prompt scale and the global offset of each member.

    Args:
        rewards: raw rewards, [R, M].
        prompt_index: prompt of each response, LongTensor [R].

    Returns:
        A `Calibration`; for per-prompt centring replace its offset by `prompt_means`.

    Raises:
        ValueError: as `within_prompt_scale`.
    """
    scale = within_prompt_scale(rewards, prompt_index)
    n_prompts = len(torch.unique(prompt_index))
    return Calibration(scale, rewards.double().mean(dim=0), n_prompts, len(rewards))


def prompt_means(rewards: Tensor, prompt_index: Tensor, n_prompts: int) -> Tensor:
    """Mean reward of each prompt's responses, the per-prompt offset b(x).

    Args:
        rewards: raw rewards, [R, M].
        prompt_index: prompt of each response, LongTensor [R], values in [0, n_prompts).
        n_prompts: number of prompts X.

    Returns:
        float64 [X, M].

    Raises:
        ValueError: a prompt without responses (per-prompt and global centring are never mixed in one run).
    """
    _check_rewards(rewards, prompt_index, "prompt_means")
    counts = torch.bincount(prompt_index, minlength=n_prompts)
    if len(counts) > n_prompts or bool((counts == 0).any()):
        empty = int((counts == 0).sum())
        raise ValueError(
            f"prompt_means: {empty} of {n_prompts} prompts have no response (highest index {int(prompt_index.max())}); "
            "sample every prompt or use the global offset for all"
        )
    return _group_sums(rewards, prompt_index, n_prompts) / counts[:, None]


def calibrate(rewards: Tensor, *, scale: Tensor, offset: Tensor) -> Tensor:
    """Rewards in calibrated units, ``(r - offset) / scale``.

    Args:
        rewards: raw rewards with the members last, [..., M].
        scale: within-prompt standard deviation, [M], > 0.
        offset: [M], or anything that broadcasts against `rewards`, such as per-prompt offsets [X, 1, M] for
            rewards [X, n, M].

    Returns:
        float64 [..., M]: the division is done in float64 so that an affine change of a member's rewards changes
        nothing downstream beyond 1e-9.

    Raises:
        ValueError: member counts differ, or a scale is not positive.
    """
    if scale.shape != rewards.shape[-1:] or offset.shape[-1] != rewards.shape[-1]:
        raise ValueError(
            f"calibrate: rewards have {rewards.shape[-1]} members, the calibration {list(scale.shape)} scales and "
            f"{list(offset.shape)} offsets; it belongs to another ensemble"
        )
    if not bool((scale > 0).all()):
        raise ValueError("calibrate: every scale must be > 0; fit the calibration again")
    return (rewards.double() - offset.double()) / scale.double()


def within_prompt_variance(robust: Tensor, prompt_index: Tensor) -> float:
    """Mean over prompts of the variance of R within each, divisor n_x - 1.

    Variance between prompts moves no policy and would only shrink the scale that `scale_of_variance` makes of this.

    Args:
        robust: robust rewards of R responses, [R].
        prompt_index: prompt of each response, LongTensor [R]; prompts with one response are left out.

    Raises:
        ValueError: no prompt with two responses, or rewards that are not finite.
    """
    _check_rewards(robust[:, None], prompt_index, "within_prompt_variance")
    deviations, counts = _squared_deviations(robust[:, None], prompt_index)
    several = counts > 1
    if not bool(several.any()):
        raise ValueError(
            "within_prompt_variance: no prompt has two responses; set reward_scale to a number instead"
        )
    return float((deviations[several, 0] / (counts[several] - 1)).mean())


def can_cross_fit(n_samples: int) -> bool:
    """Whether n samples of a prompt make two halves that each have a variance."""
    return n_samples >= 4 and n_samples % 2 == 0


def cross_fitted_variance(reward: Callable[[Tensor], Tensor], rewards: Tensor) -> float:
    """Within-prompt variance of R where the offset b(x) is the mean of the prompt's own samples.

    A sample centred on a mean that contains it is pulled to zero, member by member, so that a minimum of such samples
    varies less than one of the responses that are trained on, which the mean does not contain: at four samples a prompt
    the scale made of it aims at 5.0 nats for 4. Here each half of the samples is centred on the mean of the other one, R is
    formed, and the variances within both halves are averaged.

    Args:
        reward: rewards of all members [K, M, ...] -> R [...].
        rewards: calibrated, [K, M, X, n], on any offset per prompt; n as `can_cross_fit` wants it.

    Raises:
        ValueError: another n, or rewards that are not finite.
    """
    n = rewards.shape[-1]
    if not can_cross_fit(n) or not bool(torch.isfinite(rewards).all()):
        raise ValueError(
            f"cross_fitted_variance: needs finite rewards of an even number of at least 4 samples, got {n}"
        )
    first, second = rewards.double().split(n // 2, dim=-1)
    halves = [reward(a - b.mean(dim=-1, keepdim=True)) for a, b in ((first, second), (second, first))]
    return float(torch.stack([half.var(dim=-1).mean() for half in halves]).mean())


def scale_of_variance(variance: float, *, beta: float, kl_target: float) -> float:
    """Reward scale that aims at `kl_target` nats where R varies so much within a prompt.

    For Gaussian rewards the optimum ``pi_ref * exp(scale * R / beta)`` has ``KL = (scale * sigma)**2 / (2 beta**2)``,
    hence ``scale = beta * sqrt(2 * kl_target) / sigma``.

    Args:
        variance: sigma**2, from `within_prompt_variance` or `cross_fitted_variance`.
        beta: > 0.
        kl_target: nats per response, > 0.

    Returns:
        The scale, > 0.

    Raises:
        ValueError: beta or kl_target not positive, or no variance.

    Source: the exponential tilt of a Gaussian; the optimum is Eq. 4 of arXiv:2305.18290.
    """
    if not beta > 0 or not kl_target > 0:
        raise ValueError(f"scale_of_variance: beta and kl_target must be > 0, got {beta} and {kl_target}")
    if not variance > 0:
        raise ValueError("scale_of_variance: robust rewards are the same for all responses of every prompt")
    return beta * math.sqrt(2.0 * kl_target / variance)
