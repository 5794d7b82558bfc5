"""The whole pipeline on a tiny random model: its three YAML files, and a run of all stages in this process."""

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import tiny_causal_lm
from transformers import PreTrainedModel

import run_pipeline
from prmd.artifacts.paths import CONFIG_DIR, ArtifactPaths
from prmd.config.evaluation import EvaluationConfig
from prmd.config.loading import load_pipeline
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.objectives import OBJECTIVES

MEMBERS = 3
METHODS = ("hard_min", "cvar", "mean")
POLICIES = ("baseline_dpo", *METHODS, "hierarchical")
"""Everything the pipeline trains, in the order it does."""

REWARD_MODELS = """
extends: {quickstart}/reward_model_config.yaml
artifact_root: {root}
data:
  approach: embedded
  max_pairs_per_objective: 40
  splits: {{val_fraction: 0.07, test_fraction: 0.14, judge_fraction: 0.2}}
model: {{source: hub, name: {model}, revision: null, dtype: float32}}
tuning: {{method: lora, lora: {{r: 4, alpha: 8, learning_rate: 1e-2}}}}
training:
  pairs_per_device: 2
  gradient_accumulation_steps: 2
  epochs: 1.0
  max_pairs: 66
  max_length: 240
  logging_steps: 1
  checkpoints: [0.0, 0.33, 0.66, 1.0]
scoring_tokens: 4096
ensemble: {{members: 3, fit_fraction: 0.3}}
calibration: {{source: validation_responses, samples_per_prompt: 2, prompts: 30, max_new_tokens: 8}}
"""
POLICY = """
extends: {quickstart}/policy_config.yaml
reward_model_config: reward_model_config.yaml
policy: {{methods: [hard_min, cvar, mean], alpha: 0.5}}
tuning: {{method: lora, lora: {{r: 4, alpha: 8, learning_rate: 1e-2}}}}
training:
  pairs_per_device: 2
  gradient_accumulation_steps: 2
  epochs: 1.0
  max_pairs: 18
  max_length: 240
  logging_steps: 1
  checkpoints: [0.33, 0.66, 1.0]
"""
EVALUATION = """
extends: {quickstart}/evaluation_config.yaml
reward_model_config: reward_model_config.yaml
judges:
  tuning: {{method: lora, lora: {{r: 4, alpha: 8, learning_rate: 1e-2}}}}
  training: {{pairs_per_device: 2, gradient_accumulation_steps: 2, max_pairs: 8, max_length: 240}}
generation: {{prompts: 6, samples_per_prompt: 2, max_new_tokens: 8, batch_size: 12}}
benchmarks: {{hh_holdout: {{max_pairs: 16}}}}
bootstrap_resamples: 200
"""


@dataclass(frozen=True)
class Pipeline:
    """A finished run of all stages.

    Attributes:
        configs: folder with the three YAML files.
        log: what the stages logged; `said` what the pipeline printed.
        seconds: taken by the run.
    """

    root: Path
    configs: Path
    log: str
    said: str
    seconds: float

    @property
    def paths(self) -> ArtifactPaths:
        return self.loaded()[RewardModelConfig].paths

    def loaded(self, *overrides: str) -> dict[type, Any]:
        return load_pipeline(self.configs, [f"artifact_root={self.root.as_posix()}", *overrides])

    def reward_models(self, *overrides: str) -> RewardModelConfig:
        return self.loaded(*overrides)[RewardModelConfig]

    def policies(self, *overrides: str) -> PolicyConfig:
        return self.loaded(*overrides)[PolicyConfig]

    def evaluation(self, *overrides: str) -> EvaluationConfig:
        return self.loaded(*overrides)[EvaluationConfig]


def write_configs(folder: Path, root: Path, model: Path) -> Path:
    """The three YAML files, with a model of two layers and lengths a test can afford."""
    folder.mkdir(parents=True)
    names = {
        "quickstart": (CONFIG_DIR / "quickstart").as_posix(),
        "root": root.as_posix(),
        "model": model.as_posix(),
    }
    for name, text in (
        ("reward_model_config.yaml", REWARD_MODELS),
        ("policy_config.yaml", POLICY),
        ("evaluation_config.yaml", EVALUATION),
    ):
        (folder / name).write_text(text.format(**names), encoding="utf-8", newline="\n")
    return folder


@contextmanager
def logged() -> Iterator[StringIO]:
    """What the project logs meanwhile."""
    log = StringIO()
    handler, ours = logging.StreamHandler(log), logging.getLogger("prmd")
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield log
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)


def run_all(root: Path, configs: Path, overrides: Sequence[str] = (), *, force: bool = False) -> Pipeline:
    """Run every stage in this process, as `run_pipeline.py` does."""
    printed, start = StringIO(), time.monotonic()
    with logged() as log, redirect_stdout(printed):
        run_pipeline.run_stages(load_pipeline(configs, overrides), force=force, dry_run=False)
    return Pipeline(root, configs, log.getvalue(), printed.getvalue(), time.monotonic() - start)


def copy_of(pipeline: Pipeline, root: Path) -> Pipeline:
    """The same artifacts at another place, for a test to change."""
    shutil.copytree(pipeline.root, root)
    return replace(pipeline, root=root)


def no_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every loading of weights fail."""

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of every model that is loaded from now on."""
    loaded: list[str] = []
    original = PreTrainedModel.from_pretrained.__func__

    def load(kind: type, *arguments: Any, **keywords: Any) -> Any:
        loaded.append(kind.__name__)
        return original(kind, *arguments, **keywords)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))
    return loaded


def artifacts(pipeline: Pipeline) -> Iterator[Path]:
    """Every directory that a run.json makes an artifact."""
    paths = pipeline.paths
    yield paths.processed
    for objective in OBJECTIVES:
        yield paths.reward_model(objective)
        yield paths.judge(objective)
    for method in POLICIES:
        yield paths.policy(method)
    yield paths.metrics


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard would show of a folder."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def shards(root: Path) -> set[str]:
    """Every file of the cache."""
    return {
        path.relative_to(root).as_posix() for path in (root / "data" / "cache").rglob("*") if path.is_file()
    }


def first_run(folder: Path) -> Pipeline:
    """Make the tiny model and its configuration in `folder`, and run everything."""
    model = tiny_causal_lm(folder / "base", seed=0)
    root = folder / "artifacts"
    return run_all(root, write_configs(folder / "configs", root, model))
