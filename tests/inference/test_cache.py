"""Tables of scores and samples: keys, shards that are whole or absent, what is refused."""

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
    assert [p.name for p in sorted((tmp_path / "t").iterdir())] == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]


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
