"""Pairs of policy training: pooled by objective weights, tokenised once, in the order of the seed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policies import mixture_of, tokens_of, trained_on, watched
from tiny_workspace import policy_config

from prmd.config.policy import PolicyConfig, PolicySection
from prmd.objectives import OBJECTIVES
from prmd.policies.pairs import pool_order, pooled_pairs, read_splits

K = len(OBJECTIVES)


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
    return policy_config(tmp_path)


def adjusted(
    config: PolicyConfig, *, weights: dict[str, float] | None = None, **training: Any
) -> PolicyConfig:
    policy = config.policy if weights is None else PolicySection(weights=weights)
    return config.model_copy(
        update={"policy": policy, "training": config.training.model_copy(update=training)}
    )


def test_each_pair_is_tokenised_once_and_streamed_by_weight(config: PolicyConfig) -> None:
    config = adjusted(
        config, weights={"helpful": 0.5, "harmless": 0.25, "honest": 0.25}, epochs=2.0, max_pairs=12
    )
    pairs = trained_on(config)
    ids = [pair.id for pair in pairs.tokenized.pairs]
    assert len(set(ids)) == len(ids) and len(pairs.stream) == 24
    for epoch in (pairs.stream[:12], pairs.stream[12:]):
        seen = Counter(pairs.tokenized.pairs[i].objective for i in epoch)
        assert seen == {"helpful": 6, "harmless": 3, "honest": 3}
    assert pairs.stream[:12] != pairs.stream[12:]


def test_half_an_epoch_is_half_the_stream_and_more_weight_repeats_pairs(config: PolicyConfig) -> None:
    half = trained_on(adjusted(config, epochs=0.5))
    assert len(half.stream) == 9
    heavy = adjusted(config, weights={"helpful": 0.9, "harmless": 0.05, "honest": 0.05})
    train = read_splits(config.paths)["train"]
    pairs = pooled_pairs(train, replace(mixture_of(heavy), total=20), tokens_of(config))
    uses = Counter(pairs.tokenized.pairs[i].id for i in pairs.stream)
    helpful = [uses[p.id] for p in pairs.tokenized.pairs if p.objective == "helpful"]
    assert sum(helpful) == 18 and set(helpful) == {3}


def test_over_long_pairs_leave_the_stream(config: PolicyConfig) -> None:
    whole = trained_on(config)
    length = max(row.longest for row in whole.tokenized.rows) - 1
    short = trained_on(adjusted(config, max_length=length, over_length="drop"))
    assert short.tokenized.dropped > 0
    kept = {p.id for p in short.tokenized.pairs}
    assert [short.tokenized.pairs[i].id for i in short.stream] == [
        whole.tokenized.pairs[i].id for i in whole.stream if whole.tokenized.pairs[i].id in kept
    ]


def test_held_out_pairs_are_a_pooled_quarter(config: PolicyConfig) -> None:
    held = watched(config, 24)
    assert Counter(p.objective for p in held.pairs) == dict.fromkeys(OBJECTIVES, 2)
    train = {p.id for p in trained_on(config).tokenized.pairs}
    assert not train & {p.id for p in held.pairs}


def test_pairs_of_one_objective_are_as_many_as_all_together(config: PolicyConfig) -> None:
    config = adjusted(config, max_pairs=12)
    together = trained_on(config)
    alone = trained_on(config, "honest")
    assert len(alone.stream) == len(together.stream) == 12
    assert {p.objective for p in alone.tokenized.pairs} == {"honest"} and len(alone.tokenized.pairs) == 6
    assert set(Counter(alone.stream).values()) == {2}
    held = watched(config, 24, "harmless")
    assert {p.objective for p in held.pairs} == {"harmless"} and len(held.pairs) == 6
