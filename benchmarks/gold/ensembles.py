"""Reward models of the gold-reward study: Bradley-Terry backbones, their ensembles of heads, their scores of all samples.

A reward model is trained on the labelled pairs of one objective at one bias, starts from pi_ref's backbone, and gets its
heads from the pairs of prompts it never saw (`rewards.heads.fit_ensemble`, shipped settings). Families of heads:

    bootstrap    on a backbone trained on the labels as they are
    debiased     on a backbone told of length (`pessimism.debias`, all objectives, strength 1); every head with the whole offset
    strengths    on the same backbone; heads from no offset to the whole, and other ranges of `STRENGTHS` as ablations

Member 0 of the scores here is the backbone's own reward r_0, the single reward model. Calibration, pessimism and smaller
ensembles are in `gold/targets.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import LlamaForSequenceClassification

from benchmarks.gold.labels import BIAS_SHARE, UNBIASED, LabelledPairs, label_pairs, longer_share
from benchmarks.gold.models import fit, model_config, score
from benchmarks.gold.reference import World
from benchmarks.gold.world import LENGTH_COST, LENGTH_IN
from prmd.artifacts import io
from prmd.config.shared import EnsembleConfig, RewardModelConfig
from prmd.models.sequence_models import SequenceRewards
from prmd.models.tokenization import PrefixRow
from prmd.objectives import OBJECTIVES
from prmd.pessimism.debias import (
    bias_columns,
    bias_offsets,
    fit_log_odds,
    member_strengths,
    root_mean_square,
)
from prmd.pessimism.losses import bradley_terry_loss
from prmd.rewards.heads import Ensemble, fit_ensemble
from prmd.runtime import get_device, set_seed
from prmd.statistics.reliability import mean_pairwise_correlation
from prmd.training.trainer import Columns, PairData, PairLoss

NONE, BOOTSTRAP, DEBIASED, FAMILY = "none", "bootstrap", "debiased", "strengths"
"""Names of families; `NONE` is what a policy has that learns from the labels."""
STRENGTHS: Mapping[str, tuple[float, float]] = {
    DEBIASED: (1.0, 1.0),
    FAMILY: (0.0, 1.0),
    "strengths 0.5 to 1": (0.5, 1.0),
    "strengths 0 to 0": (0.0, 0.0),
}
"""Strengths of the first and the last head on a debiased backbone; the last two families are ablations."""


@dataclass(frozen=True)
class BackboneKey:
    """Which labels a backbone is trained on, and whether it is told of length.

    Attributes:
        bias: rho; an objective whose labels know no bias has one backbone for all of them.
        length_cost: of the true rewards; other objectives than helpful do not know of it either.
    """

    objective: str
    bias: float
    length_cost: float
    debiased: bool

    @classmethod
    def of(cls, objective: str, bias: float, length_cost: float, family: str) -> "BackboneKey":
        """The backbone that the heads of a family stand on."""
        own_bias = bias if BIAS_SHARE[objective] else UNBIASED
        own_cost = length_cost if objective == LENGTH_IN else LENGTH_COST
        return cls(objective, own_bias, own_cost, family in STRENGTHS)

    def folder(self, world: World) -> Path:
        """Where it lies."""
        name = f"{self.objective}-{self.bias:g}" if BIAS_SHARE[self.objective] else self.objective
        name += f"-cost{self.length_cost:g}" if self.length_cost != LENGTH_COST else ""
        return world.directory / "reward_models" / (name + "-debiased" * self.debiased)


def heads_folder(world: World, objective: str, bias: float, family: str) -> Path:
    """Where the heads of a family lie: beside the backbone they are the only ones of, or below it."""
    folder = BackboneKey.of(objective, bias, world.length_cost, family).folder(world)
    return folder / family.replace(" ", "-") if family in STRENGTHS else folder


def objective_pairs(world: World, objective: str, bias: float) -> LabelledPairs:
    """The labelled pairs of an objective; policies and reward models are trained on the same ones."""
    k = OBJECTIVES.index(objective)
    return label_pairs(
        np.random.default_rng([world.seed, 3, k]),
        rewards=world.rewards[k],
        lengths=world.lengths,
        objective=objective,
        bias=bias,
        count=world.sizes.pairs,
    )


def pair_rows(rows: Sequence[PrefixRow], pairs: LabelledPairs) -> list[PrefixRow]:
    """(chosen, rejected) rows out of the rows that hold all samples of a prompt."""
    return [
        PrefixRow(rows[p].prompt_ids, (rows[p].responses[c], rows[p].responses[r]))
        for p, c, r in zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True)
    ]


@dataclass(frozen=True)
class RewardScorer:
    """A trained reward model: backbone and heads."""

    backbone: LlamaForSequenceClassification
    ensemble: Ensemble

    def rewards(self, rows: Sequence[PrefixRow]) -> Tensor:
        """Raw rewards of every response: r_0 and the members, float32 [X, n, 1 + M]."""
        return member_rewards(self.ensemble, backbone_features(self.backbone, rows))


def member_rewards(ensemble: Ensemble, found: tuple[Tensor, Tensor]) -> Tensor:
    """r_0 and the members of responses given as `backbone_features` gives them: [X, n, 1 + M]."""
    base, features = found
    flat = ensemble.rewards(features.flatten(0, 1), base.flatten())
    return torch.cat([base[..., None], flat.reshape(*base.shape, -1)], dim=2)


def backbone_features(
    backbone: LlamaForSequenceClassification, rows: Sequence[PrefixRow]
) -> tuple[Tensor, Tensor]:
    """r_0 [X, n] and features [X, n, d] of every response."""
    scorer = SequenceRewards(backbone).eval()

    def compute(batch: dict[str, Tensor]) -> Tensor:
        features, base = scorer.features_and_rewards(**batch)
        return torch.cat([base[:, None], features], dim=1)

    values = score(rows, compute, width=1 + backbone.config.hidden_size)
    return values[..., 0], values[..., 1:]


def load_scorer(world: World, objective: str, bias: float, family: str) -> RewardScorer:
    """A finished reward model, to score what policies sample."""
    backbone = _new_backbone(world)
    key = BackboneKey.of(objective, bias, world.length_cost, family)
    backbone.load_state_dict(io.read_tensors(key.folder(world) / "backbone.safetensors"))
    ensemble = Ensemble.load(heads_folder(world, objective, bias, family) / "ensemble.safetensors")
    return RewardScorer(backbone.eval(), ensemble)


def load_scores(world: World, bias: float, family: str, *, test: bool) -> Tensor:
    """Raw rewards of the samples of pi_ref by every reward model: float64 [K, 1 + M, X, n]."""
    name = "test" if test else "train"
    folders = [heads_folder(world, objective, bias, family) for objective in OBJECTIVES]
    tables = [io.read_tensors(folder / "scores.safetensors")[name] for folder in folders]
    return torch.stack(tables).permute(0, 3, 1, 2).double()


# ------------------------------------------------------------------ training
def make_reward_models(world: World, key: BackboneKey, families: Sequence[str]) -> list[Path]:
    """Train one backbone, and fit, score and measure the heads of families on it; what is finished is left alone.

    Args:
        world: with the true rewards of `key.length_cost`.
        families: of `STRENGTHS` for a debiased backbone, else `BOOTSTRAP`.

    Returns:
        The `metrics.json` of every family, each written last.
    """
    folders = {f: heads_folder(world, key.objective, key.bias, f) for f in families}
    missing = {f: folder for f, folder in folders.items() if not (folder / "metrics.json").is_file()}
    if missing:
        rows, settings = world.rows(test=False, rewards=True), EnsembleConfig(members=world.sizes.members)
        trained, unseen = split_pairs(world, key.objective, key.bias, settings.fit_fraction)
        told = LengthBias.fit(trained, world.lengths) if key.debiased else None
        backbone = _kept_backbone(world, key, rows, trained, told)
        found = backbone_features(backbone, rows)
        test = backbone_features(backbone, world.rows(test=True, rewards=True))
        for family, folder in missing.items():
            offsets = told.member_offsets(unseen, STRENGTHS[family], settings.members) if told else None
            ensemble = fit_heads(world, unseen, found, settings, offsets)
            _write_heads(world, key, folder, ensemble, (found, test))
    return [folder / "metrics.json" for folder in folders.values()]


def _kept_backbone(
    world: World,
    key: BackboneKey,
    rows: Sequence[PrefixRow],
    pairs: LabelledPairs,
    told: "LengthBias | None",
) -> LlamaForSequenceClassification:
    """The backbone of a key, trained once."""
    path = key.folder(world) / "backbone.safetensors"
    if path.is_file():
        backbone = _new_backbone(world)
        backbone.load_state_dict(io.read_tensors(path))
        return backbone.eval()
    offsets = torch.from_numpy(told.offsets(pairs)).float() if told else None
    backbone = fit_backbone(world, pair_rows(rows, pairs), path.parent, offsets)
    io.write_tensors(path, dict(backbone.state_dict()))
    return backbone.eval()


def _write_heads(
    world: World,
    key: BackboneKey,
    folder: Path,
    ensemble: Ensemble,
    found: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Write heads, their scores of the samples in `found` (training, held out), and last what they are worth."""
    train, test = (member_rewards(ensemble, one).contiguous() for one in found)
    ensemble.save(folder / "ensemble.safetensors")
    io.write_tensors(folder / "scores.safetensors", {"train": train, "test": test})
    longer = longer_share(objective_pairs(world, key.objective, key.bias), world.lengths)
    facts = {"objective": key.objective, "bias": key.bias, "seed": world.seed, "longer_share": longer}
    io.write_json(folder / "metrics.json", facts | measure(world, key.objective, test.double().numpy()))


