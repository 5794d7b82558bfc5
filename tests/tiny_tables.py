"""Reward models that are random tables, and a policy configuration of a few steps: stage 3 without any scoring model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from tiny_workspace import reward_model_config
from torch import Tensor

from prmd.artifacts.paths import ArtifactPaths
from prmd.config.policy import PairsConfig, PolicyConfig
from prmd.config.shared import CalibrationConfig, LoraConfig, RewardModelConfig, TrainingConfig, TuningConfig
from prmd.inference.cache import ScoreTable, tokens_key
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import PrefixRow, Tokens
from prmd.objectives import OBJECTIVES
from prmd.pessimism.calibration import Calibration, fit_calibration
from prmd.policies import preview, train
from prmd.report import figures

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

    def held(self, rows: list[PrefixRow]) -> list[bool]:
        table = ScoreTable(self.paths.cache("rewards", self.fingerprint), self.members)
        return [table.holds([row]) for row in rows]

    def reward(self, prompt: Tokens, response: Tokens) -> Tensor:
        seed = int.from_bytes(tokens_key(prompt, response)[:4], "little") + sum(self.fingerprint.encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((), generator=generator) + 0.5 * torch.randn(self.members, generator=generator)

    def calibrated(self) -> Self:
        rows = [PrefixRow((7, i), ((1, i), (2, i), (3, i))) for i in range(8)]
        values = torch.cat(self.rewards(rows, description="c"))
        self.calibration = fit_calibration(values, torch.arange(8).repeat_interleave(3))
        return self


def table_config(root: Path, base: Path, **changes: Any) -> PolicyConfig:
    """A policy of six steps at most below `root`, from the tiny model in `base`, with reference samples."""
    shared = reward_model_config(
        root,
        base,
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


def with_calibration(config: PolicyConfig, **changes: Any) -> PolicyConfig:
    """The same with other settings of the calibration."""
    calibration = config.shared.calibration.model_copy(update=changes)
    shared = config.shared.model_copy(update={"calibration": calibration})
    return config.model_copy(update={"reward_model_config": shared})


def use_tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Table]:
    """Put tables in the place of reward models; by objective, made when the first stage asks for them."""
    models: dict[str, Table] = {}

    def load(shared: RewardModelConfig) -> list[Table]:
        tokenizer = load_tokenizer(shared.model, shared.paths)
        for objective in OBJECTIVES:
            if objective not in models:
                models[objective] = Table(tokenizer, shared.paths, f"{objective}-table").calibrated()
        return [models[objective] for objective in OBJECTIVES]

    for module in (preview, train):
        monkeypatch.setattr(module, "load_reward_models", load)
    monkeypatch.setattr(figures, "plot_policy_training", lambda *arguments: [])
    monkeypatch.setattr("prmd.runtime.gc.collect", lambda: 0)
    return models
