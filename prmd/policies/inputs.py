"""What each policy's training is fed: rows, columns and stream, from the frozen numbers that all methods share.

`prepare` reads, samples and scores once for all methods; `method_inputs` makes one method's targets of it, adds its pairs
of reference samples and what its loss reads; `policy_fingerprints` are the keys of it all. No policy is loaded here; the trainings are in `train`.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths, reward_model_command
from prmd.artifacts.runs import require_artifact
from prmd.config.loading import as_dict
from prmd.config.policy import PolicyConfig
from prmd.errors import ConfigError
from prmd.inference.reference import reference_key, reference_logps, with_sample_count
from prmd.models.tokenization import PrefixRow, say_one_prompt
from prmd.policies.methods import (
    BASELINE,
    method_of,
    reference_sample_count,
    reward_keys,
    settings_keys,
    uses_gamma,
)
from prmd.policies.notes import label_notes
from prmd.policies.pairs import (
    PairScores,
    PairTokens,
    PolicyPairs,
    ReferenceSamples,
    ScaleResponses,
    Split,
    binding_repeats,
    describe_draws,
    draws_line,
    held_out_pairs,
    pooled_pairs,
    split_sizes,
    training_mixture,
)
from prmd.policies.robust_reward import RobustReward, solve_reward
from prmd.policies.sample_pairs import (
    added_pairs,
    draw_sample_pairs,
    merge_streams,
    sides_by_reward,
    with_gamma_samples,
    with_sample_pairs,
)
from prmd.policies.scores import (
    SampledPrompts,
    centers_by_prompt,
    pair_responses,
    sample_prompts,
    score_as_policy,
    score_pairs,
    score_samples,
)
from prmd.policies.targets import Targets, clipping_warning, method_targets, refuse_signs
from prmd.rewards.debias import DEBIAS_FILE, FittedBias, read_bias
from prmd.rewards.reward_model import Scorer
from prmd.training.fingerprints import calibration_keys, training_keys
from prmd.training.trainer import PairData, weight_column

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything frozen that methods on the same pairs share.

    `scores` and `scale` are None when no reward model is needed, `samples` when no method trains on reference samples;
    `ref_logps` are [n, 2] of training and held-out pairs, `draws` from `pairs.describe_draws`, `offsets` [n] what features that
    are held to be a bias predict of their labels, and `debiased` says of which objectives' reward models these were named.
    """

    pairs: PolicyPairs
    held_out: PolicyPairs
    ref_logps: tuple[Tensor, ...]
    scores: tuple[PairScores, PairScores] | None = None
    scale: ScaleResponses | None = None
    samples: ReferenceSamples | None = None
    offsets: tuple[Tensor, ...] = ()
    debiased: Mapping[str, list[str]] = field(default_factory=dict)
    draws: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodInputs:
    """One method's training.

    Attributes:
        stream: indices into `train` over all epochs.
        targets: None for methods that learn from the labels alone.
        debiased: `debiased` with the features by objective where what it learns from was debiased; else empty.
    """

    train: PairData
    held_out: PairData
    stream: Sequence[int]
    targets: Targets | None = None
    notes: tuple[str, ...] = field(default=())
    debiased: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Trained:
    """What a method is trained on before its loss is known.

    Attributes:
        rows: (chosen, rejected) of the labelled pairs, and behind them the pairs of reference samples.
        prompts: index into the labelled pairs of each row's prompt.
        ref_logps: [n, 2].
        stream: indices into `rows`.
        targets: None for methods that read no rewards.
    """

    rows: Sequence[PrefixRow]
    prompts: Sequence[int]
    ref_logps: Tensor
    stream: Sequence[int]
    targets: Targets | None = None


