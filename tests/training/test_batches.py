"""Plans of a training: the same pairs a step on any hardware, exact mean weights, little padding."""

import gzip
import itertools
import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prmd.config.shared import TrainingConfig
from prmd.errors import ConfigError
from prmd.models.prefix_rows import MOST_PADDING
from prmd.training.batches import (
    ALIKE,
    StepSize,
    TrainingPlan,
    merged,
    merges,
    plan_steps,
    plan_training,
    step_size,
)
from prmd.training.fingerprints import calibration_keys, training_keys

HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh-rlhf"
PLANS = {
    "n": st.integers(1, 60),
    "step": st.integers(1, 16),
    "device": st.integers(1, 16),
    "processes": st.integers(1, 3),
    "seed": st.integers(0, 3),
}


def a_plan(n: int, step: int, device: int, processes: int, seed: int) -> TrainingPlan:
    training = TrainingConfig(pairs_per_step=step, pairs_per_device=device)
    lengths = [(i * 37) % 23 + 1 for i in range(n)]
    order = sorted(range(n), key=lambda i: (i * 61) % 101)
    return plan_training(lengths, order, training, seed=seed, processes=processes)


def in_steps(plan: TrainingPlan) -> list[list]:
    """The micro-batches of every step, as the trainer takes them."""
    return [plan.batches[i : i + plan.size.batches] for i in range(0, len(plan.batches), plan.size.batches)]


