"""Files appear whole or not at all, and unreadable ones are named."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prmd.artifacts import io
from prmd.errors import DataError

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = io.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ValueError, match="half"), io.atomic_path(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        raise ValueError("half way")
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_text_keeps_its_line_ends(tmp_path: Path) -> None:
    path = io.write_text(tmp_path / "deep" / "a.txt", "one\ntwo ü\n")
    assert path.read_bytes() == "one\ntwo ü\n".encode()


def test_json_round_trip_and_refusal_of_nan(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "é\u2028"], "a": {}}
    assert io.read_json(io.write_json(tmp_path / "a.json", value)) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        io.write_json(tmp_path / "a.json", float("nan"))
    assert io.read_json(tmp_path / "a.json") == value  # the refused write changed nothing


def test_broken_json_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    path = io.write_text(tmp_path / "a.json", '{"a": ')
    with pytest.raises(DataError, match=r"a\.json: not readable as JSON .* run its stage again"):
        io.read_json(path)


@settings(max_examples=40)
@given(rows=st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=4), max_size=6))
def test_jsonl_gives_back_every_row(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    assert io.read_jsonl(io.write_jsonl(path, rows)) == rows


def test_jsonl_skips_blank_lines_and_names_the_bad_one(tmp_path: Path) -> None:
    path = io.write_text(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert io.read_jsonl(path) == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        io.read_jsonl(io.write_text(path, '{"a": 1}\n{"a": \n'))
    with pytest.raises(DataError, match=r"a\.jsonl:3: expected a JSON object, got list"):
        io.read_jsonl(io.write_text(path, "{}\n\n[1]\n"))
    path.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match=r"a\.jsonl: not UTF-8"):
        io.read_jsonl(path)


def test_rows_are_read_one_by_one(tmp_path: Path) -> None:
    path = io.write_text(tmp_path / "a.jsonl", '\ufeff{"a": 1}\n \n{"a": 2}\n' + "{}\n" * 10_000)
    with path.open("ab") as stream:
        stream.write(b"[\n\xff\n")
    rows = io.iterate_jsonl(path)
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(
        DataError,
        match=r"a\.jsonl: not UTF-8 \(after line \d+: invalid start byte\)|a\.jsonl:10004: not JSON",
    ):
        list(rows)


def test_half_a_character_is_written_as_its_escape_and_read_back(tmp_path: Path) -> None:
    row = {"a\ud83d": ["b\udc00", "é"]}
    path = io.write_jsonl(tmp_path / "a.jsonl", [{"a": "é"}, row])
    assert path.read_bytes().splitlines()[0] == '{"a": "é"}'.encode()
    assert io.read_jsonl(path) == [{"a": "é"}, row]
    assert io.read_json(io.write_json(tmp_path / "a.json", row)) == row
    assert io.fingerprint(row) != io.fingerprint({"a\ud83d": ["b\udc01", "é"]})


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b"", b"\0"])
def test_what_is_no_json_names_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json: not"):
        io.read_json(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n' + content)
    if content:
        with pytest.raises(DataError, match=r"a\.json:2?:? ?not"):
            io.read_jsonl(path)


def test_folders_and_missing_files_are_named(tmp_path: Path) -> None:
    for read in (io.read_json, io.read_jsonl, io.read_tensors):
        for path in (tmp_path, tmp_path / "gone"):
            with pytest.raises(DataError, match=str(path)):
                read(path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100, (8).to_bytes(8, "little") + b'{"a": 1}'])
def test_tensors_of_something_else_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.safetensors: not readable as safetensors"):
        io.read_tensors(path)


def test_tensors_round_trip_with_dtype_and_layout(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([1, 2], dtype=torch.int64)}
    loaded = io.read_tensors(io.write_tensors(tmp_path / "a.safetensors", tensors))
    assert all(torch.equal(loaded[k], tensors[k]) and loaded[k].dtype == tensors[k].dtype for k in tensors)


def test_publishing_replaces_the_former_directory_whole(tmp_path: Path) -> None:
    target, source = tmp_path / "final", tmp_path / ".final.partial"
    io.write_text(target / "old.txt", "old")
    io.write_text(source / "new.txt", "new")
    io.publish_directory(source, target)
    assert [p.name for p in target.iterdir()] == ["new.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_replace_waits_for_a_file_that_is_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real, tried, slept = io.write_text(tmp_path / "a", "x"), os.replace, [], []

    def busy_twice(*paths: Path) -> None:
        tried.append(paths)
        if len(tried) < 3:
            raise PermissionError
        real(*paths)

    monkeypatch.setattr(io.os, "replace", busy_twice)
    monkeypatch.setattr(io.time, "sleep", slept.append)
    io.replace(source, tmp_path / "b")
    assert (tmp_path / "b").exists() and slept == [0.2, 0.4]
    tried.clear()
    with pytest.raises(PermissionError):
        io.replace(tmp_path / "b", tmp_path / "c", attempts=2)


def test_file_sha256_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # longer than one block
    (tmp_path / "a").write_bytes(content)
    assert io.file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name of every file that is read for its sha256."""
    names, blocks = [], io._blocks

    def counted(path: Path) -> Iterator[bytes]:
        names.append(path.name)
        return blocks(path)

    monkeypatch.setattr(io, "_blocks", counted)
    return names


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_file_is_hashed_again_only_when_it_has_changed(tmp_path: Path, read: list[str]) -> None:
    a, b = io.write_text(tmp_path / "a", "one"), io.write_text(tmp_path / "b", "two")
    assert io.files_sha256([a, b, a]) == [sha256("one"), sha256("two"), sha256("one")]
    assert io.file_sha256(b) == sha256("two") and read == ["a", "b"]
    io.write_text(a, "six")  # as long, and perhaps at the same time by the clock of the disk
    assert io.files_sha256([a, b]) == [sha256("six"), sha256("two")] and read == ["a", "b", "a"]
    with pytest.raises(FileNotFoundError):
        io.file_sha256(tmp_path / "c")


