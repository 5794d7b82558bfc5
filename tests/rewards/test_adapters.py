"""Reward models on one base: the rewards of their merged checkpoints, one load, memory given back, and when it is refused."""

import logging
import weakref
from pathlib import Path

import pytest
import torch
from model_families import separate_rewards
from peft import PeftModel
from tiny_models import tiny_causal_lm
from tiny_pipeline import count_loads
from tiny_policies import tokens_of, trained_on
from tiny_workspace import write_prepared
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prmd.artifacts import io
from prmd.config.policy import PolicyConfig
from prmd.config.shared import (
    CalibrationConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    RewardModelConfig,
    TrainingConfig,
)
from prmd.models.loading import add_lora, load_base_classifier, load_tokenizer, save_merged
from prmd.models.tokenization import PrefixRow, tokenize_row
from prmd.objectives import OBJECTIVES
from prmd.pessimism.calibration import Calibration
from prmd.policies.scores import score_pairs
from prmd.rewards.adapters import shared_base
from prmd.rewards.reward_model import RewardModel, load_reward_model, load_reward_models, write_calibration

TEXTS = [
    ("why?", ("I do not know", "no")),
    ("what is it?", ("It is a test", "yes")),
    ("Q", ("the quick brown fox", "B")),
]


def config_at(root: Path, dtype: str = "float32") -> RewardModelConfig:
    return RewardModelConfig(
        artifact_root=str(root),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(root / "base"), revision=None, dtype=dtype),
        calibration=CalibrationConfig(source="validation_responses"),
    )


def write_base(folder: Path, dtype: str = "float32", *, seed: int = 0) -> None:
    tiny_causal_lm(folder, seed=seed)
    if dtype != "float32":
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(folder)


def write_reward_models(config: RewardModelConfig) -> list[Path]:
    """Adapters with random B matrices and heads, merged as training leaves them."""
    tokenizer = load_tokenizer(config.model, config.paths)
    folders = []
    for seed, objective in enumerate(OBJECTIVES):
        base = load_base_classifier(config.model, config.paths, pad_token_id=0, master_weights=True)
        torch.manual_seed(100 + seed)
        model = add_lora(base, LoraConfig(r=4, alpha=8), task="SEQ_CLS")
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.data.normal_(0, 0.3)
        folders.append(config.paths.reward_model(objective))
        save_merged(model, tokenizer, folders[-1], dtype=config.model.dtype)
        io.write_json(folders[-1] / "run.json", {"fingerprint": objective})
        calibration = Calibration(torch.full((1,), 1.5 + seed).double(), torch.full((1,), 0.2).double(), 2, 4)
        reward_model = load_reward_model(folders[-1], shared=config)
        write_calibration(reward_model, calibration, source=config.calibration.source)
    return folders


def rows_for(model: RewardModel, texts: list = TEXTS) -> list[PrefixRow]:
    return [
        tokenize_row(model.tokenizer, [{"role": "user", "content": q}], answers, keep_suffix=True)
        for q, answers in texts
    ]


def rewards(model: RewardModel, texts: list = TEXTS) -> torch.Tensor:
    return torch.stack(model.rewards(rows_for(model, texts), description="test"))[..., 0]


