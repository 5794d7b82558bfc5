"""Which anchor, prior scale and slice of pairs make good heads: a sweep on the frozen features of finished reward models.

    python benchmarks/ensemble_choice.py models/reward_models/hh_truthfulqa/helpful_rm ... [--json FILE]

For every setting the heads are fit on pairs that the backbone never saw and measured on the other unseen ones (train pairs
it did not get, test and judge splits; val chose its checkpoint): accuracy and negative log-likelihood of the mean member
beside those of r_0 on the same pairs, mean correlation of the members' margins, and whether their disagreement foretells
the mean's mistakes. A larger slice would cost the backbone its pairs; here the backbone is given, so that cost is not in
the table. How heads are fit is in `rewards.heads`; what the study with known
rewards says is in `gold/heads.py`.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

import numpy as np
import torch
from torch import Tensor

from prmd.artifacts import io
from prmd.artifacts.paths import resolve_user_path
from prmd.config.loading import load_config
from prmd.config.shared import EnsembleConfig, RewardModelConfig
from prmd.pairs import hash_share, read_pairs
from prmd.rewards.heads import fit_ensemble
from prmd.rewards.reward_model import load_reward_model
from prmd.rewards.task import RewardTask, read_reward_pairs, tokenize_reward_pairs
from prmd.runtime import configure_logging
from prmd.statistics.intervals import accuracy_with_ties
from prmd.statistics.reliability import disagreement_measures, mean_pairwise_correlation
from utils import user_errors_exit

ANCHORS, PRIOR_SCALES, FIT_FRACTIONS = (1.0, 30.0, 100.0, 300.0), (0.5, 1.0), (0.1, 0.3)
REPEATS = 2
"""Divisions of the unseen pairs into those that fit heads and those that measure them."""


@dataclass(frozen=True)
class UnseenPairs:
    """Pairs that a backbone was not trained on.

    Attributes:
        ids: of the pairs.
        rewards: r_0 of (chosen, rejected), float32 [n, 2].
        features: float32 [n, 2, d].
        trained: pairs the backbone was trained on.
    """

    name: str
    ids: list[str]
    rewards: Tensor
    features: Tensor
    trained: int


def unseen_pairs(folder: Path, root: Path | None = None) -> UnseenPairs:
    """Features of the unseen pairs of a finished reward model, from its cache as far as they are there.

    Args:
        folder: of the reward model.
        root: its artifact root, where that has moved since `config.yaml` was written.
    """
    config = load_config(folder / "config.yaml", RewardModelConfig)
    if root is not None:
        config = config.model_copy(update={"artifact_root": str(root.resolve())})
    objective = io.read_json(folder / "metrics.json")["objective"]
    task = RewardTask(config, objective, "train", folder, ())
    seen = {pair.id for pair in read_reward_pairs(task).train}
    pairs = [
        pair
        for split in ("train", "test", "judge")
        for pair in read_pairs(config.paths, objective, split)
        if pair.id not in seen
    ]
    reward_model = load_reward_model(folder, shared=config)
    tokenized = tokenize_reward_pairs(task, pairs, reward_model.tokenizer)
    values = torch.stack(reward_model.features(tokenized.rows, description=f"{objective}: unseen pairs"))
    return UnseenPairs(
        f"{objective} ({config.data.approach})",
        [pair.id for pair in tokenized.pairs],
        values[..., 0],
        values[..., 1:],
        len(seen),
    )


def measure_heads(pairs: UnseenPairs, settings: EnsembleConfig, repeat: int) -> dict[str, float]:
    """Fit heads on one division of the pairs and measure them on the rest; undefined measures are NaN."""
    order = sorted(range(len(pairs.ids)), key=lambda i: hash_share(f"ensemble-choice-{repeat}", pairs.ids[i]))
    count = round(settings.fit_fraction / (1 - settings.fit_fraction) * pairs.trained)
    fit, held_out = torch.tensor(order[:count]), torch.tensor(order[count:])
    ensemble = fit_ensemble(
        chosen_features=pairs.features[fit, 0],
        rejected_features=pairs.features[fit, 1],
        chosen_rewards=pairs.rewards[fit, 0],
        rejected_rewards=pairs.rewards[fit, 1],
        pair_ids=[pairs.ids[i] for i in fit],
        config=settings,
        seed=repeat,
    )
    base = pairs.rewards[held_out]
    rewards = ensemble.rewards(pairs.features[held_out].flatten(0, 1), base.flatten())
    members = rewards.reshape(*base.shape, -1)
    margins = (members[:, 0] - members[:, 1]).double().T.numpy()
    single, mean = (base[:, 0] - base[:, 1]).double().numpy(), margins.mean(axis=0)
    found = disagreement_measures(margins, n_resamples=2)  # intervals are taken over models and repeats
    return {
        "accuracy_gain": _accuracy(mean) - _accuracy(single),
        "nll_gain": _nll(single) - _nll(mean),
        "accuracy_single": _accuracy(single),
        "accuracy": _accuracy(mean),
        "nll": _nll(mean),
        "member_correlation": mean_pairwise_correlation(margins),
        "auc": found.auc.value if found.auc else math.nan,
        "mistake_correlation": found.mistake_correlation.value if found.mistake_correlation else math.nan,
        "fit_pairs": float(len(fit)),
        "held_out_pairs": float(len(held_out)),
    }


def _accuracy(margins: np.ndarray) -> float:
    return float(accuracy_with_ties(margins)["value"])


def _nll(margins: np.ndarray) -> float:
    """Mean of -log sigmoid(margin), nats per pair."""
    return float(np.logaddexp(0.0, -margins).mean())


def sweep(models: Sequence[UnseenPairs], members: int, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Every setting on every reward model and division: means, and the standard error of the accuracy's gain over models.

    The divisions of one model share their pairs, so they are averaged first; one model has no standard error.
    """
    rows = []
    for fraction, anchor, prior in itertools.product(FIT_FRACTIONS, ANCHORS, PRIOR_SCALES):
        settings = EnsembleConfig(members=members, fit_fraction=fraction, anchor=anchor, prior_scale=prior)
        found = [
            {"model": pairs.name, "repeat": repeat, **measure_heads(pairs, settings, repeat)}
            for pairs in models
            for repeat in range(repeats)
        ]
        names = [name for name in found[0] if name not in ("model", "repeat")]
        means = {name: float(np.nanmean([entry[name] for entry in found])) for name in names}
        gains = (
            np.array([entry["accuracy_gain"] for entry in found]).reshape(len(models), repeats).mean(axis=1)
        )
        error = float(gains.std(ddof=1) / math.sqrt(len(models))) if len(models) > 1 else None
        setting = {"fit_fraction": fraction, "anchor": anchor, "prior_scale": prior}
        rows.append(setting | means | {"accuracy_gain_error": error, "runs": found})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The sweep as a Markdown table; gains are over r_0 on the same pairs."""
    head = ("fit share", "anchor", "prior scale", "accuracy", "gain", "NLL", "gain", "member correlation")
    head += ("disagreement and mistakes, rank correlation", "AUC")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{row['fit_fraction']:g}", f"{row['anchor']:g}", f"{row['prior_scale']:g}"]
        error = row["accuracy_gain_error"]
        cells += [
            f"{row['accuracy']:.3f}",
            f"{row['accuracy_gain']:+.3f}" + (f" ± {error:.3f}" if error is not None else ""),
        ]
        cells += [f"{row['nll']:.3f}", f"{row['nll_gain']:+.3f}"]
        cells += [
            f"{row['member_correlation']:.2f}",
            f"{row['mistake_correlation']:+.2f}",
            f"{row['auc']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    runs = rows[0]["runs"]
    models = sorted({run["model"] for run in runs})
    lines += [
        "",
        f"Means over {', '.join(models)}, {len(runs) // len(models)} divisions each of {runs[0]['held_out_pairs']:.0f} held-out "
        "pairs or so; gains over r_0 on the same pairs; ± standard error over models.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep, print the table, write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders of finished reward models")
    parser.add_argument("--root", type=Path, help="their artifact root, if it was moved")
    parser.add_argument("--members", type=int, default=EnsembleConfig().members, help="heads of an ensemble")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="divisions of the unseen pairs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args(arguments)
    configure_logging()
    wanted = "the folder of a finished reward model"
    folders = [resolve_user_path(folder, "folders", wanted, "folder") for folder in options.folders]
    rows = sweep([unseen_pairs(folder, options.root) for folder in folders], options.members, options.repeats)
    print(table(rows))
    if options.json:
        io.write_json(options.json, rows)


if __name__ == "__main__":
    with user_errors_exit():
        main()
