"""What policy training reads of its pairs: calibrated rewards of all members and reference log-probabilities.

Everything here is computed once for all methods, one model in memory at a time (reward models that are adapters of one
base take turns on it), and cached by content. Methods, beta, losses and scales are applied to these tensors in
`train` at no forward cost. Which pairs these are is in `pairs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prmd.config.shared import CalibrationConfig, SharedConfig
from prmd.inference.generation import GeneratedResponse, sample_rows
from prmd.inference.reference import reference_logps, reference_samples
from prmd.models.tokenization import TokenizedPairs, Tokens
from prmd.pairs import Message
from prmd.pessimism.aggregation import stack_objectives
from prmd.pessimism.calibration import calibrate, prompt_means
from prmd.policies.pairs import PairScores, PairTokens, ReferenceSamples, ScaleResponses
from prmd.rewards.brought import BroughtReward
from prmd.rewards.reward_model import Scorer, rows_of_samples


@dataclass(frozen=True)
class SampledPrompts:
    """Rendered prompts with the samples that pi_ref gave to each, and the messages that were rendered."""

    prompts: Sequence[Tokens]
    responses: Sequence[Sequence[GeneratedResponse]]
    messages: Sequence[Sequence[Message]]

    def rows_for_rewards(self, model: Scorer) -> Sequence[Any]:
        """Rows of a prompt and its samples as a reward model reads them, by their text."""
        if isinstance(model, BroughtReward):
            return model.rows_of_samples(self.messages, self.responses)
        return rows_of_samples(model, self.prompts, self.responses)


def sample_prompts(
    shared: SharedConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    messages: Sequence[Sequence[Message]],
) -> SampledPrompts:
    """Sample pi_ref, or read what was sampled before.

    Args:
        shared: its `calibration` says how many samples of each prompt (`with_sample_count`).
        messages: of each prompt.
    """
    return SampledPrompts(prompts, reference_samples(shared, tokenizer, prompts), messages)


def centers_by_prompt(calibration: CalibrationConfig) -> bool:
    """One centering for the whole run: each prompt's own where calibration has samples, else the stored global one."""
    return calibration.source == "reference_samples"


def score_pairs(
    shared: SharedConfig,
    models: Sequence[Scorer],
    tokens: PairTokens,
    parts: Sequence[TokenizedPairs],
    *,
    samples: Sequence[SampledPrompts] = (),
) -> list[PairScores]:
    """Calibrated rewards of every member of every objective, and reference log-probabilities, of all pairs.

    Args:
        parts: training and held-out pairs, say; the weights of a reward model are loaded once for all of them.
        samples: of the prompts of each part, on whose mean they are centered; none: on the stored global one.

    Returns:
        The scores of each part.
    """
    calibrated: list[list[Tensor]] = [[] for _ in parts]
    objectives = shared.paths.objectives
    for objective, model in zip(objectives, models, strict=True):
        for i, part in enumerate(parts):
            own = samples[i].rows_for_rewards(model) if samples else None
            brought = isinstance(model, BroughtReward)
            rows = model.rows_of_pairs(part.pairs) if brought else tokens.for_rewards(model.tokenizer, part)
            values = _calibrated_rewards(model, objective, rows, own)
            calibrated[i].append(values.permute(2, 0, 1))  # [n, 2, M] -> [M, n, 2]
        model.release()  # before the next one, or the reference model, is loaded
    return [
        PairScores(
            stack_objectives(rewards),
            torch.stack(reference_logps(shared, tokens.tokenizer, part.rows)),
            torch.tensor([objectives.index(pair.objective) for pair in part.pairs]),
        )
        for rewards, part in zip(calibrated, parts, strict=True)
    ]


def _calibrated_rewards(
    model: Scorer, objective: str, rows: Sequence[Any], samples: Sequence[Any] | None
) -> Tensor:
    """Rewards [n, 2, M] of one objective.

    Args:
        samples: reference samples of each pair's prompt, whose mean is its offset; None: the stored global one.
    """
    raw = torch.stack(model.rewards(rows, description=f"rewards of the {objective} ensemble"))
    offset = model.calibration.offset if samples is None else _centers(model, samples, objective)[:, None, :]
    return calibrate(raw, scale=model.calibration.scale, offset=offset)


def pair_responses(scores: PairScores) -> ScaleResponses:
    """The two responses of each pair, to fix the reward scale where no samples of pi_ref are drawn."""
    index = torch.arange(scores.rewards.shape[2]).repeat_interleave(2)
    return ScaleResponses(scores.rewards.flatten(2), index, "the two responses of each training pair")


def score_samples(
    models: Sequence[Scorer], sampled: SampledPrompts, *, by_prompt: bool, source: str
) -> ScaleResponses:
    """Calibrated rewards of reference samples by every member of every objective.

    Args:
        by_prompt: center on each prompt's own mean instead of the stored global one.
        source: whose prompts these are.
    """
    n, calibrated = len(sampled.responses[0]), []
    for model in models:
        rows = sampled.rows_for_rewards(model)
        raw = torch.stack(model.rewards(rows, description="rewards of reference samples"))
        offset = raw.mean(dim=1, keepdim=True) if by_prompt else model.calibration.offset
        values = calibrate(raw, scale=model.calibration.scale, offset=offset)
        calibrated.append(values.flatten(0, 1).T)
        model.release()
    index = torch.arange(len(sampled.prompts)).repeat_interleave(n)
    source = f"reference samples of the {source}"
    return ScaleResponses(stack_objectives(calibrated), index, source, n, centred=by_prompt)


def score_as_policy(
    shared: SharedConfig, tokenizer: PreTrainedTokenizerBase, sampled: SampledPrompts
) -> ReferenceSamples:
    """Reference samples as the policy is trained on them, by the tokens that were sampled."""
    rows = sample_rows(sampled.prompts, sampled.responses, tokenizer, keep_suffix=False)
    return ReferenceSamples(rows, torch.stack(reference_logps(shared, tokenizer, rows)))


def _centers(model: Scorer, rows: Sequence[Any], objective: str) -> Tensor:
    """b(x) of every prompt from its samples: [n, M]."""
    values = model.rewards(rows, description=f"{objective} rewards of reference samples")
    index = torch.tensor([i for i, rewards in enumerate(values) for _ in rewards])
    return prompt_means(torch.cat(values), index, len(values))
