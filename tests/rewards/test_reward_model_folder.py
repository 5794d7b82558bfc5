"""Scores of a trained reward model's folder: as a plain transformers user reads them, cached, and refused where they do not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_causal_lm, tiny_classifier
from tiny_pipeline import count_loads, no_model_loads, shards
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prmd.artifacts import io
from prmd.config.shared import DataConfig, ModelConfig, RewardModelConfig
from prmd.errors import DataError
from prmd.models.tokenization import PrefixRow, tokenize_row
from prmd.pessimism.calibration import Calibration
from prmd.rewards.heads import Ensemble, initial_heads
from prmd.rewards.reward_model import (
    CALIBRATION_FILE,
    ENSEMBLE_FILE,
    RewardModel,
    load_reward_model,
    write_calibration,
)

PROMPTS = (
    [{"role": "user", "content": "why is the sky blue"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "and a much longer question, asked twice?"},
    ],
)
RESPONSES = ("yes", "no, it is not; I do not know")
MEMBERS, WIDTH = 3, 32


@pytest.fixture
def config(tmp_path: Path) -> RewardModelConfig:
    return RewardModelConfig(
        artifact_root=str(tmp_path / "root"),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name="unused", revision=None, dtype="float32"),
        scoring_tokens=200,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier with three heads."""
    path = tiny_classifier(tmp_path / "rm", seed=3)
    heads = initial_heads(WIDTH, MEMBERS, seed=5)
    heads |= {"mean": torch.linspace(-1, 1, WIDTH), "std": torch.linspace(0.5, 2, WIDTH)}
    Ensemble(heads).save(path / ENSEMBLE_FILE)
    return path


def rows_of(model: RewardModel) -> list[PrefixRow]:
    return [tokenize_row(model.tokenizer, prompt, RESPONSES, keep_suffix=True) for prompt in PROMPTS]


