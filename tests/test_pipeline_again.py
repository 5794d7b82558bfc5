"""Stages run again on a finished pipeline: reuse, rebuilding, sweeps, other sources, tunings and approaches."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipeline import POLICIES, Pipeline, artifacts, count_loads, events, no_model_loads, run_all, shards
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prmd.artifacts import io
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.errors import ConfigError
from prmd.objectives import OBJECTIVES
from prmd.policies.train import train_baseline_dpo, train_hierarchical, train_pessimistic
from prmd.report import figures, reward_figures
from prmd.rewards.train import train_reward_model

pytestmark = pytest.mark.slow


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are half of a tiny training's time and have their own tests."""
    for module, name in ((reward_figures, "plot_reward_model"), (figures, "plot_policy_training")):
        monkeypatch.setattr(module, name, lambda *arguments: [])


def test_a_second_run_reuses_everything_and_says_so(
    copied: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {d: (d / "run.json").read_bytes() for d in artifacts(copied) if d != copied.paths.metrics}
    files = shards(copied.root)
    no_model_loads(monkeypatch)
    monkeypatch.setattr("prmd.evaluation.evaluate.build_report", lambda paths: paths.report)
    again = run_all(copied.root, copied.configs, [f"artifact_root={copied.root.as_posix()}"])
    assert all((d / "run.json").read_bytes() == content for d, content in before.items())
    assert shards(copied.root) == files
    assert again.log.count("reused") >= 1 + len(OBJECTIVES) * 2 + len(POLICIES)
    for name in (*(f"{o} reward model" for o in OBJECTIVES), *(f"policy {m}" for m in POLICIES)):
        assert f"{name}: finished before" in again.log


def test_force_trains_again_and_comes_to_the_same(copied: Pipeline, no_figures: None) -> None:
    config = copied.policies()
    folder = copied.paths.policy("hierarchical")
    before = load_file(folder / "adapter_model.safetensors")
    stamp = (folder / "run.json").read_bytes()
    train_hierarchical(config, force=True)
    after = load_file(folder / "adapter_model.safetensors")
    assert (folder / "run.json").read_bytes() != stamp
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)


