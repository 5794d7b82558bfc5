"""Who judges sampled responses: reward models.

A judge gives every response of a prompt a number, higher is better; calibration and win rates are made of these numbers in
`evaluation.metrics`. A reward model judges well only if no policy was trained on it: by default it is trained on the `judge`
split (`rewards.train.train_judge`), or it is any one-logit classifier by folder or hub id.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prmd.artifacts import io
from prmd.artifacts.manifest import EVERYTHING
from prmd.artifacts.paths import stage_command
from prmd.artifacts.runs import read_run, require_artifact
from prmd.errors import DataError
from prmd.models.foreign import model_folder
from prmd.models.identity import weight_files
from prmd.models.tokenization import PrefixRow, tokenize_row
from prmd.pairs import Message, PreferencePair, hash_share, read_pairs
from prmd.rewards.reward_model import RewardModel, weights_keys
from prmd.statistics.intervals import accuracy_with_ties

logger = logging.getLogger(__name__)

JUDGE_REMEDY = "give the folder of a one-logit classifier, or remove the key to train a judge"
CARD_PAIRS = 256
"""Held-out pairs on which the accuracy of a judge that was not trained here is measured."""


@dataclass(frozen=True)
class Conversation:
    """A prompt and the responses to be judged."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]


@dataclass(frozen=True)
class RewardModelJudge:
    """A reward model as a judge.

    Attributes:
        objective: what it judges.
        name: how the configuration or the results call it.
        reward_model: its weights are loaded when something really has to be judged.
        fingerprint: of what its folder holds, the template included, and of the precision; results of different judges are
            never compared.
        accuracy: on held-out pairs; None until it was measured.
    """

    objective: str
    name: str
    reward_model: RewardModel
    fingerprint: str
    accuracy: dict[str, Any] | None = None

    def card(self) -> dict[str, Any]:
        """What is reported of it: `path`, `fingerprint`, `accuracy` (an estimate with `ties`)."""
        return {"path": self.name, "fingerprint": self.fingerprint, "accuracy": self.accuracy}

    def scores(self, conversations: Sequence[Conversation]) -> list[np.ndarray]:
        """One float64 array [n_responses] per conversation, the mean of the members where there are some; frees the model."""
        rows = [_row(self.reward_model.tokenizer, conversation) for conversation in conversations]
        rewards = self.reward_model.rewards(rows, description=f"{self.objective} judge")
        self.reward_model.release()
        return [values.mean(dim=1).numpy() for values in rewards]


def _row(tokenizer: Any, conversation: Conversation) -> PrefixRow:
    """Tokens by the judge's own template, as a plain user of the reward model would make them."""
    return tokenize_row(tokenizer, conversation.prompt, conversation.responses, keep_suffix=True)


def trained_judge(objective: str, reward_model: RewardModel) -> RewardModelJudge:
    """The judge that `train_judge` left in the reward model's folder, with its accuracy on the test split."""
    directory = reward_model.directory
    name = directory.relative_to(reward_model.paths.root).as_posix()
    check_judge(directory, what=f"the {objective} judge {name}")
    accuracy = io.read_json(directory / "metrics.json")["accuracy"]
    return RewardModelJudge(objective, name, reward_model, _fingerprint(reward_model), accuracy)


def given_judge(objective: str, name: str, load: Callable[[Path], RewardModel]) -> RewardModelJudge:
    """The judge `judges.paths` names for an objective, its accuracy measured on held-out pairs of the approach.

    Args:
        name: what `judges.paths` gives, a folder or hub id, `@revision` behind it.
        load: opens a reward model's folder.
    """
    directory = judge_folder(name, objective)
    check_judge(directory, what=f"the {objective} judge {name}")
    weight_files(directory)  # first, so that a folder without a model says just that
    reward_model = load(directory)
    paths = reward_model.paths
    if directory == paths.reward_model(objective).resolve():
        logger.warning(
            "judges.paths.%s: policies are trained on this reward model, its verdicts flatter them", objective
        )
    judge = RewardModelJudge(objective, name, reward_model, _fingerprint(reward_model))
    pairs = sorted(read_pairs(paths, objective, "test"), key=lambda p: hash_share("judge card", p.id))
    return replace(judge, accuracy=judge_accuracy(judge, pairs[:CARD_PAIRS]))


def _fingerprint(reward_model: RewardModel) -> str:
    """Key of its folder and of the precision."""
    files = weights_keys(reward_model.directory, reward_model.paths)[0]
    return io.fingerprint([files, reward_model.base_model.dtype])


def check_judge(directory: Path, *, what: str) -> None:
    """Refuse the folder of a judge that was finished here and whose files were lost or changed.

    Raises:
        DataError: names the file and the command that makes it again.
    """
    if read_run(directory) is not None:
        require_artifact(directory, what=what, command=stage_command("compute_metrics"), read=EVERYTHING)


def judge_accuracy(judge: RewardModelJudge, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """Share of pairs whose chosen response the judge scores higher, ties one half and counted: a Wilson estimate."""
    scored = judge.scores([Conversation(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs])
    return accuracy_with_ties(np.array([values[0] - values[1] for values in scored]))


def judge_folder(name: str, objective: str) -> Path:
    """The local folder of a judge given by path or hub id, `@revision` behind it (fetched into the hub's own cache).

    Raises:
        ConfigError: it is neither an existing folder nor a hub id that can be reached.
    """
    return model_folder(name, f"judges.paths.{objective}", JUDGE_REMEDY)[0]


def check_scores(scores: np.ndarray, judge: RewardModelJudge) -> None:
    """Refuse verdicts nothing can be computed from.

    Args:
        scores: of all reference samples, [X, n].

    Raises:
        DataError: a score is not finite, or the judge gives all samples of every prompt the same score.
    """
    where = f"{judge.card()['path']} ({judge.objective} judge)"
    if not np.isfinite(scores).all():
        raise DataError(
            f"{where}: {int((~np.isfinite(scores)).sum())} scores are not finite; train or choose another judge"
        )
    if (np.ptp(scores, axis=1) <= 1e-12 * np.abs(scores).max()).all():
        raise DataError(
            f"{where}: scores all {scores.shape[1]} reference samples of every prompt the same, so its scale cannot be "
            "fitted; raise generation.max_new_tokens or samples_per_prompt, or choose another judge"
        )
