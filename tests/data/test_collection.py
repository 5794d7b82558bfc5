"""Pairs of HH-RLHF, TruthfulQA and the embedded files."""

from pathlib import Path

import pytest

from prmd.config.shared import HhRlhfConfig, TruthfulQaConfig
from prmd.data.collection import PairCollection, RawFile, merge
from prmd.data.embedded import embedded_pairs
from prmd.data.hh_rlhf import hh_rlhf_pairs
from prmd.data.truthfulqa import truthfulqa_pairs
from prmd.errors import DataError


def raw(rows, source="hh_rlhf", label="helpful-base/train", split="train"):
    return RawFile(source, label, split, Path("data") / f"{label}.jsonl", rows)


HH_ROW = {"chosen": "\n\nHuman: a \n\nAssistant:  b", "rejected": "\n\nHuman: a\n\nAssistant: c"}


def test_hh_rows_become_pairs_of_the_subsets_objective():
    settings = HhRlhfConfig(helpful_subsets=("helpful-base",), harmless_subsets=("harmless-base",))
    files = [raw([HH_ROW]), raw([HH_ROW], label="harmless-base/test", split="test")]
    helpful, harmless = hh_rlhf_pairs(files, settings).pairs
    assert (helpful.pair.objective, helpful.upstream_split) == ("helpful", "train")
    assert (harmless.pair.objective, harmless.upstream_split) == ("harmless", "test")
    assert helpful.pair.prompt == ({"role": "user", "content": "a"},)
    assert (helpful.pair.chosen, helpful.pair.rejected) == ("b", "c")
    assert helpful.pair.source == "hh_rlhf/helpful-base/train:1"
    assert helpful.pair.id != harmless.pair.id


def test_refused_hh_rows_keep_the_row_and_the_reason():
    same = {"chosen": HH_ROW["chosen"], "rejected": HH_ROW["chosen"]}
    collection = hh_rlhf_pairs([raw([HH_ROW, same, {"chosen": None}])], HhRlhfConfig())
    assert len(collection.pairs) == 1
    assert collection.quarantine == [
        {
            "source": "hh_rlhf/helpful-base/train:2",
            "objective": "helpful",
            "reason": "identical_responses",
            "row": same,
        },
        {
            "source": "hh_rlhf/helpful-base/train:3",
            "objective": "helpful",
            "reason": "malformed",
            "row": {"chosen": None},
        },
    ]


def question(text, correct=("Yes.", "Sure."), incorrect=("No.", "Never.", "Nope.", "Nay.")):
    return {
        "question": text,
        "best_answer": correct[0] if correct else "",
        "correct_answers": list(correct)[::-1],  # the best answer comes first all the same
        "incorrect_answers": list(incorrect),
    }


def truthful(rows, **settings):
    return truthfulqa_pairs([raw(rows, "truthfulqa", "generation", None)], TruthfulQaConfig(**settings))


def test_chosen_cycles_through_correct_answers_from_the_best():
    pairs = truthful([question("Q?")], benchmark_fraction=0.0, pairs_per_question=3).pairs
    assert [(p.pair.chosen, p.pair.rejected) for p in pairs] == [
        ("Yes.", "No."),
        ("Sure.", "Never."),
        ("Yes.", "Nope."),
    ]
    assert {p.pair.objective for p in pairs} == {"honest"}
    assert {p.upstream_split for p in pairs} == {None}


def test_an_answer_listed_as_both_is_not_rejected_and_answerless_questions_are_refused():
    rows = [
        question("A?", correct=("Yes.",), incorrect=("Yes.", "No.", "No.")),
        question("B?", incorrect=()),
        question(""),
    ]
    collection = truthful(rows, benchmark_fraction=0.0)
    assert [(p.pair.chosen, p.pair.rejected) for p in collection.pairs] == [("Yes.", "No.")]
    assert [q["reason"] for q in collection.quarantine] == ["empty_response", "empty_prompt"]


def test_benchmark_questions_give_no_pair():
    rows = [question(f"Question number {i}?") for i in range(400)]
    collection = truthful(rows, benchmark_fraction=0.5)
    reserved = set(collection.benchmark_questions)
    trained = {p.pair.first_turn for p in collection.pairs}
    assert not reserved & trained
    assert reserved | trained == {row["question"] for row in rows}
    assert 140 < len(reserved) < 260  # 200 ± 6 sd
    assert set(truthful(rows, benchmark_fraction=0.2).benchmark_questions) < reserved  # by hash: nested
    assert truthful(rows, benchmark_fraction=1.0).pairs == []


def test_embedded_rows_keep_their_ids_and_mistakes_name_file_and_line():
    row = {
        "id": "embedded-honest-001",
        "prompt": [{"role": "user", "content": "p"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "source": "embedded",
    }
    (item,) = embedded_pairs([raw([row], "embedded", "honest", None)]).pairs
    assert (item.pair.id, item.pair.objective, item.upstream_split) == ("embedded-honest-001", "honest", None)
    with pytest.raises(DataError, match=r"honest\.jsonl:2: .*rejected"):
        embedded_pairs([raw([row, {**row, "rejected": []}], "embedded", "honest", None)])


def test_merge_adds_up_and_keeps_the_questions():
    with_questions = PairCollection(benchmark_questions=["q"])
    plain = PairCollection()
    plain.counts["x"] += 2
    plain.refuse(source="s", objective=None, reason="malformed", row={})
    total = merge([plain, with_questions, plain])
    assert total.benchmark_questions == ["q"] and total.counts["x"] == 4 and len(total.quarantine) == 2
    assert merge([plain]).benchmark_questions is None
