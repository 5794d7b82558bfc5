"""The transcript parser loses no character and refuses what is not two answers to one prompt."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prmd.data.hh_rlhf import TranscriptError, compare_transcripts, parse_transcript

HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh-rlhf"
NAMES = {"user": "Human", "assistant": "Assistant"}
MARKERS = re.compile(r"(?:\A\s*|\n\n[ \t]*)(?:Human|Assistant):")

# text that cannot contain a marker: no colon
contents = st.text(st.characters(exclude_characters=":", exclude_categories=("Cs",)), min_size=1).filter(
    lambda text: text.strip()
)


def said_of(transcript):
    """What stands behind the markers, in order: with them it is the whole text."""
    return [part for turn in transcript.turns for part in turn.parts]


@given(st.lists(st.tuples(contents, contents), min_size=1, max_size=4))
def test_alternating_turns_are_found_and_reproduced(exchanges):
    turns = [turn for human, reply in exchanges for turn in (("user", human), ("assistant", reply))]
    text = "".join(f"\n\n{NAMES[role]}: {content}" for role, content in turns)
    transcript = parse_transcript(text)
    assert said_of(transcript) == MARKERS.split(text)[1:]
    assert [(t.role, t.content) for t in transcript.turns] == [(r, c.strip()) for r, c in turns]
    assert transcript.response == exchanges[-1][1].strip()


@given(
    st.text(st.sampled_from("HumanAssistant:\n x"), max_size=60),
    st.text(st.sampled_from("\n :a"), max_size=9),
)
def test_whatever_is_accepted_is_reproduced(head, tail):
    text = f"\n\nHuman: {head}\n\nAssistant: {tail}"
    try:
        transcript = parse_transcript(text)
    except TranscriptError:
        return
    assert said_of(transcript) == MARKERS.split(text)[1:]
    roles = [turn.role for turn in transcript.turns]
    assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_consecutive_turns_are_merged_without_loss():
    text = "\n\nHuman: a\n\nAssistant: b \n\nAssistant:  c\n\nHuman: d\n\nHuman: e\n\nAssistant: f"
    transcript = parse_transcript(text)
    assert [t.content for t in transcript.turns] == ["a", "b\n\nc", "d\n\ne", "f"]
    assert said_of(transcript) == MARKERS.split(text)[1:]


def test_inline_speaker_names_are_text():
    transcript = parse_transcript("\n\nHuman: is Human: a word?\nAssistant: no\n\nAssistant: The Human: yes")
    assert transcript.prompt[0]["content"] == "is Human: a word?\nAssistant: no"
    assert transcript.response == "The Human: yes"


START = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: more"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{START}\n\nAssistant: a", f"{START}\n\nAssistant: a ", "identical_responses"),
        (f"{START}\n\nAssistant: a", f"{START}\n\nAssistant: ", "empty_response"),
        (f"{START}\n\nAssistant:", f"{START}\n\nAssistant: b", "empty_response"),
        (f"{START}\n\nAssistant: a", f"{START}!\n\nAssistant: b", "contexts_differ"),
        (f"{START}\n\nAssistant: a", f"{START}\n\nAssistant: b\n\nAssistant: c", "contexts_differ"),
        (f"{START}\n\nAssistant: a", f"{START}\n\nAssistant: b\n\nHuman: c", "last_speaker_not_assistant"),
        (f"{START}\n\nAssistant: a", f"{START}\n\nAssistant: b\n\n  Human: c", "last_speaker_not_assistant"),
        (
            f"{START}\n\nAssistant: x\n\nAssistant: a",
            f"{START}\n\nAssistant: x\n\nAssistant: b",
            "roles_not_alternating",
        ),
        ("\n\nAssistant: hi\n\nHuman: x\n\nAssistant: a", "\n\nAssistant: hi", "roles_not_alternating"),
        (f"\n\nHuman:\n\nHuman: a{START}\n\nAssistant: a", START, "roles_not_alternating"),
        ("\n\nHuman: \n\nAssistant: a", "\n\nHuman: \n\nAssistant: b", "empty_prompt"),
        ("hello", f"{START}\n\nAssistant: b", "malformed"),
        (f"Title{START}\n\nAssistant: a", f"Title{START}\n\nAssistant: b", "malformed"),
        ("", "", "malformed"),
    ],
)
def test_refused_with_the_reason(chosen, rejected, reason):
    with pytest.raises(TranscriptError) as error:
        compare_transcripts(chosen, rejected)
    assert str(error.value) == reason


@pytest.mark.skipif(not HH.is_dir(), reason="no local HH-RLHF rows beside the project")
def test_every_accepted_real_row_is_reproduced():
    outcomes: Counter[str] = Counter()
    for path in sorted(HH.glob("*/*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        for row in rows:
            try:
                sides = compare_transcripts(row["chosen"], row["rejected"])
            except TranscriptError as error:
                outcomes[str(error)] += 1
                continue
            outcomes["accepted"] += 1
            assert sides.chosen.prompt == sides.rejected.prompt
            for side, text in ((sides.chosen, row["chosen"]), (sides.rejected, row["rejected"])):
                assert said_of(side) == MARKERS.split(text)[1:]
                assert text.rstrip().endswith(side.response)
                # independent of the parser: markers and white space aside, the messages are the text
                plain = "".join(re.sub(r"\n\n[ \t]*(Human|Assistant):", "", text).split())
                said = [m["content"] for m in side.prompt] + [side.response]
                assert "".join("".join(said).split()) == plain
    assert sum(outcomes.values()) == 7445
    assert outcomes["identical_responses"] == 33
    assert outcomes["contexts_differ"] == 13
    assert outcomes["empty_response"] == 9
    assert outcomes["accepted"] == 7383
