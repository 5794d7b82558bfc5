"""Reward models of the gold-reward study: Bradley-Terry backbones, their ensembles of heads, their scores of all samples.

A reward model is trained on the labelled pairs of one objective at one bias, starts from pi_ref's backbone, and gets its
heads from the pairs of prompts it never saw (`rewards.heads.fit_ensemble`, shipped settings). Heads of a smaller ensemble are
the first ones of a larger one, as every head has its own initialisation and bootstrap; member 0 of the scores here is the
backbone's own reward r_0, the single reward model. Calibration and pessimism over the scores are in `gold/targets.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification

from benchmarks.gold.labels import BIAS_SHARE, LabelledPairs, label_pairs, longer_share
from benchmarks.gold.models import fit, model_config, score
from benchmarks.gold.reference import World
from prmd.artifacts import io
from prmd.config.shared import EnsembleConfig, RewardModelConfig
from prmd.models.sequence_models import SequenceRewards
from prmd.models.tokenization import PrefixRow
from prmd.objectives import OBJECTIVES
from prmd.pessimism.losses import bradley_terry_loss
from prmd.rewards.heads import Ensemble, fit_ensemble
from prmd.runtime import get_device, set_seed
from prmd.statistics.reliability import disagreement_error_correlation, mean_pairwise_correlation
from prmd.training.trainer import Columns, PairData, PairLoss


def reward_folder(world: World, objective: str, bias: float) -> Path:
    """Where a reward model lies; an objective whose labels know no bias has one for all biases."""
    name = f"{objective}-{bias:g}" if BIAS_SHARE[objective] else objective
    return world.directory / "reward_models" / name


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


def load_scorer(world: World, objective: str, bias: float) -> RewardScorer:
    """A finished reward model, to score what policies sample."""
    folder = reward_folder(world, objective, bias)
    backbone = _new_backbone(world)
    backbone.load_state_dict(io.read_tensors(folder / "backbone.safetensors"))
    return RewardScorer(backbone.eval(), Ensemble.load(folder / "ensemble.safetensors"))


def load_scores(world: World, bias: float, *, test: bool) -> Tensor:
    """Raw rewards of the samples of pi_ref by every reward model: float64 [K, 1 + M, X, n]."""
    name = "test" if test else "train"
    tables = [
        io.read_tensors(reward_folder(world, objective, bias) / "scores.safetensors")[name]
        for objective in OBJECTIVES
    ]
    return torch.stack(tables).permute(0, 3, 1, 2).double()


# ------------------------------------------------------------------ training
def make_reward_model(world: World, objective: str, bias: float) -> Path:
    """Train, score and measure one reward model; what is finished is left alone.

    Returns:
        Its `metrics.json`, which is written last.
    """
    folder = reward_folder(world, objective, bias)
    if (folder / "metrics.json").is_file():
        return folder / "metrics.json"
    rows, settings = world.rows(test=False, rewards=True), EnsembleConfig(members=world.sizes.members)
    trained, unseen = split_pairs(world, objective, bias, settings.fit_fraction)
    backbone = fit_backbone(world, pair_rows(rows, trained), folder)
    ensemble = fit_heads(world, unseen, backbone_features(backbone, rows), settings)
    scorer = RewardScorer(backbone.eval(), ensemble)
    scores = {
        "train": scorer.rewards(rows),
        "test": scorer.rewards(world.rows(test=True, rewards=True)),
    }
    io.write_tensors(folder / "backbone.safetensors", dict(backbone.state_dict()))
    ensemble.save(folder / "ensemble.safetensors")
    io.write_tensors(folder / "scores.safetensors", {k: v.contiguous() for k, v in scores.items()})
    facts = {
        "objective": objective,
        "bias": bias if BIAS_SHARE[objective] else 0.5,
        "seed": world.seed,
        "longer_share": longer_share(objective_pairs(world, objective, bias), world.lengths),
    }
    return io.write_json(
        folder / "metrics.json", facts | measure(world, objective, scores["test"].double().numpy())
    )


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


def fit_backbone(world: World, rows: list[PrefixRow], folder: Path) -> LlamaForSequenceClassification:
    """A Bradley-Terry reward model that starts from pi_ref's backbone."""
    backbone = _new_backbone(world)
    backbone.model.load_state_dict(world.reference.model.state_dict())
    centering = RewardModelConfig().centering_coefficient

    def bradley_terry(rewards: Tensor, columns: Columns) -> PairLoss:
        loss = bradley_terry_loss(
            chosen_rewards=rewards[:, 0], rejected_rewards=rewards[:, 1], centering_coefficient=centering
        )
        return PairLoss(loss, {"nats": loss.detach()})

    set_seed(world.seed)
    rng, sizes = np.random.default_rng([world.seed, 4]), world.sizes
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(sizes.reward_epochs)])
    fit(
        SequenceRewards(backbone),
        PairData(rows, {}),
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
    world: World, pairs: LabelledPairs, found: tuple[Tensor, Tensor], settings: EnsembleConfig
) -> Ensemble:
    """The ensemble on a backbone.

    Args:
        found: r_0 [X, n] and features [X, n, d] of all samples, from `backbone_features`.
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
        metrics["disagreement_error_correlation"] = float(disagreement_error_correlation(members))
    return metrics
