"""Rewards of all members and log-probabilities as policy training reads them: calibration, centring, what is refused."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policies import tokens_of, trained_on
from tiny_workspace import policy_config
from torch import Tensor

from prmd.artifacts.paths import ArtifactPaths
from prmd.config.policy import PairsConfig, PolicyConfig
from prmd.errors import DataError
from prmd.inference.generation import GeneratedResponse
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import PrefixRow, Tokens
from prmd.objectives import OBJECTIVES
from prmd.pessimism.calibration import Calibration, fit_calibration
from prmd.policies import scores as policies_scores
from prmd.policies.inputs import Prepared, prepare
from prmd.policies.pairs import PairScores, ScaleResponses, read_splits
from prmd.policies.targets import method_targets
from prmd.rewards.reward_model import load_reward_models

K, M = 3, 4
NOWHERE = ArtifactPaths(Path("nowhere"), "embedded")


@pytest.fixture
def config(tmp_path: Path) -> PolicyConfig:
    return policy_config(tmp_path)


def tokenizer_of(config: PolicyConfig) -> Any:
    return load_tokenizer(config.shared.model, config.paths)


@dataclass
class StandIn:
    """A reward model whose rewards are a random table, changed by a r + c per member and c(x) per prompt."""

    tokenizer: Any
    seed: int
    factor: Tensor = field(default_factory=lambda: torch.ones(M, dtype=torch.float64))
    shift: Tensor = field(default_factory=lambda: torch.zeros(M, dtype=torch.float64))
    by_prompt: float = 0.0
    calibration: Calibration | None = None
    paths: ArtifactPaths = NOWHERE
    fingerprint: str = "stand-in"
    members: int = M
    seen: list[PrefixRow] = field(default_factory=list)

    def rewards(self, rows: list[PrefixRow], *, description: str) -> list[Tensor]:
        self.seen += rows
        return [torch.stack([self._reward(row.prompt_ids, r) for r in row.responses]) for row in rows]

    def release(self) -> None:
        """It has no weights."""

    def _reward(self, prompt: Tokens, response: Tokens) -> Tensor:
        key = hash((self.seed, prompt, response)) % 2**31
        raw = torch.randn(M, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
        offset = self.by_prompt * torch.randn(
            M, generator=torch.Generator().manual_seed(sum(prompt)), dtype=torch.float64
        )
        return self.factor * raw + self.shift + offset

    def calibrated(self, rows: list[PrefixRow]) -> "StandIn":
        rewards = self.rewards(rows, description="c")
        index = torch.tensor([i for i, values in enumerate(rewards) for _ in values])
        return replace(self, calibration=fit_calibration(torch.cat(rewards), index), seen=[])


VALIDATION = [PrefixRow((7, i), ((1, i), (2, i), (3, i))) for i in range(8)]


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference samples and log-probabilities without a model."""

    def samples(config: Any, tokenizer: Any, prompts: list[Tokens]) -> list[list[GeneratedResponse]]:
        return [[GeneratedResponse(f"t{i}", (5, i, 2), True) for i in range(3)] for _ in prompts]

    def logps(config: Any, tokenizer: Any, rows: list[PrefixRow]) -> list[Tensor]:
        return [torch.tensor([-float(len(r)) for r in row.responses]) for row in rows]

    monkeypatch.setattr(policies_scores, "reference_samples", samples)
    monkeypatch.setattr(policies_scores, "reference_logps", logps)


def with_source(config: PolicyConfig, source: str) -> PolicyConfig:
    calibration = config.shared.calibration.model_copy(update={"source": source})
    shared = config.shared.model_copy(update={"calibration": calibration})
    return config.model_copy(update={"reward_model_config": shared})


def prepared(config: PolicyConfig, models: list[StandIn]) -> Prepared:
    return prepare(config, ["hard_min"], models, tokens_of(config), read_splits(config.paths))  # type: ignore[arg-type]


def scored(config: PolicyConfig, models: list[StandIn]) -> tuple[PairScores, ScaleResponses]:
    found = prepared(config, models)
    return found.scores[0], found.scale


def test_every_pair_is_scored_by_every_model_and_centred_globally(config: PolicyConfig, frozen: None) -> None:
    models = [StandIn(tokenizer_of(config), k).calibrated(VALIDATION) for k in range(K)]
    scores, scale = scored(config, models)
    n = 18
    assert scores.rewards.shape == (K, M, n, 2) and scores.ref_logps.shape == (n, 2)
    for k, model in enumerate(models):
        raw = torch.stack(
            [torch.stack([model._reward(r.prompt_ids, y) for y in r.responses]) for r in model.seen[:n]]
        )
        validation = np.array([v.numpy() for v in model.rewards(VALIDATION, description="c")])  # [8, 3, M]
        deviations = validation - validation.mean(axis=1, keepdims=True)
        s = np.sqrt((deviations**2).sum(axis=(0, 1)) / (8 * 2))
        expected = (raw.numpy() - validation.mean(axis=(0, 1))) / s
        assert scores.rewards[k].permute(1, 2, 0).numpy() == pytest.approx(expected)
    assert torch.equal(scale.rewards, scores.rewards.reshape(K, M, 2 * n))
    assert scale.prompt_index.tolist() == [i for i in range(n) for _ in range(2)]


