"""Scores of the reference samples and the units they define: reference standard deviations above the reference's mean.

What lives here: `ReferenceScores`, for judges and for ensemble members alike. What does not: where scores come from
(`judges`, `rewards.reward_model`), what is made of them (`policy_metrics`, `proxies`, to be read next).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prmd.pessimism.calibration import calibrate, fit_calibration, prompt_means


@dataclass(frozen=True)
class ReferenceScores:
    """Raw scores of the reference samples by every judge, and the units they define.

    Attributes:
        raw: [K, X, m] in the order of `objectives`.
        scale: within-prompt standard deviation per judge, [K].
        offset: mean per judge and prompt, [K, X].
    """

    objectives: tuple[str, ...]
    raw: np.ndarray
    scale: np.ndarray
    offset: np.ndarray

    @classmethod
    def fit(cls, objectives: Sequence[str], raw: np.ndarray) -> "ReferenceScores":
        """Scale and per-prompt offset of every judge from the reference samples, by `calibration`.

        Raises:
            ValueError: a judge gives all samples of every prompt the same score.
        """
        prompts, samples = raw.shape[1:]
        index = torch.arange(prompts).repeat_interleave(samples)
        flat = [torch.from_numpy(np.ascontiguousarray(r)).reshape(-1, 1) for r in raw]
        scale = np.array([float(fit_calibration(r, index).scale) for r in flat])
        offset = np.stack([prompt_means(r, index, prompts)[:, 0].numpy() for r in flat])
        return cls(tuple(objectives), raw, scale, offset)

    def calibrated(self, raw: np.ndarray) -> np.ndarray:
        """Raw scores [K, X, n] of any method in reference standard deviations above the reference's mean."""
        parts = [
            calibrate(
                torch.from_numpy(np.ascontiguousarray(raw[k]))[..., None],
                scale=torch.tensor([self.scale[k]]),
                offset=torch.from_numpy(self.offset[k])[:, None, None],
            )
            for k in range(len(raw))
        ]
        return torch.stack(parts)[..., 0].numpy()

    def centred(self, raw: np.ndarray, *, is_reference: bool) -> np.ndarray:
        """Scores of which a minimum may be taken: each sample centred on all reference samples but one.

        A reference sample is part of the mean it would be centred on, which shrinks its deviations by sqrt((m - 1)/m)
        where those of a policy grow by sqrt((m + 1)/m); the minimum would then rank a policy equal to the reference
        below it. Leaving out the sample itself (the reference), or each one in turn (policies), gives equal policies
        equal values. Means are unchanged by this.

        Args:
            raw: scores of the method, [K, X, n].

        Returns:
            [K, X, m] of the reference; [K, X, n*m] of a policy, every sample once per sample left out.
        """
        m = self.raw.shape[2]
        offsets = (self.raw.sum(axis=2, keepdims=True) - self.raw) / (m - 1)
        scale = self.scale[:, None, None]
        if is_reference:
            return (self.raw - offsets) / scale
        centred = (raw[:, :, :, None] - offsets[:, :, None, :]) / scale[..., None]
        return centred.reshape(*raw.shape[:2], -1)

    def mean_of_min(self, raw: np.ndarray, *, is_reference: bool) -> np.ndarray:
        """E[min_k r~_k] per prompt, [X], of scores [K, X, n], centred as `centred` says."""
        return self.centred(raw, is_reference=is_reference).min(axis=0).mean(axis=1)
