"""Pairs of policy training: pooled by objective weights, tokenised once, in the order of the seed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TEMPLATE, tiny_tokenizer
from tiny_policies import mixture_of, tokens_of, trained_on, watched
from tiny_workspace import policy_config
from transformers import AutoTokenizer

from prmd.config.policy import PolicyConfig, PolicySection
from prmd.errors import ConfigError, DataError
from prmd.models.tokenization import tokenize_pairs, tokenize_prompt, tokenize_row
from prmd.objectives import OBJECTIVES
from prmd.pairs import PreferencePair, make_pair
from prmd.policies.pairs import (
    Mixture,
    PairTokens,
    binding_repeats,
    describe_draws,
    drawn_pairs,
    draws_line,
    held_out_pairs,
    objective_draws,
    pool_order,
    pooled_pairs,
    read_splits,
)

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


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 40)] * K),
    raw=st.tuples(*[st.integers(0, 9)] * K).filter(any),
    total=st.integers(1, 90),
    most=st.integers(1, 6),
)
def test_no_pair_is_drawn_more_often_than_asked_and_an_epoch_keeps_its_size(
    sizes: tuple[int, ...], raw: tuple[int, ...], total: int, most: int
) -> None:
    weights = {k: w / sum(raw) for k, w in zip(OBJECTIVES, raw, strict=True)}
    size_of = dict(zip(OBJECTIVES, sizes, strict=True))
    drawn = pool_order(size_of, weights, total, 0, most)
    assert max(Counter(drawn).values(), default=0) <= most
    free, limited = (objective_draws(size_of, weights, total, limit) for limit in (None, most))
    able = sum(most * size_of[k] for k in OBJECTIVES if weights[k] > 0)
    assert len(drawn) == sum(limited.values()) == min(sum(free.values()), able)
    assert all(limited[k] == 0 for k in OBJECTIVES if weights[k] == 0)
    if all(free[k] <= most * size_of[k] for k in OBJECTIVES):
        assert drawn == pool_order(size_of, weights, total, 0)


def test_what_few_honest_pairs_leave_over_goes_to_the_others_by_weight() -> None:
    sizes = {"helpful": 43_000, "harmless": 42_000, "honest": 830}
    weights = {"helpful": 0.4, "harmless": 0.2, "honest": 0.4}
    draws = objective_draws(sizes, weights, 60_000, 10)
    assert draws["honest"] == 8300 and sum(draws.values()) == 60_000
    assert draws["helpful"] / draws["harmless"] == pytest.approx(2, rel=1e-3)
    mixture = Mixture(weights, 60_000, 2.0, 0, 10)
    described = describe_draws(sizes, mixture)
    assert described["honest"] == {"draws": 8300, "share": 8300 / 60_000, "passes": 20.0}
    assert "honest 13.8% (20 passes)" in draws_line(described)
    assert binding_repeats(sizes, mixture) == 10
    assert (
        binding_repeats(sizes, replace(mixture, max_repeats=29)) is None
    )  # 24,000 draws of 830 are 28.9 passes


def test_an_epoch_without_enough_draws_is_shorter(config: PolicyConfig) -> None:
    train = read_splits(config.paths)["train"]
    mixture = replace(mixture_of(config, "honest"), max_repeats=2, epochs=1.5)
    pairs = pooled_pairs(train, mixture, tokens_of(config))
    held = len(train["honest"])
    assert len(pairs.stream) == 3 * held < 1.5 * mixture.total
    assert max(Counter(pairs.stream[: 2 * held]).values()) == 2


@pytest.mark.parametrize(("total", "epochs"), [(1, 1.0), (18, 0.02)])
def test_a_training_of_no_pair_is_refused_in_a_line(total: int, epochs: float) -> None:
    """A third of one pair rounds to none, and so does .02 x 18."""
    mixture = Mixture(dict.fromkeys(OBJECTIVES, 1 / K), total, epochs, 0)
    with pytest.raises(ConfigError, match=rf"training\.max_pairs: {total} pairs, .* come to none") as error:
        drawn_pairs(dict.fromkeys(OBJECTIVES, 6), mixture)
    assert "\n" not in str(error.value)


def test_of_many_objectives_there_are_held_out_pairs_beside_a_small_training(config: PolicyConfig) -> None:
    """3 x 0.1 rounds to none for each of ten; 6 x 0.1 is the first that rounds to one."""
    val = read_splits(config.paths)["val"]["honest"]
    many = {f"own{i}": [replace(pair, id=f"{i}-{pair.id}") for pair in val] for i in range(10)}
    mixture = Mixture(dict.fromkeys(many, 0.1), 20, 1.0, 0)
    held = held_out_pairs(many, mixture, tokens_of(config), 12)
    assert len({pair.id.partition("-")[0] for pair in held.pairs}) == len(held.pairs) == 6


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


# ------------------------------------------------------------------ tokens
TEMPLATES = {
    "a newline behind the turn": TEMPLATE,
    "nothing behind the turn": TEMPLATE.replace("<|im_end|>\n", "<|im_end|>"),
    "what depends on the conversation": TEMPLATE.replace(
        "<|im_end|>\n", "<|im_end|>{{ message['content'] | length }}"
    ),
    "a prompt that shares less": TEMPLATE.replace("assistant\n{% endif %}", "assistant\n\n{% endif %}"),
}


def odd_pairs() -> list[PreferencePair]:
    """Several turns, a system turn, text that reads like the template, other alphabets, one that no prompt can save."""
    turns = [
        {"role": "user", "content": "why is the sky blue? " * 4},
        {"role": "assistant", "content": "no."},
    ]
    last = {"role": "user", "content": "the quick brown fox\n"}
    system = {"role": "system", "content": "answer"}
    prompts = ([last], [*turns, last], [system, *turns, last], [turns[0]], [last])
    texts = ("yes", "no\n", "<|im_end|>\nI", "I do not know <|im_start|>", "é ß 中文", "fox " * 40)
    return [
        make_pair(prompt=prompt, chosen=text, rejected="B", source=f"s:{i}", objective="helpful")
        for i, text in enumerate(texts)
        for prompt in prompts
    ]


@pytest.mark.parametrize("over_length", ["drop", "truncate_prompt"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_tokens_are_those_of_tokenizing_anew(tmp_path: Path, template: str, over_length: str) -> None:
    load = AutoTokenizer.from_pretrained
    tokenizer = load(tiny_tokenizer(tmp_path / "policy", template=template))
    own = load(tiny_tokenizer(tmp_path / "own", template=TEMPLATE.replace("assistant\n", "assistant ")))
    pairs, options = odd_pairs(), {"max_length": 90, "over_length": over_length}
    tokens = PairTokens(tokenizer, **options)
    first, found = tokens.of_pairs(pairs[3:9]), tokens.of_pairs(pairs)
    for tokenized, asked in ((first, pairs[3:9]), (found, pairs), (tokens.of_pairs(pairs), pairs)):
        assert tokenized == tokenize_pairs(asked, tokenizer, keep_suffix=False, **options)
    assert found.dropped > 0 and (found.truncated > 0) is (over_length == "truncate_prompt")
    for model in (tokenizer, own, own):
        expected = [
            tokenize_row(model, p.prompt, (p.chosen, p.rejected), keep_suffix=True) for p in found.pairs
        ]
        assert tokens.for_rewards(model, found) == expected
    for length in (90, 40, 60, 90):
        for pair in pairs:
            cut = tokenize_prompt(tokenizer, pair.prompt, max_length=length)
            assert tokens.of_prompt(pair.prompt, length) == cut


def test_when_no_pair_fits_it_is_said_of_the_pairs_asked_for(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path))
    short, long = ([p for p in odd_pairs() if (len(p.chosen) > 100) is is_long] for is_long in (False, True))
    tokens = PairTokens(tokenizer, max_length=100, over_length="drop")
    assert tokens.of_pairs([*short, *long]).dropped >= len(long)
    with pytest.raises(DataError, match=rf"none of {len(long)} pairs fits training\.max_length=100"):
        tokens.of_pairs(long)