def test_with_reference_samples_every_prompt_is_centred_on_its_own(
    config: PolicyConfig, frozen: None
) -> None:
    config = with_source(config, "reference_samples")
    models = [StandIn(tokenizer_of(config), k).calibrated(VALIDATION) for k in range(K)]
    scores, scale = scored(config, models)
    model = models[1]
    pair_rows = [row for row in model.seen if len(row.responses) == 2][:18]
    sampled = [row for row in model.seen if len(row.responses) == 3][:18]
    assert [r.prompt_ids for r in sampled] == [r.prompt_ids for r in pair_rows]
    for i, (row, samples) in enumerate(zip(pair_rows, sampled, strict=True)):
        b = torch.stack([model._reward(samples.prompt_ids, y) for y in samples.responses]).mean(0)
        for side in range(2):
            expected = (model._reward(row.prompt_ids, row.responses[side]) - b) / model.calibration.scale
            assert torch.allclose(scores.rewards[1, :, i, side], expected, atol=1e-12)
    assert scale.rewards.shape == (K, M, 54) and scale.source.startswith("reference samples")
    centred = scale.rewards.reshape(K, M, 18, 3)
    assert centred.mean(-1).abs().max() < 1e-12


def test_samples_beside_a_global_centring_keep_it(config: PolicyConfig, frozen: None) -> None:
    """`pairs.reference_samples` with calibration by held-out responses: one centring for pairs and samples."""
    config = config.model_copy(update={"pairs": PairsConfig(reference_samples=3)})
    models = [StandIn(tokenizer_of(config), k).calibrated(VALIDATION) for k in range(K)]
    found = prepared(config, models)
    scores, scale, reference, model = found.scores[0], found.scale, found.samples, models[2]
    pair = next(row for row in model.seen if len(row.responses) == 2)
    samples = next(row for row in model.seen if len(row.responses) == 3)
    fitted = model.calibration
    for j, response in enumerate(samples.responses):
        expected = (model._reward(samples.prompt_ids, response) - fitted.offset) / fitted.scale
        assert torch.allclose(scale.by_prompt()[2, :, 0, j], expected, atol=1e-12)
    expected = (model._reward(pair.prompt_ids, pair.responses[1]) - fitted.offset) / fitted.scale
    assert torch.allclose(scores.rewards[2, :, 0, 1], expected, atol=1e-12)
    assert scale.samples_per_prompt == 3 and scale.rewards.shape == (K, M, 54)
    objectives = [OBJECTIVES[k] for k in scores.labelled_for.tolist()]
    assert objectives == [p.objective for p in trained_on(config).tokenized.pairs]
    assert [row.responses for row in reference.rows][:2] == [((5, 0, 2), (5, 1, 2), (5, 2, 2))] * 2
    assert reference.logps.shape == (18, 3) and set(reference.logps.flatten().tolist()) == {-3.0}


EVERY = ("mean", "hard_min", "cvar", "hierarchical", "lcb", "softmin", "edpo")
EVERY += tuple(f"paper_eq{number}" for number in (5, 6, 7, 9))


@pytest.mark.parametrize(
    ("source", "method"),
    [
        *((source, method) for source in ("validation_responses", "reference_samples") for method in EVERY),
        ("reference_samples", "maxmin"),  # which needs samples
    ],
)
def test_an_affine_change_of_one_member_changes_no_target(
    config: PolicyConfig, frozen: None, source: str, method: str
) -> None:
    config = with_source(config, source)
    tokenizer = tokenizer_of(config)
    before = [StandIn(tokenizer, k).calibrated(VALIDATION) for k in range(K)]
    factor, shift = torch.ones(M).double(), torch.zeros(M).double()
    factor[2], shift[2] = 37.5, -1234.5
    after = [*before[:1], StandIn(tokenizer, 1, factor, shift).calibrated(VALIDATION), *before[2:]]
    targets = []
    for models in (before, after):
        scores, scale = scored(config, models)
        targets.append(method_targets(config.policy, method, train=scores, held_out=scores, scale=scale))
    assert torch.allclose(targets[0].train, targets[1].train, atol=1e-9)
    assert targets[0].reward_scale == pytest.approx(targets[1].reward_scale, abs=1e-9)
    before_columns, after_columns = (found.columns[0] for found in targets)
    assert all(
        torch.allclose(before_columns[name], after_columns[name], atol=1e-9) for name in before_columns
    )


def test_an_offset_of_each_prompt_changes_nothing_where_prompts_are_centred(
    config: PolicyConfig, frozen: None
) -> None:
    tokenizer, found = tokenizer_of(config), {}
    for source in ("reference_samples", "validation_responses"):
        for by_prompt in (0.0, 50.0):
            models = [StandIn(tokenizer, k, by_prompt=by_prompt if k == 1 else 0.0) for k in range(K)]
            models = [model.calibrated(VALIDATION) for model in models]
            scores, scale = scored(with_source(config, source), models)
            result = method_targets(config.policy, "hard_min", train=scores, held_out=scores, scale=scale)
            found[source, by_prompt] = result.train
    assert torch.allclose(found["reference_samples", 0.0], found["reference_samples", 50.0], atol=1e-9)
    assert not torch.allclose(
        found["validation_responses", 0.0], found["validation_responses", 50.0], atol=0.01
    )


# ------------------------------------------------------------------ what is refused
def test_missing_reward_model_names_the_command(config: PolicyConfig) -> None:
    with pytest.raises(DataError, match=r"python 2_reward_modeling/train_helpful_rm\.py"):
        load_reward_models(config.shared)