def prepare(
    config: PolicyConfig,
    methods: Sequence[str],
    models: Sequence[Scorer],
    tokens: PairTokens,
    splits: Mapping[str, Split],
) -> Prepared:
    """Read, sample and score what these methods need, which all are trained on pairs of the same objectives.

    Args:
        models: the reward models of all objectives; not read where no method reads rewards.
        splits: from `pairs.read_splits`.
    """
    shared, objective = config.shared, method_of(methods[0]).objective
    mixture = training_mixture(config, splits["train"], objective)
    pairs = pooled_pairs(splits["train"], mixture, tokens)
    draws = describe_draws(split_sizes(splits["train"]), mixture)
    logger.info("policies: %s", draws_line(draws))
    watched = held_out_pairs(splits["val"], mixture, tokens, len(pairs.tokenized.rows))
    held_out = PolicyPairs(watched, list(range(len(watched.rows))))
    tokenized = pairs.tokenized
    logger.info(
        "policies: %d distinct pairs of %s (an epoch draws %d by weight, some again), %d dropped and %d with a shortened prompt",
        *(len(tokenized.rows), objective or config.paths.approach, mixture.total),
        *(tokenized.dropped, tokenized.truncated),
    )
    say_one_prompt(tokenized.rows, "policies")
    biases = named_biases(methods, shared.paths)
    debiased = {objective: list(bias.names) for objective, bias in biases.items()}
    offsets = ()
    if any(_is_debiased_dpo(method) for method in methods):
        offsets = tuple(_label_offsets(side, biases, tokens) for side in (pairs, held_out))
    named: dict[str, Any] = {"offsets": offsets, "debiased": debiased, "draws": draws}
    if not any(method_of(method).reads_rewards for method in methods):
        sides = (pairs, held_out) if any(method != BASELINE for method in methods) else ()
        logps = [reference_logps(shared, tokens.tokenizer, side.tokenized.rows) for side in sides]
        return Prepared(pairs, held_out, tuple(torch.stack(values) for values in logps), **named)
    gamma = any(uses_gamma(config.policy, method) for method in methods)
    trained_on = bool(config.pairs.reference_samples) or gamma
    return replace(_scored(config, pairs, held_out, models, tokens, trained_on=trained_on), **named)


def _is_debiased_dpo(method: str) -> bool:
    return method_of(method).loss == "dpo_debiased"


def named_biases(methods: Sequence[str], paths: ArtifactPaths) -> dict[str, FittedBias]:
    """What debiased the reward models that these methods read, by objective; empty where they read none.

    Raises:
        DataError: a method takes from the labels what was fitted with the reward models, and one of these is missing.
        ConfigError: no feature was named for any of them.
    """
    taken_out = [method for method in methods if _is_debiased_dpo(method)]
    if not taken_out and not any(method_of(method).reads_rewards for method in methods):
        return {}
    for objective in paths.objectives if taken_out else ():
        command = reward_model_command(objective)
        what = f"the {objective} reward model"
        require_artifact(paths.reward_model(objective), what=what, command=command, read=(DEBIAS_FILE,))
    found = {objective: read_bias(paths.reward_model(objective)) for objective in paths.objectives}
    named = {objective: bias for objective, bias in found.items() if bias}
    if taken_out and not named:
        raise ConfigError(
            f"policy.methods: {taken_out[0]} takes out of the labels what debias.features predict, and no reward model below "
            f"{paths.reward_model(paths.objectives[0]).parent} was trained with any; name some, train them again, or leave it out"
        )
    return named


def _label_offsets(pairs: PolicyPairs, biases: Mapping[str, FittedBias], tokens: PairTokens) -> Tensor:
    """a of each pair by the bias of the objective it is labelled for, 0 where none was named, [n]."""
    offsets = torch.zeros(len(pairs.tokenized.pairs), dtype=torch.float64)
    for objective, bias in biases.items():
        own = [i for i, pair in enumerate(pairs.tokenized.pairs) if pair.objective == objective]
        labelled = [pairs.tokenized.pairs[i] for i in own]
        offsets[own] = torch.tensor(bias.offsets(labelled, tokens.tokenizer))
    return offsets