def plain_rewards(folder: Path) -> np.ndarray:
    """As any transformers user would score the folder, all conversations in one padded batch: [2, 2]."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[*prompt, {"role": "assistant", "content": text}] for prompt in PROMPTS for text in RESPONSES]
    batch = tokenizer.apply_chat_template(chats, return_tensors="pt", return_dict=True, padding=True)
    with torch.no_grad():
        return model(**batch).logits[:, 0].reshape(2, 2).numpy()


def test_features_hold_the_reward_a_plain_user_reads(folder: Path, config: RewardModelConfig) -> None:
    model = load_reward_model(folder, shared=config)
    found = torch.stack(model.features(rows_of(model), description="t"))
    assert found.shape == (2, 2, 1 + WIDTH)
    assert found[..., 0].numpy() == pytest.approx(plain_rewards(folder), abs=1e-5)


def test_members_add_their_heads_to_that_reward(folder: Path, config: RewardModelConfig) -> None:
    model = load_reward_model(folder, shared=config)
    rewards = torch.stack(model.rewards(rows_of(model), description="t"))
    assert rewards.shape == (2, 2, MEMBERS) and rewards.dtype == torch.float64 and model.members == MEMBERS
    found = torch.stack(model.features(rows_of(model), description="t")).double().numpy()
    heads = {k: v.double().numpy() for k, v in io.read_tensors(folder / ENSEMBLE_FILE).items()}
    h = (found[..., 1:] - heads["mean"]) / heads["std"]
    for m in range(MEMBERS):
        hidden = np.maximum(h @ heads["weight1"][m] + heads["bias1"][m], 0)
        hidden = np.maximum(hidden @ heads["weight2"][m] + heads["bias2"][m], 0)
        expected = plain_rewards(folder) + (hidden @ heads["weight3"][m] + heads["bias3"][m])[..., 0]
        assert rewards[..., m].numpy() == pytest.approx(expected, abs=1e-4)


def test_a_folder_without_heads_is_the_reward_model_alone(folder: Path, config: RewardModelConfig) -> None:
    (folder / ENSEMBLE_FILE).unlink()
    model = load_reward_model(folder, shared=config)
    assert model.members == 1 and model.calibration is None
    rewards = torch.stack(model.rewards(rows_of(model), description="t"))
    assert rewards[..., 0].numpy() == pytest.approx(plain_rewards(folder), abs=1e-5)


def test_scores_are_computed_once(
    folder: Path, config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_reward_model(folder, shared=config)
    loads = count_loads(monkeypatch)
    first = model.rewards(rows_of(model)[:1], description="t")
    both = model.rewards(rows_of(model), description="t")
    assert len(loads) == 1 and torch.equal(both[0], first[0])
    no_model_loads(monkeypatch)
    before = shards(config.paths.root)
    again = load_reward_model(folder, shared=config).rewards(rows_of(model), description="t")
    assert all(map(torch.equal, again, both)) and shards(config.paths.root) == before


def test_other_weights_heads_or_precision_are_other_tables(folder: Path, config: RewardModelConfig) -> None:
    first = load_reward_model(folder, shared=config)
    half = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    in_bfloat16 = load_reward_model(folder, shared=half)
    heads = io.read_tensors(folder / ENSEMBLE_FILE)
    Ensemble({**heads, "bias3": heads["bias3"] + 1}).save(folder / ENSEMBLE_FILE)
    other_heads = load_reward_model(folder, shared=config)
    tiny_classifier(folder, seed=4)
    other_weights = load_reward_model(folder, shared=config)
    models = (first, in_bfloat16, other_heads, other_weights)
    assert len({m.fingerprint for m in models}) == 4
    assert other_heads.backbone_fingerprint == first.backbone_fingerprint  # its features are still good
    assert len({m.backbone_fingerprint for m in models}) == 3


def test_calibration_is_read_back_and_belongs_to_its_weights(folder: Path, config: RewardModelConfig) -> None:
    model = load_reward_model(folder, shared=config)
    calibration = Calibration(
        torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([0.1, 0.2, 0.3]).double(), 5, 10
    )
    write_calibration(model, calibration, source=config.calibration.source)
    read = load_reward_model(folder, shared=config).calibration
    assert torch.equal(read.scale, calibration.scale) and torch.equal(read.offset, calibration.offset)
    assert (read.n_prompts, read.n_responses) == (5, 10)
    record = io.read_json(folder / CALIBRATION_FILE)
    assert set(record) == {"reward_model", "template", "data", "source", "calibration"}
    heads = io.read_tensors(folder / ENSEMBLE_FILE)
    Ensemble({**heads, "bias3": heads["bias3"] + 1}).save(folder / ENSEMBLE_FILE)
    with pytest.raises(DataError, match=r"belongs to reward model .* --force"):
        load_reward_model(folder, shared=config)


def test_calibration_of_another_precision_or_template_is_refused(
    folder: Path, config: RewardModelConfig
) -> None:
    model = load_reward_model(folder, shared=config)
    ones = torch.ones(MEMBERS, dtype=torch.float64)
    write_calibration(model, Calibration(ones, ones, 2, 4), source=config.calibration.source)
    half = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(DataError, match=r"model\.dtype"):
        load_reward_model(folder, shared=half)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant: ")
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match="template"):
        load_reward_model(folder, shared=config)


def test_a_folder_without_weights_or_without_a_trained_head_is_refused(
    tmp_path: Path, config: RewardModelConfig
) -> None:
    base = tiny_causal_lm(tmp_path / "base")
    model = load_reward_model(base, shared=config)
    with pytest.raises(DataError, match="no trained one-logit 'score' head"):
        model.rewards(rows_of(model), description="t")
    (base / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no \.safetensors weights"):
        load_reward_model(base, shared=config)


def test_a_score_that_is_not_finite_is_not_cached(folder: Path, config: RewardModelConfig) -> None:
    heads = io.read_tensors(folder / ENSEMBLE_FILE)
    Ensemble({**heads, "bias3": heads["bias3"] * 0 + float("nan")}).save(folder / ENSEMBLE_FILE)
    model = load_reward_model(folder, shared=config)
    with pytest.raises(DataError, match="not finite; nothing was cached"):
        model.rewards(rows_of(model), description="t")
    assert not shards(config.paths.root)