def plain_rewards(model: RewardModel, texts: list = TEXTS) -> torch.Tensor:
    """Those of the merged checkpoint as any transformers user loads it, one conversation at a time."""
    plain = AutoModelForSequenceClassification.from_pretrained(model.directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return separate_rewards(plain, rows_for(model, texts)).double().view(len(texts), -1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RewardModelConfig:
    """A float32 base and three reward models that are adapters of it."""
    config = config_at(tmp_path_factory.mktemp("trained"))
    write_base(Path(config.model.name))
    write_reward_models(config)
    return config


@pytest.fixture
def config(trained: RewardModelConfig, tmp_path: Path) -> RewardModelConfig:
    """The same with a cache of its own, in which nothing has been scored."""
    for name in ("base", "models"):
        (tmp_path / "root").mkdir(exist_ok=True)
        _copy(Path(trained.artifact_root) / name, tmp_path / "root" / name)
    return config_at(tmp_path / "root")


def _copy(source: Path, target: Path) -> None:
    for path in (p for p in source.rglob("*") if p.is_file()):
        io.copy_file(path, target / path.relative_to(source))


def test_one_load_serves_three_reward_models_with_the_rewards_of_their_checkpoints(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = load_reward_models(config)
    loads = count_loads(monkeypatch)
    found = [rewards(model, TEXTS[:2]) for model in models]
    again = [rewards(model, TEXTS[2:]) for model in reversed(models)][::-1]  # switched back and forth
    assert loads == ["LlamaForSequenceClassification"]
    for model, first, last in zip(models, found, again, strict=True):
        torch.testing.assert_close(torch.cat([first, last]), plain_rewards(model), rtol=0, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=0.1)
    assert not torch.allclose(found[1], found[2], atol=0.1)


def test_released_weights_are_gone(config: RewardModelConfig) -> None:
    [first, *_] = models = load_reward_models(config)
    rewards(first)
    network = weakref.ref(first.model.get_base_model())
    for model in models:
        model.release()
    assert network() is not None
    first.shared_base.release()
    assert network() is None


def test_in_bfloat16_they_are_the_rewards_of_the_rounded_checkpoint(tmp_path: Path) -> None:
    config = config_at(tmp_path, "bfloat16")
    write_base(Path(config.model.name), "bfloat16")
    write_reward_models(config)
    for model in load_reward_models(config):
        on_base = rewards(model)
        assert isinstance(model.model, PeftModel)
        alone = load_reward_model(model.directory, shared=config_at(tmp_path / "other", "bfloat16"))
        assert model.fingerprint == alone.fingerprint and alone.shared_base is None
        torch.testing.assert_close(on_base, rewards(alone), rtol=0, atol=1e-6)


def test_stage_three_loads_the_base_once_for_all_pairs(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prepared(config.paths, pairs=4)
    write_reward_models(config)  # calibrated on what was prepared
    policy = PolicyConfig(reward_model_config=config, training=TrainingConfig(max_length=200))
    models, pairs, tokens = load_reward_models(config), trained_on(policy).tokenized, tokens_of(policy)
    loads = count_loads(monkeypatch)
    [scores] = score_pairs(config, models, tokens, [pairs])
    assert loads == ["LlamaForSequenceClassification", "LlamaForCausalLM"]
    assert "_model" not in vars(models[0].shared_base)  # the reference model was not loaded beside it
    for k, model in enumerate(models):
        texts = [(p.prompt[0]["content"], (p.chosen, p.rejected)) for p in pairs.pairs]
        assert all(len(p.prompt) == 1 for p in pairs.pairs)
        expected = (plain_rewards(model, texts) - 0.2) / (1.5 + k)
        torch.testing.assert_close(scores.rewards[k, 0], expected, rtol=0, atol=1e-5)


def test_adapters_of_another_base_are_loaded_merged(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [plain_rewards(model) for model in load_reward_models(config)]
    write_base(Path(config.model.name), seed=7)  # the folder now holds other weights
    models, loads = load_reward_models(config), count_loads(monkeypatch)
    with caplog.at_level(logging.WARNING):
        found = [rewards(model) for model in models]
    assert len(loads) == 4 and "its adapter on" in caplog.text
    for values, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(values, wanted, rtol=0, atol=1e-5)


def test_an_adapter_of_another_training_is_noticed(config: RewardModelConfig) -> None:
    folders = [config.paths.reward_model(objective) for objective in OBJECTIVES]
    _copy(folders[0] / "adapter", folders[1] / "adapter")
    base = shared_base(config.model, config.paths, folders)
    assert base is not None and base.switch_to(folders[0]) is None


def test_only_adapters_in_the_format_of_their_base_share_it(config: RewardModelConfig) -> None:
    folders = [config.paths.reward_model(objective) for objective in OBJECTIVES]
    assert shared_base(config.model, config.paths, folders) is not None
    assert shared_base(config.model, config.paths, folders[:1]) is None
    assert shared_base(config_at(Path(config.artifact_root), "bfloat16").model, config.paths, folders) is None
    (folders[2] / "adapter" / "adapter_config.json").unlink()
    assert shared_base(config.model, config.paths, folders) is None
    assert all(model.shared_base is None for model in load_reward_models(config))