@dataclass(frozen=True)
class LengthBias:
    """How far length alone predicts the labels of an objective, fitted once on the pairs its backbone is trained on.

    Attributes:
        lengths: tokens of all samples, [X, n].
        rms: of the differences in length, [1].
        values: b of sign and size, [2].
    """

    lengths: np.ndarray
    rms: np.ndarray
    values: np.ndarray

    @classmethod
    def fit(cls, pairs: LabelledPairs, lengths: np.ndarray) -> "LengthBias":
        """Fit b."""
        differences = _length_differences(pairs, lengths)
        rms = root_mean_square(differences)
        return cls(lengths, rms, fit_log_odds(bias_columns(differences, rms)))

    def offsets(self, pairs: LabelledPairs) -> np.ndarray:
        """a of pairs, [n]."""
        differences = _length_differences(pairs, self.lengths)
        return bias_offsets(bias_columns(differences, self.rms), self.values)

    def member_offsets(self, pairs: LabelledPairs, strengths: tuple[float, float], members: int) -> Tensor:
        """s_m a of every one of M > 1 heads, float32 [M, n]."""
        spread = member_strengths(strengths, members)
        return torch.from_numpy(np.outer(spread, self.offsets(pairs))).float()


def _length_differences(pairs: LabelledPairs, lengths: np.ndarray) -> np.ndarray:
    """Tokens of chosen less rejected, [n, 1]."""
    won, lost = lengths[pairs.prompt, pairs.chosen], lengths[pairs.prompt, pairs.rejected]
    return (won - lost).astype(np.float64)[:, None]