def test_a_changed_setting_trains_again_and_scores_nothing_again(
    copied: Pipeline, no_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, loads = shards(copied.root), count_loads(monkeypatch)
    stamps = {m: (copied.paths.policy(m) / "run.json").read_bytes() for m in POLICIES}
    config = copied.policies("policy.beta=0.3", "policy.loss=bce", "policy.methods=[mean]")
    with pytest.raises(ConfigError, match=r"give --force to replace it.*run_name"):
        train_pessimistic(config)
    assert {m: (copied.paths.policy(m) / "run.json").read_bytes() for m in POLICIES} == stamps
    train_pessimistic(config, force=True)
    assert shards(copied.root) == files and loads == ["LlamaForCausalLM"]  # the policy itself, once
    changed = {m for m in POLICIES if (copied.paths.policy(m) / "run.json").read_bytes() != stamps[m]}
    assert changed == {"mean"}


def test_runs_with_names_lie_side_by_side(copied: Pipeline, no_figures: None) -> None:
    stamp = (copied.paths.policy("hierarchical") / "run.json").read_bytes()
    for name, beta in (("b03", 0.3), ("b05", 0.5)):
        train_hierarchical(copied.policies(f"policy.beta={beta}", f"run_name={name}"))
    assert {"hierarchical", "hierarchical-b03", "hierarchical-b05"} <= {
        p.name for p in copied.paths.policies.iterdir()
    }
    assert (copied.paths.policy("hierarchical") / "run.json").read_bytes() == stamp
    assert events(copied.root / "logs/policies/embedded/hierarchical-b03").Tags()["scalars"]
    assert (
        io.read_json(copied.paths.policy("hierarchical", "b05") / "metrics.json")["method"]
        == "hierarchical-b05"
    )


# ------------------------------------------------------------------ other settings
def test_calibration_by_reference_samples(copied: Pipeline, no_figures: None) -> None:
    override = "calibration.source=reference_samples"
    config = copied.reward_models(override)
    for objective in OBJECTIVES:
        train_reward_model(config, objective=objective, force=True)
        record = io.read_json(copied.paths.reward_model(objective) / "calibration.json")
        assert record["source"] == "reference_samples"
        fitted = record["calibration"]
        assert fitted["n_responses"] == 16 * fitted["n_prompts"]  # whatever training prompts have
    policies = copied.policies(override, "policy.methods=[hard_min]")
    train_pessimistic(policies, force=True)
    metrics = io.read_json(copied.paths.policy("hard_min") / "metrics.json")
    assert "reward scale fixed on reference samples of the training prompts" in metrics["notes"]
    assert metrics["reward_scale"] > 0 and metrics["target_margins"]["sd"] > 0


def test_full_tuning_in_float32(copied: Pipeline, no_figures: None) -> None:
    override = ("tuning.method=full", "training.learning_rate=1e-3")
    folder = train_reward_model(copied.reward_models(*override), objective="helpful", force=True)
    for name in ("start", "33", "66", "end", "best"):
        assert (folder / "checkpoints" / name / "model.safetensors").is_file()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.dtype == torch.float32 and not (folder / "adapter").exists()
    best = load_file(folder / "checkpoints" / "best" / "model.safetensors")
    assert all(torch.equal(v, best[k]) for k, v in load_file(folder / "model.safetensors").items())
    config = copied.policies(*override)
    train_hierarchical(config, force=True)
    train_baseline_dpo(config, force=True)
    base = load_file(Path(config.shared.model.name) / "model.safetensors")
    for method in ("hierarchical", "baseline_dpo"):
        weights = load_file(copied.paths.policy(method) / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj.weight"
        moved = (weights[name] - base[name]).abs()
        assert (
            1e-4 < moved.max() < 1e-2 and (moved > 0).float().mean() > 0.99
        )  # Adam: about the sum of the rates
        AutoModelForCausalLM.from_pretrained(copied.paths.policy(method))


def test_approaches_lie_side_by_side(copied: Pipeline, no_figures: None) -> None:
    configs = copied.loaded("data.approach=pku_safe")
    assert {config.paths.approach for config in configs.values()} == {"pku_safe"}
    own = configs[RewardModelConfig]
    shutil.copytree(copied.paths.processed, own.paths.processed)  # as if its data had been prepared
    stamps = {d: (d / "run.json").read_bytes() for d in artifacts(copied)}
    train_reward_model(own, objective="honest")
    train_baseline_dpo(configs[PolicyConfig])
    for made in (own.paths.reward_model("honest"), own.paths.policy("baseline_dpo")):
        assert "pku_safe" in made.parts and (made / "run.json").is_file()
    assert (own.paths.reward_analysis / "honest.json").is_file()
    assert io.read_json(own.paths.reward_model("honest") / "metrics.json")["approach"] == "pku_safe"
    assert {d: (d / "run.json").read_bytes() for d in stamps} == stamps


def test_a_reward_model_that_lost_its_calibration_is_calibrated_and_not_trained(
    copied: Pipeline, no_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prmd.rewards.backbone.run_training", None)
    folder = copied.paths.reward_model("helpful")
    kept = {p: io.file_sha256(p) for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")}
    record, calibration = folder / "run.json", folder / "calibration.json"
    wanted = io.read_json(calibration)
    for damage in (
        lambda: calibration.unlink(),
        lambda: io.write_json(calibration, wanted | {"source": "x"}),
    ):
        damage()
        train_reward_model(copied.reward_models(), objective="helpful")
        assert io.read_json(calibration)["calibration"] == wanted["calibration"]
        same = {p for p, key in kept.items() if p.is_file() and io.file_sha256(p) == key}
        assert {p for p in kept if p.suffix == ".safetensors"} <= same and record not in same
