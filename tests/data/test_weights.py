"""Weights of pairs in stage 1: which column they come from, what is refused, and the mean that they are brought to."""

import csv
import json
import re

import pyarrow as pa
import pytest
from pyarrow import parquet

from prmd.artifacts import io
from prmd.config.shared import RewardModelConfig
from prmd.data import prepare
from prmd.data.prepare import download_dataset, split_objectives
from prmd.data.weights import describe_weights, with_mean_one
from prmd.errors import DataError
from prmd.objectives import SPLITS
from prmd.pairs import PreferencePair, read_pairs

WORDS = ("river", "bread", "engine", "violin", "garden", "winter", "market", "planet")


@pytest.fixture(autouse=True)
def no_summary(monkeypatch):
    """Figures are slow and not looked at here."""
    monkeypatch.setattr(prepare, "write_summary", lambda *_, **__: [])


def rows(word, n=40):
    return [
        {
            "prompt": f"{word}: say {WORDS[i % 8]} {WORDS[i // 8]} {i}?",
            "chosen": f"good {word} {i}",
            "rejected": f"bad {word} {i}",
        }
        for i in range(n)
    ]


def given(i):
    """A weight for row i, from 0.5 to 8."""
    return 0.5 * 2.0 ** (i % 5)


def weighted(word="polite", name="agreement"):
    return [row | {name: given(i)} for i, row in enumerate(rows(word))]


def config_of(root, values, **settings):
    """`concise` without weights, and `polite` of these rows or of the file or folder at this path."""
    root.mkdir(exist_ok=True)
    io.write_jsonl(root / "concise.jsonl", rows("concise"))
    path = io.write_jsonl(root / "polite.jsonl", values) if isinstance(values, list) else values
    objectives = {"concise": {"path": str(root / "concise.jsonl")}, "polite": {"path": str(path), **settings}}
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2, "judge_fraction": 0.2}
    data = {"approach": "own_pairs", "own_pairs": {"objectives": objectives}, "splits": fractions}
    return RewardModelConfig.model_validate({"artifact_root": str(root / "out"), "data": data})


def prepared(config):
    download_dataset(config)
    folder = split_objectives(config)
    return {k: {s: read_pairs(config.paths, k, s) for s in SPLITS} for k in config.paths.objectives}, (
        json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    )


AGREEMENT = {"columns": {"weight": "agreement"}}


# ------------------------------------------------------------------ what they become
def test_weights_have_mean_1_over_the_training_pairs_of_their_objective(tmp_path, caplog):
    caplog.set_level("INFO", logger="prmd")
    pairs, stats = prepared(config_of(tmp_path / "a", weighted(), **AGREEMENT))
    place = {row["chosen"]: i for i, row in enumerate(rows("polite"))}
    own = [given(place[pair.chosen]) for pair in pairs["polite"]["train"]]
    mean = sum(own) / len(own)
    for split in SPLITS:
        for pair in pairs["polite"][split]:
            assert pair.weight == pytest.approx(given(place[pair.chosen]) / mean, rel=1e-14)
    trained = [pair.weight for pair in pairs["polite"]["train"]]
    assert sum(trained) / len(trained) == pytest.approx(1.0, abs=1e-14)
    kish = sum(own) ** 2 / sum(w * w for w in own)
    assert stats["weights"] == {
        "polite": {
            "pairs": len(own),
            "mean": pytest.approx(mean),
            "min": min(own),
            "max": max(own),
            "effective_pairs": pytest.approx(kish),
        }
    }
    [line] = [r for r in caplog.records if "weights of" in r.message]
    assert f"they count as about {kish:.0f} pairs" in line.message and line.levelname == "INFO"


def test_an_objective_without_weights_is_byte_for_byte_what_it_was(tmp_path):
    config, plain = (
        config_of(tmp_path / "a", weighted(), **AGREEMENT),
        config_of(tmp_path / "b", rows("polite")),
    )
    pairs, stats = prepared(config)
    _, without = prepared(plain)
    assert all(pair.weight is None for split in pairs["concise"].values() for pair in split)
    assert "weights" not in without and stats["sizes"] == without["sizes"]
    for split in SPLITS:
        a, b = (c.paths.split("concise", split).read_bytes() for c in (config, plain))
        assert a == b and b"weight" not in a
        a, b = (io.read_jsonl(c.paths.split("polite", split)) for c in (config, plain))
        assert [{k: v for k, v in row.items() if k != "weight"} for row in a] == b


@pytest.mark.parametrize("value", [1, 0.3, 1e308, 5e-324])
def test_equal_weights_are_exactly_1(value, tmp_path):
    pairs, stats = prepared(config_of(tmp_path, [row | {"weight": value} for row in rows("polite")]))
    assert {pair.weight for split in pairs["polite"].values() for pair in split} == {1.0}
    assert stats["weights"]["polite"]["effective_pairs"] == stats["weights"]["polite"]["pairs"]


def test_a_few_heavy_pairs_are_warned_of(tmp_path, caplog):
    caplog.set_level("INFO", logger="prmd")
    values = [row | {"weight": 100 if i % 10 == 0 else 1} for i, row in enumerate(rows("polite"))]
    prepared(config_of(tmp_path, values))
    [line] = [r for r in caplog.records if "weights of" in r.message]
    assert line.levelname == "WARNING" and "less than half" in line.message and "\n" not in line.message


