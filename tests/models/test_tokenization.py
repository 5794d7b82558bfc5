"""Prompt and response tokens against the rendered text, the chat templates that are refused, and over-long rows."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TEMPLATE, tiny_tokenizer
from transformers import AutoTokenizer

from prmd.errors import ConfigError, DataError
from prmd.models.chat_templates import end_of_turn, render, template_fingerprint
from prmd.models.loading import load_tokenizer_from
from prmd.models.tokenization import (
    fit_messages,
    tokenize_pairs,
    tokenize_prompt,
    tokenize_row,
)
from prmd.pairs import PreferencePair

TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="<|>", exclude_categories=("Cs", "Cc")),
    min_size=1,
    max_size=30,
)
TURNS = st.lists(TEXT, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2 == 1)


def chatml(messages, *, generation_prompt=False):
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if generation_prompt else "")


def conversation(turns, system=None):
    messages = [{"role": r, "content": c} for r, c in zip(itertools.cycle(["user", "assistant"]), turns)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def pair_of(prompt, chosen="yes", rejected="no, I do not know", name="p"):
    return PreferencePair(name, tuple(prompt), chosen, rejected, "test:1", "helpful")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer_from(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


# ------------------------------------------------------------------ prompt and responses
@settings(deadline=None, max_examples=60)
@given(turns=TURNS, responses=st.lists(TEXT, min_size=1, max_size=4))
def test_prompt_and_response_give_the_source_text_back(tokenizer, turns, responses):
    messages = conversation(turns)
    for keep_suffix, behind in ((True, "<|im_end|>\n"), (False, "<|im_end|>")):
        row = tokenize_row(tokenizer, messages, responses, keep_suffix=keep_suffix)
        assert len(row.responses) == len(responses)
        assert tokenizer.decode(row.prompt_ids) == chatml(messages, generation_prompt=True)
        for text, ids in zip(responses, row.responses, strict=True):
            assert tokenizer.decode(ids) == text + behind
            whole = tokenizer(
                chatml(messages, generation_prompt=True) + text + behind, add_special_tokens=False
            )
            assert row.prompt_ids + ids == tuple(whole["input_ids"])


def test_the_end_of_turn_is_in_and_the_newline_behind_it_is_for_reward_models_alone(tokenizer):
    messages = conversation(["why is the sky blue?"])
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    policy = tokenize_row(tokenizer, messages, ["yes"], keep_suffix=False).responses[0]
    reward = tokenize_row(tokenizer, messages, ["yes"], keep_suffix=True).responses[0]
    assert policy[-1] == stop
    assert reward[: len(policy)] == policy
    assert tokenizer.decode(reward[len(policy) :]) == "\n"
    assert reward[-1] == render(tokenizer, [*messages, {"role": "assistant", "content": "yes"}])[-1]


def test_a_boundary_inside_the_generation_prompt_moves_to_the_responses(tmp_path):
    """A template whose generation prompt ends in a newline that the conversation lacks for an empty answer."""
    odd = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n\n{% endif %}")
    path = tiny_tokenizer(tmp_path, template=odd)
    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = conversation(["why?"])
    row = tokenize_row(tokenizer, messages, ["\nyes", "no"], keep_suffix=True)
    for text, ids in zip(["\nyes", "no"], row.responses, strict=True):
        whole = [*messages, {"role": "assistant", "content": text}]
        assert tokenizer.decode(row.prompt_ids + ids) == chatml(whole)


def test_a_conversation_unlike_its_prompt_is_refused(tmp_path):
    odd = "{% if add_generation_prompt %}A{% else %}B{% endif %}" + TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, template=odd))
    with pytest.raises(ConfigError, match="shares no token"):
        tokenize_row(tokenizer, conversation(["why?"]), ["yes"], keep_suffix=True)


def test_template_fingerprint_depends_on_the_template_and_nothing_else(tmp_path, tokenizer):
    same = load_tokenizer_from(tiny_tokenizer(tmp_path / "same"))
    other = load_tokenizer_from(
        tiny_tokenizer(tmp_path / "other", template=TEMPLATE.replace("assistant\n", "assistant "))
    )
    assert template_fingerprint(same) == template_fingerprint(tokenizer)
    assert template_fingerprint(other) != template_fingerprint(tokenizer)


# ------------------------------------------------------------------ templates that are refused
def test_no_chat_template_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer_from(tiny_tokenizer(tmp_path, template=None))


def test_a_template_that_ends_in_the_pad_token_is_refused(tmp_path):
    ends_in_eos = TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    with pytest.raises(ConfigError, match="ends in the pad token"):
        load_tokenizer_from(tiny_tokenizer(tmp_path, pad="<|im_end|>", template=ends_in_eos))


def test_pad_as_end_of_turn_is_fine_where_something_follows_it(tmp_path):
    assert load_tokenizer_from(tiny_tokenizer(tmp_path, pad="<|im_end|>")).pad_token == "<|im_end|>"


def test_a_turn_without_a_special_token_at_its_end_is_refused_for_policies(tmp_path):
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = load_tokenizer_from(tiny_tokenizer(tmp_path, template=plain))
    with pytest.raises(ConfigError, match="without a special token"):
        tokenize_row(tokenizer, conversation(["why?"]), ["yes"], keep_suffix=False)
    with pytest.raises(ConfigError, match="without a special token"):
        end_of_turn(tokenizer, [40, 41])


# ------------------------------------------------------------------ rows that are too long
LONG = conversation(["the fox " * 9, "no no no", "why is the sky blue", "I do not know", "Q: what is it?"])


def lengths(tokenizer, prompt, responses=("yes", "no, I do not know")):
    texts = [chatml([*prompt, {"role": "assistant", "content": r}]) for r in responses]
    return max(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts)


def fit(tokenizer, pair, max_length, over_length="truncate_prompt"):
    return tokenize_pairs([pair], tokenizer, max_length=max_length, over_length=over_length, keep_suffix=True)


def test_what_fits_is_left_alone(tokenizer):
    limit = lengths(tokenizer, LONG)
    result = fit(tokenizer, pair_of(LONG), limit)
    assert (result.dropped, result.truncated) == (0, 0)
    assert result.pairs[0].prompt == tuple(LONG)
    assert result.rows[0].longest == limit


def test_whole_turns_go_first_oldest_first(tokenizer):
    for kept in (LONG[2:], LONG[4:]):
        limit = lengths(tokenizer, kept)
        result = fit(tokenizer, pair_of(LONG), limit)
        assert result.truncated == 1
        assert result.pairs[0].prompt == tuple(kept)
        assert result.rows[0].longest == limit


def test_a_system_turn_stays(tokenizer):
    prompt = [{"role": "system", "content": "be brief"}, *LONG]
    kept = [prompt[0], *LONG[2:]]
    result = fit(tokenizer, pair_of(prompt), lengths(tokenizer, kept))
    assert result.pairs[0].prompt == tuple(kept)


@settings(deadline=None, max_examples=40)
@given(st.integers(20, 120))
def test_every_kept_row_fits_and_no_response_is_cut(tokenizer, max_length):
    pairs = [
        pair_of(LONG, name="a"),
        pair_of(LONG[4:], name="b"),
        pair_of(LONG[:1], "a b c d e f g h i j k l m n o p", "x", name="c"),
    ]
    try:
        result = tokenize_pairs(
            pairs, tokenizer, max_length=max_length, over_length="truncate_prompt", keep_suffix=True
        )
    except DataError:
        assert (
            min(lengths(tokenizer, conversation(["."]), (p.chosen, p.rejected)) for p in pairs)
            > max_length - 3
        )
        return
    assert len(result.rows) + result.dropped == len(pairs)
    for pair, row in zip(result.pairs, result.rows, strict=True):
        original = next(p for p in pairs if p.id == pair.id)
        assert row.longest <= max_length
        assert (pair.chosen, pair.rejected) == (original.chosen, original.rejected)
        assert tokenizer.decode(row.responses[0]) == f"{original.chosen}<|im_end|>\n"
        assert tokenizer.decode(row.responses[1]) == f"{original.rejected}<|im_end|>\n"
        assert tokenizer.decode(row.prompt_ids) == chatml(pair.prompt, generation_prompt=True)
        kept, source = pair.prompt[-1]["content"], original.prompt[-1]["content"]
        assert kept.strip() and source.strip().endswith(kept.strip())
        if kept.strip() != source.strip():
            assert len(pair.prompt) == 1  # a message is cut only when it is the last one left


def test_drop_keeps_pairs_in_step_with_rows_and_counts(tokenizer):
    pairs = [pair_of(LONG, name="long"), pair_of(LONG[4:], name="short")]
    limit = lengths(tokenizer, LONG[4:])
    result = tokenize_pairs(pairs, tokenizer, max_length=limit, over_length="drop", keep_suffix=True)
    assert [p.id for p in result.pairs] == ["short"]
    assert (len(result.rows), result.dropped, result.truncated) == (1, 1, 0)


def test_sides_that_the_template_makes_equal_are_left_out_and_said(tmp_path, caplog):
    trims = TEMPLATE.replace("['content']", "['content'] | trim")
    assert trims != TEMPLATE
    tokenizer = load_tokenizer_from(tiny_tokenizer(tmp_path, template=trims))
    prompt = conversation(["What?"])
    pairs = [pair_of(prompt, "yes", "yes \n", "equal"), pair_of(prompt, name="different")]
    settings = {"max_length": 200, "over_length": "drop", "keep_suffix": True}
    result = tokenize_pairs(pairs, tokenizer, **settings)
    assert [pair.id for pair in result.pairs] == ["different"]
    assert (len(result.rows), result.dropped, result.truncated) == (1, 1, 0)
    assert "1 of 2 pairs left out: chosen and rejected are the same tokens" in caplog.text
    assert "equal of test:1" in caplog.text
    with pytest.raises(
        DataError, match="none of 1 pairs is left: 1 are the same tokens as chosen and rejected"
    ):
        tokenize_pairs(pairs[:1], tokenizer, **settings)


def test_a_response_that_cannot_fit_drops_its_pair(tokenizer):
    hopeless = pair_of(LONG[4:], "the fox jumps " * 30, "no", name="hopeless")
    pairs = [hopeless, pair_of(LONG[4:], name="short")]
    result = tokenize_pairs(pairs, tokenizer, max_length=60, over_length="truncate_prompt", keep_suffix=True)
    assert ([p.id for p in result.pairs], result.dropped) == (["short"], 1)


def test_nothing_left_is_an_error_that_names_the_setting(tokenizer):
    with pytest.raises(DataError, match=r"training\.max_length=8"):
        fit(tokenizer, pair_of(LONG), 8, "drop")


@settings(deadline=None, max_examples=30)
@given(turns=TURNS, room=st.integers(8, 60))
def test_a_fitted_prompt_has_at_most_its_room(tokenizer, turns, room):
    messages = conversation([t.strip() or "a" for t in turns])
    fitted = fit_messages(tokenizer, messages, room)
    if fitted is None:
        with pytest.raises(DataError, match=r"training\.max_length"):
            tokenize_prompt(tokenizer, messages, max_length=room)
        return
    ids = tokenize_prompt(tokenizer, messages, max_length=room)
    assert len(ids) <= room
    assert tokenizer.decode(ids) == chatml(fitted, generation_prompt=True)
