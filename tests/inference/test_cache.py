"""Tables of scores and samples: keys, shards that are whole or absent, what is refused."""

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prmd.errors import DataError
from prmd.inference.cache import JsonTable, ScoreTable, tokens_key
from prmd.models.tokenization import PrefixRow

TOKENS = st.lists(st.integers(0, 200_000), max_size=6).map(tuple)
KEYS = [tokens_key((i,)) for i in range(10)]


@given(a=st.tuples(TOKENS, TOKENS), b=st.tuples(TOKENS, TOKENS))
def test_keys_are_equal_exactly_where_prompt_and_response_are(a, b):
    assert (tokens_key(*a) == tokens_key(*b)) == (a == b)
    assert len(tokens_key(*a)) == 16


def test_key_depends_on_where_the_prompt_ends():
    assert len({tokens_key((1, 2), (3,)), tokens_key((1,), (2, 3)), tokens_key((1, 2, 3))}) == 3


def test_rows_come_back_bit_for_bit_after_reopening(tmp_path):
    values = torch.randn(5, 3) * torch.tensor([1e-8, 1.0, 1e8])
    table = ScoreTable(tmp_path / "t", 3)
    table.append(KEYS[:2], values[:2])
    table.append(KEYS[2:5], values[2:])
    again = ScoreTable(tmp_path / "t", 3)
    assert len(table) == len(again) == 5
    for key, row in zip(KEYS, values, strict=False):
        assert torch.equal(again[key], row) and torch.equal(table[key], row)
    assert KEYS[5] not in again
    for number, shard in enumerate(sorted((tmp_path / "t").iterdir())):
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        assert shard.name == f"shard-{number:05d}-{digest[:16]}.safetensors"


def test_a_process_that_does_not_write_keeps_rows_in_memory(tmp_path):
    table = ScoreTable(tmp_path / "t", 1)
    table.append(KEYS[:1], torch.ones(1, 1), write=False)
    assert KEYS[0] in table
    assert not (tmp_path / "t").exists()


def test_nothing_is_written_for_no_rows(tmp_path):
    ScoreTable(tmp_path / "t", 1).append([], torch.zeros(0, 1))
    JsonTable(tmp_path / "t").append([])
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused_and_nothing_is_cached(tmp_path, bad):
    table = ScoreTable(tmp_path / "t", 2)
    with pytest.raises(DataError, match="1 scores are not finite"):
        table.append(KEYS[:2], torch.tensor([[1.0, 2.0], [3.0, bad]]))
    assert len(table) == 0
    assert not (tmp_path / "t").exists()


def test_another_width_is_refused_and_names_the_folder_to_delete(tmp_path):
    ScoreTable(tmp_path / "t", 2).append(KEYS[:1], torch.zeros(1, 2))
    with pytest.raises(DataError, match=r"rows of \(2,\), expected \(3,\); delete"):
        ScoreTable(tmp_path / "t", 3)


@pytest.mark.parametrize("kind", ["scores", "json"])
def test_a_deleted_shard_never_makes_a_later_one_overwrite_another(tmp_path, kind):
    def opened():
        return ScoreTable(tmp_path / "t", 1) if kind == "scores" else JsonTable(tmp_path / "t")

    def add(table, i):
        if kind == "scores":
            table.append([KEYS[i]], torch.tensor([[float(i)]]))
        else:
            table.append([(KEYS[i].hex(), i)])

    table = opened()
    for i in range(3):
        add(table, i)
    next(iter(sorted((tmp_path / "t").iterdir()))).unlink()
    add(opened(), 3)
    again = opened()
    kept = [KEYS[i] if kind == "scores" else KEYS[i].hex() for i in range(4)]
    assert [key in again for key in kept] == [False, True, True, True]


def test_what_a_torn_write_leaves_is_ignored(tmp_path):
    ScoreTable(tmp_path / "t", 1).append(KEYS[:1], torch.zeros(1, 1))
    (tmp_path / "t" / ".shard-00001.safetensors.77.tmp").write_bytes(b"half")
    assert len(ScoreTable(tmp_path / "t", 1)) == 1


