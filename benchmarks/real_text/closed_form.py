"""The closed-form part of the real-text study: linear reward models on frozen features, enough pairs and seeds to decide.

Features of SmolLM2-135M-Instruct (`real_text/features.py`); of each objective up to `ClosedFormSizes.pairs` prepared pairs. For every
seed and share of pairs whose longer response is the chosen one, training pairs are drawn anew, and every family of members
(`benchmarks/closed_form/`) is fitted to them. Policies are the exact optimum of a robust reward on samples of pi_ref for held-out
prompts. Two judges on pairs and features that no reward model saw decide: on natural labels, and on the same pairs weighted so
that the longer response is chosen in half of them. What debiasing does to natural labels is `natural_rows`.

The numbers of all seeds are put together in `real_text/closed_form_summary.py`; the command line is `real_text`.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.closed_form.families import STRENGTHS, members_of, offsets_of
from benchmarks.closed_form.fits import fit_linear
from benchmarks.closed_form.gates import in_reference_units, optimum, outcome
from benchmarks.real_text.data import longer_is_chosen
from benchmarks.real_text.features import Features, Projection, features_of
from prmd.artifacts import io
from prmd.artifacts.paths import CONFIG_DIR
from prmd.config.loading import load_config
from prmd.config.policy import PolicySection
from prmd.config.shared import RewardModelConfig
from prmd.data.prepare import download_dataset, split_objectives
from prmd.errors import DataError
from prmd.inference.generation import sample_rows
from prmd.inference.reference import reference_samples
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import tokenize_pairs, tokenize_prompt
from prmd.objectives import OBJECTIVES, SPLITS
from prmd.pairs import PreferencePair, hash_share, read_pairs
from prmd.pessimism.aggregation import robust_rewards
from prmd.policies.methods import aggregation
from prmd.policies.robust_reward import objective_weights

logger = logging.getLogger("prmd.real_text")
NATURAL = "natural"
JUDGES = ("natural labels", "length-balanced")
METHODS = ("mean", "hard_min", "hierarchical")
MEASURES = ("wins", "least", "length")
FOLDS = 10


@dataclass(frozen=True)
class ClosedFormSizes:
    """How much is run.

    Attributes:
        seeds: each draws its own training pairs, bootstraps and judges.
        pairs: of each objective that features are made of, training and judge split together, at most.
        trained: training pairs of an objective, where there are enough of both kinds.
        shares: of pairs whose longer response is chosen; None takes labels as they are.
        prompts, samples, tokens: held-out prompts, samples of pi_ref for each, at most so many tokens long.
        length: tokens of a conversation, at most.
        components: of the features.
        members: of every family.
        kls: nats.
    """

    seeds: int = 20
    pairs: int = 1500
    trained: int = 500
    shares: tuple[float | None, ...] = (0.8, 0.65, None)
    prompts: int = 100
    samples: int = 16
    tokens: int = 64
    length: int = 384
    components: int = 256
    members: int = 10
    kls: tuple[float, ...] = (0.5, 1.0)


FULL = ClosedFormSizes()
QUICK = ClosedFormSizes(
    seeds=2,
    pairs=60,
    trained=20,
    shares=(0.65, None),
    prompts=6,
    samples=8,
    tokens=8,
    length=192,
    components=16,
)


def closed_form_config(sizes: ClosedFormSizes, work: Path, overrides: Sequence[str]) -> RewardModelConfig:
    """Data, model and sampling of the study, in an artifact root of its own for other settings.

    Args:
        overrides: `data.*` and `model.*` of the command line.
    """
    kept = {name: value for name, value in asdict(sizes).items() if name in ("prompts", "samples", "tokens")}
    root = work / f"closed-form-{io.fingerprint([kept, sizes.length, sizes.pairs, list(overrides)])[:8]}"
    own = (
        f"artifact_root={json.dumps(str(root.resolve()))}",
        "data.approach=hh_truthfulqa",
        "data.hh_rlhf.helpful_subsets=[helpful-base, helpful-online, helpful-rejection-sampled]",
        "data.hh_rlhf.harmless_subsets=[harmless-base]",
        "data.splits.val_fraction=0.02",
        "data.splits.test_fraction=0.1",
        "data.splits.judge_fraction=0.35",
        "data.max_pairs_per_objective=null",
        f"training.max_length={sizes.length}",
        "calibration.source=reference_samples",
        f"calibration.samples_per_prompt={sizes.samples}",
        f"calibration.max_new_tokens={sizes.tokens}",
    )
    return load_config(CONFIG_DIR / "quickstart", RewardModelConfig, [*own, *overrides])


@dataclass(frozen=True)
class Responses:
    """Features and lengths of (chosen, rejected) of n pairs, or of n samples of X prompts.

    Attributes:
        rewards, judges: features of the two layers, [n, side, components].
        length: tokens, [n, side].
    """

    rewards: np.ndarray
    judges: np.ndarray
    length: np.ndarray


@dataclass(frozen=True)
class Objective:
    """One objective: the responses of its pairs, those of the training split and those of the judge split."""

    training: Responses
    judging: Responses


@dataclass(frozen=True)
class Material:
    """Everything that seeds share.

    Attributes:
        objectives: in the order of `OBJECTIVES`.
        held_out: samples of pi_ref, [X, samples].
    """

    sizes: ClosedFormSizes
    objectives: list[Objective]
    held_out: Responses

    @cached_property
    def prompts(self) -> int:
        return len(self.held_out.length)


def make_material(config: RewardModelConfig, sizes: ClosedFormSizes) -> Material:
    """Prepare data, sample pi_ref and compute features; what is kept in the artifact root is not done again."""
    download_dataset(config)
    split_objectives(config)
    tokenizer = load_tokenizer(config.model, config.paths)
    splits: dict[tuple[str, str], tuple[list[Features], np.ndarray]] = {}
    for objective in OBJECTIVES:
        for split, share in (("train", 0.6), ("judge", 0.4)):
            pairs = _some(read_pairs(config.paths, objective, split), round(share * sizes.pairs))
            splits[objective, split] = _pair_features(config, tokenizer, pairs)
    samples, lengths = _sample_features(config, tokenizer, sizes)
    project = _projections([f for found, _ in splits.values() for f in found], sizes.components)

    def responses(found: Sequence[Features], length: np.ndarray) -> Responses:
        return Responses(
            np.stack([project[0](f.rewards) for f in found]),
            np.stack([project[1](f.judges) for f in found]),
            length,
        )

    objectives = []
    for objective in OBJECTIVES:
        training, judging = (responses(*splits[objective, split]) for split in ("train", "judge"))
        objectives.append(Objective(training, judging))
    return Material(sizes, objectives, responses(samples, lengths))


def _some(pairs: Sequence[PreferencePair], count: int) -> list[PreferencePair]:
    """At most `count` pairs, the same in every run."""
    return sorted(pairs, key=lambda pair: hash_share("closed form", pair.id))[:count]


def _pair_features(
    config: RewardModelConfig, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair]
) -> tuple[list[Features], np.ndarray]:
    """Features of the responses of the pairs that fit, and tokens of these without the end of turn, [n, 2]."""
    fitted = tokenize_pairs(
        pairs,
        tokenizer,
        max_length=config.training.max_length,
        over_length="truncate_prompt",
        keep_suffix=False,
    )
    lengths = np.array([[len(r) - 1 for r in row.responses] for row in fitted.rows], dtype=np.float64)
    return features_of(config, tokenizer, fitted.rows), lengths


def _sample_features(
    config: RewardModelConfig, tokenizer: PreTrainedTokenizerBase, sizes: ClosedFormSizes
) -> tuple[list[Features], np.ndarray]:
    """Features and tokens of the samples of pi_ref for held-out prompts, as many of each objective as can be."""
    found: dict[str, list[PreferencePair]] = {
        k: _some(read_pairs(config.paths, k, "test"), sizes.prompts) for k in OBJECTIVES
    }
    turns = [found[k][i] for i in range(sizes.prompts) for k in OBJECTIVES if i < len(found[k])]
    room = config.training.max_length - sizes.tokens
    prompts = [tokenize_prompt(tokenizer, pair.prompt, max_length=room) for pair in turns]
    prompts = list(dict.fromkeys(prompts))[: sizes.prompts]
    if len(prompts) < sizes.prompts:
        raise DataError(
            f"{len(prompts)} held-out prompts fit in {room} tokens, {sizes.prompts} wanted; give more data"
        )
    drawn = reference_samples(config, tokenizer, prompts)
    rows = sample_rows(prompts, drawn, tokenizer, keep_suffix=False)
    lengths = np.array([[len(s.token_ids) for s in group] for group in drawn], dtype=np.float64)
    return features_of(config, tokenizer, rows), lengths


def _projections(found: Sequence[Features], components: int) -> tuple[Projection, Projection]:
    """Principal components of each layer, fitted on the responses of all pairs."""
    return (
        Projection.fit(np.concatenate([f.rewards for f in found]), components),
        Projection.fit(np.concatenate([f.judges for f in found]), components),
    )


# ------------------------------------------------------------------ one seed
def run_seed(material: Material, seed: int, folder: Path) -> Path:
    """All shares, families, methods, KLs and judges of one seed; what is finished is left alone.

    Returns:
        A safetensors file: `<share>/<family>/<method>/<kl>/<judge>/<measure>` with a value for every held-out prompt
        ([K, X] of wins).
    """
    path = folder / f"seed-{seed}.safetensors"
    if path.is_file():
        return path
    judges = _judges(material, seed)
    tensors = {}
    for share in material.sizes.shares:
        for (family, method), robust in _robust_rewards(material, share, seed).items():
            for kl in material.sizes.kls:
                weights = optimum(robust, kl=kl, beta=PolicySection().beta)
                for judge, truth in judges.items():
                    found = outcome(weights, truth, material.held_out.length)
                    name = f"{share_name(share)}/{family}/{method}/{kl:g}/{judge}"
                    tensors |= {f"{name}/{m}": torch.from_numpy(getattr(found, m)) for m in MEASURES}
    return io.write_tensors(path, {name: values.contiguous() for name, values in tensors.items()})


def share_name(share: float | None) -> str:
    """A share in words."""
    return NATURAL if share is None else f"{share:g}"


def _robust_rewards(
    material: Material, share: float | None, seed: int
) -> dict[tuple[str, str], torch.Tensor]:
    """R [X, n] of every (family, method), and the implicit rewards of DPO as family `none`."""
    policy = PolicySection()
    drawn = [
        draw_training(o, share, material.sizes.trained, [seed, k]) for k, o in enumerate(material.objectives)
    ]
    found = {}
    for family in STRENGTHS:
        scores = []
        for k, (differences, offsets) in enumerate(drawn):
            rng = np.random.default_rng([seed, 7, k])
            theta = members_of(family, differences, offsets, members=material.sizes.members, rng=rng)
            scores.append(np.moveaxis(material.held_out.rewards @ theta.T, 2, 0))
        rewards = in_reference_units(np.stack(scores))
        for method in METHODS:
            chosen = aggregation(policy, method)
            found[family, method] = robust_rewards(
                rewards, aggregation=chosen, weights=objective_weights(policy)
            )
    differences, offsets = (np.concatenate(part) for part in zip(*drawn, strict=True))
    for method, offset in (("dpo", None), ("dpo_debiased", offsets)):
        theta = fit_linear(differences, offset=offset)
        found["none", method] = torch.from_numpy(material.held_out.rewards @ theta)
    return found


def draw_training(
    objective: Objective, share: float | None, count: int, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Training pairs of a seed: differences of features [n, d] and offsets a [n].

    With a share, exactly round(share n) of them have the longer response as the chosen one, the others the shorter; n is
    `count`, or less where four fifths of the pairs of one kind do not reach that far. Labels are never changed.
    """
    rng, length = np.random.default_rng([*seed, 11]), objective.training.length
    longer = np.sign(length[:, 0] - length[:, 1])
    if share is None:
        picked = rng.permutation(len(longer))[: min(count, int(0.8 * len(longer)))]
    else:
        kinds = [rng.permutation(np.flatnonzero(longer == sign)) for sign in (1, -1)]
        most = [int(0.8 * len(kind) / part) for kind, part in zip(kinds, (share, 1 - share), strict=True)]
        n = min(count, *most)
        picked = np.concatenate([kinds[0][: round(share * n)], kinds[1][: n - round(share * n)]])
    features = objective.training.rewards[picked]
    return features[:, 0] - features[:, 1], offsets_of(length[picked][:, :1] - length[picked][:, 1:])