def split_pairs(
    world: World, objective: str, bias: float, fit_fraction: float
) -> tuple[LabelledPairs, LabelledPairs]:
    """Pairs that train the backbone, and those of the last prompts, which it never sees, for the heads."""
    pairs = objective_pairs(world, objective, bias)
    unseen = pairs.prompt >= round((1 - fit_fraction) * len(world.prompts))
    backbone, heads = (
        LabelledPairs(pairs.prompt[mask], pairs.chosen[mask], pairs.rejected[mask])
        for mask in (~unseen, unseen)
    )
    return backbone, heads


def _new_backbone(world: World) -> LlamaForSequenceClassification:
    torch.manual_seed(world.seed)
    return LlamaForSequenceClassification(model_config(world.sizes.hidden, num_labels=1)).to(get_device())


def fit_backbone(
    world: World, rows: list[PrefixRow], folder: Path, offsets: Tensor | None = None
) -> LlamaForSequenceClassification:
    """A Bradley-Terry reward model that starts from pi_ref's backbone.

    Args:
        offsets: a of the pairs, [n]; None: it learns from the labels as they are.
    """
    backbone = _new_backbone(world)
    backbone.model.load_state_dict(world.reference.model.state_dict())
    centering = RewardModelConfig().centering_coefficient

    def bradley_terry(rewards: Tensor, columns: Columns) -> PairLoss:
        loss = bradley_terry_loss(
            chosen_rewards=rewards[:, 0],
            rejected_rewards=rewards[:, 1],
            centering_coefficient=centering,
            offsets=columns.get("offsets"),
        )
        return PairLoss(loss, {"nats": loss.detach()})

    set_seed(world.seed)
    rng, sizes = np.random.default_rng([world.seed, 4]), world.sizes
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(sizes.reward_epochs)])
    fit(
        SequenceRewards(backbone),
        PairData(rows, {} if offsets is None else {"offsets": offsets}),
        stream=order.tolist(),
        batch=sizes.batch,
        learning_rate=sizes.reward_rate,
        loss=bradley_terry,
        seed=world.seed,
        tokenizer=world.tokenizer,
        directory=folder,
    )
    return backbone