def test_weights_that_differ_by_more_than_a_number_holds_stay_numbers():
    def pair(i, weight):
        return PreferencePair(str(i), ({"role": "user", "content": "q"},), "c", "r", "s", "a", weight)

    splits = {"a": {"train": [pair(0, 1.7e308), pair(1, 1.7e308), pair(2, 1e-300)], "val": []}}
    found = with_mean_one(splits)["a"]
    assert [p.weight for p in found["train"]] == pytest.approx([1.5, 1.5, 0.0]) and found["val"] == []
    assert describe_weights(splits)["weights"]["a"]["effective_pairs"] == pytest.approx(2.0)


# ------------------------------------------------------------------ where they are read
def test_a_column_weight_is_read_unless_it_is_named_otherwise_or_none(tmp_path):
    values = weighted(name="weight")
    read, _ = prepared(config_of(tmp_path / "a", values))
    assert len({pair.weight for pair in read["polite"]["train"]}) == 5
    left, stats = prepared(config_of(tmp_path / "b", values, columns={"weight": None}))
    assert {pair.weight for pair in left["polite"]["train"]} == {None} and "weights" not in stats
    empty, _ = prepared(config_of(tmp_path / "c", [row | {"weight": None} for row in rows("polite")]))
    assert {pair.weight for pair in empty["polite"]["train"]} == {None}


def test_prepared_rows_are_read_with_their_weights(tmp_path):
    config = config_of(tmp_path / "a", weighted(), **AGREEMENT)
    pairs, _ = prepared(config)
    again, _ = prepared(config_of(tmp_path / "b", config.paths.split("polite", "train").parent))
    before = {pair.id: pair.weight for split in pairs["polite"].values() for pair in split}
    after = {pair.id: pair.weight for split in again["polite"].values() for pair in split}
    assert after == pytest.approx(before)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_numbers_are_read_from_text_and_tables(kind, tmp_path):
    values, path = weighted(), tmp_path / f"p.{kind}"
    values[3]["agreement"] = float("nan")
    if kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(values[0]))
            writer.writeheader()
            writer.writerows(values)
    else:
        parquet.write_table(pa.Table.from_pylist(values), path)
    pairs, stats = prepared(config_of(tmp_path / "root", path, **AGREEMENT))
    assert stats["rows"]["polite"]["refused"] == {"weight": 1}
    assert len({pair.weight for split in pairs["polite"].values() for pair in split}) == 5


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("much", "'much'"),
        (None, "None"),
        ("", "''"),
        (-0.5, "-0.5"),
        (True, "True"),
        ([1], r"\[1\]"),
        pytest.param(10**400, "1000", id="huge"),
        ("inf", "'inf'"),
    ],
)
def test_a_row_whose_weight_is_none_is_refused_with_its_place(value, got, tmp_path):
    values = weighted()
    values[6]["agreement"] = value
    config = config_of(tmp_path, values, **AGREEMENT)
    pairs, stats = prepared(config)
    assert stats["rows"]["polite"]["refused"] == {"weight": 1}
    assert sum(map(len, pairs["polite"].values())) == 39
    [refused] = io.read_jsonl(config.paths.processed / "quarantine.jsonl")
    assert refused["reason"] == "weight" and refused["source"] == "own_pairs/polite:7"
    assert "(" in refused["detail"] and "polite.jsonl): row 7: got " in refused["detail"]
    assert refused["detail"].endswith("wanted a finite number above 0 (0 leaves the pair out)")
    assert re.search(got, refused["detail"])


def test_a_weight_of_0_leaves_the_pair_out_and_is_counted(tmp_path):
    values = weighted()
    for i in (0, 9, 17):
        values[i]["agreement"] = 0
    pairs, stats = prepared(config_of(tmp_path, values, **AGREEMENT))
    row = stats["rows"]["polite"]
    assert row["left_out"]["zero_weight"] == 3 and row["refused"] == {}
    assert sum(map(len, pairs["polite"].values())) == 37
    assert row["read"] == sum(sum(row[key].values()) for key in ("refused", "left_out", "kept"))


def test_a_column_that_is_not_there_and_files_without_one_are_one_line(tmp_path):
    with pytest.raises(DataError, match="no column 'agreement' for weight; it has prompt, chosen, rejected"):
        prepared(config_of(tmp_path / "a", rows("polite"), **AGREEMENT))
    folder = tmp_path / "folder"
    folder.mkdir()
    io.write_jsonl(folder / "x.jsonl", weighted(name="weight")[:25])
    io.write_jsonl(folder / "y.jsonl", rows("polite")[25:])
    with pytest.raises(DataError, match="15 pairs are of files without weights") as refused:
        prepared(config_of(tmp_path / "b", folder))
    assert "objectives.polite.path" in str(refused.value) and "\n" not in str(refused.value)
    prepared(config_of(tmp_path / "c", folder, columns={"weight": None}))


@pytest.mark.parametrize(
    "value", [-1, "1", None, True, float("inf"), float("nan"), pytest.param(10**400, id="huge")]
)
def test_a_stored_row_holds_a_number_or_nothing(value):
    pair = PreferencePair("a", ({"role": "user", "content": "q"},), "c", "r", "s", "honest", 0.5)
    row = pair.to_row()
    assert row["weight"] == 0.5 and PreferencePair.from_row(row, objective="honest", where="f:1") == pair
    with pytest.raises(DataError, match=r"train\.jsonl:7: 'weight' must be a finite number, 0 or more, got"):
        PreferencePair.from_row(row | {"weight": value}, objective="honest", where="train.jsonl:7")
