"""Pooling of pairs by objective weights, and rewards and log-probabilities as policy training reads them."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_causal_lm
from tiny_workspace import write_prepared
from torch import Tensor

from prmd import policy_data
from prmd.calibration import Calibration, fit_calibration
from prmd.config import (
    CalibrationConfig,
    DataConfig,
    ModelConfig,
    PairsConfig,
    PolicyConfig,
    PolicySection,
    RewardModelConfig,
    TrainingConfig,
)
from prmd.errors import DataError
from prmd.generation import GeneratedResponse
from prmd.models import load_tokenizer
from prmd.objectives import OBJECTIVES
from prmd.policy_data import (
    PairScores,
    ScaleResponses,
    draw_reference_samples,
    held_out_pairs,
    pool_order,
    pooled_pairs,
    scale_responses,
    score_pairs,
)
from prmd.policy_targets import method_targets
from prmd.tokenization import PrefixRow, Tokens

K, M = 3, 4


# ------------------------------------------------------------------ pooling
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 40)] * K),
    raw=st.tuples(*[st.integers(1, 9)] * K),
    total=st.integers(1, 90),
    seed=st.integers(0, 5),
)
def test_pool_holds_each_objective_by_its_weight_not_its_size(
    sizes: tuple[int, ...], raw: tuple[int, ...], total: int, seed: int
) -> None:
    weights = {k: w / sum(raw) for k, w in zip(OBJECTIVES, raw, strict=True)}
    size_of = dict(zip(OBJECTIVES, sizes, strict=True))
    drawn = pool_order(size_of, weights, total, seed)
    counts = Counter(objective for objective, _ in drawn)
    for objective in OBJECTIVES:
        assert counts[objective] == round(weights[objective] * total)
        uses = Counter(i for o, i in drawn if o == objective)
        assert all(0 <= i < size_of[objective] for i in uses)
        # small sets repeat evenly and large ones never do
        least = counts[objective] // size_of[objective]
        assert set(uses.values()) <= {least, least + 1} and (least == 0 or len(uses) == size_of[objective])
    assert pool_order(size_of, weights, total, seed) == drawn


def test_pool_is_mixed_and_another_seed_is_another_order() -> None:
    sizes = dict.fromkeys(OBJECTIVES, 30)
    weights = dict.fromkeys(OBJECTIVES, 1 / 3)
    first, other = (pool_order(sizes, weights, 60, seed) for seed in (0, 1))
    assert first != other
    assert {o for o, _ in first[:15]} == set(OBJECTIVES)


@pytest.fixture
def config(tmp_path: Path) -> PolicyConfig:
    shared = RewardModelConfig(
        artifact_root=str(tmp_path / "root"),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(tiny_causal_lm(tmp_path / "base")), revision=None, dtype="float32"),
        calibration=CalibrationConfig(samples_per_prompt=3, max_new_tokens=4, source="validation_responses"),
    )
    write_prepared(shared.paths, pairs=6)
    training = TrainingConfig(max_length=200, epochs=1.0)
    return PolicyConfig(reward_model_config=shared, training=training)


def adjusted(
    config: PolicyConfig, *, weights: dict[str, float] | None = None, **training: Any
) -> PolicyConfig:
    policy = config.policy if weights is None else PolicySection(weights=weights)
    return config.model_copy(
        update={"policy": policy, "training": config.training.model_copy(update=training)}
    )


def tokenizer_of(config: PolicyConfig) -> Any:
    return load_tokenizer(config.shared.model, config.paths)


def test_each_pair_is_tokenised_once_and_streamed_by_weight(config: PolicyConfig) -> None:
    config = adjusted(
        config, weights={"helpful": 0.5, "harmless": 0.25, "honest": 0.25}, epochs=2.0, max_pairs=12
    )
    pairs = pooled_pairs(config, tokenizer_of(config), "train", None)
    ids = [pair.id for pair in pairs.tokenized.pairs]
    assert len(set(ids)) == len(ids) and len(pairs.stream) == 24
    for epoch in (pairs.stream[:12], pairs.stream[12:]):
        seen = Counter(pairs.tokenized.pairs[i].objective for i in epoch)
        assert seen == {"helpful": 6, "harmless": 3, "honest": 3}
    assert pairs.stream[:12] != pairs.stream[12:]


def test_half_an_epoch_is_half_the_stream_and_more_weight_repeats_pairs(config: PolicyConfig) -> None:
    half = pooled_pairs(adjusted(config, epochs=0.5), tokenizer_of(config), "train", None)
    assert len(half.stream) == 9
    heavy = adjusted(config, weights={"helpful": 0.9, "harmless": 0.05, "honest": 0.05})
    pairs = pooled_pairs(heavy, tokenizer_of(config), "train", 20)
    uses = Counter(pairs.tokenized.pairs[i].id for i in pairs.stream)
    helpful = [uses[p.id] for p in pairs.tokenized.pairs if p.objective == "helpful"]
    assert sum(helpful) == 18 and set(helpful) == {3}


def test_over_long_pairs_leave_the_stream(config: PolicyConfig) -> None:
    whole = pooled_pairs(config, tokenizer_of(config), "train", None)
    length = max(row.longest for row in whole.tokenized.rows) - 1
    short = pooled_pairs(
        adjusted(config, max_length=length, over_length="drop"), tokenizer_of(config), "train", None
    )
    assert short.tokenized.dropped > 0
    kept = {p.id for p in short.tokenized.pairs}
    assert [short.tokenized.pairs[i].id for i in short.stream] == [
        whole.tokenized.pairs[i].id for i in whole.stream if whole.tokenized.pairs[i].id in kept
    ]


def test_held_out_pairs_are_a_pooled_quarter(config: PolicyConfig) -> None:
    held = held_out_pairs(config, tokenizer_of(config), 24)
    assert Counter(p.objective for p in held.pairs) == dict.fromkeys(OBJECTIVES, 2)
    train = {p.id for p in pooled_pairs(config, tokenizer_of(config), "train", None).tokenized.pairs}
    assert not train & {p.id for p in held.pairs}


def test_pairs_of_one_objective_are_as_many_as_all_together(config: PolicyConfig) -> None:
    config = adjusted(config, max_pairs=12)
    together = pooled_pairs(config, tokenizer_of(config), "train", None)
    alone = pooled_pairs(config, tokenizer_of(config), "train", None, objective="honest")
    assert len(alone.stream) == len(together.stream) == 12
    assert {p.objective for p in alone.tokenized.pairs} == {"honest"} and len(alone.tokenized.pairs) == 6
    assert set(Counter(alone.stream).values()) == {2}
    held = held_out_pairs(config, tokenizer_of(config), 24, objective="harmless")
    assert {p.objective for p in held.pairs} == {"harmless"} and len(held.pairs) == 6


# ------------------------------------------------------------------ rewards
@dataclass
class StandIn:
    """A reward model whose rewards are a random table, changed by a r + c per member and c(x) per prompt."""

    tokenizer: Any
    seed: int
    factor: Tensor = field(default_factory=lambda: torch.ones(M, dtype=torch.float64))
    shift: Tensor = field(default_factory=lambda: torch.zeros(M, dtype=torch.float64))
    by_prompt: float = 0.0
    calibration: Calibration | None = None
    shared_base: None = None
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
        return [[GeneratedResponse("t", (5, i, 2), True) for i in range(3)] for _ in prompts]

    def logps(config: Any, tokenizer: Any, rows: list[PrefixRow]) -> list[Tensor]:
        return [torch.tensor([-float(len(r)) for r in row.responses]) for row in rows]

    monkeypatch.setattr(policy_data, "reference_samples", samples)
    monkeypatch.setattr(policy_data, "reference_logps", logps)


def with_source(config: PolicyConfig, source: str) -> PolicyConfig:
    calibration = config.shared.calibration.model_copy(update={"source": source})
    shared = config.shared.model_copy(update={"calibration": calibration})
    return config.model_copy(update={"reward_model_config": shared})


def scored(config: PolicyConfig, models: list[StandIn]) -> tuple[PairScores, ScaleResponses]:
    tokenizer = tokenizer_of(config)
    pairs = pooled_pairs(config, tokenizer, "train", None)
    scores = score_pairs(config, models, tokenizer, pairs.tokenized)  # type: ignore[arg-type]
    return scores, scale_responses(config, models, tokenizer, pairs, scores)  # type: ignore[arg-type]


def test_every_pair_is_scored_by_every_model_and_centred_globally(config: PolicyConfig, frozen: None) -> None:
    models = [StandIn(tokenizer_of(config), k).calibrated(VALIDATION) for k in range(K)]
    scores, scale = scored(config, models)
    n = 18
    assert scores.rewards.shape == (K, M, n, 2) and scores.ref_logps.shape == (n, 2)
    for k, model in enumerate(models):
        raw = torch.stack(
            [torch.stack([model._reward(r.prompt_ids, y) for y in r.responses]) for r in model.seen]
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
    pair_rows = [row for row in model.seen if len(row.responses) == 2]
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
    scores, scale = scored(config, models)
    model = models[2]
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
    tokenizer = tokenizer_of(config)
    drawn = pooled_pairs(config, tokenizer, "train", None).tokenized
    assert objectives == [p.objective for p in drawn.pairs]
    reference = draw_reference_samples(config, tokenizer, drawn)
    assert [row.responses for row in reference.rows][:2] == [((5, 0, 2), (5, 1, 2), (5, 2, 2))] * 2
    assert reference.logps.shape == (18, 3) and set(reference.logps.flatten().tolist()) == {-3.0}


@pytest.mark.parametrize("source", ["validation_responses", "reference_samples"])
@pytest.mark.parametrize("method", ["mean", "hard_min", "cvar", "hierarchical", "lcb", "softmin"])
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
        policy_data.load_reward_models(config.shared)
