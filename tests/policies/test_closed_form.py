"""The gate: what it reads from the cache alone, against numpy; which samples it takes; what it says in the report."""

import logging
from pathlib import Path

import numpy as np
import pytest
from tiny_pipeline import no_model_loads
from tiny_policies import tokens_of
from tiny_tables import SAMPLES, M, Table, table_config, with_calibration
from tiny_workspace import write_prepared

from prmd.artifacts import io
from prmd.config.policy import PolicyConfig, PolicySection
from prmd.inference.cache import tokens_key
from prmd.inference.generation import sample_rows
from prmd.inference.reference import reference_samples
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import Tokens
from prmd.policies import preview
from prmd.policies.pairs import read_splits
from prmd.policies.train import train_pessimistic
from prmd.report.evaluation_sections import gate_section


def test_the_gate_reads_the_cache_alone_and_agrees_with_numpy(
    tmp_path: Path,
    tiny_base: Path,
    tables: dict[str, Table],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = table_config(tmp_path, tiny_base, policy=PolicySection(methods=("mean",), kl_target=0.3))
    config = with_calibration(config, source="reference_samples")
    write_prepared(config.paths, pairs=6)
    caplog.set_level(logging.INFO, logger="prmd")
    with monkeypatch.context() as patch:
        no_model_loads(patch)
        train_pessimistic(config, dry_run=True)
    assert "with pairs of reference samples, 50% of all: 2 times these steps" in caplog.text
    assert "gate        not computed: no scored reference samples are cached" in caplog.text
    assert not preview.gate_file(config.paths).exists()
    train_pessimistic(config)  # samples and scores the prompts it trains on and those it watches
    preview.gate_file(config.paths).unlink()
    no_model_loads(monkeypatch)
    caplog.clear()
    train_pessimistic(config, dry_run=True)
    gate = io.read_json(preview.gate_file(config.paths))
    assert (
        gate["samples_per_prompt"] == SAMPLES
        and gate["kl"] == 0.3
        and gate["prompts"] == 3
        and not gate["refused"]
    )
    assert [row["method"] for row in gate["rows"]] == [
        *("mean", "hard_min", "cvar", "hierarchical", "lcb", "softmin", "maxmin")
    ]
    assert "hard_min     gains helpful" in caplog.text and "at 0.3 nats" in caplog.text
    rewards = gate_rewards(config, tables)
    for method, robust in (("mean", rewards.mean(axis=(0, 1))), ("hard_min", rewards.min(axis=(0, 1)))):
        row = next(row for row in gate["rows"] if row["method"] == method)
        p = np.exp(row["reward_scale"] / 0.1 * (robust - robust.max(axis=1, keepdims=True)))
        p /= p.sum(axis=1, keepdims=True)
        assert (p * np.log(p * SAMPLES)).sum(axis=1).mean() == pytest.approx(0.3, abs=1e-6)
        members = rewards.mean(axis=1)
        gains = (p * members).sum(axis=2).mean(axis=1) - members.mean(axis=(1, 2))
        assert list(row["gains"].values()) == pytest.approx(gains) and row["worst_gain"] == pytest.approx(
            gains.min()
        )
        assert row["mean_of_min"] == pytest.approx((p * members.min(axis=0)).sum(axis=1).mean())
        assert row["effective_sample_size"] == pytest.approx((1 / (p**2).sum(axis=1)).mean())
    table = gate_section(config.paths)["table"]
    assert table.columns[0] == "method" and len(table.rows) == 7 and "3 held-out prompts" in table.caption


def test_the_gate_takes_the_samples_of_the_calibration_before_stage_three(
    tmp_path: Path, tiny_base: Path, tables: dict[str, Table]
) -> None:
    config = table_config(tmp_path, tiny_base, policy=PolicySection(methods=("maxmin",)))
    config = with_calibration(config, source="reference_samples", samples_per_prompt=5)
    shared = config.shared
    write_prepared(config.paths, pairs=6)
    tokenizer = load_tokenizer(shared.model, shared.paths)
    models = preview.load_reward_models(shared)
    prompts = watched_prompts(config)
    assert len(prompts) == 18
    samples = reference_samples(shared, tokenizer, prompts[:7])
    for model, scored in zip(models, (7, 7, 4), strict=True):  # one model has not scored them all
        model.rewards(
            sample_rows(prompts[:scored], samples[:scored], tokenizer, keep_suffix=True), description="c"
        )
    found = preview.cached_responses(config, models, tokens_of(config), read_splits(config.paths))
    assert found.samples_per_prompt == 5 and found.by_prompt().shape == (3, M, 4, 5)
    assert found.by_prompt().mean(dim=-1).abs().max() < 1e-9  # centred on each prompt's own samples
    table = preview.gate_table(config.policy, found)
    assert table["prompts"] == 4 and table["kl"] == pytest.approx(np.log(5) / 4)
    assert any("needs more samples" in line for line in preview.gate_lines(table))


def watched_prompts(config: PolicyConfig) -> list[Tokens]:
    lengths = sorted({config.shared.training.max_length, config.training.max_length})
    return preview.distinct_prompts(read_splits(config.paths)["val"], tokens_of(config), lengths)


def gate_rewards(config: PolicyConfig, tables: dict[str, Table]) -> np.ndarray:
    """Calibrated rewards [K, M, X, n] of the cached samples of the watched prompts, by hand."""
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    prompts = watched_prompts(config)
    (folder,) = (config.paths.root / "data" / "cache").glob("samples-*")
    cached = {row["key"]: row["value"] for shard in folder.glob("*.jsonl") for row in io.read_jsonl(shard)}
    kept = [p for p in prompts if tokens_key(p).hex() in cached]
    closing = tuple(tokenizer.encode("<|im_end|>\n", add_special_tokens=False))
    rows = []
    for model in tables.values():
        raw = []
        for prompt in kept:
            sampled = cached[tokens_key(prompt).hex()]
            texts = [tokenizer.decode(y, skip_special_tokens=True).strip() for y in sampled]
            closed = [(*tokenizer.encode(text, add_special_tokens=False), *closing) for text in texts]
            raw.append([model.reward(prompt, y).float().double().numpy() for y in closed])
        values = np.array(raw)  # [X, n, M]
        rows.append((values - values.mean(axis=1, keepdims=True)) / model.calibration.scale.numpy())
    return np.array(rows).transpose(0, 3, 1, 2)
