"""Reward models of families without a sequence classifier in transformers: the head, the saved code, the refusal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_families import separate_rewards
from tiny_models import SMALL, SMALL_MAMBA, VOCABULARY, tiny_classifier, tiny_tokenizer
from tiny_pipeline import no_model_loads
from tiny_workspace import reward_model_config, write_prepared
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    GraniteConfig,
    PreTrainedConfig,
    XGLMConfig,
)

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.evaluation import EvaluationConfig, JudgeConfig
from prmd.config.shared import EnsembleConfig, LoraConfig, ModelConfig, TrainingConfig, TuningConfig
from prmd.errors import ConfigError
from prmd.models.classifiers import provide_classifier, save_code
from prmd.models.loading import add_lora, load_base_classifier, load_classifier, load_tokenizer_from
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceRewards
from prmd.models.tokenization import PrefixRow
from prmd.rewards.train import train_judge, train_reward_model

ROWS = [PrefixRow((5, 6, 7, 8), ((9, 10, 11), (12, 13))), PrefixRow((14,), ((15, 16),))]
SIZES = SMALL | {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "eos_token_id": 2}
FAMILIES = {
    "cohere": CohereConfig(**SIZES),
    "granite": GraniteConfig(**SIZES),
    "xglm": XGLMConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        ffn_dim=48,
        num_layers=2,
        attention_heads=4,
        init_std=0.2,
        pad_token_id=0,
    ),
}


def saved(path: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return tiny_tokenizer(path)


def model_at(path: Path) -> ModelConfig:
    return ModelConfig(name=str(path), revision=None, dtype="float32")


def rewards(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return SequenceRewards(model)(**collate_rows(ROWS, pad_id=0, share_prompt=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_stands_on_the_weights_of_the_base(tmp_path: Path, family: str) -> None:
    base = saved(tmp_path / "base", FAMILIES[family])
    model = load_base_classifier(model_at(base), ArtifactPaths(tmp_path, "x"), pad_token_id=0).eval()
    plain = AutoModelForCausalLM.from_pretrained(base).base_model.state_dict()
    assert model.base_model.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in model.base_model.state_dict().items())
    assert model.score.weight.shape == (1, 32) and rewards(model).std() > 1e-3
    torch.testing.assert_close(rewards(model), separate_rewards(model, ROWS), rtol=1e-5, atol=1e-5)


def test_buffers_that_no_file_holds_have_the_values_of_the_plain_model(tmp_path: Path) -> None:
    """Falcon-H1 sets its multipliers at the level of the whole model."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2} | SMALL_MAMBA
    config = FalconH1Config(**sizes, ssm_multipliers=[0.5, 2.0, 3.0, 4.0, 5.0])
    path = saved(tmp_path / "base", config)
    plain = dict(AutoModelForCausalLM.from_pretrained(path).named_buffers())
    paths = ArtifactPaths(tmp_path, "pku_safe")
    found = dict(load_base_classifier(model_at(path), paths, pad_token_id=0).named_buffers())
    names = [name for name in plain if "mup_vector" in name]
    assert len(names) == 2 and plain[names[0]].unique().numel() > 1
    assert all(torch.equal(found[name], plain[name]) for name in names)


def test_the_head_and_adapters_are_trained_and_nothing_else(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", FAMILIES["cohere"])
    plain = load_base_classifier(model_at(base), ArtifactPaths(tmp_path, "x"), pad_token_id=0)
    adapted = add_lora(plain, LoraConfig(r=2, alpha=4), task="SEQ_CLS")
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len([n for n in trained if "lora_A" in n]) == 2 * 7
    assert all("lora_" in name or "score" in name for name in trained) and any("score" in n for n in trained)


@pytest.mark.slow
def test_a_plain_user_loads_what_was_saved_by_the_code_beside_it(tmp_path: Path) -> None:
    base, folder = saved(tmp_path / "base", FAMILIES["cohere"]), tmp_path / "rm"
    torch.manual_seed(1)
    model = load_base_classifier(model_at(base), ArtifactPaths(tmp_path, "x"), pad_token_id=0).eval()
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    save_code(folder)
    torch.testing.assert_close(rewards(load_classifier(folder, "float32")), rewards(model))  # trusts no code
    program = (
        "import sys, torch; from transformers import AutoModelForSequenceClassification as Auto;"
        "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True).eval();"
        "rows = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 12, 13], [14, 15, 16]];"
        "print([float(model(torch.tensor([row])).logits[0, 0]) for row in rows])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    by_user = torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]))
    torch.testing.assert_close(rewards(model), by_user, rtol=1e-5, atol=1e-5)


def test_a_family_that_has_a_classifier_is_saved_as_it_is(tmp_path: Path) -> None:
    folder = tiny_classifier(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    save_code(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_reward_model_is_trained_and_scores_as_its_folder_says(tmp_path: Path, tuning: str) -> None:
    config = reward_model_config(tmp_path / "root", saved(tmp_path / "base", FAMILIES["cohere"]))
    write_prepared(config.paths)
    lora = LoraConfig(r=2, alpha=4, learning_rate=1e-2)
    steps = {"pairs_per_device": 1, "gradient_accumulation_steps": 1, "warmup_ratio": 0.0}
    training = TrainingConfig(
        max_length=200, epochs=1.0, learning_rate=1e-2, checkpoints=(1.0,), max_pairs=4, **steps
    )
    judges = JudgeConfig(training=training, tuning=TuningConfig(method=tuning, lora=lora))
    folder = train_judge(EvaluationConfig(reward_model_config=config, judges=judges), objective="helpful")
    listed = io.read_json(folder / "run.json")["files"]
    assert "modeling_reward_model.py" in listed
    model = load_classifier(folder, "float32")
    assert type(model).__name__ == "CohereForSequenceClassification"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").base_model.state_dict()
    moved, start = (
        weights["layers.0.mlp.up_proj.weight"] for weights in (model.base_model.state_dict(), base)
    )
    assert 1e-4 < (moved - start).abs().max() < 0.1
    torch.testing.assert_close(rewards(model), separate_rewards(model, ROWS), rtol=1e-5, atol=1e-5)
    assert load_tokenizer_from(folder).chat_template


@pytest.mark.parametrize("family", ["mamba", "whisper", "gemma4"])
def test_a_family_of_which_none_can_be_made_is_named(family: str) -> None:
    with pytest.raises(ConfigError, match=rf"no sequence classifier of the {family} family") as error:
        provide_classifier(AutoConfig.for_model(family))
    assert "\n" not in str(error.value)


def test_that_family_is_named_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_tokenizer(tmp_path / "base")
    AutoConfig.for_model("rwkv", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2).save_pretrained(
        base
    )
    ensemble = EnsembleConfig(members=3, fit_fraction=0.4)
    config = reward_model_config(tmp_path / "root", base, ensemble=ensemble)
    write_prepared(config.paths, pairs=20)
    no_model_loads(monkeypatch)
    with pytest.raises(ConfigError, match="no sequence classifier of the rwkv family"):
        train_reward_model(config, objective="helpful")
