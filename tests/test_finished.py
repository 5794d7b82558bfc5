"""Artifacts made by an earlier version still count as finished: nothing is trained, sampled or scored again.

`fixtures/finished` is a whole run, see its README.md. Every test works on a copy of it at another place.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import count_loads, no_model_loads

from prmd.artifacts.io import file_sha256, fingerprint, read_json
from prmd.artifacts.paths import PROJECT_ROOT
from prmd.config.evaluation import EvaluationConfig
from prmd.config.loading import load_config
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.data.prepare import download_dataset, split_objectives
from prmd.errors import ConfigError
from prmd.evaluation.evaluate import benchmark_eval, compute_metrics
from prmd.models.tokenization import tokenize_pairs
from prmd.pairs import read_pairs
from prmd.policies.train import train_baseline_dpo, train_hierarchical, train_pessimistic
from prmd.rewards.reward_model import load_reward_model
from prmd.rewards.train import train_reward_model

MADE = PROJECT_ROOT / "tests" / "fixtures" / "finished"
CANDIDATES = ("reference", "baseline_dpo", "hard_min", "hierarchical")
BENCHMARKS = ("hh_holdout", "heldout_pairs", "truthfulqa", "truthfulqa_generation")
REWRITTEN = {"manifest.json", "run.json", "config.yaml", "comparison.json", "comparison.md"}
"""Files in `data/raw` and `outputs` that a stage writes at every call; those below `models.loading` it never does."""


@dataclass(frozen=True)
class Finished:
    """A copy of the finished run: `configs` as they were, artifacts and model at their new place."""

    folder: Path

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    def load(self, kind: type, *overrides: str, configs: str = "configs") -> Any:
        places = [
            f"artifact_root={self.artifacts.as_posix()}",
            f"model.name={(self.folder / 'base').as_posix()}",
        ]
        return load_config(self.folder / configs, kind, [*places, *overrides])

    def files(self) -> dict[str, str]:
        """sha256 by name of everything that a finished run keeps: data, cache, weights with their records, results."""
        kept = [
            *self._below("models/**/*"),
            *self._below("data/processed/**/*"),
            *self._below("data/cache/**/*"),
        ]
        kept += [p for p in self._below("data/raw/**/*") if p.name not in REWRITTEN]
        results = [*self._below("outputs/metrics/**/*"), *self._below("outputs/benchmarks/*/*/*")]
        kept += [p for p in results if p.name not in REWRITTEN]
        return {p.relative_to(self.artifacts).as_posix(): self._key(p) for p in kept}

    def cache(self) -> dict[str, str]:
        """The same of the cache alone."""
        return {k: v for k, v in self.files().items() if k.startswith("data/cache/")}

    def _key(self, path: Path) -> str:
        """sha256 of a file; of a record without its list of files, which an earlier version did not keep."""
        if path.name != "run.json":
            return file_sha256(path)
        return fingerprint({key: value for key, value in read_json(path).items() if key != "files"})

    def _below(self, pattern: str) -> Iterator[Path]:
        return (path for path in self.artifacts.glob(pattern) if path.is_file())


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finished:
    """A copy of the finished run; no report, no figure and no download."""
    shutil.copytree(MADE, tmp_path / "elsewhere")
    monkeypatch.setattr("gc.collect", lambda: 0)  # half a second each time, where no model was in memory
    monkeypatch.setattr("prmd.report.figures.plot_policy_training", lambda *arguments: [])
    monkeypatch.setattr("prmd.evaluation.evaluate.build_report", lambda paths: paths.report)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    return Finished(tmp_path / "elsewhere")


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded and no module called."""
    no_model_loads(monkeypatch)
    monkeypatch.setattr(torch.nn.Module, "__call__", refuse)


def refuse(*arguments: Any, **keywords: Any) -> None:
    raise AssertionError("something finished is done again")


def test_every_stage_reuses_what_an_earlier_version_made(
    finished: Finished, no_forward: None, caplog: pytest.LogCaptureFixture
) -> None:
    def said(stage: Callable[..., Path], config: Any, **objective: str) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="prmd"):
            stage(config, **objective)
        return caplog.text

    before = finished.files()
    shared, policy = finished.load(RewardModelConfig), finished.load(PolicyConfig)
    evaluation = finished.load(EvaluationConfig)
    lora = finished.load(RewardModelConfig, configs="configs/lora")
    lora_policy = finished.load(PolicyConfig, configs="configs/lora")
    assert said(download_dataset, shared).count("kept") == 5
    first = said(split_objectives, shared)
    assert "reused" in first and first.count("accepted as they are") == 1
    assert "accepted as they are" not in said(split_objectives, shared)  # once
    for objective, config in (("helpful", shared), ("harmless", lora), ("honest", shared)):
        assert "reused" in said(train_reward_model, config, objective=objective)
    assert "policy baseline_dpo: finished before" in said(train_baseline_dpo, policy)
    assert "policy hard_min: finished before" in said(train_pessimistic, lora_policy)
    assert "policy hierarchical: finished before" in said(train_hierarchical, policy)
    assert said(compute_metrics, evaluation).count("reused") == 3 + len(CANDIDATES)  # its judges too
    assert said(benchmark_eval, evaluation).count("reused") == len(BENCHMARKS) * len(CANDIDATES)
    assert finished.files() == before
    weights = finished.artifacts / "models/policy_models/hh_truthfulqa/hard_min/adapter_model.safetensors"
    listed = read_json(weights.with_name("run.json"))["files"][weights.name]
    assert listed == {"size": weights.stat().st_size, "sha256": file_sha256(weights)}