def fit_heads(
    world: World,
    pairs: LabelledPairs,
    found: tuple[Tensor, Tensor],
    settings: EnsembleConfig,
    offsets: Tensor | None = None,
) -> Ensemble:
    """The ensemble on a backbone.

    Args:
        found: r_0 [X, n] and features [X, n, d] of all samples, from `backbone_features`.
        offsets: s_m a of every member and pair, [M, n].
    """
    prompt, chosen, rejected = (torch.from_numpy(v) for v in (pairs.prompt, pairs.chosen, pairs.rejected))
    base, features = found
    return fit_ensemble(
        chosen_features=features[prompt, chosen],
        rejected_features=features[prompt, rejected],
        chosen_rewards=base[prompt, chosen],
        rejected_rewards=base[prompt, rejected],
        pair_ids=[f"{p}-{c}-{r}" for p, c, r in zip(prompt, chosen, rejected, strict=True)],
        config=settings,
        seed=world.seed,
        offsets=offsets,
    )


# ------------------------------------------------------------------ how good it is
def measure(world: World, objective: str, scores: np.ndarray) -> dict[str, float]:
    """How a reward model orders held-out samples, against the true rewards.

    Args:
        scores: of the held-out samples of pi_ref, [X, n, 1 + M].

    Returns:
        Accuracy of r_0 and of the mean member on pairs of samples of a prompt, correlation of their margins with the
        difference in length, mean correlation of the members' margins, and how well their disagreement predicts errors.
    """
    truth = world.truth.raw[OBJECTIVES.index(objective)]
    lengths = np.array([[len(r.token_ids) for r in group] for group in world.test_samples], dtype=float)
    first, second = np.triu_indices(truth.shape[1], k=1)
    margin = (truth[:, first] - truth[:, second]).ravel()
    longer = (lengths[:, first] - lengths[:, second]).ravel()
    differences = (scores[:, first] - scores[:, second]).reshape(-1, scores.shape[2]).T
    signed = (differences * np.sign(margin))[:, margin != 0]
    members = signed[1:]
    metrics = {
        "accuracy_single": float((signed[0] > 0).mean()),
        "accuracy_ensemble": float((members.mean(axis=0) > 0).mean()),
        "length_correlation": float(np.corrcoef(differences[0], longer)[0, 1]),
        "length_correlation_ensemble": float(np.corrcoef(differences[1:].mean(axis=0), longer)[0, 1]),
    }
    if len(members) > 1:
        metrics["member_correlation"] = float(mean_pairwise_correlation(differences[1:]))
        metrics["disagreement_error_correlation"] = _disagreement_error_correlation(members)
    return metrics


def _disagreement_error_correlation(margins: np.ndarray) -> float:
    """Spearman correlation of the members' spread with the mean member's mistakes (ties one half); margins [M, N]."""
    disagreement, mean = margins.std(axis=0), margins.mean(axis=0)
    errors = np.where(mean == 0, 0.5, mean < 0)
    if np.ptp(disagreement) == 0 or np.ptp(errors) == 0:
        return math.nan
    return float(spearmanr(disagreement, errors).statistic)