def test_a_copy_is_known_by_its_source(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 9000  # of several blocks
    for name in ("known", "new", "turned"):
        (tmp_path / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    io.file_sha256(tmp_path / "known")
    for name in ("known", "new"):  # the other is hashed as it passes
        io.copy_file(tmp_path / name, tmp_path / "copies" / name)
        assert (tmp_path / "copies" / name).read_bytes() == content
        assert io.file_sha256(tmp_path / "copies" / name) == io.file_sha256(tmp_path / name) == digest
    assert read == ["known"]

    def while_copying(blocks: Iterator[bytes], *arguments: Any, **options: Any) -> Iterator[bytes]:
        for block in blocks:
            (tmp_path / "turned").write_text("other", encoding="utf-8")
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(io, "progress", while_copying)
        io.copy_file(tmp_path / "turned", tmp_path / "copies" / "turned")
    assert io.file_sha256(tmp_path / "turned") == sha256("other") and read == ["known", "turned"]
    found = hashlib.sha256((tmp_path / "copies" / "turned").read_bytes()).hexdigest()
    assert io.file_sha256(tmp_path / "copies" / "turned") == found


def test_a_copy_that_fails_leaves_nothing_and_is_not_known(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = io.write_text(tmp_path / "a", "one"), io.write_text(tmp_path / "b", "two")

    def fails(blocks: Iterator[bytes], *arguments: Any, **options: Any) -> Iterator[bytes]:
        yield next(blocks)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "progress", fails)
    with pytest.raises(OSError, match="No space left on device") as error:
        io.copy_file(source, target)
    assert error.value.filename == str(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    monkeypatch.undo()
    assert io.file_sha256(target) == sha256("two")


def test_what_was_hashed_before_its_folder_was_published_is_known_there(
    tmp_path: Path, read: list[str]
) -> None:
    old, new = tmp_path / "model", tmp_path / ".model.partial"
    for folder, text in ((old, "old"), (new, "new")):
        io.write_text(folder / "sub" / "weights", text)
        assert io.file_sha256(folder / "sub" / "weights") == sha256(text)
    io.publish_directory(new, old)
    assert io.file_sha256(old / "sub" / "weights") == sha256("new") and len(read) == 2


def test_hashing_that_takes_long_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").write_bytes(bytes(2 * 1024**2 + 1))
    io.file_sha256(tmp_path / "weights")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(io, "_digests", {})
    monkeypatch.setattr("prmd.runtime._PROGRESS_AFTER_SECONDS", 0.0)
    io.file_sha256(tmp_path / "weights")
    shown = capsys.readouterr().err
    assert f"hashing {tmp_path.name}" in shown and "3/3" in shown and "MiB/s" in shown


@given(value=st.dictionaries(st.text(max_size=5), json_values, max_size=5))
def test_fingerprint_depends_on_content_not_order(value: dict) -> None:
    backwards = dict(reversed(value.items()))
    assert io.fingerprint(value) == io.fingerprint(backwards)
    assert io.fingerprint(value) == io.fingerprint(json.loads(json.dumps(value)))
    assert io.fingerprint(value) != io.fingerprint({**value, "another key": 1})


def test_fingerprint_is_the_same_on_every_machine() -> None:
    canonical = '{"a":[1,2.5,null],"b":"ü"}'
    assert (
        io.fingerprint({"b": "ü", "a": [1, 2.5, None]}) == hashlib.sha256(canonical.encode()).hexdigest()[:16]
    )