@pytest.mark.parametrize("kind", ["scores", "samples"])
def test_a_folder_in_the_place_of_a_shard_is_left_out(tmp_path, kind):
    for number in range(2):
        add(opened(kind, tmp_path / "t"), number)
    first = min((tmp_path / "t").iterdir())
    first.unlink()
    first.mkdir()
    assert len(opened(kind, tmp_path / "t")._rows) == 1


def test_holds_asks_for_every_response(tmp_path):
    table = ScoreTable(tmp_path / "t", 1)
    row = PrefixRow((1, 2), ((3,), (4, 5)))
    table.append([tokens_key((1, 2), (3,))], torch.zeros(1, 1))
    assert not table.holds([row])
    table.append([tokens_key((1, 2), (4, 5))], torch.zeros(1, 1))
    assert table.holds([row])
    assert table.holds([])


def test_json_rows_come_back_after_reopening(tmp_path):
    table = JsonTable(tmp_path / "t")
    prompts = [(1, 2), (3,)]
    table.append([(tokens_key(prompts[0]).hex(), [[7, 8], [9]])])
    assert not table.holds(prompts)
    table.append([(tokens_key(prompts[1]).hex(), ["é"])])
    again = JsonTable(tmp_path / "t")
    assert again.holds(prompts)
    assert again[tokens_key(prompts[0]).hex()] == [[7, 8], [9]]
    assert again[tokens_key(prompts[1]).hex()] == ["é"]


def change(shard: Path) -> None:
    """Another value in the same number of bytes."""
    content = bytearray(shard.read_bytes())
    content[-4] ^= 1
    shard.write_bytes(bytes(content))


def opened(kind: str, directory: Path) -> ScoreTable | JsonTable:
    return ScoreTable(directory, 1) if kind == "scores" else JsonTable(directory)


def add(table: ScoreTable | JsonTable, number: int) -> None:
    if isinstance(table, ScoreTable):
        table.append([KEYS[number]], torch.tensor([[float(number)]]))
    else:
        table.append([(KEYS[number].hex(), [number, 12345])])


@pytest.mark.parametrize("kind", ["scores", "json"])
def test_a_changed_shard_is_named_and_its_rows_are_made_again(tmp_path, caplog, kind):
    table = opened(kind, tmp_path)
    add(table, 0)
    add(table, 1)
    first, second = sorted(tmp_path.iterdir())
    change(first)
    again = opened(kind, tmp_path)
    keys = [key if kind == "scores" else key.hex() for key in KEYS[:2]]
    assert [key in again for key in keys] == [False, True]
    opened(kind, tmp_path)
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]  # once
    assert str(first) in line and "computed again" in line and "\n" not in line
    add(again, 0)
    assert all(key in opened(kind, tmp_path) for key in keys)
    assert len(list(tmp_path.iterdir())) == 3 and second.exists()


@pytest.mark.parametrize("kind", ["scores", "json"])
def test_a_shard_of_an_earlier_version_is_believed(tmp_path, caplog, kind):
    add(opened(kind, tmp_path), 0)
    [shard] = tmp_path.iterdir()
    shard.rename(tmp_path / f"shard-00007{shard.suffix}")
    table = opened(kind, tmp_path)
    assert (KEYS[0] if kind == "scores" else KEYS[0].hex()) in table and not caplog.records
    add(table, 1)
    assert [p.name[:11] for p in sorted(tmp_path.iterdir())] == ["shard-00007", "shard-00008"]


def test_two_runs_that_add_to_one_table_keep_the_rows_of_both(tmp_path):
    ours, theirs = ScoreTable(tmp_path, 1), ScoreTable(tmp_path, 1)
    add(ours, 0)
    [first] = tmp_path.iterdir()
    hidden = first.rename(tmp_path / "hidden")  # the other run looked before it was there
    add(theirs, 1)
    hidden.rename(first)
    assert len(ScoreTable(tmp_path, 1)) == 2


def test_a_torn_shard_of_an_earlier_version_is_named(tmp_path):
    (tmp_path / "shard-00000.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match=r"shard-00000\.safetensors: not readable as safetensors"):
        ScoreTable(tmp_path, 1)