def _scored(
    config: PolicyConfig,
    pairs: PolicyPairs,
    held_out: PolicyPairs,
    models: Sequence[Scorer],
    tokens: PairTokens,
    *,
    trained_on: bool,
) -> Prepared:
    """The pairs with their rewards, and with reference samples where any are drawn.

    Args:
        trained_on: whether a method trains on them.
    """
    shared, sample_count = config.shared, reference_sample_count(config.pairs, config.shared.calibration)
    sampling, by_prompt = with_sample_count(shared, sample_count), centers_by_prompt(shared.calibration)
    parts = [pairs.tokenized, held_out.tokenized]

    def draw(part: int) -> SampledPrompts:
        messages = [pair.prompt for pair in parts[part].pairs]
        return sample_prompts(sampling, tokens.tokenizer, tokens.of_prompts(parts[part]), messages)

    centers = [draw(part) for part in range(len(parts))] if by_prompt else []
    train, val = score_pairs(shared, models, tokens, parts, samples=centers)
    logps = (train.ref_logps, val.ref_logps)
    if not sample_count:
        return Prepared(pairs, held_out, logps, (train, val), pair_responses(train))
    drawn = centers[0] if centers else draw(0)
    scale = score_samples(models, drawn, by_prompt=by_prompt, source="training prompts")
    samples = score_as_policy(shared, tokens.tokenizer, drawn) if trained_on else None
    return Prepared(pairs, held_out, logps, (train, val), scale, samples)


def method_inputs(config: PolicyConfig, method: str, prepared: Prepared) -> MethodInputs:
    """Rows, columns, targets and stream of one method.

    Raises:
        ConfigError: as `robust_reward.solve_reward` and `sample_pairs.draw_sample_pairs`.
    """
    held_rows, labelled = prepared.held_out.tokenized.rows, prepared.pairs.tokenized.rows
    trained, notes = _labelled(prepared), label_notes(config.policy, method)
    if method_of(method).reads_rewards:
        trained = _rewarded(config, method, prepared)
        notes = trained.targets.notes
    rows, targets = trained.rows, trained.targets
    columns = {
        "ref_logps": trained.ref_logps,
        "chosen_length": _chosen_lengths(rows, len(rows) - len(labelled)),
    }
    held = {"ref_logps": prepared.ref_logps[1], "chosen_length": _chosen_lengths(held_rows, 0)}
    if method_of(method).loss == "rdpo":
        columns["length_difference"] = _length_differences(rows)
        held["length_difference"] = _length_differences(held_rows)
    if _is_debiased_dpo(method):
        columns["offsets"], held["offsets"] = (values.float() for values in prepared.offsets)
    if targets is not None:
        train_targets, held_targets = targets.columns
        columns |= {name: values.float() for name, values in train_targets.items()}
        held |= {name: values.float() for name, values in held_targets.items()}
    columns |= weight_column(prepared.pairs.tokenized.pairs, added=len(rows) - len(labelled))
    if uses_gamma(config.policy, method):
        rows = with_gamma_samples(rows, trained.prompts, prepared.samples)
    ids = [pair.id for pair in prepared.pairs.tokenized.pairs]
    ids += [f"samples of {ids[i]}" for i in trained.prompts[len(ids) :]]
    train = PairData(rows, columns, ids)
    held_out = PairData(held_rows, held, [pair.id for pair in prepared.held_out.tokenized.pairs])
    learns = method_of(method).reads_rewards or _is_debiased_dpo(method)
    debiased = {"debiased": dict(prepared.debiased)} if learns and prepared.debiased else {}
    return MethodInputs(train, held_out, trained.stream, targets, tuple(notes), debiased)


def _labelled(prepared: Prepared) -> _Trained:
    rows, stream = prepared.pairs.tokenized.rows, prepared.pairs.stream
    return _Trained(rows, range(len(rows)), prepared.ref_logps[0], stream)


def _rewarded(config: PolicyConfig, method: str, prepared: Prepared) -> _Trained:
    """The labelled pairs and the added ones of samples with the targets of a method that reads rewards."""
    trained, (train, held_out) = _labelled(prepared), prepared.scores
    policy, reward = config.policy, None
    if method_of(method).reward is not None:
        reward = solve_reward(policy, method, prepared.scale)
        if config.pairs.reference_samples and config.pairs.share:
            trained, train = _with_samples(config, prepared, reward)
    targets = method_targets(
        policy, method, train=train, held_out=held_out, scale=prepared.scale, reward=reward
    )
    return replace(trained, targets=targets)


