"""What each policy's training is fed: rows, columns and stream, from the frozen numbers that all methods share.

`prepare` reads, samples and scores once for all methods; `method_inputs` makes one method's targets of it, adds its pairs
of reference samples and what its loss reads. No policy is loaded here; the trainings are in `train`.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prmd.config.policy import PolicyConfig
from prmd.inference.reference import reference_logps
from prmd.models.tokenization import PrefixRow
from prmd.policies.methods import BASELINE, POLICY_METHODS, uses_gamma
from prmd.policies.notes import label_notes
from prmd.policies.pairs import PolicyPairs, held_out_pairs, pooled_pairs
from prmd.policies.robust_reward import solve_reward
from prmd.policies.sample_pairs import (
    added_pairs,
    draw_sample_pairs,
    merge_streams,
    sides_by_reward,
    with_gamma_samples,
    with_sample_pairs,
)
from prmd.policies.scores import (
    PairScores,
    ReferenceSamples,
    ScaleResponses,
    draw_reference_samples,
    scale_responses,
    score_pairs,
)
from prmd.policies.targets import Targets, method_targets
from prmd.rewards.reward_model import RewardModel
from prmd.training.trainer import PairData

logger = logging.getLogger(__name__)

HELD_OUT = -1
"""Column `position` of pairs that are not trained on."""


@dataclass(frozen=True)
class Prepared:
    """Everything frozen that methods on the same pairs share.

    `scores` and `scale` are None when no reward model is needed, `samples` when no method trains on reference samples;
    `ref_logps` are [n, 2] of training and held-out pairs.
    """

    pairs: PolicyPairs
    held_out: PolicyPairs
    ref_logps: tuple[Tensor, ...]
    scores: tuple[PairScores, PairScores] | None = None
    scale: ScaleResponses | None = None
    samples: ReferenceSamples | None = None


@dataclass(frozen=True)
class MethodInputs:
    """One method's training.

    Attributes:
        base_rows: the rows of `train` without the samples of the gamma term.
        stream: indices into `train` over all epochs.
        targets: None for methods that learn from the labels alone.
    """

    train: PairData
    base_rows: Sequence[PrefixRow]
    held_out: PairData
    stream: Sequence[int]
    targets: Targets | None = None
    notes: tuple[str, ...] = field(default=())


def prepare(
    config: PolicyConfig,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[str],
    objective: str | None,
    models: Sequence[RewardModel],
) -> Prepared:
    """Read, sample and score what these methods need.

    Args:
        models: the reward models of all objectives; not read where no method reads rewards.
        objective: pool the pairs of this one alone; None: of all.
    """
    pairs = pooled_pairs(config, tokenizer, "train", None, objective=objective)
    watched = held_out_pairs(config, tokenizer, len(pairs.tokenized.rows), objective=objective)
    held_out = PolicyPairs(watched, list(range(len(watched.rows))))
    tokenized = pairs.tokenized
    logger.info(
        "policies: %d distinct pairs of %s, %d dropped and %d with a shortened prompt at max_length %d",
        *(len(tokenized.rows), objective or config.paths.approach, tokenized.dropped, tokenized.truncated),
        config.training.max_length,
    )
    if not any(POLICY_METHODS[method].reads_rewards for method in methods):
        sides = (pairs, held_out) if any(method != BASELINE for method in methods) else ()
        logps = [reference_logps(config.shared, tokenizer, side.tokenized.rows) for side in sides]
        return Prepared(pairs, held_out, tuple(torch.stack(values) for values in logps))
    train, val = score_pairs(config, models, tokenizer, [tokenized, held_out.tokenized])
    scale = scale_responses(config, models, tokenizer, pairs, train)
    wanted = config.pairs.reference_samples or any(uses_gamma(config, method) for method in methods)
    samples = draw_reference_samples(config, tokenizer, tokenized) if wanted else None
    return Prepared(pairs, held_out, (train.ref_logps, val.ref_logps), (train, val), scale, samples)


def method_inputs(config: PolicyConfig, method: str, prepared: Prepared) -> MethodInputs:
    """Rows, columns, targets and stream of one method.

    Raises:
        ConfigError: as `robust_reward.solve_reward` and `sample_pairs.draw_sample_pairs`.
    """
    rows, stream = prepared.pairs.tokenized.rows, prepared.pairs.stream
    held_rows, targets, notes = prepared.held_out.tokenized.rows, None, label_notes(config.policy, method)
    ref, prompts = prepared.ref_logps[0], list(range(len(rows)))
    if POLICY_METHODS[method].reads_rewards:
        rows, ref, prompts, stream, targets = _rewarded(config, method, prepared)
        notes = targets.notes
    added = len(rows) - len(prepared.pairs.tokenized.rows)
    columns = {"ref_logps": ref, "chosen_length": _chosen_lengths(rows, added)}
    held = {"ref_logps": prepared.ref_logps[1], "chosen_length": _chosen_lengths(held_rows, 0)}
    if targets is not None:
        train_targets, held_targets = targets.columns
        columns |= {name: values.float() for name, values in train_targets.items()}
        held |= {name: values.float() for name, values in held_targets.items()}
    base = list(rows)
    if uses_gamma(config, method):
        rows = with_gamma_samples(rows, prompts, prepared.samples)
    inputs = MethodInputs(
        PairData(rows, columns), base, PairData(held_rows, held), stream, targets, tuple(notes)
    )
    return _by_position(inputs) if POLICY_METHODS[method].loss == "edpo" else inputs


def _rewarded(
    config: PolicyConfig, method: str, prepared: Prepared
) -> tuple[Sequence[PrefixRow], Tensor, list[int], Sequence[int], Targets]:
    """Rows, their reference log-probabilities and prompts, the stream and the targets, with pairs of samples added."""
    policy, (train, held_out), scale = config.policy, prepared.scores, prepared.scale
    rows, stream = prepared.pairs.tokenized.rows, prepared.pairs.stream
    prompts, reward = list(range(len(rows))), None
    if POLICY_METHODS[method].reward is not None:
        reward = solve_reward(policy, method, scale)
        if config.pairs.reference_samples and config.pairs.share:
            count, seed = added_pairs(len(stream), config.pairs.share), config.shared.seed
            drawn = draw_sample_pairs(
                prepared.samples, count, max_length=config.training.max_length, seed=seed
            )
            stream = merge_streams(stream, range(len(rows), len(rows) + count), seed)
            sides = sides_by_reward(drawn, reward(scale.by_prompt()))
            rows, train = with_sample_pairs(
                rows, train, drawn=drawn, sides=sides, samples=prepared.samples, scale=scale
            )
            prompts += [pair.prompt for pair in drawn]
    targets = method_targets(policy, method, train=train, held_out=held_out, scale=scale, reward=reward)
    return rows, train.ref_logps, prompts, stream, targets


def _chosen_lengths(rows: Sequence[PrefixRow], added: int) -> Tensor:
    """Tokens of each chosen response; infinite for the last `added` rows, whose likelihood nothing should raise."""
    lengths = [float(len(row.responses[0])) for row in rows[: len(rows) - added]]
    return torch.tensor(lengths + [math.inf] * added)


def _by_position(inputs: MethodInputs) -> MethodInputs:
    """Every position of the stream a row of its own, so that a batch says which optimiser step it belongs to."""
    index = torch.tensor(list(inputs.stream))
    columns = {name: values[index] for name, values in inputs.train.columns.items()}
    columns["position"] = torch.arange(len(index))
    held = {**inputs.held_out.columns, "position": torch.full((len(inputs.held_out.rows),), HELD_OUT)}
    return MethodInputs(
        PairData([inputs.train.rows[i] for i in inputs.stream], columns),
        [inputs.base_rows[i] for i in inputs.stream],
        PairData(inputs.held_out.rows, held),
        range(len(index)),
        inputs.targets,
        inputs.notes,
    )
