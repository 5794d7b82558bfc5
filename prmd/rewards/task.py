"""Which pairs train, fit, watch and test one reward model, and what its artifact depends on.

Everything is read and refused here before a model is loaded. Training is in `backbone`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.config.loading import as_dict
from prmd.config.shared import RewardModelConfig
from prmd.errors import ConfigError
from prmd.inference.reference import reference_key
from prmd.models.tokenization import TokenizedPairs, tokenize_pairs
from prmd.pairs import PreferencePair, hash_share, read_pairs
from prmd.rewards.adapters import resampled
from prmd.training.fingerprints import calibration_keys, training_keys

MIN_FIT_PAIRS = 2
"""Pairs without which the spread of margins that the heads start from is not defined."""


@dataclass(frozen=True)
class RewardTask:
    """One reward model, or one `member` of its ensemble, to train: on which split, to where, logged under which names."""

    config: RewardModelConfig
    objective: str
    split: str
    directory: Path
    log_names: tuple[str, ...]
    member: int | None = None

    @property
    def name(self) -> str:
        name = f"{self.objective} {'judge' if self.split == 'judge' else 'reward model'}"
        return name if self.member is None else f"{name}, member {self.member}"

    @property
    def has_heads(self) -> bool:
        """Whether heads are fit on pairs that are kept from the backbone."""
        return self.config.ensemble.members > 1 and self.config.ensemble.kind == "heads"

    @property
    def has_adapters(self) -> bool:
        """Whether the members are adapters, each trained on a resample of all pairs."""
        return self.config.ensemble.members > 1 and self.config.ensemble.kind == "adapters"

    def fingerprints(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Key of everything the finished artifact depends on, and behind it the key that earlier versions gave it."""
        paths, values = self.config.paths, as_dict(self.config)
        kept = {key: values[key] for key in ("seed", "tuning", "centering_coefficient", "ensemble")}
        kept["ensemble"] = {k: v for k, v in kept["ensemble"].items() if k != "debias_strengths"}
        kept |= self._debias_key()
        own = [(self.objective, self.split), (self.objective, "test")]
        calibrating = [(objective, "val") for objective in paths.objectives]
        parts = list(dict.fromkeys(own + calibrating))
        digests = io.files_sha256([paths.split(*part) for part in parts])
        data = {"/".join(part): digest for part, digest in zip(parts, digests, strict=True)}
        base = reference_key(self.config.model, paths, tokenizer)
        keys = zip(
            training_keys(self.config.training), calibration_keys(self.config.calibration), strict=True
        )
        return tuple(
            io.fingerprint(
                [self.objective, base, kept | {"training": training, "calibration": calibration}, data]
            )
            for training, calibration in keys
        )

    def _debias_key(self) -> dict[str, Any]:
        """What decides debiasing; nothing where no feature is named, so that what was finished before stays finished."""
        debias, ensemble = self.config.debias, self.config.ensemble
        if not (features := debias.of(self.objective)):
            return {}
        strengths = list(ensemble.debias_strengths) if ensemble.members > 1 else None
        return {"debias": [list(features), debias.strength, strengths]}


@dataclass(frozen=True)
class RewardPairs:
    """Pairs of one task; `fit` is kept from the backbone, for heads."""

    train: list[PreferencePair]
    fit: list[PreferencePair]
    val: list[PreferencePair]
    test: list[PreferencePair]
    available: int
    """Pairs of the split, `training.max_pairs` or not."""

    def describe(self, task: RewardTask) -> str:
        """How the pairs of the split became those of the trainings, with the settings that decide it."""
        used = len(self.train) + len(self.fit)
        line = f"{task.name}: {self.available} {task.split} pairs"
        if used < self.available:
            line += f", {used} of them used (training.max_pairs)"
        if self.fit:
            line += (
                f": {len(self.train)} train the model, {len(self.fit)} fit its heads (ensemble.fit_fraction)"
            )
        return line


def read_reward_pairs(task: RewardTask) -> RewardPairs:
    """Everything the task reads, refused here where it does not suffice, before a model is trained."""
    paths, config = task.config.paths, task.config
    pairs = read_pairs(paths, task.objective, task.split)
    available, limit = len(pairs), config.training.max_pairs
    if limit is not None:
        pairs = sorted(pairs, key=lambda pair: hash_share(f"max_pairs-{config.seed}", pair.id))[:limit]
    share = config.ensemble.fit_fraction if task.has_heads else 0.0
    fit = [pair for pair in pairs if hash_share("ensemble-fit", pair.id) < share]
    held = {pair.id for pair in fit}
    train = [pair for pair in pairs if pair.id not in held]
    if not train or (task.has_heads and len(fit) < MIN_FIT_PAIRS):
        raise ConfigError(
            f"ensemble.fit_fraction: {share:g} of {len(pairs)} {task.split} pairs of {task.objective} leaves {len(train)} to "
            f"the reward model and {len(fit)} to the ensemble's heads, wanted at least 1 and {MIN_FIT_PAIRS}; change it, "
            "set ensemble.members: 1, or give more data"
        )
    if task.has_adapters:
        _refuse_empty_resamples(task, train)
    for objective in paths.objectives:
        read_pairs(paths, objective, "val")  # calibration needs the prompts of all
    val, test = (read_pairs(paths, task.objective, split) for split in ("val", "test"))
    return RewardPairs(train, fit, val, test, available)


def _refuse_empty_resamples(task: RewardTask, train: Sequence[PreferencePair]) -> None:
    members = task.config.ensemble.members
    for member, pairs in enumerate(resampled(train, members=members, seed=task.config.seed)):
        if not pairs:
            raise ConfigError(
                f"ensemble.members: the resample of member {member} draws none of the {len(train)} {task.split} pairs of "
                f"{task.objective}, wanted at least 1 for each of {members} members; give more data or fewer members"
            )


def tokenize_reward_pairs(
    task: RewardTask, pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase
) -> TokenizedPairs:
    """Rows of (chosen, rejected) as reward models read them, by the task's own lengths."""
    training = task.config.training
    return tokenize_pairs(
        pairs, tokenizer, max_length=training.max_length, over_length=training.over_length, keep_suffix=True
    )
