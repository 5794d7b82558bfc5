"""The stored row format, ids and keys of pairs, and reading prepared splits."""

import copy
import json

import pytest

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.errors import DataError
from prmd.pairs import PreferencePair, hash_share, make_pair, prompt_key, read_benchmark_questions, read_pairs

ROW = {
    "id": "a-1",
    "prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    "chosen": [{"role": "assistant", "content": "Air scatters blue light more."}],
    "rejected": [{"role": "assistant", "content": "It mirrors the sea."}],
    "source": "embedded",
}


def changed(path, value):
    row = copy.deepcopy(ROW)
    target = row
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    return row


def test_row_survives_reading_and_writing():
    pair = PreferencePair.from_row(ROW, objective="honest", where="f:1")
    assert pair.to_row() == ROW
    assert pair.chosen == "Air scatters blue light more."
    assert pair.objective == "honest"
    assert pair.first_turn == "Hello?"  # not the system message


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({k: v for k, v in ROW.items() if k != "chosen"}, "missing ['chosen']"),
        ({**ROW, "chosn": 1}, "unknown ['chosn']"),
        (changed(["id"], " "), "'id'"),
        (changed(["source"], 3), "'source'"),
        (changed(["prompt"], []), "'prompt'"),
        (changed(["prompt"], "Hello?"), "'prompt'"),
        (changed(["prompt"], ROW["prompt"][:3]), "alternate"),
        (changed(["prompt"], ROW["prompt"][2:]), "alternate"),
        (changed(["prompt"], ROW["prompt"][:1]), "alternate"),
        (changed(["prompt", 1, "content"], "  "), "non-empty text"),
        (changed(["prompt", 1, "content"], None), "non-empty text"),
        (changed(["prompt", 1], {"role": "user"}), "role and content"),
        (changed(["chosen", 0, "role"], "user"), "one assistant message"),
        (changed(["chosen"], ROW["chosen"] * 2), "one assistant message"),
        (changed(["rejected", 0, "content"], ""), "non-empty text"),
        (changed(["rejected"], ROW["chosen"]), "same text"),
    ],
)
def test_bad_row_names_place_and_rule(row, says):
    with pytest.raises(DataError) as error:
        PreferencePair.from_row(row, objective="honest", where="train.jsonl:7")
    message = str(error.value)
    assert message.startswith("train.jsonl:7: ") and says in message and "\n" not in message


def test_prompt_key_ignores_case_spacing_punctuation_and_compatibility_forms():
    assert prompt_key("  What's\n UP?") == prompt_key("what s up")
    assert prompt_key("ﬁne") == prompt_key("fine")
    assert prompt_key("one two") != prompt_key("two one")
    assert prompt_key("??") != prompt_key("!!")


def test_ids_depend_on_content_and_objective_only():
    parts = {"prompt": ROW["prompt"], "chosen": "a", "rejected": "b"}
    pair = make_pair(**parts, source="x:1", objective="helpful")
    assert pair.id == make_pair(**parts, source="y:9", objective="helpful").id
    others = [
        make_pair(**parts, source="x:1", objective="honest"),
        make_pair(**{**parts, "chosen": "b", "rejected": "a"}, source="x:1", objective="helpful"),
        make_pair(**{**parts, "prompt": ROW["prompt"][1:]}, source="x:1", objective="helpful"),
    ]
    assert len({pair.id, *(o.id for o in others)}) == 4


def test_hash_share_is_uniform_and_salted():
    shares = [hash_share("a", str(i)) for i in range(4000)]
    assert all(0 <= s < 1 for s in shares)
    for decile in range(10):
        assert 320 < sum(decile / 10 <= s < (decile + 1) / 10 for s in shares) < 480  # 400 ± 4 sd
    both = sum(hash_share("a", str(i)) < 0.5 and hash_share("b", str(i)) < 0.5 for i in range(4000))
    assert 890 < both < 1110  # independent: 1000 ± 4 sd


@pytest.fixture
def paths(tmp_path):
    return ArtifactPaths(tmp_path, "embedded")


def test_missing_preparation_names_the_command(paths):
    for read in (lambda: read_pairs(paths, "honest", "train"), lambda: read_benchmark_questions(paths)):
        with pytest.raises(DataError, match=r"python 1_data_preparation/split_objectives\.py"):
            read()


def prepare(paths, rows, questions=None):
    io.write_jsonl(paths.split("honest", "train"), rows)
    io.write_json(paths.processed / "truthfulqa_benchmark_questions.json", questions)
    io.write_json(paths.processed / "run.json", {"fingerprint": "x"})


def test_half_written_preparation_is_refused(paths):
    prepare(paths, [ROW])
    (paths.processed / "run.json").unlink()
    with pytest.raises(DataError, match="split_objectives"):
        read_pairs(paths, "honest", "train")


def test_read_pairs_and_questions(paths):
    prepare(paths, [ROW], ["Do pigs fly?"])
    assert [p.to_row() for p in read_pairs(paths, "honest", "train")] == [ROW]
    assert read_benchmark_questions(paths) == {"Do pigs fly?"}
    prepare(paths, [ROW], None)
    assert read_benchmark_questions(paths) is None


def test_empty_missing_and_broken_splits(paths):
    prepare(paths, [])
    with pytest.raises(DataError, match="train split of honest is empty"):
        read_pairs(paths, "honest", "train")
    with pytest.raises(DataError, match="missing"):
        read_pairs(paths, "honest", "val")


def test_a_broken_split_names_file_line_and_field(paths):
    prepare(paths, [])
    path = paths.split("honest", "train")
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "id": ""}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl:2: 'id'"):
        read_pairs(paths, "honest", "train")
