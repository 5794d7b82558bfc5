"""Collated batches against plain loops, and plans of batches: every index once, exact mean weights, little padding."""

import gzip
import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import rows_of

from prmd.models.prefix_rows import PADDING, attention_mask, collate_rows, padding_share, plan_scoring
from prmd.models.tokenization import PrefixRow
from prmd.training.batches import plan_batches

HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh-rlhf"
PLANS = {
    "n": st.integers(1, 60),
    "rows_per_batch": st.integers(1, 5),
    "accumulation": st.integers(1, 4),
    "world_size": st.integers(1, 3),
    "seed": st.integers(0, 3),
}


def make_plan(n, rows_per_batch, accumulation, world_size, seed, window_rows=16):
    lengths = [(i * 37) % 23 + 1 for i in range(n)]
    order = sorted(range(n), key=lambda i: (i * 61) % 101)
    return plan_batches(
        lengths,
        order,
        rows_per_batch=rows_per_batch,
        batches_per_step=accumulation * world_size,
        seed=seed,
        world_size=world_size,
        window_rows=window_rows,
    )


# ------------------------------------------------------------------ tensors of a batch
@given(rows=rows_of(), share_prompt=st.booleans())
def test_collated_tensors_give_the_conversations_back(rows, share_prompt):
    batch = collate_rows(rows, pad_id=0, share_prompt=share_prompt)
    ids, positions, segments = (batch[k].flatten() for k in ("input_ids", "position_ids", "segment_ids"))
    responses = [(row.prompt_ids, response) for row in rows for response in row.responses]
    assert len(batch["last_index"]) == len(responses)
    assert sorted(batch["sequence_index"].tolist()) == batch["sequence_index"].tolist()
    width = batch["input_ids"].shape[1]
    for s, (prompt, response) in enumerate(responses):
        mine = batch["sequence_index"] == s
        predict = batch["predict_index"][mine]
        assert tuple(batch["target_ids"][mine].tolist()) == response
        assert ids[batch["last_index"][s]] == response[-1]
        assert positions[batch["last_index"][s]] == len(prompt) + len(response) - 1
        # what predicts token t of the response stands at position len(prompt) + t - 1 of the conversation
        assert positions[predict].tolist() == list(range(len(prompt) - 1, len(prompt) + len(response) - 1))
        assert tuple(ids[predict].tolist()) == (prompt[-1], *response[:-1])
        sequence = int(predict[0]) // width
        assert tuple(batch["input_ids"][sequence, : len(prompt)].tolist()) == prompt
    padding = segments == PADDING
    assert (ids[padding] == 0).all()
    shared = sum(len(r.prompt_ids) + sum(map(len, r.responses)) for r in rows)
    apart = sum(len(prompt) + len(response) for prompt, response in responses)
    assert int((~padding).sum()) == (shared if share_prompt else apart)
    processed, padded = padding_share(batch)
    assert (int(processed), int(padded)) == (ids.numel(), int(padding.sum()))


@given(rows=rows_of())
def test_mask_lets_a_token_see_its_prompt_and_its_own_past_only(rows):
    segments = collate_rows(rows, pad_id=0)["segment_ids"]
    mask = attention_mask(segments)
    if segments.max() <= 1:
        assert torch.equal(mask, (segments >= 0).long())
        return
    assert mask.shape == (len(segments), 1, segments.shape[1], segments.shape[1])
    for b, row in enumerate(segments.tolist()):
        for query, of_query in enumerate(row):
            for key, of_key in enumerate(row):
                sees = key <= query and of_key != PADDING and of_key in (0, of_query)
                assert bool(mask[b, 0, query, key]) == (sees or key == query)


@pytest.mark.parametrize("parts", [((), ((1,),)), ((1,), ()), ((1,), ((2,), ()))])
def test_a_row_with_an_empty_part_is_refused(parts):
    with pytest.raises(ValueError, match="none of them empty"):
        PrefixRow(*parts)


# ------------------------------------------------------------------ plans
@given(**PLANS)
def test_every_index_is_used_once_and_every_step_but_the_last_is_full(
    n, rows_per_batch, accumulation, world_size, seed
):
    plan = make_plan(n, rows_per_batch, accumulation, world_size, seed)
    batches_per_step, step_rows = accumulation * world_size, rows_per_batch * accumulation * world_size
    used = Counter(i for micro in plan for i in micro.rows)
    assert set(used.values()) <= {1}
    # one row a micro-batch and a multiple of the processes: a few rows may be left over at the very end
    assert n - len(used) < world_size
    if world_size == 1 or (rows_per_batch > 1 and n % step_rows >= rows_per_batch * world_size):
        assert len(used) == n
    full = n // step_rows * batches_per_step
    assert all(len(micro.rows) == rows_per_batch and micro.weight == 1.0 for micro in plan[:full])
    assert len(plan) % world_size == 0
    assert len(plan) - full <= batches_per_step
    assert all(1 <= len(micro.rows) <= rows_per_batch for micro in plan)


