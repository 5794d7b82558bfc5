"""What policy training reads of its pairs: calibrated rewards of all members and reference log-probabilities.

Everything here is computed once for all methods, one model in memory at a time (reward models that are adapters of one
base take turns on it), and cached by content. Methods, beta, losses and scales are applied to these tensors in
`train` at no forward cost. Which pairs these are is in `pairs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prmd.artifacts.paths import reward_model_command
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.errors import DataError
from prmd.inference.generation import GeneratedResponse, sample_rows
from prmd.inference.reference import reference_logps, reference_samples
from prmd.models.tokenization import PrefixRow, TokenizedPairs, Tokens, tokenize_prompt, tokenize_row
from prmd.objectives import OBJECTIVES
from prmd.pairs import PreferencePair
from prmd.pessimism.aggregation import stack_objectives
from prmd.pessimism.calibration import calibrate, prompt_means
from prmd.policies.methods import reference_sample_count
from prmd.policies.pairs import PolicyPairs
from prmd.rewards.reward_model import RewardModel


@dataclass(frozen=True)
class PairScores:
    """Frozen numbers of n pairs; side 0 is chosen.

    Attributes:
        rewards: calibrated rewards, float64 [K, M, n, 2].
        ref_logps: log pi_ref, float32 [n, 2], nats.
        labelled_for: index of the objective each pair was labelled for, LongTensor [n], or None where none was.
    """

    rewards: Tensor
    ref_logps: Tensor
    labelled_for: Tensor | None = None


@dataclass(frozen=True)
class ScaleResponses:
    """Calibrated rewards of the responses that fix the reward scale: several responses to each of some prompts.

    Attributes:
        rewards: float64 [K, M, R].
        prompt_index: prompt of each response, [R].
        source: what the responses are.
        samples_per_prompt: n where they are n samples of pi_ref for each prompt in turn (R = X n), else 0.
    """

    rewards: Tensor
    prompt_index: Tensor
    source: str
    samples_per_prompt: int = 0

    def by_prompt(self) -> Tensor:
        """Rewards of reference samples by prompt, [K, M, X, n]."""
        return self.rewards.unflatten(2, (-1, self.samples_per_prompt))


@dataclass(frozen=True)
class ReferenceSamples:
    """Samples of pi_ref for the prompts of a list of pairs, as the policy reads them: n responses to each of X prompts.

    Attributes:
        rows: prompt and n responses.
        logps: log pi_ref of each, float32 [X, n], nats.
    """

    rows: list[PrefixRow]
    logps: Tensor


def score_pairs(
    config: PolicyConfig,
    models: Sequence[RewardModel],
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[TokenizedPairs],
) -> list[PairScores]:
    """Calibrated rewards of every member of every objective, and reference log-probabilities, of all pairs.

    Args:
        parts: training and held-out pairs, say; the weights of a reward model are loaded once for all of them.

    Returns:
        The scores of each part.
    """
    prompts = [_prompts(config, tokenizer, part) for part in parts]
    by_prompt = _centres_by_prompt(config)
    samples = [_samples(config, tokenizer, found) for found in prompts] if by_prompt else []
    calibrated: list[list[Tensor]] = [[] for _ in parts]
    for objective, model in zip(OBJECTIVES, models, strict=True):
        for i, part in enumerate(parts):
            own = (
                sample_rows(prompts[i], samples[i], model.tokenizer, keep_suffix=True) if by_prompt else None
            )
            calibrated[i].append(_calibrated_rewards(model, objective, part, own))
        model.release()
    _release_base(models)  # before the reference model is loaded
    return [
        PairScores(
            stack_objectives(rewards),
            torch.stack(reference_logps(config.shared, tokenizer, part.rows)),
            torch.tensor([OBJECTIVES.index(pair.objective) for pair in part.pairs]),
        )
        for rewards, part in zip(calibrated, parts, strict=True)
    ]


def _calibrated_rewards(
    model: RewardModel, objective: str, tokenized: TokenizedPairs, samples: Sequence[PrefixRow] | None
) -> Tensor:
    """Rewards [M, n, 2] of one objective.

    Args:
        samples: reference samples of each pair's prompt, whose mean is its offset; None: the stored global one.
    """
    rows = [_reward_row(model, pair) for pair in tokenized.pairs]
    raw = torch.stack(model.rewards(rows, description=f"rewards of the {objective} ensemble"))
    offset = model.calibration.offset if samples is None else _centres(model, samples, objective)[:, None, :]
    values = calibrate(raw, scale=model.calibration.scale, offset=offset)
    _refuse_missing(values, objective, tokenized)
    return values.permute(2, 0, 1)  # [n, 2, M] -> [M, n, 2]


def _release_base(models: Sequence[RewardModel]) -> None:
    if (base := models[0].shared_base) is not None:
        base.release()


def scale_responses(
    config: PolicyConfig,
    models: Sequence[RewardModel],
    tokenizer: PreTrainedTokenizerBase,
    pairs: PolicyPairs,
    scores: PairScores,
) -> ScaleResponses:
    """The responses whose within-prompt variance fixes `reward_scale: auto`.

    Samples of pi_ref where the configuration draws any; otherwise the two responses of each pair.
    """
    n = len(pairs.tokenized.rows)
    if not reference_sample_count(config):
        index = torch.arange(n).repeat_interleave(2)
        return ScaleResponses(scores.rewards.flatten(2), index, "the two responses of each training pair")
    prompts = _prompts(config, tokenizer, pairs.tokenized)
    samples = _samples(config, tokenizer, prompts)
    return score_samples(
        models, prompts, samples, by_prompt=_centres_by_prompt(config), source="training prompts"
    )


def score_samples(
    models: Sequence[RewardModel],
    prompts: Sequence[Tokens],
    samples: Sequence[Sequence[GeneratedResponse]],
    *,
    by_prompt: bool,
    source: str,
) -> ScaleResponses:
    """Calibrated rewards of reference samples by every member of every objective.

    Args:
        by_prompt: centre on each prompt's own mean instead of the stored global one.
        source: whose prompts these are.
    """
    n, calibrated = len(samples[0]), []
    for objective, model in zip(OBJECTIVES, models, strict=True):
        rows = sample_rows(prompts, samples, model.tokenizer, keep_suffix=True)
        raw = torch.stack(model.rewards(rows, description=f"{objective} rewards of reference samples"))
        offset = raw.mean(dim=1, keepdim=True) if by_prompt else model.calibration.offset
        values = calibrate(raw, scale=model.calibration.scale, offset=offset)
        calibrated.append(values.flatten(0, 1).T)
        model.release()
    _release_base(models)
    index = torch.arange(len(prompts)).repeat_interleave(n)
    return ScaleResponses(stack_objectives(calibrated), index, f"reference samples of the {source}", n)


def draw_reference_samples(
    config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, tokenized: TokenizedPairs
) -> ReferenceSamples:
    """The reference samples of the pairs' prompts, as the policy is trained on them."""
    prompts = _prompts(config, tokenizer, tokenized)
    samples = _samples(config, tokenizer, prompts)
    rows = sample_rows(prompts, samples, tokenizer, keep_suffix=False)
    return ReferenceSamples(rows, torch.stack(reference_logps(config.shared, tokenizer, rows)))