def _with_samples(
    config: PolicyConfig, prepared: Prepared, reward: RobustReward
) -> tuple[_Trained, PairScores]:
    """The labelled pairs with `pairs.share` of pairs of reference samples, and the scores of both."""
    labelled, scale, samples = _labelled(prepared), prepared.scale, prepared.samples
    count, seed = added_pairs(len(labelled.stream), config.pairs.share), config.shared.seed
    drawn = draw_sample_pairs(samples, count, max_length=config.training.max_length, seed=seed)
    added = range(len(labelled.rows), len(labelled.rows) + count)
    sides = sides_by_reward(drawn, reward(scale.by_prompt()))
    rows, scores = with_sample_pairs(
        labelled.rows, prepared.scores[0], drawn=drawn, sides=sides, samples=samples, scale=scale
    )
    prompts = [*labelled.prompts, *(pair.prompt for pair in drawn)]
    stream = merge_streams(labelled.stream, added, seed)
    return _Trained(rows, prompts, scores.ref_logps, stream), scores


def _length_differences(rows: Sequence[PrefixRow]) -> Tensor:
    """|y_w| - |y_l| in tokens, [n]."""
    return torch.tensor([float(len(row.responses[0]) - len(row.responses[1])) for row in rows])


def _chosen_lengths(rows: Sequence[PrefixRow], added: int) -> Tensor:
    """Tokens of each chosen response; infinite for the last `added` rows, whose likelihood nothing should raise."""
    lengths = [float(len(row.responses[0])) for row in rows[: len(rows) - added]]
    return torch.tensor(lengths + [math.inf] * added)


def say_inputs(method: str, inputs: MethodInputs) -> None:
    """Log what is to be known of a training before it starts.

    Raises:
        ConfigError: as `refuse_signs`.
    """
    for note in inputs.notes:
        logger.info("policy %s: %s", method, note)
    targets = inputs.targets
    if targets is not None and math.isfinite(targets.margin_clip):
        refuse_signs(method, targets)
        share, clip = 100 * targets.clipped_share, targets.margin_clip
        logger.info("policy %s: %.1f%% of its target margins are clipped, at %.3g nats", method, share, clip)
        if warning := clipping_warning(method, targets):
            logger.warning("policy %s", warning)


# ------------------------------------------------------------------ their keys
Keys = tuple[str, ...]
"""Today's fingerprint of a policy, and behind it those that earlier versions gave it."""


def policy_fingerprints(
    config: PolicyConfig,
    method: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    train: Split,
    models: Sequence[Scorer] = (),
) -> Keys:
    """Key of everything a finished policy depends on, and of nothing its method does not read; then that of earlier versions.

    Args:
        train: the training pairs of each objective.
        models: the reward models of all objectives; may be left out where the method reads no rewards.
    """
    shared, paths, rewarded = config.shared, config.paths, method_of(method).reads_rewards
    data = io.files_sha256([paths.split(k, split) for k in paths.objectives for split in ("train", "val")])
    if rewarded:
        every = reward_keys(config.policy, method, [model.fingerprint for model in models])
    else:  # what a method takes from the labels; of rewards it is in the weights
        every = [[bias.record for bias in named_biases([method], paths).values()]]
    seed, how = shared.seed, as_dict(config.tuning)
    base = reference_key(shared.model, paths, tokenizer)
    calibrations = calibration_keys(shared.calibration) if rewarded else (None, None)
    today, earlier = zip(training_keys(config.training), calibrations, strict=True)
    read, before = settings_keys(config.policy, config.pairs, method)
    mixture = training_mixture(config, train, method_of(method).objective)
    if repeats := binding_repeats(split_sizes(train), mixture):
        read, before = ({**values, "max_repeats": repeats} for values in (read, before))
    return tuple(
        io.fingerprint([method, settings, how, trained, seed, calibration, base, data, keys])
        for keys in every
        for settings, (trained, calibration) in ((read, today), (before, today), (before, earlier))
    )
