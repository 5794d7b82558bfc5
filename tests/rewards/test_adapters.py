"""Reward models trained as adapters: stage 3 reads their merged checkpoints, as any transformers user loads them."""

from pathlib import Path

import pytest
import torch
from model_families import separate_rewards
from tiny_models import tiny_causal_lm
from tiny_pipeline import count_loads
from tiny_policies import tokens_of, trained_on
from tiny_workspace import write_prepared
from transformers import AutoModelForSequenceClassification

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
from prmd.rewards.reward_model import RewardModel, load_reward_model, load_reward_models, write_calibration


def config_at(root: Path) -> RewardModelConfig:
    return RewardModelConfig(
        artifact_root=str(root),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(root / "base"), revision=None, dtype="float32"),
        calibration=CalibrationConfig(source="validation_responses"),
    )


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


def rows_for(model: RewardModel, texts: list) -> list[PrefixRow]:
    return [
        tokenize_row(model.tokenizer, [{"role": "user", "content": q}], answers, keep_suffix=True)
        for q, answers in texts
    ]


def plain_rewards(model: RewardModel, texts: list) -> torch.Tensor:
    """Those of the merged checkpoint as any transformers user loads it, one conversation at a time."""
    plain = AutoModelForSequenceClassification.from_pretrained(model.directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return separate_rewards(plain, rows_for(model, texts)).double().view(len(texts), -1)


def test_stage_three_scores_the_merged_checkpoints_one_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_at(tmp_path)
    tiny_causal_lm(Path(config.model.name))
    write_prepared(config.paths, pairs=4)
    write_reward_models(config)  # calibrated on what was prepared
    policy = PolicyConfig(reward_model_config=config, training=TrainingConfig(max_length=200))
    models, pairs, tokens = load_reward_models(config), trained_on(policy).tokenized, tokens_of(policy)
    loads = count_loads(monkeypatch)
    [scores] = score_pairs(config, models, tokens, [pairs])
    assert loads == ["LlamaForSequenceClassification"] * 3 + ["LlamaForCausalLM"]
    assert all("model" not in vars(model) for model in models)
    for k, model in enumerate(models):
        texts = [(p.prompt[0]["content"], (p.chosen, p.rejected)) for p in pairs.pairs]
        assert all(len(p.prompt) == 1 for p in pairs.pairs)
        expected = (plain_rewards(model, texts) - 0.2) / (1.5 + k)
        torch.testing.assert_close(scores.rewards[k, 0], expected, rtol=0, atol=1e-5)
