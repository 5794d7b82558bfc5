"""Samples and log-probabilities of the reference: right, computed once, and kept under a key of the model alone."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_causal_lm
from tiny_pipeline import count_loads, no_model_loads, shards
from tiny_workspace import reward_model_config
from transformers import AutoModelForCausalLM

from prmd.config.shared import CalibrationConfig, RewardModelConfig
from prmd.inference.reference import reference_key, reference_logps, reference_samples
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import PrefixRow, tokenize_prompt, tokenize_row

PROMPTS = [[{"role": "user", "content": text}] for text in ("why is the sky blue", "yes", "what is it?")]


@pytest.fixture
def config(tmp_path: Path) -> RewardModelConfig:
    return reward_model_config(
        tmp_path / "root",
        tiny_causal_lm(tmp_path / "base"),
        scoring_tokens=120,
        calibration=CalibrationConfig(samples_per_prompt=3, max_new_tokens=6),
    )


def changed(config: RewardModelConfig, section: str, **values: object) -> RewardModelConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def rows_of(config: RewardModelConfig) -> list[PrefixRow]:
    tokenizer = load_tokenizer(config.model, config.paths)
    return [tokenize_row(tokenizer, p, ("no", "I do not know it"), keep_suffix=False) for p in PROMPTS]


def test_logps_are_sums_over_response_tokens_end_of_turn_included(config: RewardModelConfig) -> None:
    tokenizer = load_tokenizer(config.model, config.paths)
    found = reference_logps(config, tokenizer, rows_of(config))
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32).eval()
    for row, values in zip(rows_of(config), found, strict=True):
        assert values.shape == (2,) and values.dtype == torch.float32
        for response, value in zip(row.responses, values, strict=True):
            assert response[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
            ids = torch.tensor([[*row.prompt_ids, *response]])
            with torch.no_grad():
                logps = model(ids).logits.double().log_softmax(-1)[0]
            start = len(row.prompt_ids)
            expected = sum(float(logps[start + t - 1, token]) for t, token in enumerate(response))
            assert float(value) == pytest.approx(expected, abs=1e-4)


def test_logps_are_computed_once_and_whatever_is_trained(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(config.model, config.paths)
    loads = count_loads(monkeypatch)
    first = reference_logps(config, tokenizer, rows_of(config)[:2])
    assert len(loads) == 1
    reference_logps(config, tokenizer, rows_of(config))  # one more row: a new shard, the rest is kept
    assert len(loads) == 2 and len(shards(config.paths.root)) == 2
    no_model_loads(monkeypatch)
    other = changed(config, "training", learning_rate=1.0, epochs=7.0)
    again = reference_logps(other, tokenizer, rows_of(config)[:2])
    assert all(map(torch.equal, first, again))


def test_key_is_of_weights_template_and_precision(config: RewardModelConfig, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(config.model, config.paths)
    keys = [reference_key(config.model, config.paths, tokenizer)]
    keys.append(reference_key(config.model.model_copy(update={"dtype": "bfloat16"}), config.paths, tokenizer))
    other = str(tiny_causal_lm(tmp_path / "other", seed=1))
    keys.append(reference_key(config.model.model_copy(update={"name": other}), config.paths, tokenizer))
    tokenizer.chat_template += "\n"
    keys.append(reference_key(config.model, config.paths, tokenizer))
    assert len(set(keys)) == 4
    same = str(tiny_causal_lm(tmp_path / "elsewhere"))  # equal weights in another folder
    assert (
        reference_key(
            config.model.model_copy(update={"name": same}),
            config.paths,
            load_tokenizer(config.model, config.paths),
        )
        == keys[0]
    )


def test_samples_are_reused_and_keyed_by_how_they_were_drawn(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(config.model, config.paths)
    prompts = [tokenize_prompt(tokenizer, p, max_length=64) for p in PROMPTS]
    loads = count_loads(monkeypatch)
    first = reference_samples(config, tokenizer, prompts)
    assert [len(samples) for samples in first] == [3, 3, 3] and len(loads) == 1
    longer = reference_samples(changed(config, "calibration", max_new_tokens=7), tokenizer, prompts)
    assert max(len(s.token_ids) for samples in longer for s in samples) == 7 and len(loads) == 2
    reseeded = reference_samples(config.model_copy(update={"seed": 1}), tokenizer, prompts)
    assert reseeded != first and len(loads) == 3
    no_model_loads(monkeypatch)
    assert reference_samples(config, tokenizer, prompts) == first
    assert reference_samples(changed(config, "calibration", prompts=9), tokenizer, prompts[1:]) == first[1:]
    assert reference_samples(changed(config, "calibration", batch_size=1), tokenizer, prompts) == first


def test_first_tokens_come_from_the_reference_at_temperature_one(config: RewardModelConfig) -> None:
    """Mean log-probability of many first tokens is minus the entropy, which no other temperature would give."""
    tokenizer = load_tokenizer(config.model, config.paths)
    prompt = tokenize_prompt(tokenizer, PROMPTS[0], max_length=64)
    many = changed(config, "calibration", samples_per_prompt=3000, max_new_tokens=1)
    (samples,) = reference_samples(many, tokenizer, [prompt])
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32).eval()
    with torch.no_grad():
        logps = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1).numpy()
    drawn = np.array([logps[s.token_ids[0]] for s in samples])
    entropy = -(np.exp(logps) * logps).sum()
    spread = math.sqrt((np.exp(logps) * (logps + entropy) ** 2).sum() / len(drawn))
    assert abs(drawn.mean() + entropy) < 4 * spread
