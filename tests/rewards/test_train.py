"""What a reward model is trained on, when it is trained again, and what is refused before anything is loaded."""

import logging
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_causal_lm
from tiny_pipeline import no_model_loads
from tiny_workspace import reward_model_config, write_prepared

from prmd.artifacts import io
from prmd.config.evaluation import EvaluationConfig
from prmd.config.shared import EnsembleConfig, RewardModelConfig, TrainingConfig
from prmd.errors import ConfigError, DataError
from prmd.models.loading import load_tokenizer
from prmd.objectives import OBJECTIVES
from prmd.pairs import read_pairs
from prmd.rewards import fitting
from prmd.rewards.task import RewardTask, read_reward_pairs
from prmd.rewards.train import train_judge, train_reward_model


@pytest.fixture
def config(tmp_path: Path) -> RewardModelConfig:
    config = reward_model_config(
        tmp_path / "root",
        tiny_causal_lm(tmp_path / "base"),
        training=TrainingConfig(max_length=200),
        ensemble=EnsembleConfig(members=3, fit_fraction=0.4),
    )
    write_prepared(config.paths, pairs=20)
    return config


def task_of(config: RewardModelConfig, split: str = "train") -> Any:
    directory = config.paths.reward_model("helpful")
    return RewardTask(config, "helpful", split, directory, ("t",))


def changed(config: RewardModelConfig, section: str, **values: Any) -> RewardModelConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


# ------------------------------------------------------------------ data
def test_heads_are_fit_on_pairs_the_backbone_never_sees(config: RewardModelConfig) -> None:
    data = read_reward_pairs(task_of(config))
    train, fit = {p.id for p in data.train}, {p.id for p in data.fit}
    everything = {p.id for p in read_pairs(config.paths, "helpful", "train")}
    assert not train & fit and train | fit == everything and 2 <= len(fit) <= 16
    more = read_reward_pairs(task_of(changed(config, "ensemble", fit_fraction=0.7)))
    assert fit < {p.id for p in more.fit}  # a hash decides: a larger share is a superset
    assert not (train | fit) & {p.id for p in data.val + data.test}


def test_one_member_leaves_all_pairs_to_the_backbone(config: RewardModelConfig) -> None:
    data = read_reward_pairs(task_of(changed(config, "ensemble", members=1)))
    assert len(data.train) == 20 and data.fit == []
    assert data.describe(task_of(config)) == "helpful reward model: 20 train pairs"


def test_max_pairs_limits_and_a_judge_reads_its_own_split(config: RewardModelConfig) -> None:
    limited = changed(config, "training", max_pairs=9)
    data = read_reward_pairs(task_of(limited))
    assert len(data.train) + len(data.fit) == 9
    assert data.describe(task_of(limited)) == (
        f"helpful reward model: 20 train pairs, 9 of them used (training.max_pairs): {len(data.train)} train the model, "
        f"{len(data.fit)} fit its heads (ensemble.fit_fraction)"
    )
    alone = changed(limited, "ensemble", members=1)
    judge = read_reward_pairs(task_of(alone, "judge"))
    assert {p.id for p in judge.train} < {p.id for p in read_pairs(config.paths, "helpful", "judge")}


# ------------------------------------------------------------------ when it is trained again
def test_fingerprint_covers_what_the_artifact_depends_on(config: RewardModelConfig, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(config.model, config.paths)

    def key(changed_config: RewardModelConfig) -> str:
        return task_of(changed_config).fingerprints(tokenizer)[0]

    first = key(config)
    different = [
        changed(config, "training", learning_rate=2e-5),
        changed(config, "ensemble", anchor=2.0),
        changed(config, "calibration", prompts=7),
        changed(config, "model", dtype="bfloat16"),
        config.model_copy(update={"seed": 1}),
        changed(config, "model", name=str(tiny_causal_lm(tmp_path / "other", seed=9))),
    ]
    keys = [key(c) for c in different]
    assert first not in keys and len(set(keys)) == len(keys)
    same = [
        config.model_copy(update={"report_to": ()}),
        config.model_copy(update={"scoring_tokens": 1}),
        changed(config, "model", name=str(tiny_causal_lm(tmp_path / "moved"))),
    ]
    assert {key(c) for c in same} == {first}
    io.write_jsonl(config.paths.split("harmless", "train"), [])  # another objective's training pairs
    assert key(config) == first
    path = config.paths.split("harmless", "val")  # whose prompts calibrate this model too
    io.write_jsonl(path, io.read_jsonl(path)[1:])
    assert key(config) != first


def test_an_edited_template_is_another_reward_model(config: RewardModelConfig) -> None:
    tokenizer = load_tokenizer(config.model, config.paths)
    first = task_of(config).fingerprints(tokenizer)[0]
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant: ")
    assert task_of(config).fingerprints(tokenizer)[0] != first


# ------------------------------------------------------------------ refused before a model is loaded
@pytest.mark.parametrize(("share", "left"), [(0.0, "leaves 20 .* and 0 "), (1.0, "leaves 0 .* and 20 ")])
def test_a_fit_share_that_leaves_nothing_is_refused(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch, share: float, left: str
) -> None:
    no_model_loads(monkeypatch)
    with pytest.raises(ConfigError, match=rf"ensemble\.fit_fraction: .*{left}"):
        train_reward_model(changed(config, "ensemble", fit_fraction=share), objective="helpful")
    assert not config.paths.reward_model("helpful").parent.exists()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_empty_split_that_is_needed_is_refused_first(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch, objective: str, split: str
) -> None:
    """Of the other objectives only the validation prompts are needed, to calibrate."""
    no_model_loads(monkeypatch)
    io.write_jsonl(config.paths.split(objective, split), [])
    if objective != "helpful" and split != "val":
        expected: type[Exception] = AssertionError  # of `no_model_loads`: it got as far as loading
        message = "a model was loaded"
    else:
        expected, message = DataError, f"the {split} split of {objective} is empty"
    with pytest.raises(expected, match=message):
        train_reward_model(config, objective="helpful")


def test_a_judge_is_trained_without_heads_and_without_calibration(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fitting, "reference_samples", lambda *a: pytest.fail("sampled for a judge"))
    caplog.set_level(logging.WARNING, logger="prmd")
    judges = {
        "training": TrainingConfig(
            epochs=0.5, max_pairs=8, max_length=200, learning_rate=1e-3, checkpoints=(1.0,)
        )
    }
    evaluation = EvaluationConfig(reward_model_config=config)
    evaluation = evaluation.model_copy(update={"judges": evaluation.judges.model_copy(update=judges)})
    folder = train_judge(evaluation, objective="honest")
    assert folder == config.paths.judge("honest")
    metrics = io.read_json(folder / "metrics.json")
    assert metrics["sizes"] == {"train": 8, "fit": 0, "val": 20, "test": 20} and metrics["members"] == 1
    assert {"model.safetensors", "config.json", "tokenizer.json", "run.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert not (folder / "ensemble.safetensors").exists() and not config.paths.reward_analysis.exists()
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"end", "best"}
    stamp = (folder / "run.json").read_bytes()
    train_judge(evaluation, objective="honest")
    assert (folder / "run.json").read_bytes() == stamp
