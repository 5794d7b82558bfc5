"""Local files: every mistake names file and line."""

import gzip

import pytest

from prmd.data.readers import json_rows
from prmd.data.truthfulqa import truthfulqa_row
from prmd.errors import DataError


@pytest.mark.parametrize(
    "text", ['{"a": 1}\n\n{"a": 2}\n', '[{"a": 1},\n {"a": 2}]', '\n [{"a": 1}, {"a": 2}]\n']
)
def test_lines_and_arrays_zipped_or_not(tmp_path, text):
    plain, zipped = tmp_path / "x.json", tmp_path / "x.jsonl.gz"
    plain.write_text(text, encoding="utf-8")
    with gzip.open(zipped, "wt", encoding="utf-8") as stream:
        stream.write(text)
    assert list(json_rows(plain)) == list(json_rows(zipped)) == [{"a": 1}, {"a": 2}]


def test_a_line_separator_inside_a_string_is_no_line_break(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "one\u2028two\x85"}\n', encoding="utf-8")
    assert list(json_rows(path)) == [{"a": "one\u2028two\x85"}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}\n{"a": \n', r"x\.jsonl:2: not JSON"),
        ('{"a": 1}\n3\n', r"x\.jsonl:2: expected a JSON object, got int"),
        ('[{"a": 1},\n oops]', r"x\.jsonl:2: not JSON"),
        ('[{"a": 1}, "b"]', r"x\.jsonl: item 2 is str"),
    ],
)
def test_mistakes_name_the_line(tmp_path, text, says):
    path = tmp_path / "x.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        list(json_rows(path))


def test_broken_archives_and_encodings(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: not readable"):
        list(json_rows(path))
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-9])  # an interrupted download
    with pytest.raises(DataError, match="fetch the file again"):
        list(json_rows(path))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        list(json_rows(latin))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_lines_are_read_one_by_one(tmp_path, ending):
    path = tmp_path / "x.jsonl"
    path.write_bytes(f'{ending}{{"a": 1}}{ending}{{"a": 2}}{ending}oops'.encode() + b"\n" * 100_000 + b"\xff")
    rows = json_rows(path)
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match=r"x\.jsonl:4: not JSON \(Expecting value\)"):
        next(rows)


def test_answers_are_cut_at_semicolons_and_end_in_a_full_stop():
    row = truthfulqa_row(
        {
            "Question": " Why? ",
            "Best Answer": "Because",
            "Correct Answers": "Because; No reason. ;;",
            "Incorrect Answers": "",
        }
    )
    assert row["question"] == "Why?"
    assert row["best_answer"] == "Because."
    assert row["correct_answers"] == ["Because.", "No reason."]
    assert row["incorrect_answers"] == []
