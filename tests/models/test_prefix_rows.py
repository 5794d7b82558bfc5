"""Collated batches against plain loops, and groups of scoring: every index once, little padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import rows_of

from prmd.models.prefix_rows import PADDING, attention_mask, collate_rows, padding_share, plan_scoring
from prmd.models.tokenization import PrefixRow


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


# ------------------------------------------------------------------ scoring groups
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