@given(**PLANS)
def test_weights_give_the_exact_mean_over_the_rows_of_a_step(
    n, rows_per_batch, accumulation, world_size, seed
):
    plan = make_plan(n, rows_per_batch, accumulation, world_size, seed)
    per_step = accumulation * world_size
    for start in range(0, len(plan), per_step):
        step = plan[start : start + per_step]
        rows = [i for micro in step for i in micro.rows]
        mean = Fraction(0)
        for micro in step:  # what the trainer does: mean over micro-batches of weight x mean over rows
            weight = Fraction(micro.weight).limit_denominator(10_000)
            mean += weight * Fraction(sum(i * i for i in micro.rows), len(micro.rows)) / len(step)
        assert mean == Fraction(sum(i * i for i in rows), len(rows))


@given(**PLANS)
def test_rows_stay_in_their_window_and_the_plan_is_deterministic(
    n, rows_per_batch, accumulation, world_size, seed
):
    arguments = (n, rows_per_batch, accumulation, world_size, seed)
    plan = make_plan(*arguments)
    assert plan == make_plan(*arguments)
    step_rows = rows_per_batch * accumulation * world_size
    window = max(1, 16 // step_rows) * step_rows
    order = sorted(range(n), key=lambda i: (i * 61) % 101)
    flat = [i for micro in plan[: n // step_rows * accumulation * world_size] for i in micro.rows]
    for start in range(0, len(flat), window):
        assert sorted(flat[start : start + window]) == sorted(
            order[start : start + window][: len(flat) - start]
        )


def test_a_stream_of_several_epochs_uses_a_row_once_per_epoch():
    order = [i for epoch in range(3) for i in sorted(range(11), key=lambda i: (i * (epoch + 3)) % 13)]
    plan = plan_batches(list(range(11)), order, rows_per_batch=2, batches_per_step=2, seed=1, window_rows=8)
    assert Counter(i for micro in plan for i in micro.rows) == dict.fromkeys(range(11), 3)


def test_seed_changes_the_order_of_batches_and_not_their_rows():
    plans = [make_plan(60, 2, 2, 1, seed) for seed in (0, 1)]
    assert plans[0] != plans[1]
    assert Counter(m.rows for m in plans[0]) == Counter(m.rows for m in plans[1])


def test_batches_of_a_window_are_not_sorted_by_length():
    plan = plan_batches(list(range(512)), list(range(512)), rows_per_batch=4, batches_per_step=4, seed=0)
    longest = torch.tensor([float(max(micro.rows)) for micro in plan])
    steps = torch.arange(len(plan)).float()
    assert torch.corrcoef(torch.stack([steps, longest]))[0, 1].abs() < 0.3


@settings(max_examples=40)
@given(rows=rows_of(max_rows=12), tokens=st.integers(1, 80), share_prompt=st.booleans())
def test_scoring_groups_hold_every_row_once_within_the_budget(rows, tokens, share_prompt):
    groups = plan_scoring(rows, tokens_per_batch=tokens, share_prompt=share_prompt)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    for group in groups:
        batch = collate_rows([rows[i] for i in group], pad_id=0, share_prompt=share_prompt)
        assert len(group) == 1 or batch["input_ids"].numel() <= tokens
        if share_prompt:
            processed, padding = padding_share(batch)
            assert padding <= 0.05 * processed


def test_rows_of_one_length_fill_a_scoring_batch():
    rows = [PrefixRow((1,) * 6, ((2,) * 2, (3,) * 2))] * 10
    assert [len(group) for group in plan_scoring(rows, tokens_per_batch=45)] == [4, 4, 2]


# ------------------------------------------------------------------ padding
def hh_rows(subset: str, limit: int) -> list[PrefixRow]:
    """Rows with about one token per word or mark, which keeps the spread of real lengths."""

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(2 for _ in re.findall(r"\w+|[^\w\s]", text))

    rows = []
    with gzip.open(HH / subset / "train.jsonl.gz", "rt", encoding="utf-8") as stream:
        for _, line in zip(range(limit), stream, strict=False):
            pair = json.loads(line)
            cut = pair["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")
            prompt, chosen, rejected = (
                tokens(text) for text in (pair["chosen"][:cut], pair["chosen"][cut:], pair["rejected"][cut:])
            )
            rows.append(PrefixRow(prompt or (2,), (chosen or (2,), rejected or (2,))))
    return rows


@pytest.mark.skipif(not HH.is_dir(), reason="HH-RLHF is not on this machine")
@pytest.mark.parametrize("subset", ["harmless-base", "helpful-base"])
@pytest.mark.parametrize(("rows_per_batch", "accumulation"), [(4, 8), (2, 16)])
def test_padding_of_real_lengths_is_at_most_five_per_cent(subset, rows_per_batch, accumulation):
    rows = hh_rows(subset, 2000)
    lengths = [row.shared_length for row in rows]
    plan = plan_batches(
        lengths, list(range(len(rows))), rows_per_batch=rows_per_batch, batches_per_step=accumulation, seed=42
    )
    processed = padding = 0
    for micro in plan:
        widest = max(lengths[i] for i in micro.rows)
        processed += widest * len(micro.rows)
        padding += sum(widest - lengths[i] for i in micro.rows)
    assert padding / processed <= 0.05
    used = len(rows) // rows_per_batch * rows_per_batch
    unsorted = [max(lengths[i : i + rows_per_batch]) * rows_per_batch for i in range(0, used, rows_per_batch)]
    assert 1 - sum(lengths[:used]) / sum(unsorted) > 0.15  # without the buckets