def _judges(material: Material, seed: int) -> dict[str, np.ndarray]:
    """Raw rewards [K, X, n] of the held-out samples by two judges, each on its own bootstrap of the judge pairs."""
    found: dict[str, list[np.ndarray]] = {judge: [] for judge in JUDGES}
    for k, objective in enumerate(material.objectives):
        pairs, rng = objective.judging, np.random.default_rng([seed, 13, k])
        weights = rng.poisson(1.0, len(pairs.length)).astype(np.float64)
        differences = pairs.judges[:, 0] - pairs.judges[:, 1]
        for judge, used in zip(JUDGES, (weights, weights * balanced_weights(pairs.length)), strict=True):
            found[judge].append(material.held_out.judges @ fit_linear(differences, weights=used))
    return {judge: np.stack(scores) for judge, scores in found.items()}


def balanced_weights(length: np.ndarray) -> np.ndarray:
    """Weights [n] under which the longer response is chosen in half of the pairs; pairs of equal length count nothing."""
    longer = np.sign(length[:, 0] - length[:, 1])
    counts = {sign: max(1, int((longer == sign).sum())) for sign in (1, -1)}
    return np.where(longer == 1, 0.5 / counts[1], np.where(longer == -1, 0.5 / counts[-1], 0.0)) * len(length)


