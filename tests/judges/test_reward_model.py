"""`judges`: scores are those a plain transformers user reads, accuracy counts ties, and bad judges are one clear line."""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_causal_lm, tiny_classifier
from tiny_workspace import PAIRS, evaluation_config, write_prepared
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prmd.artifacts import io
from prmd.config.evaluation import EvaluationConfig, JudgeConfig
from prmd.errors import ConfigError, DataError
from prmd.judges.reward_model import (
    Conversation,
    RewardModelJudge,
    check_scores,
    given_judge,
    judge_accuracy,
    judge_folder,
    trained_judge,
)
from prmd.pairs import make_pair, read_pairs
from prmd.rewards.reward_model import load_reward_model

PROMPT = ({"role": "user", "content": "Why is the sky blue?"},)
CONVERSATIONS = [
    Conversation(PROMPT, ("I do not know.", "", "The quick brown fox.")),
    Conversation(
        (*PROMPT, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Yes?"}),
        ("a", "b", "a"),
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("judge"), seed=3)


@pytest.fixture
def config(tmp_path: Path, folder: Path) -> EvaluationConfig:
    config = evaluation_config(tmp_path, judges=JudgeConfig(paths={"helpful": str(folder)}))
    write_prepared(config.paths)
    return config


def plain_reward(folder: Path, prompt: tuple[dict[str, str], ...], response: str) -> float:
    """What a user of the classifier who knows nothing of this project gets."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [*prompt, {"role": "assistant", "content": response}], return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        return float(model(**ids).logits[0, 0])


def judge_of(config: EvaluationConfig) -> RewardModelJudge:
    """The judge of helpfulness that the configuration gives."""
    load = partial(load_reward_model, shared=config.shared)
    return given_judge("helpful", config.judges.paths["helpful"], load)


class LengthJudge:
    """Scores a response by its length: what a verdict is can be told without a model."""

    objective, fingerprint = "helpful", "length"

    def card(self) -> dict[str, object]:
        return {"path": "length", "fingerprint": "length", "accuracy": None}

    def scores(self, conversations: list[Conversation]) -> list[np.ndarray]:
        return [np.array([float(len(r)) for r in c.responses]) for c in conversations]


def test_scores_are_those_of_a_plain_user(config: EvaluationConfig, folder: Path) -> None:
    scores = judge_of(config).scores(CONVERSATIONS)
    assert [s.shape for s in scores] == [(3,), (3,)]
    for conversation, found in zip(CONVERSATIONS, scores, strict=True):
        wanted = [plain_reward(folder, conversation.prompt, r) for r in conversation.responses]
        assert found == pytest.approx(wanted, abs=1e-5)
    assert scores[1][0] == scores[1][2] != scores[1][1]


def test_the_card_of_a_given_judge_is_measured_on_held_out_pairs(
    config: EvaluationConfig, folder: Path
) -> None:
    card = judge_of(config).card()
    pairs = read_pairs(config.paths, "helpful", "test")
    right = [
        plain_reward(folder, p.prompt, p.chosen) > plain_reward(folder, p.prompt, p.rejected) for p in pairs
    ]
    assert card["path"] == str(folder)
    assert card["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert (card["accuracy"]["n"], card["accuracy"]["ties"]) == (PAIRS, 0)
    assert card["accuracy"]["low"] < card["accuracy"]["value"] < card["accuracy"]["high"] or np.mean(
        right
    ) in (0, 1)


def test_accuracy_counts_ties_one_half() -> None:
    judge: Any = LengthJudge()
    texts = [("long", "a"), ("a", "long"), ("ab", "cd"), ("abc", "a")]
    pairs = [
        make_pair(prompt=PROMPT, chosen=c, rejected=r, source="s:1", objective="helpful") for c, r in texts
    ]
    found = judge_accuracy(judge, pairs)
    assert (found["value"], found["ties"], found["n"]) == (2.5 / 4, 1, 4)


def test_a_trained_judge_brings_its_own_accuracy(config: EvaluationConfig, folder: Path) -> None:
    directory = config.paths.judge("honest")
    shutil.copytree(folder, directory)
    accuracy = {"value": 0.7, "low": 0.5, "high": 0.8, "n": 30, "ties": 0}
    io.write_json(directory / "metrics.json", {"accuracy": accuracy})
    judge = trained_judge("honest", load_reward_model(directory, shared=config.shared))
    assert judge.card() == {
        "path": "models/judges/embedded/honest",
        "fingerprint": judge_of(config).fingerprint,  # the same weights
        "accuracy": accuracy,
    }


def test_other_weights_have_another_fingerprint(config: EvaluationConfig, tmp_path: Path) -> None:
    other = tiny_classifier(tmp_path / "other", seed=4)
    changed = config.model_copy(update={"judges": JudgeConfig(paths={"helpful": str(other)})})
    assert judge_of(changed).fingerprint != judge_of(config).fingerprint


def test_judging_by_the_training_reward_model_is_said(
    config: EvaluationConfig, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = config.paths.reward_model("helpful")
    shutil.copytree(folder, directory)
    with caplog.at_level(logging.WARNING):
        judge_of(config.model_copy(update={"judges": JudgeConfig(paths={"helpful": str(directory)})}))
    assert "its verdicts flatter them" in caplog.text


def test_a_judge_that_cannot_be_found_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no connection")

    monkeypatch.setattr("prmd.models.foreign.snapshot_download", unreachable)
    with pytest.raises(
        ConfigError, match=r"judges\.paths\.honest: 'some/judge' .*no connection.*remove the key"
    ):
        judge_folder("some/judge", "honest")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"judges\.paths\.honest"):
        judge_folder("not/a/hub/id", "honest")


@pytest.mark.parametrize(("name", "revision"), [("some/judge", None), ("some/judge@v1", "v1")])
def test_a_hub_id_is_fetched_at_its_revision_with_its_members(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, revision: str | None
) -> None:
    asked = []

    def fetch(name: str, **how: Any) -> str:
        asked.append((name, how["revision"], how["ignore_patterns"]))
        return str(folder)

    monkeypatch.setattr("prmd.models.foreign.snapshot_download", fetch)
    assert judge_folder(name, "honest") == folder
    assert asked == [("some/judge", revision, [])]


def test_a_base_model_is_no_judge(config: EvaluationConfig, tmp_path: Path) -> None:
    base = tiny_causal_lm(tmp_path / "base-model")
    with pytest.raises(DataError, match="no trained one-logit 'score' head"):
        judge_of(config.model_copy(update={"judges": JudgeConfig(paths={"helpful": str(base)})}))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[1.0, 1.0], [2.0, 2.0]], "scores all 2 reference samples of every prompt the same"),
        ([[1.0, float("nan")], [2.0, 3.0]], "1 scores are not finite"),
    ],
)
def test_verdicts_nothing_can_be_computed_from_are_refused(scores: list[list[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_scores(np.array(scores), LengthJudge())


def test_verdicts_that_differ_anywhere_pass() -> None:
    check_scores(np.array([[1.0, 1.0], [2.0, 2.5]]), LengthJudge())


def test_a_judge_says_what_it_judges(config: EvaluationConfig) -> None:
    judge = judge_of(config)
    assert judge.objective == "helpful" and judge.card()["accuracy"]["n"] == PAIRS
