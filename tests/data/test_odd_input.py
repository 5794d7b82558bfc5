"""Odd input of stage 1: one `DataError` that names file and row, or the row left out and counted; never another error."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prmd.artifacts.paths import EMBEDDED_DIR
from prmd.config.shared import HhRlhfConfig, PkuSafeRlhfConfig, RewardModelConfig
from prmd.data import prepare
from prmd.data.collection import RawFile
from prmd.data.embedded import embedded_pairs
from prmd.data.hh_rlhf import TranscriptError, hh_rlhf_pairs, parse_transcript
from prmd.data.pku_safe_rlhf import pku_pairs
from prmd.data.prepare import download_dataset, split_objectives
from prmd.data.readers import json_rows, parquet_rows
from prmd.data.sources import plan_source
from prmd.errors import ConfigError, DataError
from prmd.objectives import OBJECTIVES

COLUMNS = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers\n"


@pytest.fixture(autouse=True)
def no_summary(monkeypatch):
    """Figures are slow and not looked at here."""
    monkeypatch.setattr(prepare, "write_summary", lambda *_, **__: [])


def pku_row(i, **changes):
    row = {"prompt": f"ask{i} about{i} thing{i}?", "response_0": f"yes {i}", "response_1": f"no {i}"}
    return row | {"better_response_id": 0, "safer_response_id": 1} | changes


def pku_config(tmp_path, text, **data):
    path = tmp_path / "mine.jsonl"
    path.write_text(text, encoding="utf-8")
    source = {"path": str(path), "honest": "better_response"}
    return RewardModelConfig.model_validate(
        {
            "artifact_root": str(tmp_path / "root"),
            "data": {"approach": "pku_safe", "pku_safe_rlhf": source, **data},
        }
    )


def prepared(config):
    download_dataset(config)
    folder = split_objectives(config)
    return json.loads((folder / "stats.json").read_text(encoding="utf-8")), folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------ rows
def test_odd_rows_are_left_out_and_counted_with_the_reason(tmp_path):
    odd = [
        pku_row(100, response_0="Sure \ud83d"),
        pku_row(101, prompt="a\0b"),
        pku_row(102, better_response_id=float("nan")),
        pku_row(103, safer_response_id="first"),
        pku_row(104, response_1="caf\ufffd"),  # kept: published data holds such rows
    ]
    text = "".join(json.dumps(row) + "\n" for row in [*map(pku_row, range(40)), *odd])
    text += json.dumps(pku_row(105)).replace('"yes 105"', "9" * 5000) + "\n"
    text += json.dumps(pku_row(106)).replace('"yes 106"', "1e999") + "\n"
    stats, folder = prepared(pku_config(tmp_path, "\ufeff" + text))  # a byte order mark in front
    assert stats["quarantined"] == {"broken_text": 2, "malformed": 2, "unknown_label": 2}
    assert stats["counts"] == {"pairs_with_replacement_character": 3, "pku_sha256_mismatches": 0}
    assert sum(stats["sizes"]["helpful"].values()) == 41
    refused = {row["source"].rsplit(":", 1)[1]: row for row in lines_of(folder / "quarantine.jsonl")}
    assert set(refused) == {"41", "42", "43", "44", "46", "47"}
    assert refused["41"]["row"]["response_0"] == "Sure \ud83d"
    assert refused["44"]["detail"] == "safer_response_id is 'first', wanted 0 or 1"


@pytest.mark.parametrize(
    ("written", "read"),
    [(0, 0), (1, 1), (0.0, 0), (1.0, 1), ("0", 0), ("1", 1), (" 1.0 ", 1), ("0.0", 0), (True, 1)],
)
def test_labels_as_exports_write_them(written, read):
    file = RawFile("pku_safe_rlhf", "x", None, Path("x"), [pku_row(1, better_response_id=written)])
    helpful, *_ = pku_pairs([file], PkuSafeRlhfConfig(honest="better_response")).pairs
    assert (helpful.pair.objective, helpful.pair.chosen) == ("helpful", ["yes 1", "no 1"][read])


@pytest.mark.parametrize("label", [2, -1, 0.5, "yes", "", None, [0], {"id": 0}, 10**400])
def test_other_labels_are_named_with_the_row_that_stops_the_run(label, tmp_path):
    text = "".join(json.dumps(pku_row(i, safer_response_id=label)) + "\n" for i in range(3))
    with pytest.raises(
        DataError, match=r"unknown_label 3 \(first pku_safe_rlhf/mine:1: safer_response_id is"
    ):
        prepared(pku_config(tmp_path, text))


def test_rows_nested_as_deep_as_can_be_read(tmp_path):
    """Wherever reading ends, no depth is an error without the row."""
    for depth in range(760, 1000, 20):
        row = json.dumps(pku_row(1)).replace("{", '{"more": ' + "[" * depth + "]" * depth + ", ", 1)
        text = "".join(json.dumps(pku_row(i)) + "\n" for i in range(2, 30)) + row
        try:
            stats, _ = prepared(pku_config(tmp_path, text))
            assert sum(stats["sizes"]["helpful"].values()) == 29
        except DataError as error:
            assert "mine.jsonl:29" in str(error) or "row 29" in str(error) or "line 29" in str(error)


# ------------------------------------------------------------------ files
GZIPPED = gzip.compress(b'{"a": 1}\n' * 2000)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", b'{"a": ' + b"[" * 100_000, r"x\.jsonl:1: not JSON \(nested too deeply\)"),
        ("x.json", b"[" * 100_000, r"x\.json:1: not JSON \(nested too deeply\)"),
        ("x.jsonl", '{"a": "é"}'.encode("utf-16"), r"x\.jsonl: not readable as UTF-8"),
        ("x.jsonl", '{"a": "é"}'.encode("latin-1"), r"x\.jsonl: not readable as UTF-8"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\0"}\n', r"x\.jsonl:2: not JSON"),
        ("x.jsonl", GZIPPED, r"x\.jsonl: not readable as UTF-8"),
        ("x.jsonl.gz", GZIPPED[:-9], r"x\.jsonl\.gz: not readable"),
        ("x.jsonl.gz", GZIPPED[:15] + b"\xff" * 20 + GZIPPED[35:], r"x\.jsonl\.gz: not readable"),
        ("x.jsonl.gz", b'{"a": 1}\n', r"x\.jsonl\.gz: not readable"),
        ("x.jsonl", b"\x89PNG\r\n\x1a\n", r"x\.jsonl: not readable as UTF-8"),
    ],
)
def test_files_that_are_something_else(name, content, says, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(json_rows(path))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 50 + b"PAR1", b"no parquet"])
def test_parquet_junk(content, tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet: not readable as parquet"):
        parquet_rows(path)


def test_folders_given_for_files(tmp_path):
    for name in ("x.jsonl", "x.jsonl.gz", "x.parquet"):
        (tmp_path / name).mkdir()
    for name in ("x.jsonl", "x.jsonl.gz"):
        with pytest.raises(DataError, match=name):
            list(json_rows(tmp_path / name))
    with pytest.raises(DataError, match=r"x\.parquet"):
        parquet_rows(tmp_path / "x.parquet")
    (tmp_path / "TruthfulQA.csv").mkdir()
    for source in ("truthfulqa", "pku_safe_rlhf", "hh_rlhf"):
        (tmp_path / "helpful-base" / "train.jsonl").mkdir(parents=True, exist_ok=True)
        data = RewardModelConfig.model_validate({"data": {source: {"path": str(tmp_path)}}}).data
        with pytest.raises(ConfigError, match=rf"data\.{source}\.path"):
            plan_source(source, data)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "not readable as UTF-8 CSV"),
        ((COLUMNS + "a,b,Why?\n").encode(), "row 1: wanted a text"),
        ((COLUMNS + "a,b,Why?,Yes,Yes,No,and,more\n").encode(), "row 1: wanted a text"),
        ((COLUMNS + f'a,b,"{"x" * 200_000}",Yes,Yes,No\n').encode(), "not readable as UTF-8 CSV"),
        (b"", "the columns .* are missing"),
    ],
)
def test_truthfulqa_files_that_are_something_else(content, says, tmp_path):
    path = tmp_path / "TruthfulQA.csv"
    path.write_bytes(content)
    data = RewardModelConfig.model_validate({"data": {"truthfulqa": {"path": str(path)}}}).data
    [file] = plan_source("truthfulqa", data)
    with pytest.raises(DataError, match=rf"TruthfulQA\.csv: {says}"):
        list(file.read())


def test_a_source_without_rows_is_refused_and_an_empty_file_among_others_said(tmp_path, caplog):
    with pytest.raises(DataError, match=r"data\.pku_safe_rlhf: mine of .*mine\.jsonl hold no row"):
        download_dataset(pku_config(tmp_path, "\n\n"))
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(pku_row(1)), encoding="utf-8")
    (folder / "b.jsonl").write_text("", encoding="utf-8")
    config = pku_config(tmp_path, "").model_dump(mode="json")
    caplog.clear()
    config["data"]["pku_safe_rlhf"]["path"] = str(folder)
    download_dataset(RewardModelConfig.model_validate(config))
    assert [r.getMessage().rsplit(" ", 2)[-2:] for r in caplog.records if r.levelname == "WARNING"] == [
        ["0", "rows"]
    ]


def test_prompts_that_are_all_one_are_said(tmp_path, caplog):
    rows = [pku_row(i, prompt=("Why?", "why")[i % 2]) for i in range(20)]
    config = pku_config(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    try:
        prepared(config)
    except DataError as error:  # the split they all fall into is not the training split
        assert "no training pair is left" in str(error)
    assert "helpful: all 20 pairs have one prompt, 'why'" in caplog.text


def test_a_manifest_that_was_edited(tmp_path):
    config = pku_config(tmp_path, json.dumps(pku_row(1)))
    download_dataset(config)
    for text in ("[]", "{}", '{"files": {"a": 3}}', '{"files": [1]}', "[" * 100_000, "\ud83d"):
        (config.paths.raw("pku_safe_rlhf") / "manifest.json").write_bytes(
            text.encode("utf-8", "surrogatepass")
        )
        for stage in (download_dataset, split_objectives):
            with pytest.raises(DataError, match=r"manifest\.json: not"):
                stage(config)


# ------------------------------------------------------------------ the project's own pairs
def own(objective, *ids, text="answer"):
    say = lambda role, content: [{"role": role, "content": content}]  # noqa: E731
    rows = [
        {
            "id": name,
            "prompt": say("user", f"{objective} {name}?"),
            "chosen": say("assistant", f"{text} {number}"),
            "rejected": say("assistant", "no"),
            "source": "mine",
        }
        for number, name in enumerate(ids)
    ]
    return RawFile("embedded", objective, None, Path(f"{objective}.jsonl"), rows)


def test_ids_that_repeat_across_files_are_made_unique():
    files = [own("helpful", "1", "2"), own("harmless", "1", "7"), own("honest", "1", "2", "3")]
    found = embedded_pairs(files)
    assert [item.pair.id for item in found.pairs] == [
        *("helpful-1", "helpful-2", "harmless-1", "7", "honest-1", "honest-2", "3"),
    ]
    assert found.counts == {"ids_of_several_files_made_unique": 5}


def test_ids_that_repeat_within_a_file():
    with pytest.raises(DataError, match=r"helpful\.jsonl:3: the id 'a' is also that of helpful\.jsonl:1;"):
        embedded_pairs([own("helpful", "a", "b", "a")])
    file = own("helpful", "a", "b")
    pairs = embedded_pairs(
        [RawFile("embedded", "helpful", None, file.path, [*file.rows, file.rows[0]])]
    ).pairs
    assert [item.pair.id for item in pairs] == [
        "a",
        "b",
        "a",
    ]  # the same row twice: one is dropped in splitting
    with pytest.raises(DataError, match="the id 'honest-1' is also that of"):
        embedded_pairs([own("helpful", "honest-1", "1"), own("honest", "1")])


def test_the_ids_of_the_pairs_written_for_this_project_stay():
    files = [
        RawFile("embedded", o, None, EMBEDDED_DIR / f"{o}.jsonl", lines_of(EMBEDDED_DIR / f"{o}.jsonl"))
        for o in OBJECTIVES
    ]
    found = embedded_pairs(files)
    assert [item.pair.id for item in found.pairs] == [row["id"] for file in files for row in file.rows]
    assert not found.counts


def test_half_a_character_and_nul_in_own_pairs_name_the_line():
    for text in ("\ud83d", "a\0"):
        with pytest.raises(DataError, match=r"helpful\.jsonl:1: .*(half a character|NUL)"):
            embedded_pairs([own("helpful", "a", text=text)])


# ------------------------------------------------------------------ anything at all
texts = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates too
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
transcripts = st.lists(
    st.sampled_from(["\n\nHuman:", "\n\nAssistant:", "\n\n", " ", "Human:", "x", "\ud83d", "\0", "\u2028"]),
    max_size=9,
).map("".join)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=60) | st.lists(values, max_size=3).map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_rows_or_one_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "x.jsonl"
    path.write_bytes(content)
    try:
        rows = list(json_rows(path))
    except DataError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert all(isinstance(row, dict) for row in rows)
        json.dumps(rows, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(transcripts | texts)
def test_any_transcript_is_cut_without_loss_or_refused(text):
    try:
        parts = [part for turn in parse_transcript(text).turns for part in turn.parts]
        assert parts == re.split(r"(?:\A\s*|\n\n[ \t]*)(?:Human|Assistant):", text)[1:]
    except TranscriptError as error:
        assert str(error) in ("malformed", "last_speaker_not_assistant", "roles_not_alternating")


def assert_encodable(collection):
    for item in collection.pairs:
        json.dumps(item.pair.to_row(), ensure_ascii=False).encode("utf-8")
        assert item.pair.chosen.strip() and item.pair.rejected.strip() and item.pair.first_turn.strip()


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({}, optional={"chosen": transcripts | values, "rejected": transcripts | values}))
def test_any_row_of_hh_rlhf_is_a_pair_or_refused(row):
    file = RawFile("hh_rlhf", "helpful-base/train", "train", Path("x"), [row])
    found = hh_rlhf_pairs([file], HhRlhfConfig())
    assert len(found.pairs) + len(found.quarantine) == 1
    assert_encodable(found)


@settings(max_examples=40, deadline=None)
@given(
    st.fixed_dictionaries(
        {name: texts | values for name in ("prompt", "response_0", "response_1")},
        optional={name: st.sampled_from([0, 1.0, "1"]) | values for name in pku_row(0) if "_id" in name},
    )
)
def test_any_row_of_pku_safe_rlhf_is_a_pair_of_each_objective_or_refused(row):
    file = RawFile("pku_safe_rlhf", "x", None, Path("x"), [row])
    found = pku_pairs([file], PkuSafeRlhfConfig(honest="better_response"))
    assert Counter(item.pair.objective for item in found.pairs) in ({}, dict.fromkeys(OBJECTIVES, 1))
    assert bool(found.pairs) != bool(found.quarantine)
    assert_encodable(found)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(["id", "prompt", "chosen", "rejected", "source"]) | texts, values))
def test_any_row_of_own_pairs_is_a_pair_or_named(row):
    try:
        embedded_pairs([RawFile("embedded", "helpful", None, Path("helpful.jsonl"), [row])])
    except DataError as error:
        assert str(error).startswith("helpful.jsonl:1: ")