# ------------------------------------------------------------------ natural labels
def natural_rows(material: Material) -> list[dict[str, Any]]:
    """What debiasing does to natural labels: out-of-fold margins of s = 0 and s = 1 on the pairs of every objective.

    Returns:
        A row for each objective: n, longer_share; balanced_accuracy at s = 0 and s = 1, their difference and its 95 %
        interval (bootstrap over pairs, within the two kinds); accuracy at both on all pairs.
    """
    rows = []
    for k, objective in enumerate(material.objectives):
        pairs = objective.training
        differences = pairs.rewards[:, 0] - pairs.rewards[:, 1]
        fold = np.random.default_rng([17, k]).permutation(len(differences)) % FOLDS
        right = {s: np.empty(len(differences)) for s in (0.0, 1.0)}
        for held_out in range(FOLDS):
            train = fold != held_out
            offsets = offsets_of(pairs.length[train][:, :1] - pairs.length[train][:, 1:])
            for s, values in right.items():
                margins = differences[~train] @ fit_linear(differences[train], offset=s * offsets)
                values[~train] = np.where(margins == 0, 0.5, margins > 0)
        rows.append({"objective": OBJECTIVES[k], **_balanced(right, pairs.length, k)})
    return rows


def _balanced(right: dict[float, np.ndarray], length: np.ndarray, seed: int) -> dict[str, Any]:
    longer = np.sign(length[:, 0] - length[:, 1])
    kinds = [np.flatnonzero(longer == sign) for sign in (1, -1)]

    def accuracy(values: np.ndarray, chosen: Sequence[np.ndarray] = kinds) -> float:
        return float(np.mean([values[c].mean() for c in chosen]))

    rng, less = np.random.default_rng([19, seed]), right[1.0] - right[0.0]
    drawn = [accuracy(less, [rng.choice(kind, len(kind)) for kind in kinds]) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "n": len(length),
        "longer_share": len(kinds[0]) / max(1, len(kinds[0]) + len(kinds[1])),
        "accuracy": [float(right[s].mean()) for s in (0.0, 1.0)],
        "balanced_accuracy": [accuracy(right[s]) for s in (0.0, 1.0)],
        "difference": accuracy(less),
        "difference_ci": [float(low), float(high)],
    }


def longer_by_source(config: RewardModelConfig) -> dict[str, tuple[int, int]]:
    """Of every source, pairs whose longer response is the chosen one and pairs of unequal length, over all splits."""
    found: dict[str, tuple[int, int]] = {}
    for objective in OBJECTIVES:
        for pair in (pair for split in SPLITS for pair in read_pairs(config.paths, objective, split)):
            if (longer := longer_is_chosen(pair)) is not None:
                name = f"{objective}: {pair.source.rsplit('/', 1)[0]}"
                chosen, count = found.get(name, (0, 0))
                found[name] = (chosen + longer, count + 1)
    return found
