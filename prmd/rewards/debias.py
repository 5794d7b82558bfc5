"""What features of the text say of an objective's labels: fitted for those that are held to be a bias, scanned for all.

    r_0: -log sigma(r_0(y_w) - r_0(y_l) + s_0 a_i),   r_m: -log sigma(r_m(y_w) - r_m(y_l) + s_m a_i),   a_i = clip(b . z_i, +-3)

b is fitted once, on the pairs the backbone is trained on, and kept beside the weights; a_i never enters a score. The maths is
`pessimism.debias`, the features `prmd.features`; what reads the offsets is `backbone`, `fitting` and `metrics`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prmd import features
from prmd.artifacts import io
from prmd.errors import DataError
from prmd.models.chat_templates import encode_text
from prmd.pairs import PreferencePair
from prmd.pessimism.debias import (
    FEWEST_DIFFERENT,
    IS_THE_LABEL,
    bias_columns,
    bias_offsets,
    log_odds_with_intervals,
    member_strengths,
    predicted_share,
    root_mean_square,
)
from prmd.rewards.metrics import HeldOutBias
from prmd.rewards.task import RewardPairs, RewardTask, tokenize_reward_pairs
from prmd.statistics.intervals import wilson_interval
from prmd.statistics.paired_tests import holm

logger = logging.getLogger(__name__)

DEBIAS_FILE = "debias.json"
STRONG_SHARE = 0.6
"""From this share of pairs on an association of the labels with a feature that nobody named is pointed out."""
SIGNIFICANT = 0.05


def differences(
    names: Sequence[str], pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """phi(chosen) - phi(rejected) of each pair and feature, [n, F]; phi reads the final response alone."""

    def count_tokens(text: str) -> int:
        return len(encode_text(tokenizer, text)) if text else 0

    rows = [
        [
            features.measure(name, pair.chosen, count_tokens)
            - features.measure(name, pair.rejected, count_tokens)
            for name in names
        ]
        for pair in pairs
    ]
    return np.array(rows, dtype=np.float64).reshape(len(pairs), len(names))


@dataclass(frozen=True)
class FittedBias:
    """b of the features of one objective, and what the pairs it was fitted on are like.

    Attributes:
        names: features, none of which was left out.
        rms: of their differences, [F].
        values: b, (sign, size) of each feature in turn, [2 F].
        record: the contents of `debias.json`.
    """

    names: tuple[str, ...]
    rms: np.ndarray
    values: np.ndarray
    record: dict[str, Any]

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "FittedBias":
        """Rebuild it from the contents of `debias.json`."""
        found = record["features"]
        values = [found[name][column]["value"] for name in found for column in ("sign", "size")]
        return cls(tuple(found), np.array([found[name]["rms"] for name in found]), np.array(values), record)

    def columns(self, pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """z of pairs, [n, 2 F]."""
        return bias_columns(differences(self.names, pairs, tokenizer), self.rms)

    def offsets(self, pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """a of pairs, [n]; zero where every feature was left out."""
        return bias_offsets(self.columns(pairs, tokenizer), self.values)


def fit_bias(
    names: Sequence[str],
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: str,
) -> FittedBias:
    """Fit b on the training pairs of an objective; a feature in which hardly any pair differs is left out.

    Raises:
        DataError: a feature predicts nearly all labels by itself.
    """
    d = differences(names, pairs, tokenizer)
    differing = (d != 0).sum(axis=0)
    kept = [f for f in range(len(names)) if differing[f] >= FEWEST_DIFFERENT]
    for f in kept:
        if (share := predicted_share(d[:, f])) >= IS_THE_LABEL:
            raise DataError(
                f"debias.features of {objective}: {names[f]} alone predicts {share:.1%} of the labels of {len(pairs)} pairs, "
                f"wanted less than {IS_THE_LABEL:.0%}; it is what the labels ask for, or they are broken: take it out of the "
                "list, or mend the data"
            )
    left_out = {name: int(n) for name, n in zip(names, differing, strict=True) if n < FEWEST_DIFFERENT}
    rms = root_mean_square(d[:, kept])
    record = {"objective": objective, "pairs": len(pairs), "features": {}, "left_out": left_out}
    values = np.empty(0)
    if kept:
        clusters = np.unique([pair.prompt_key for pair in pairs], return_inverse=True)[1]
        b = log_odds_with_intervals(bias_columns(d[:, kept], rms), clusters)
        ends = np.stack([b.values, b.low, b.high], axis=1).reshape(len(kept), 2, 3).tolist()
        for f, scale, (sign, size) in zip(kept, rms, ends, strict=True):
            record["features"][names[f]] = {
                "rms": float(scale),
                "sign": _estimate(sign),
                "size": _estimate(size),
                "share": _share(d[:, f]),
            }
        values = b.values
    return FittedBias(tuple(names[f] for f in kept), rms, values, record)


def _estimate(ends: Sequence[float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), ends, strict=True))


def _share(d: np.ndarray) -> dict[str, Any] | None:
    """Share of the pairs that differ in which the chosen response has more, and how many are alike."""
    more, differing = int((d > 0).sum()), int((d != 0).sum())
    if not differing:
        return None
    return wilson_interval(more, differing).to_json() | {"equal": int(len(d) - differing)}


# ------------------------------------------------------------------ for the training of one reward model
@dataclass(frozen=True)
class Debiasing:
    """The offsets of one reward model's training.

    Attributes:
        offsets: a of every pair that is read, by id.
        strength: s_0, of the reward model itself.
        strengths: s_m of its members.
    """

    bias: FittedBias
    offsets: Mapping[str, float]
    strength: float
    strengths: tuple[float, ...]

    def of(self, pairs: Sequence[PreferencePair]) -> Tensor:
        """a, float32 [n]."""
        return torch.tensor([self.offsets[pair.id] for pair in pairs])

    def of_members(self, pairs: Sequence[PreferencePair]) -> Tensor:
        """s_m a of each member, float32 [M, n]."""
        return torch.tensor(self.strengths)[:, None] * self.of(pairs)

    def held_out(self, pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase) -> HeldOutBias:
        """What metrics read of held-out pairs."""
        offsets = np.array([self.offsets[pair.id] for pair in pairs])
        sizes = dict(zip(self.bias.names, self.bias.columns(pairs, tokenizer)[:, 1::2].T, strict=True))
        prompts = [pair.prompt_key for pair in pairs]
        return HeldOutBias(offsets, self.strength, self.strengths, sizes, prompts, self.bias.record)


def prepare_debiasing(
    task: RewardTask, data: RewardPairs, tokenizer: PreTrainedTokenizerBase
) -> tuple[FittedBias | None, Debiasing | None]:
    """b and the offsets where the configuration names features of this objective; says what was found.

    Returns:
        What is kept in `debias.json`, and what trains; None and None where nothing is named, the latter also where every
        feature was left out.

    Raises:
        DataError: as `fit_bias`.
    """
    config, objective = task.config, task.objective
    if not (names := config.debias.of(objective)):
        return None, None
    trained = tokenize_reward_pairs(task, data.train, tokenizer).pairs
    bias = fit_bias(names, trained, tokenizer, objective=objective)
    for name, n in bias.record["left_out"].items():
        logger.warning(
            "%s: debias: %s differs in %d of %d pairs, fewer than %d, and is left out",
            *(task.name, name, n, len(trained), FEWEST_DIFFERENT),
        )
    if not bias.names:
        return bias, None
    for name, found in bias.record["features"].items():
        logger.info("%s: debias: %s", task.name, describe_feature(name, found))
    pairs = [*data.train, *data.fit, *data.val, *data.test]
    offsets = dict(zip((pair.id for pair in pairs), bias.offsets(pairs, tokenizer).tolist(), strict=True))
    members = config.ensemble.members
    several = (
        member_strengths(config.ensemble.debias_strengths, members)
        if members > 1
        else [config.debias.strength]
    )
    return bias, Debiasing(bias, offsets, config.debias.strength, tuple(several))


def describe_feature(name: str, found: Mapping[str, Any]) -> str:
    """The fit of one feature in words."""
    share = found["share"]
    sign, size = (
        f"{found[c]['value']:+.2f} [{found[c]['low']:+.2f}, {found[c]['high']:+.2f}]"
        for c in ("sign", "size")
    )
    return (
        f"{name}: the chosen response has more {features.MEANINGS[name]} in {share['value']:.1%} of the {share['n']} pairs that "
        f"differ; log-odds b for having more {sign}, and for each root mean square ({found['rms']:.3g}) more {size}"
    )


def read_bias(directory: Path) -> FittedBias | None:
    """The b that a finished reward model was trained with; None where nothing was named for it or every feature was left out."""
    path = directory / DEBIAS_FILE
    found = FittedBias.from_json(io.read_json(path)) if path.is_file() else None
    return found if found and found.names else None


# ------------------------------------------------------------------ scan
def scan_features(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any] | None]:
    """How often the chosen response has more of each feature, among the pairs that differ in it.

    Returns:
        By feature: `value`, `low`, `high` (Wilson 95 %), `n`, `equal`, and the exact two-sided `p` of a share of one half,
        `p_holm` corrected over the features; None where no pair differs.
    """
    names = tuple(features.MEANINGS)
    d = differences(names, pairs, tokenizer)
    found = {name: _share(d[:, f]) for f, name in enumerate(names)}
    present = [share for share in found.values() if share]
    for share in present:
        share["p"] = float(binomtest(round(share["value"] * share["n"]), share["n"], 0.5).pvalue)
    for share, adjusted in zip(present, holm([share["p"] for share in present]), strict=True):
        share["p_holm"] = float(adjusted)
    return found


def is_strong(share: Mapping[str, Any] | None) -> bool:
    """Whether labels follow a feature in more than `STRONG_SHARE` of pairs, either way, and not by chance."""
    if not share or share["p_holm"] >= SIGNIFICANT:
        return False
    return max(share["value"], 1 - share["value"]) > STRONG_SHARE


def scan_notes(scan: Mapping[str, dict[str, Any] | None], objective: str, named: Sequence[str]) -> list[str]:
    """One line for each strong association with a feature that the configuration does not name."""
    notes = []
    for name in (name for name, share in scan.items() if is_strong(share) and name not in named):
        share, listed = scan[name], ", ".join([*named, name])
        more = "more" if share["value"] > 0.5 else "fewer"
        value, low, high = share["value"], share["low"], share["high"]
        if more == "fewer":
            value, low, high = 1 - value, 1 - high, 1 - low
        notes.append(
            f"{objective}: the chosen response has {more} {features.MEANINGS[name]} in {value:.0%} [{low:.0%}, {high:.0%}] of "
            f"{share['n']} pairs that differ: a bias of the labels, which reward models and policies will follow, or what the "
            f"objective asks for; only a person knows. If it is a bias, name it: debias: {{features: {{{objective}: [{listed}]}}}}"
        )
    return notes