def sampling_config(config: PolicyConfig) -> RewardModelConfig:
    """The shared settings with the number of samples that stage 3 draws for each prompt."""
    values = {"samples_per_prompt": reference_sample_count(config)}
    calibration = config.shared.calibration.model_copy(update=values)
    return config.shared.model_copy(update={"calibration": calibration})


def _samples(
    config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Tokens]
) -> list[list[GeneratedResponse]]:
    return reference_samples(sampling_config(config), tokenizer, prompts)


def _centres_by_prompt(config: PolicyConfig) -> bool:
    """One centring for the whole run: each prompt's own where calibration has samples, else the stored global one."""
    return config.shared.calibration.source == "reference_samples"


def _refuse_missing(values: Tensor, objective: str, tokenized: TokenizedPairs) -> None:
    """Values: calibrated rewards [n, 2, M].

    Raises:
        DataError: a score is NaN or infinite.
    """
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        pair, _, member = (int(i) for i in bad[0])
        raise DataError(
            f"the {objective} ensemble gives {len(bad)} scores that are NaN or infinite, the first by member {member} for "
            f"pair {tokenized.pairs[pair].id}; train it again with `{reward_model_command(objective)} --force`"
        )


def _prompts(
    config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, tokenized: TokenizedPairs
) -> list[Tokens]:
    """Rendered prompts, as the policy continues them."""
    return [
        tokenize_prompt(tokenizer, pair.prompt, max_length=config.training.max_length)
        for pair in tokenized.pairs
    ]


def _reward_row(model: RewardModel, pair: PreferencePair) -> PrefixRow:
    return tokenize_row(model.tokenizer, pair.prompt, (pair.chosen, pair.rejected), keep_suffix=True)


def _centres(model: RewardModel, rows: Sequence[PrefixRow], objective: str) -> Tensor:
    """b(x) of every prompt from its samples: [n, M]."""
    values = model.rewards(rows, description=f"{objective} rewards of reference samples")
    index = torch.tensor([i for i, rewards in enumerate(values) for _ in rewards])
    return prompt_means(torch.cat(values), index, len(values))