def test_what_is_compared_covers_every_kind_of_artifact(finished: Finished) -> None:
    """Without which equal files would say nothing."""
    files, prefix = finished.files(), "hh_truthfulqa"
    names = list(files)
    kinds = {name.split("/")[2].split("-")[0] for name in names if name.startswith("data/cache/")}
    assert kinds == {"features", "kl", "logps", "rewards", "samples"}
    models = {
        f"reward_models/{prefix}/helpful_rm/model.safetensors",
        f"reward_models/{prefix}/honest_rm/ensemble.safetensors",
        f"reward_models/{prefix}/harmless_rm/members/1/adapter/adapter_model.safetensors",
        f"judges/{prefix}/honest/adapter/adapter_model.safetensors",
        f"policy_models/{prefix}/baseline_dpo/model.safetensors",
        f"policy_models/{prefix}/hard_min/adapter_model.safetensors",
        f"policy_models/{prefix}/hierarchical/model.safetensors",
        f"policy_models/{prefix}/hierarchical/run.json",
    }
    results = {f"benchmarks/{b}/{prefix}/{c}.json" for b in BENCHMARKS for c in CANDIDATES}
    results |= {f"metrics/{prefix}/{name}.json" for name in (*CANDIDATES, "frontier")}
    assert {f"models/{name}" for name in models} | {f"outputs/{name}" for name in results} <= set(names)
    weights = [files[name] for name in names if name.startswith("models/") and name.endswith(".safetensors")]
    assert len(set(weights)) == len(weights) > 15  # each was trained
    assert all(
        read_json(finished.artifacts / "outputs" / name)["status"] == "done"
        for name in results
        if name.startswith("benchmarks/")
    )


def test_a_forced_evaluation_finds_every_sample_and_score_in_the_cache(
    finished: Finished, no_forward: None
) -> None:
    before, config = finished.cache(), finished.load(EvaluationConfig)
    results = finished.artifacts / "outputs" / "metrics" / "hh_truthfulqa"
    old = {path.name: read_json(path) for path in results.glob("*.json")}
    for name in old:
        (results / name).unlink()  # the frontier too, which is not forced
    compute_metrics(config, force=True)
    benchmark_eval(config, force=True)
    assert finished.cache() == before
    new = {name: read_json(results / name) for name in old}
    assert new["frontier.json"]["fingerprint"] == old["frontier.json"]["fingerprint"]
    for name in (f"{method}.json" for method in CANDIDATES):
        for key in ("fingerprint", "policy", "reward_models"):
            assert new[name]["evaluation"][key] == old[name]["evaluation"][key]
        assert numbers(new[name]) == pytest.approx(numbers(old[name]))


def numbers(metrics: dict[str, Any]) -> list[float]:
    """What depends on every sample, its KL and its judges' scores."""
    return [
        metrics["kl"]["per_response"]["value"],
        *(found["mean_reward"]["value"] for found in metrics["objectives"].values()),
    ]


def test_another_policy_finds_rewards_samples_and_reference_logps_in_the_cache(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, loads = finished.cache(), count_loads(monkeypatch)
    train_hierarchical(finished.load(PolicyConfig, "run_name=again", "policy.beta=0.2"))
    assert loads == ["LlamaForCausalLM"]  # the policy itself, once
    assert finished.cache() == before


def test_a_reward_model_finds_its_features_in_the_cache(finished: Finished, no_forward: None) -> None:
    before, config = finished.cache(), finished.load(RewardModelConfig)
    model = load_reward_model(config.paths.reward_model("helpful"), shared=config)
    pairs = read_pairs(config.paths, "helpful", "test")
    tokenized = tokenize_pairs(
        pairs, model.tokenizer, max_length=128, over_length="truncate_prompt", keep_suffix=True
    )
    features = model.features(tokenized.rows, description="test pairs")
    metrics = read_json(model.directory / "metrics.json")
    assert [float(row[0, 0]) for row in features] == pytest.approx(metrics["rewards_chosen"], abs=2e-5)
    assert finished.cache() == before


def test_new_values_of_the_shipped_file_keep_what_is_finished(
    finished: Finished, no_forward: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Targets were cut at 5 nats, which was the value shipped; ten draws of each of these pairs are more than there are."""
    with caplog.at_level(logging.INFO, logger="prmd"):
        train_hierarchical(finished.load(PolicyConfig, "policy.margin_clip=auto", "pairs.max_repeats=10"))
    assert "policy hierarchical: finished before" in caplog.text


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_what_is_finished_is_not_reused_on_a_base_that_was_edited_since(
    finished: Finished, no_forward: None, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, path = finished.load(RewardModelConfig), finished.folder / "base" / name
    text = path.read_text(encoding="utf-8")
    train_reward_model(config, objective="helpful")
    path.write_text(text.replace("{", '{"edited": true,', 1), encoding="utf-8")
    with pytest.raises(ConfigError, match="finished with other settings or data"):
        train_reward_model(config, objective="helpful")
    path.write_text(text, encoding="utf-8")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="prmd"):
        train_reward_model(config, objective="helpful")
    assert "helpful reward model: finished before" in caplog.text


@pytest.mark.parametrize(
    ("stage", "kind", "override"),
    [
        (train_hierarchical, PolicyConfig, "policy.beta=0.2"),
        (train_hierarchical, PolicyConfig, "policy.margin_clip=4.0"),
        (train_baseline_dpo, PolicyConfig, "training.epochs=2.0"),
        (lambda config: train_reward_model(config, objective="honest"), RewardModelConfig, "seed=43"),
    ],
)
def test_other_settings_do_not_count_as_finished(
    finished: Finished, no_forward: None, stage: Callable[..., Path], kind: type, override: str
) -> None:
    with pytest.raises(ConfigError, match="finished with other settings or data"):
        stage(finished.load(kind, override))