@given(**PLANS)
def test_a_step_holds_the_same_pairs_on_any_hardware(n, step, device, processes, seed):
    plan, other = a_plan(n, step, device, processes, seed), a_plan(n, step, 1, 1, seed)
    assert plan.pairs == other.pairs and plan.steps == len(in_steps(plan)) == -(-n // step)
    for batches, pairs in zip(in_steps(plan), plan.pairs, strict=True):
        assert sorted(i for micro in batches if micro.weight for i in micro.rows) == sorted(pairs)
        assert len(batches) % processes == 0
        assert all(1 <= len(micro.rows) <= device for micro in batches)
        assert {i for micro in batches for i in micro.rows} == set(
            pairs
        )  # what counts nothing is of the step
    assert Counter(i for pairs in plan.pairs for i in pairs) == dict.fromkeys(range(n), 1)


@given(**PLANS)
def test_weights_give_the_exact_mean_over_the_rows_of_a_step(n, step, device, processes, seed):
    plan = a_plan(n, step, device, processes, seed)
    for batches, pairs in zip(in_steps(plan), plan.pairs, strict=True):
        mean = Fraction(0)
        for micro in batches:  # what the trainer does: mean over micro-batches of weight x mean over rows
            weight = Fraction(micro.weight).limit_denominator(10_000)
            mean += weight * Fraction(sum(i * i for i in micro.rows), len(micro.rows)) / len(batches)
        assert mean == Fraction(sum(i * i for i in pairs), len(pairs))


@given(
    n=st.integers(1, 8),
    most=st.integers(1, 8),
    parts=st.integers(1, 8),
    seed=st.integers(0, 99),
    limit=st.integers(0, 120),
)
def test_a_step_is_cut_where_least_is_padded(n, most, parts, seed, limit):
    """Against all ways to cut it."""
    from prmd.training.batches import _bounds

    parts = min(parts, n)
    lengths = sorted(random.Random(seed).randrange(1, 30) for _ in range(n))
    ways = [(0, *ends, n) for ends in itertools.combinations(range(1, n), parts - 1)]

    def may_be(a, b):
        return b - a <= most or (b - a) * lengths[b - 1] <= limit

    fitting = [way for way in ways if all(may_be(a, b) for a, b in itertools.pairwise(way))]
    if not fitting:
        return

    def tokens(way):
        return sum((b - a) * lengths[b - 1] for a, b in itertools.pairwise(way))

    found = _bounds(lengths, parts, most, limit)
    assert tuple(found) in fitting and tokens(found) == min(map(tokens, fitting))


# ------------------------------------------------------------------ merged micro-batches
MERGED = PLANS | {"most": st.integers(0, 400), "spread": st.integers(0, 22)}


def merged_plans(n, step, device, processes, seed, most, spread):
    """(lengths, the plan, all it may be merged to), of rows whose lengths lie in so wide a range."""
    training = TrainingConfig(pairs_per_step=step, pairs_per_device=device)
    lengths = [20 - spread // 2 + (i * 37) % (spread + 1) for i in range(n)]
    order = sorted(range(n), key=lambda i: (i * 61) % 101)
    plan = plan_training(lengths, order, training, seed=seed, processes=processes)
    options = list(merges(plan, lengths, device=device, most_tokens=most))
    return lengths, plan, [merged(plan, lengths, *option, device=device) for option in options]


@settings(deadline=None)  # a few hundred milliseconds on a busy machine
@given(**MERGED)
def test_merging_changes_no_step_and_keeps_its_limits(n, step, device, processes, seed, most, spread):
    lengths, plan, found = merged_plans(n, step, device, processes, seed, most, spread)
    counts = [other.size.accumulation for other in found]
    assert counts == sorted(set(counts)) and all(count < plan.size.accumulation for count in counts)
    for other in found:
        assert other.pairs == plan.pairs and other.tokens <= most
        assert len(in_steps(other)) == other.steps and len(other.batches) % processes == 0
        for batches, pairs in zip(in_steps(other), other.pairs, strict=True):
            assert sorted(i for micro in batches if micro.weight for i in micro.rows) == sorted(pairs)
            for micro in batches:
                tokens = len(micro.rows) * max(lengths[i] for i in micro.rows)
                assert len(micro.rows) <= device or tokens <= other.tokens
        full = [
            micro.rows
            for batches, pairs in zip(in_steps(other)[:64], other.pairs, strict=False)
            for micro in batches
            if len(pairs) == step
        ]
        assert not full or padding(lengths, full) <= MOST_PADDING + 1e-12


@settings(deadline=None)  # a few hundred milliseconds on a busy machine
@given(**MERGED)
def test_merged_micro_batches_are_no_larger_than_their_number_asks(
    n, step, device, processes, seed, most, spread
):
    """With a token less some step would need more of them, or pad too much; the former found by cutting from the longest row on."""
    lengths, _, found = merged_plans(n, step, device, processes, seed, most, spread)

    def fewest(pairs, tokens):
        left, parts = sorted(lengths[i] for i in pairs), 0
        while left:
            rows = max(m for m in range(1, len(left) + 1) if m <= device or m * left[-1] <= tokens)
            left, parts = left[:-rows], parts + 1
        return parts

    for other in (other for other in found if other.tokens):
        assert max(fewest(pairs, other.tokens) for pairs in other.pairs) <= other.size.batches
        if max(fewest(pairs, other.tokens - 1) for pairs in other.pairs) <= other.size.batches:
            less = merged(other, lengths, other.size, other.tokens - 1, device=device)
            full = [
                m.rows
                for b, pairs in zip(in_steps(less), less.pairs, strict=True)
                for m in b
                if len(pairs) == step
            ]
            assert padding(lengths, full) > MOST_PADDING


@settings(deadline=None)  # a few hundred milliseconds on a busy machine
@given(**MERGED)
def test_every_cut_gives_the_gradient_of_the_step(n, step, device, processes, seed, most, spread):
    """In float64, as the trainer makes it: the mean over micro-batches of weight x mean loss."""
    _, plan, found = merged_plans(n, step, device, processes, seed, most, spread)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    theta = torch.randn(5, dtype=torch.float64, generator=generator)

    def gradient(rows):
        """Of the mean of softplus(x theta)."""
        return (torch.sigmoid(x[list(rows)] @ theta)[:, None] * x[list(rows)]).mean(0)

    for other in (plan, *found):
        for batches, pairs in zip(in_steps(other), other.pairs, strict=True):
            cut = sum(micro.weight * gradient(micro.rows) for micro in batches) / len(batches)
            assert torch.allclose(cut, gradient(pairs), rtol=0, atol=1e-12)


def test_short_pairs_are_merged_more_than_long_ones():
    lengths = [20] * 16 + [100] * 4
    training = TrainingConfig(pairs_per_step=20, pairs_per_device=2)
    plan = plan_training(lengths, range(20), training, seed=0, processes=1)
    assert plan.size.accumulation == 10
    options = list(merges(plan, lengths, device=2, most_tokens=16_384))
    two, three = options[:2]
    assert two == (StepSize(20, 2), 400)  # 16 x 20 | 4 x 100
    assert three == (StepSize(20, 3), 320)  # 300 would do, if two of 20 might be padded to 100
    cut = merged(plan, lengths, *three, device=2)
    assert (
        sorted(len(micro.rows) for micro in cut.batches)[-1] == 16
        and padding(lengths, [micro.rows for micro in cut.batches]) == 0
    )
    assert next(merges(plan, lengths, device=2, most_tokens=319))[0].accumulation == 4


def test_rows_stay_in_their_window_and_those_of_like_length_together():
    lengths = [(i * 37) % 229 for i in range(200)]
    order = random.Random(0).sample(range(200), 200)
    steps = plan_steps(lengths, order, pairs_per_step=8, seed=1, window_rows=64)
    assert steps == plan_steps(lengths, order, pairs_per_step=8, seed=1, window_rows=64)
    assert steps != plan_steps(lengths, order, pairs_per_step=8, seed=2, window_rows=64)
    flat = [i for step in steps for i in step]
    for start in range(0, 200, 64):
        window = sorted(order[start : start + 64], key=lambda i: lengths[i])
        groups = [tuple(window[i : i + ALIKE]) for i in range(0, len(window), ALIKE)]
        here = flat[start : start + 64]
        assert sorted(tuple(here[i : i + ALIKE]) for i in range(0, len(here), ALIKE)) == sorted(groups)


def test_a_stream_of_several_epochs_uses_a_row_once_per_epoch():
    order = [i for epoch in range(3) for i in sorted(range(11), key=lambda i: (i * (epoch + 3)) % 13)]
    steps = plan_steps(list(range(11)), order, pairs_per_step=4, seed=1, window_rows=8)
    assert Counter(i for step in steps for i in step) == dict.fromkeys(range(11), 3)


def test_steps_of_a_window_are_not_sorted_by_length():
    steps = plan_steps(list(range(512)), list(range(512)), pairs_per_step=16, seed=0)
    means = torch.tensor([sum(step) / 16 for step in steps])
    assert torch.corrcoef(torch.stack([torch.arange(32.0), means]))[0, 1].abs() < 0.3
    assert all(max(step) - min(step) > 100 for step in steps)  # many lengths in each


# ------------------------------------------------------------------ the size of a step
def test_the_accumulation_follows_from_the_pairs_of_a_step():
    four = TrainingConfig(pairs_per_step=32, pairs_per_device=4)
    assert step_size(four, 1) == StepSize(32, 8, 1) and step_size(four, 2) == StepSize(32, 4, 2)
    assert step_size(four.model_copy(update={"pairs_per_device": 3}), 1) == StepSize(32, 11, 1)
    assert step_size(TrainingConfig(pairs_per_device=4, gradient_accumulation_steps=8), 2) == StepSize(
        64, 8, 2
    )
    assert StepSize(64, 8, 2).describe() == "64 pairs, in 8 micro-batches on each of 2 processes"


def test_an_accumulation_that_contradicts_the_pairs_of_a_step_is_refused_on_one_process():
    training = TrainingConfig(pairs_per_step=32, pairs_per_device=2, gradient_accumulation_steps=8)
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps: got 8, wanted 16.*set it to 16"):
        step_size(training, 1)
    assert step_size(training, 2) == StepSize(32, 8, 2)


def test_hardware_logs_and_checkpoints_are_no_part_of_what_is_trained():
    plain = TrainingConfig(pairs_per_device=4, gradient_accumulation_steps=8)
    keys, earlier = training_keys(plain)
    assert not {"pairs_per_step", "merge_micro_batches"} & set(earlier) and keys["pairs_per_step"] == 32
    changes = {
        "pairs_per_device": 2,
        "gradient_accumulation_steps": 16,
        "gradient_checkpointing": True,
        "merge_micro_batches": False,
        "logging_steps": 3,
        "checkpoints": (1.0,),
    }
    assert training_keys(plain.model_copy(update=changes))[0] == keys
    named = plain.model_copy(update={"pairs_per_step": 32})
    assert training_keys(named) == (keys, earlier)
    larger = plain.model_copy(update={"pairs_per_step": 64})
    assert all(new != old for new, old in zip(training_keys(larger), (keys, earlier), strict=True))
    from prmd.config.shared import CalibrationConfig

    assert calibration_keys(CalibrationConfig(batch_size=8))[0] == calibration_keys(CalibrationConfig())[0]
    before_auto = CalibrationConfig(batch_size=32, engine="transformers")
    assert calibration_keys(CalibrationConfig()) == calibration_keys(before_auto)
    assert calibration_keys(CalibrationConfig(engine="vllm"))[0] != calibration_keys(before_auto)[0]


# ------------------------------------------------------------------ padding
def hh_lengths(subset: str, limit: int) -> list[int]:
    """Lengths of prefix-shared rows with about one token per word or mark, which keeps the spread of real lengths."""
    found = []
    with gzip.open(HH / subset / "train.jsonl.gz", "rt", encoding="utf-8") as stream:
        for _, line in zip(range(limit), stream, strict=False):
            pair = json.loads(line)
            cut = pair["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")
            texts = (pair["chosen"], pair["rejected"][cut:])
            found.append(sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts))
    return found


def padding(lengths: list[int], batches: list[tuple[int, ...]]) -> float:
    tokens = sum(len(rows) * max(lengths[i] for i in rows) for rows in batches)
    return 1 - sum(lengths[i] for rows in batches for i in rows) / tokens


@pytest.mark.skipif(not HH.is_dir(), reason="HH-RLHF is not on this machine")
@pytest.mark.parametrize("subset", ["harmless-base", "helpful-base"])
@pytest.mark.parametrize("device", [2, 4])
def test_steps_of_real_lengths_are_merged_into_five(subset, device):
    """By the number of groups of like length that a step holds; the largest takes no more tokens than 4 of the longest pairs."""
    lengths = hh_lengths(subset, 2000)
    training = TrainingConfig(pairs_per_step=32, pairs_per_device=device)
    plan = plan_training(lengths, range(len(lengths)), training, seed=42, processes=1)
    options = list(merges(plan, lengths, device=device, most_tokens=16_384))
    assert plan.size.accumulation == 32 // device and options[0][0] == StepSize(32, 5)
    assert options[0][1] <= 4 * max(lengths)
    fewest = merged(plan, lengths, *options[0], device=device)
    assert padding(lengths, [micro.rows for micro in fewest.batches]) <= 0.055


@pytest.mark.skipif(not HH.is_dir(), reason="HH-RLHF is not on this machine")
@pytest.mark.parametrize("subset", ["harmless-base", "helpful-base"])
@pytest.mark.parametrize(
    ("step", "device", "processes", "fewest"),
    [
        (32, 1, 1, 32),
        (32, 2, 1, 16),
        (32, 4, 1, 8),
        (32, 4, 2, 4),
        (32, 8, 1, 4),
        (32, 32, 1, 1),
        (8, 8, 1, 1),
    ],
)
def test_padding_of_real_lengths_is_at_most_five_per_cent(subset, step, device, processes, fewest):
    lengths = hh_lengths(subset, 2000)
    training = TrainingConfig(pairs_per_step=step, pairs_per_device=device)
    plan = plan_training(lengths, range(len(lengths)), training, seed=42, processes=processes)
    assert fewest <= plan.size.accumulation <= max(fewest, step // 4)
    assert padding(lengths, [micro.rows for micro in plan.batches]) <= 0.055  # 0.05 on the steps looked at
    if device > 1:
        unsorted = [tuple(range(i, i + device)) for i in range(0, len(lengths) - device, device)]
        assert padding(lengths, unsorted) > 0.15  # without groups of like length
