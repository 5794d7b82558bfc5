"""What a trained backbone still needs to be a reward model: its heads, its measures, its calibration.

Each is one scoring pass over pairs or reference samples, cached by content. Training the backbone is in `backbone`.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.config.shared import RewardModelConfig
from prmd.errors import DataError
from prmd.inference.reference import calibration_sampling, reference_samples
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import PrefixRow, TokenizedPairs, tokenize_pairs, tokenize_prompt
from prmd.pairs import PreferencePair, hash_share, read_pairs
from prmd.pessimism.calibration import fit_calibration, prompt_means
from prmd.report import reward_figures
from prmd.rewards.brought import BroughtReward, TextRow
from prmd.rewards.debias import Debiasing, scan_features, scan_notes
from prmd.rewards.heads import fit_ensemble
from prmd.rewards.metrics import (
    HeldOut,
    debias_notes,
    extreme_examples,
    readable_examples,
    reward_metrics,
    warnings,
)
from prmd.rewards.reward_model import ENSEMBLE_FILE, RewardModel, Scorer, rows_of_samples, write_calibration
from prmd.rewards.task import RewardPairs, RewardTask, tokenize_reward_pairs
from prmd.runtime import is_main_process
from prmd.statistics.reliability import mean_pairwise_correlation
from prmd.training.trainer import PAIR_WEIGHT, weight_column

logger = logging.getLogger(__name__)

Model = TypeVar("Model", RewardModel, BroughtReward)


def _pair_features(
    reward_model: RewardModel, tokenized: TokenizedPairs, description: str
) -> tuple[Tensor, Tensor]:
    """(r_0 [n, 2], features [n, 2, d]) of tokenised pairs."""
    values = torch.stack(reward_model.features(tokenized.rows, description=description))
    return values[..., 0], values[..., 1:]


def _member_rewards(
    reward_model: RewardModel, tokenized: TokenizedPairs, base: Tensor, features: Tensor
) -> Tensor:
    """Rewards of every member [n, 2, M]: of heads from the features, of adapters by a pass of their own, else r_0."""
    if reward_model.ensemble:
        found = reward_model.ensemble.rewards(features.flatten(0, 1), base.flatten())
        return found.reshape(*base.shape, -1)
    if reward_model.adapters:
        return torch.stack(reward_model.rewards(tokenized.rows, description="test pairs, members")).float()
    return base[..., None]


def fit_heads(
    task: RewardTask,
    pairs: Sequence[PreferencePair],
    reward_model: RewardModel,
    debiasing: Debiasing | None = None,
) -> None:
    """Fit the ensemble on pairs the backbone never saw and save it beside the backbone."""
    tokenized = tokenize_reward_pairs(task, pairs, reward_model.tokenizer)
    base, features = _pair_features(reward_model, tokenized, f"{task.objective}: features for the ensemble")
    ensemble = fit_ensemble(
        chosen_features=features[:, 0],
        rejected_features=features[:, 1],
        chosen_rewards=base[:, 0],
        rejected_rewards=base[:, 1],
        pair_ids=[pair.id for pair in tokenized.pairs],
        config=task.config.ensemble,
        seed=task.config.seed,
        offsets=debiasing.of_members(tokenized.pairs) if debiasing else None,
        pair_weights=weight_column(tokenized.pairs).get(PAIR_WEIGHT),
    )
    if is_main_process():
        ensemble.save(reward_model.directory / ENSEMBLE_FILE)


def _test_rewards(reward_model: Scorer, tokenized: TokenizedPairs, description: str) -> tuple[Tensor, Tensor]:
    """(r_0 [n, 2], rewards of every member [n, 2, M]) of test pairs; what is brought has one member, itself."""
    if isinstance(reward_model, BroughtReward):
        rows = reward_model.rows_of_pairs(tokenized.pairs)
        members = torch.stack(reward_model.rewards(rows, description=description))
        return members[..., 0], members
    base, features = _pair_features(reward_model, tokenized, description)
    return base, _member_rewards(reward_model, tokenized, base, features)


def measure(
    task: RewardTask,
    data: RewardPairs,
    reward_model: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    facts: dict[str, Any],
    debiasing: Debiasing | None = None,
) -> dict[str, Any]:
    """Metrics on the test split; written with figures and examples to `outputs/reward_analysis` for a reward model.

    Args:
        tokenizer: in whose tokens responses are measured.
    """
    tokenized = tokenize_reward_pairs(task, data.test, tokenizer)
    base, members = _test_rewards(reward_model, tokenized, f"{task.objective}: test pairs")
    scale = reward_model.calibration.scale if reward_model.calibration else None
    bias = debiasing.held_out(tokenized.pairs, tokenizer) if debiasing else None
    held_out = HeldOut(tokenized.pairs, tokenized.rows, base, members, scale, bias)
    metrics = {
        "objective": task.objective,
        "approach": task.config.paths.approach,
        **reward_metrics(held_out),
        **facts,
        "feature_scan": scan_features(data.train, tokenizer),
    }
    accuracy = metrics["accuracy"]
    logger.info(
        "%s: held-out accuracy %.3f [%.3f, %.3f] on %d pairs, longer-is-better baseline %.3f",
        *(task.name, accuracy["value"], accuracy["low"], accuracy["high"], accuracy["n"]),
        metrics["length_only_accuracy"]["value"],
    )
    if task.split == "train" and is_main_process():
        for note in warnings(metrics, task.objective):
            logger.warning("%s", note)
        for note in debias_notes(metrics, task.objective):
            logger.info("%s", note)
        for note in scan_notes(
            metrics["feature_scan"], task.objective, task.config.debias.of(task.objective)
        ):
            logger.warning("%s", note)
        folder, examples = task.config.paths.reward_analysis, extreme_examples(held_out)
        analysis = io.write_json(folder / f"{task.objective}.json", metrics | examples)
        io.write_text(folder / f"{task.objective}_examples.txt", readable_examples(task.objective, examples))
        reward_figures.plot_reward_model(analysis)
    return metrics


def calibrate_reward_model(task: RewardTask, reward_model: Model) -> tuple[Model, float | None]:
    """Fit s and the global b on validation prompts of all objectives and store them with the model.

    Returns:
        The calibrated model; mean correlation of its members' rewards within prompts on reference samples, None without
        those.

    Raises:
        DataError: a member's rewards do not vary within any prompt.
    """
    calibration = task.config.calibration
    rows = _calibration_rows(task.config, reward_model)
    rewards = torch.cat(found := reward_model.rewards(rows, description="calibration"))
    index = torch.tensor([i for i, values in enumerate(found) for _ in values])
    try:
        fitted = fit_calibration(rewards, index)
    except ValueError as error:
        remedy = "raise training.learning_rate or give more pairs, and train it again with --force"
        if isinstance(reward_model, BroughtReward):
            remedy = "bring rewards that tell responses to one prompt apart"
        raise DataError(
            f"{task.name}: its rewards of {len(rewards)} {calibration.source.replace('_', ' ')} of {len(found)} prompts give no "
            f"scale ({error}); {remedy}"
        ) from error
    if is_main_process():
        write_calibration(reward_model, fitted, source=calibration.source)
    correlation = None
    if calibration.source == "reference_samples" and rewards.shape[1] > 1:
        centred = rewards - prompt_means(rewards, index, len(found))[index]
        correlation = mean_pairwise_correlation(centred.T)
    return replace(reward_model, calibration=fitted), correlation


def _calibration_rows(config: RewardModelConfig, reward_model: Scorer) -> Sequence[PrefixRow | TextRow]:
    """The responses that calibrate a reward model, one row for each validation prompt, of every objective as many."""
    calibration, paths = config.calibration, config.paths
    per_objective = -(-calibration.prompts // len(paths.objectives))
    pairs = [
        pair
        for objective in paths.objectives
        for pair in sorted(
            read_pairs(paths, objective, "val"), key=lambda p: hash_share("calibration", p.id)
        )[:per_objective]
    ]
    training = config.training
    if calibration.source == "validation_responses":
        if isinstance(reward_model, BroughtReward):
            return reward_model.rows_of_pairs(pairs)
        return tokenize_pairs(
            pairs,
            reward_model.tokenizer,
            max_length=training.max_length,
            over_length=training.over_length,
            keep_suffix=True,
        ).rows
    base = load_tokenizer(config.model, paths)
    prompts = [tokenize_prompt(base, pair.prompt, max_length=training.max_length) for pair in pairs]
    reward_model.release()  # the reference is loaded to be sampled from
    samples = reference_samples(calibration_sampling(config), base, prompts)
    if isinstance(reward_model, BroughtReward):
        return reward_model.rows_of_samples([pair.prompt for pair in pairs], samples)
    return rows_of_samples(reward_model, prompts, samples)
