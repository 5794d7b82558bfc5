"""A reward model's folder: rewards of r_0 and of its members, what is cached, whose calibration is accepted."""

import weakref

import pytest
import torch
from model_families import separate_rewards
from tiny_models import tiny_classifier
from transformers import AutoModelForSequenceClassification

from prmd.artifacts import io
from prmd.config.shared import EnsembleConfig, ModelConfig, RewardModelConfig
from prmd.errors import DataError
from prmd.models.tokenization import PrefixRow, tokenize_row
from prmd.pessimism.calibration import fit_calibration
from prmd.rewards import reward_model as rewards_reward_model
from prmd.rewards.heads import fit_ensemble
from prmd.rewards.reward_model import ENSEMBLE_FILE, load_reward_model, write_calibration

TEXTS = [
    ("why?", ("I do not know", "no")),
    ("what is it?", ("It is a test", "yes", "the fox")),
    ("Q", ("A", "B")),
]


def config_at(root, dtype="float32"):
    return RewardModelConfig(
        artifact_root=str(root), model=ModelConfig(name="unused", revision=None, dtype=dtype)
    )


@pytest.fixture
def folder(tmp_path):
    return tiny_classifier(tmp_path / "rm")


def rows_for(reward_model) -> list[PrefixRow]:
    return [
        tokenize_row(reward_model.tokenizer, [{"role": "user", "content": q}], answers, keep_suffix=True)
        for q, answers in TEXTS
    ]


def add_ensemble(reward_model, *, members=3, seed=0) -> None:
    found = torch.cat(reward_model.features(rows_for(reward_model), description="test"))
    ensemble = fit_ensemble(
        chosen_features=found[:3, 1:],
        rejected_features=found[3:6, 1:],
        chosen_rewards=found[:3, 0],
        rejected_rewards=found[3:6, 0],
        pair_ids=["a", "b", "c"],
        config=EnsembleConfig(members=members),
        seed=seed,
    )
    ensemble.save(reward_model.directory / ENSEMBLE_FILE)


@pytest.fixture
def quick_fit(monkeypatch):
    monkeypatch.setattr("prmd.rewards.heads.FIT_STEPS", 5)


def test_a_plain_classifier_is_a_reward_model_of_one_member(tmp_path, folder):
    model = load_reward_model(folder, shared=config_at(tmp_path))
    rows = rows_for(model)
    found = model.rewards(rows, description="test")
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = separate_rewards(plain, rows).double()
    assert model.members == 1
    assert [value.shape for value in found] == [(2, 1), (3, 1), (2, 1)]
    torch.testing.assert_close(torch.cat(found)[:, 0], expected, rtol=0, atol=1e-5)


def test_the_default_bfloat16_scores(tmp_path, folder):
    model = load_reward_model(folder, shared=config_at(tmp_path, "bfloat16"))
    exact = load_reward_model(folder, shared=config_at(tmp_path))
    assert model.fingerprint != exact.fingerprint
    found, expected = (torch.cat(m.rewards(rows_for(m), description="test")) for m in (model, exact))
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    assert model.model.dtype == torch.bfloat16


@pytest.mark.usefixtures("quick_fit")
def test_members_add_their_heads_to_the_base_reward(tmp_path, folder):
    plain = load_reward_model(folder, shared=config_at(tmp_path))
    add_ensemble(plain)
    model = load_reward_model(folder, shared=config_at(tmp_path))
    rows = rows_for(model)
    features = torch.cat(model.features(rows, description="test"))
    expected = model.ensemble.rewards(features[:, 1:], features[:, 0])
    found = torch.cat(model.rewards(rows, description="test"))
    assert found.shape == (7, 3)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)
    assert found.std(dim=1).min() > 0
    assert model.backbone_fingerprint == plain.backbone_fingerprint
    assert model.fingerprint != plain.fingerprint


@pytest.mark.usefixtures("quick_fit")
def test_other_heads_share_the_features_and_not_the_rewards(tmp_path, folder):
    add_ensemble(load_reward_model(folder, shared=config_at(tmp_path)))
    first = load_reward_model(folder, shared=config_at(tmp_path))
    before = torch.cat(first.rewards(rows_for(first), description="test"))
    add_ensemble(first, seed=1)
    second = load_reward_model(folder, shared=config_at(tmp_path))
    assert not torch.allclose(torch.cat(second.rewards(rows_for(second), description="test")), before)
    assert len(list(config_at(tmp_path).paths.cache("features", "x").parent.glob("features-*"))) == 1


def test_what_is_cached_needs_no_model(tmp_path, folder, monkeypatch):
    model = load_reward_model(folder, shared=config_at(tmp_path))
    expected = torch.cat(model.rewards(rows_for(model), description="test"))
    monkeypatch.setattr(rewards_reward_model, "load_classifier", None)
    again = load_reward_model(folder, shared=config_at(tmp_path))
    assert torch.equal(torch.cat(again.rewards(rows_for(again), description="test")), expected)


def test_a_calibration_of_other_weights_is_refused(tmp_path, folder):
    model = load_reward_model(folder, shared=config_at(tmp_path))
    assert model.calibration is None
    generator = torch.Generator().manual_seed(0)
    fitted = fit_calibration(
        torch.randn(8, 1, dtype=torch.float64, generator=generator), torch.arange(8) // 2
    )
    write_calibration(model, fitted, source="reference_samples")
    assert load_reward_model(folder, shared=config_at(tmp_path)).calibration is not None
    tensors = io.read_tensors(folder / "model.safetensors")
    io.write_tensors(
        folder / "model.safetensors", {k: v + 0.01 for k, v in tensors.items()}, {"format": "pt"}
    )
    with pytest.raises(DataError, match=r"calibration\.json: belongs to reward model .*--force"):
        load_reward_model(folder, shared=config_at(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path, folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no \.safetensors weights"):
        load_reward_model(folder, shared=config_at(tmp_path))


def test_the_checkpoint_is_loaded_with_the_configured_attention_and_freed(tmp_path, folder, monkeypatch):
    config = config_at(tmp_path)
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention": "sdpa"})})
    model, asked, real = load_reward_model(folder, shared=config), [], rewards_reward_model.load_classifier

    def load(directory, dtype, *, attention, trust):
        asked.append((directory, dtype, attention))
        assert trust is False
        return real(directory, dtype, attention=attention)

    monkeypatch.setattr(rewards_reward_model, "load_classifier", load)
    rows = rows_for(model)
    model.rewards(rows[:2], description="test")
    weights = weakref.ref(model.model)
    model.rewards(rows, description="test")
    assert asked == [(folder, "float32", "sdpa")]
    model.release()
    assert weights() is None
