"""`data.own.formats`: one row of every usual form, worked out by hand, and the rows that are no pair."""

import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prmd.artifacts.paths import PROJECT_ROOT
from prmd.config.shared import DataConfig
from prmd.data.own.formats import RowError, compare, form_of
from prmd.pairs import PreferencePair, make_pair

USER = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
HUMAN = "\n\nHuman: What color is the sky?\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER["content"], "chosen": "It is blue.", "rejected": " It is green.\n"},
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [USER], "chosen": "It is blue.", "rejected": "It is green."},
        {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": USER["content"], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": USER["content"], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"chosen": f"{HUMAN} It is blue.", "rejected": f"{HUMAN} It is green."},
        {"prompt": HUMAN, "chosen": " It is blue.", "rejected": " It is green."},
        {
            "prompt": [USER],
            "chosen": [BLUE | {"tool_calls": None, "name": "a"}],
            "rejected": [GREEN],
            "tools": [],
        },
    ],
    ids=json.dumps,
)
def test_every_form_of_one_pair_is_the_same_pair(row):
    found = compare(row)
    assert found.prompt == (USER,)
    assert (found.chosen, found.rejected) == ("It is blue.", "It is green.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is black.", "The sky is blue.", "The sky is"),  # never "The sky is bl"
        ("Q: 1+1?\nA: 2", "Q: 1+1?\nA: 3", "Q: 1+1?\nA:"),
    ],
)
def test_an_implicit_prompt_is_the_words_that_both_texts_begin_with(chosen, rejected, prompt):
    found = compare({"chosen": chosen, "rejected": rejected})
    assert found.prompt == ({"role": "user", "content": prompt},)
    assert (found.chosen, found.rejected) == (chosen[len(prompt) :].strip(), rejected[len(prompt) :].strip())


def test_systems_and_earlier_turns_are_kept():
    long = [SYSTEM, *EARLIER, USER]
    for row in (
        {"prompt": long, "chosen": [BLUE], "rejected": [GREEN]},
        {"chosen": [*long, BLUE], "rejected": [*long, GREEN]},
        {"prompt": [*EARLIER, USER], "chosen": [BLUE], "rejected": [GREEN], "system": "Be brief."},
        {
            "prompt": USER["content"],
            "chosen": [*long, BLUE],
            "rejected": [*long, GREEN],
            "system": "Ignored.",
        },
    ):
        assert compare(row).prompt == tuple(long)
    turns = "\n\nHuman: Hello\n\nAssistant: Hi." + HUMAN
    row = {"chosen": f"{turns} It is blue.", "rejected": f"{turns} It is green.", "system": "Be brief."}
    assert compare(row).prompt == tuple(long)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}
ANSWER = {"role": "tool", "content": "blue"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN], "tools": [{"name": "look"}]}, "tools"),
        ({"prompt": [USER, CALL, ANSWER], "chosen": [BLUE], "rejected": [GREEN]}, "tools"),
        ({"prompt": [USER], "chosen": [BLUE | {"thinking": "Hm."}], "rejected": [GREEN]}, "reasoning"),
        (
            {"prompt": [USER], "chosen": [BLUE | {"content": [{"type": "image"}]}], "rejected": [GREEN]},
            "not_text",
        ),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty_response"),
        ({"prompt": "a", "chosen": "  ", "rejected": "b"}, "empty_response"),
        ({"prompt": "  ", "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": None, "chosen": "yes", "rejected": "no"}, "empty_prompt"),
        ({"prompt": "a", "chosen": "same ", "rejected": "same"}, "identical_responses"),
        ({"prompt": "a", "chosen": "b\0", "rejected": "c"}, "broken_text"),
        ({"prompt": "a", "chosen": 3, "rejected": 4}, "malformed"),
        ({"prompt": "a", "chosen": "b", "rejected": [GREEN]}, "malformed"),
        ({"prompt": [USER], "chosen": ["text"], "rejected": [GREEN]}, "malformed"),
        ({"prompt": [USER, BLUE], "chosen": [BLUE], "rejected": [GREEN]}, "roles_not_alternating"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [GREEN]}, "last_speaker_not_assistant"),
        ({"chosen": [*EARLIER, USER, BLUE], "rejected": [USER, GREEN]}, "contexts_differ"),
        ({"prompt": [USER], "chosen": [*EARLIER, BLUE], "rejected": [*EARLIER, GREEN]}, "prompt_differs"),
        ({"prompt": "Why?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, "prompt_differs"),
        ({"chosen": f"{HUMAN} a", "rejected": "\n\nHuman: Other?\n\nAssistant: b"}, "contexts_differ"),
    ],
)
def test_what_is_no_pair_says_why(row, reason):
    with pytest.raises(RowError) as refused:
        compare(row)
    assert refused.value.reason == reason


def test_the_form_of_a_row_leaves_out_what_is_empty():
    assert form_of({"prompt": "", "chosen": "a", "rejected": [BLUE]}) == {
        "chosen": "text",
        "rejected": "messages",
    }
    assert form_of({"prompt": 3, "chosen": None}) == {"prompt": "int"}


VALUES = st.one_of(
    st.none(),
    st.text(max_size=20),
    st.integers(),
    st.lists(
        st.sampled_from([USER, BLUE, GREEN, SYSTEM, ANSWER, CALL, {}, "x", {"role": "user"}]), max_size=4
    ),
)


@given(
    st.fixed_dictionaries(
        {}, optional={k: VALUES for k in ("prompt", "chosen", "rejected", "system", "tools")}
    )
)
def test_any_row_is_a_storable_pair_or_refused(row):
    try:
        found = compare(row)
    except RowError as error:
        assert error.reason
        return
    pair = make_pair(
        prompt=found.prompt,
        chosen=found.chosen,
        rejected=found.rejected,
        source="own/a:1",
        objective="polite",
    )
    assert PreferencePair.from_row(pair.to_row(), objective="polite", where="a") == pair


def test_every_example_of_the_page_is_read_as_it_says():
    page = (PROJECT_ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [json.loads(text) for text in re.findall(r"```json\n(.*?)\n```", page, flags=re.DOTALL)]
    pairs = [compare(row) for row in rows if "chosen" in row]
    assert len(pairs) == 7 and all(pair.prompt == (USER,) for pair in pairs)
    assert {pair.chosen for pair in pairs} == {"It is blue."}
    sections = [
        yaml.safe_load(text)["data"] for text in re.findall(r"```yaml\n(.*?)\n```", page, flags=re.DOTALL)
    ]
    assert [DataConfig.model_validate(section).objectives for section in sections] == [
        ("concise", "polite", "correct"),
        ("helpful", "honest"),
        ("helpful", "honest"),
        ("correct", "polite"),
        ("polite", "length"),
        ("polite", "correct"),
    ]
