"""Every method trained for a few steps on a tiny model, with reward models that are random tables, and the gate before it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_causal_lm
from tiny_pipeline import no_model_loads
from tiny_workspace import write_prepared
from torch import Tensor

from prmd import io, plotting, policy_gate, policy_inputs, policy_training
from prmd.cache import ScoreTable, tokens_key
from prmd.calibration import Calibration, fit_calibration
from prmd.config import (
    CalibrationConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    PairsConfig,
    PolicyConfig,
    PolicySection,
    RewardModelConfig,
    TrainingConfig,
    TuningConfig,
)
from prmd.errors import ConfigError, DataError
from prmd.generation import sample_rows
from prmd.models import load_tokenizer
from prmd.objectives import OBJECTIVES
from prmd.paths import ArtifactPaths
from prmd.policy_selection import MemberSelection
from prmd.policy_training import train_pessimistic
from prmd.reference import reference_samples
from prmd.report_sections import gate_section
from prmd.tokenization import PrefixRow, Tokens

M = 3
SAMPLES = 6


@dataclass
class Table:
    """A reward model whose rewards are random numbers of the tokens; it caches them as a real one does."""

    tokenizer: Any
    paths: ArtifactPaths
    fingerprint: str
    calibration: Calibration | None = None
    members: int = M
    shared_base: None = None

    def release(self) -> None:
        """It has no weights."""

    def rewards(self, rows: list[PrefixRow], *, description: str) -> list[Tensor]:
        table = ScoreTable(self.paths.cache("rewards", self.fingerprint), self.members)
        missing = {tokens_key(r.prompt_ids, y): (r.prompt_ids, y) for r in rows for y in r.responses}
        missing = {key: pair for key, pair in missing.items() if key not in table}
        table.append(
            list(missing),
            torch.stack([self.reward(*p) for p in missing.values()]) if missing else torch.empty(0),
        )
        return [torch.stack([table[tokens_key(r.prompt_ids, y)].double() for y in r.responses]) for r in rows]

    def reward(self, prompt: Tokens, response: Tokens) -> Tensor:
        seed = int.from_bytes(tokens_key(prompt, response)[:4], "little") + sum(self.fingerprint.encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((), generator=generator) + 0.5 * torch.randn(self.members, generator=generator)

    def calibrated(self) -> Self:
        rows = [PrefixRow((7, i), ((1, i), (2, i), (3, i))) for i in range(8)]
        values = torch.cat(self.rewards(rows, description="c"))
        self.calibration = fit_calibration(values, torch.arange(8).repeat_interleave(3))
        return self


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("model") / "base")


def config_in(root: Path, base: Path, **changes: Any) -> PolicyConfig:
    shared = RewardModelConfig(
        artifact_root=str(root),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(base), revision=None, dtype="float32"),
        calibration=CalibrationConfig(source="validation_responses", max_new_tokens=4),
        report_to=(),
    )
    values = {
        "tuning": TuningConfig(method="lora", lora=LoraConfig(r=4, alpha=8, learning_rate=1e-2)),
        "training": TrainingConfig(
            max_length=240, epochs=1.0, max_pairs=12, pairs_per_device=2, gradient_accumulation_steps=2, logging_steps=1,
            checkpoints=(1.0,),
        ),
        "pairs": PairsConfig(reference_samples=SAMPLES, share=0.5),
    }  # fmt: skip
    return PolicyConfig(reward_model_config=shared, **(values | changes))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Table]:
    """Reward models by objective; filled when the first stage asks for them."""
    models: dict[str, Table] = {}

    def load(shared: RewardModelConfig) -> list[Table]:
        tokenizer = load_tokenizer(shared.model, shared.paths)
        for objective in OBJECTIVES:
            if objective not in models:
                models[objective] = Table(tokenizer, shared.paths, f"{objective}-table").calibrated()
        return [models[objective] for objective in OBJECTIVES]

    for module in (policy_gate, policy_inputs, policy_training):
        monkeypatch.setattr(module, "load_reward_models", load)
    monkeypatch.setattr(plotting, "plot_policy_training", lambda *arguments: [])
    monkeypatch.setattr("prmd.scoring.gc.collect", lambda: 0)
    return models


ALL = (
    *("mean", "maxmin", "edpo", "paper_eq5", "paper_eq9"),
    *("dpo", "ipo", "modpo", "dpo_helpful", "dpo_harmless", "dpo_honest", "soup"),
)


def metrics_of(config: PolicyConfig, method: str) -> dict[str, Any]:
    return io.read_json(config.paths.policy(method, config.run_name) / "metrics.json")


def curve_of(config: PolicyConfig, method: str) -> list[dict[str, float]]:
    return [row for row in metrics_of(config, method)["curve"] if "loss" in row]


def adapter(config: PolicyConfig, method: str) -> dict[str, Tensor]:
    return load_file(config.paths.policy(method, config.run_name) / "adapter_model.safetensors")


def test_every_method_trains_and_is_reused(
    tmp_path: Path,
    base: Path,
    fake: dict[str, Table],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_in(tmp_path, base, policy=PolicySection(methods=ALL, gamma=0.01))
    write_prepared(config.paths, pairs=6)
    caplog.set_level(logging.INFO, logger="prmd")
    chosen, select = [], MemberSelection.select

    def recorded(self: MemberSelection, model: Any, step: int) -> Tensor:
        chosen.append(step)
        return select(self, model, step)

    monkeypatch.setattr(MemberSelection, "select", recorded)
    train_pessimistic(config)
    assert chosen == [0, 1, 2, 3, 4, 5]  # e-DPO chooses its members once per optimiser step
    trained = [method for method in ALL if method != "soup"]
    for method in trained:
        curve = curve_of(config, method)
        distilled = method in ("mean", "maxmin", "edpo", "paper_eq5", "paper_eq9")
        # 12 labelled pairs, and as many of reference samples where rewards are distilled; 4 pairs a step
        assert curve[-1]["step"] == (6 if distilled else 3), method
        assert all(np.isfinite(row["loss"]) for row in curve)
        assert ("logps/reference_samples" in curve[0]) is distilled
        assert any(v.abs().max() > 0 for k, v in adapter(config, method).items() if "lora_B" in k)
    assert curve_of(config, "dpo")[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert curve_of(config, "ipo")[0]["loss"] == pytest.approx(25.0, abs=1e-2)  # (1 / (2 * 0.1))^2 nats^2
    # another method is another policy
    weights = {m: torch.cat([v.flatten() for k, v in sorted(adapter(config, m).items())]) for m in ALL}
    for i, a in enumerate(ALL):
        for b in ALL[i + 1 :]:
            apart = float((weights[a] - weights[b]).abs().max())
            assert (apart < 1e-5) is ({a, b} == {"mean", "paper_eq5"}), (
                a,
                b,
                apart,
            )  # nothing is clipped here
    mean = sum(weights[f"dpo_{k}"].double() for k in OBJECTIVES) / 3
    assert torch.allclose(weights["soup"].double(), mean, atol=1e-6)
    assert "nothing was trained" in metrics_of(config, "soup")["notes"][0]
    assert any("maxmin weights" in note for note in metrics_of(config, "maxmin")["notes"])
    assert any("negative: against the label" in note for note in metrics_of(config, "paper_eq9")["notes"])
    gate = io.read_json(policy_gate.gate_file(config.paths))
    assert gate["source"] == "reference samples of the training prompts" and gate["prompts"] == 12
    assert gate["kl"] == pytest.approx(np.log(6) / 4) and gate["kl_target"] == 4.0
    # notes are said before the first policy is trained
    said = caplog.text
    assert said.index("policy maxmin: ") < said.index("policy mean: 24 pairs")
    no_model_loads(monkeypatch)
    caplog.clear()
    train_pessimistic(config)
    assert caplog.text.count("finished before with the same settings") == len(ALL)
    # a setting that only some methods read leaves the others finished
    other = config.model_copy(
        update={"policy": config.policy.model_copy(update={"methods": ("ipo", "dpo"), "gamma": 0.5})}
    )
    train_pessimistic(other)
    with pytest.raises(ConfigError, match=r"policy ipo: .*give --force"):
        changed = config.policy.model_copy(update={"methods": ("dpo", "ipo"), "ipo_beta": 0.3})
        train_pessimistic(config.model_copy(update={"policy": changed}))


def test_a_soup_without_its_policies_names_the_command(
    tmp_path: Path, base: Path, fake: dict[str, Table]
) -> None:
    config = config_in(tmp_path, base, policy=PolicySection(methods=("dpo_helpful", "soup")))
    write_prepared(config.paths, pairs=6)
    with pytest.raises(
        DataError, match=r"dpo_harmless is missing; train them with: .*policy\.methods=\[dpo_helpful, "
    ) as e:
        train_pessimistic(config)
    assert "\n" not in str(e.value) and not config.paths.policies.exists()


def test_a_method_without_its_samples_is_refused_before_anything_is_written(
    tmp_path: Path, base: Path, fake: dict[str, Table]
) -> None:
    config = config_in(tmp_path, base, pairs=PairsConfig(), policy=PolicySection(methods=("maxmin",)))
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="maxmin needs samples of the reference policy"):
            train_pessimistic(config, dry_run=dry_run)
    assert not list(tmp_path.iterdir()) and not fake


# ------------------------------------------------------------------ gate
def test_the_gate_reads_the_cache_alone_and_agrees_with_numpy(
    tmp_path: Path,
    base: Path,
    fake: dict[str, Table],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_in(tmp_path, base, policy=PolicySection(methods=("mean",), kl_target=0.3))
    calibration = config.shared.calibration.model_copy(update={"source": "reference_samples"})
    shared = config.shared.model_copy(update={"calibration": calibration})
    config = config.model_copy(update={"reward_model_config": shared})
    write_prepared(config.paths, pairs=6)
    caplog.set_level(logging.INFO, logger="prmd")
    with monkeypatch.context() as patch:
        no_model_loads(patch)
        train_pessimistic(config, dry_run=True)
    assert "with pairs of reference samples, 50% of all: 2 times these steps" in caplog.text
    assert "gate        not computed: no scored reference samples are cached" in caplog.text
    assert not policy_gate.gate_file(config.paths).exists()
    train_pessimistic(config)  # samples and scores the prompts it trains on and those it watches
    policy_gate.gate_file(config.paths).unlink()
    no_model_loads(monkeypatch)
    caplog.clear()
    train_pessimistic(config, dry_run=True)
    gate = io.read_json(policy_gate.gate_file(config.paths))
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
    rewards = gate_rewards(config, fake)
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
    tmp_path: Path, base: Path, fake: dict[str, Table]
) -> None:
    config = config_in(tmp_path, base, policy=PolicySection(methods=("maxmin",)))
    values = {"source": "reference_samples", "samples_per_prompt": 5}
    shared = config.shared.model_copy(
        update={"calibration": config.shared.calibration.model_copy(update=values)}
    )
    config = config.model_copy(update={"reward_model_config": shared})
    write_prepared(config.paths, pairs=6)
    tokenizer = load_tokenizer(shared.model, shared.paths)
    models = policy_gate.load_reward_models(shared)
    prompts = policy_gate._prompts(config, tokenizer, "val")
    assert len(prompts) == 18
    samples = reference_samples(shared, tokenizer, prompts[:7])
    for model, scored in zip(models, (7, 7, 4), strict=True):  # one model has not scored them all
        model.rewards(
            sample_rows(prompts[:scored], samples[:scored], tokenizer, keep_suffix=True), description="c"
        )
    found = policy_gate.cached_responses(config, models, tokenizer)
    assert found.samples_per_prompt == 5 and found.by_prompt().shape == (3, M, 4, 5)
    assert found.by_prompt().mean(dim=-1).abs().max() < 1e-9  # centred on each prompt's own samples
    table = policy_gate.gate_table(config, found)
    assert table["prompts"] == 4 and table["kl"] == pytest.approx(np.log(5) / 4)
    assert any("needs more samples" in line for line in policy_gate.gate_lines(table))


def gate_rewards(config: PolicyConfig, fake: dict[str, Table]) -> np.ndarray:
    """Calibrated rewards [K, M, X, n] of the cached samples of the watched prompts, by hand."""
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    prompts = policy_gate._prompts(config, tokenizer, "val")
    (folder,) = (config.paths.root / "data" / "cache").glob("samples-*")
    cached = {row["key"]: row["value"] for shard in folder.glob("*.jsonl") for row in io.read_jsonl(shard)}
    kept = [p for p in prompts if tokens_key(p).hex() in cached]
    stop, newline = 2, tuple(tokenizer.encode("\n", add_special_tokens=False))
    rows = []
    for model in fake.values():
        raw = []
        for prompt in kept:
            closed = [tuple(y) if y[-1] == stop else (*y, stop) for y in cached[tokens_key(prompt).hex()]]
            raw.append([model.reward(prompt, (*y, *newline)).float().double().numpy() for y in closed])
        values = np.array(raw)  # [X, n, M]
        rows.append((values - values.mean(axis=1, keepdims=True)) / model.calibration.scale.numpy())
    return np.array(rows).transpose(0, 3, 1, 2)


def test_without_reference_samples_the_dry_run_says_so(
    tmp_path: Path, base: Path, fake: dict[str, Table], caplog: pytest.LogCaptureFixture
) -> None:
    config = config_in(tmp_path, base, pairs=PairsConfig(), policy=PolicySection(methods=("mean", "soup")))
    write_prepared(config.paths, pairs=6)
    caplog.set_level(logging.INFO, logger="prmd")
    train_pessimistic(config, dry_run=True)
    assert "set pairs.reference_samples=8 or calibration.source=reference_samples" in caplog.text
    assert "would average dpo_helpful, dpo_harmless, dpo_honest" in caplog.text
    assert not (config.paths.root / "outputs").exists()


def test_a_reward_that_is_not_a_number_names_objective_member_and_pair(
    tmp_path: Path, base: Path, fake: dict[str, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path, base, pairs=PairsConfig(), policy=PolicySection(methods=("mean",)))
    write_prepared(config.paths, pairs=6)
    original = Table.rewards

    def broken(self: Table, rows: list[PrefixRow], *, description: str) -> list[Tensor]:
        values = original(self, rows, description=description)
        if self.fingerprint.startswith("harmless") and description != "c":
            values[1] = values[1].clone()
            values[1][0, 2] = float("nan")
        return values

    monkeypatch.setattr(Table, "rewards", broken)
    with pytest.raises(
        DataError, match=r"the harmless ensemble gives 1 scores .* first by member 2 for pair .*harmless_rm"
    ) as e:
        train_pessimistic(config)
    assert "\n" not in str(e.value)
