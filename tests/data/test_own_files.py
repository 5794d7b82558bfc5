"""`data.approach: own_pairs`, stage 1: files as people have them to splits, every row accounted for, and what is refused."""

import csv
import gzip
import json
from collections import Counter

import pyarrow as pa
import pytest
from pyarrow import parquet

from prmd.artifacts.paths import CONFIG_DIR, ArtifactPaths
from prmd.config.loading import load_pipeline
from prmd.config.shared import RewardModelConfig
from prmd.data import prepare, readers
from prmd.data.own.scored import as_score, preferred
from prmd.data.prepare import download_dataset, split_objectives
from prmd.data.raw import _identity
from prmd.errors import ConfigError, DataError
from prmd.objectives import SPLITS
from prmd.pairs import read_pairs
from prmd.report.artifact_sections import data_section

SPLIT_FRACTIONS = {"val_fraction": 0.2, "test_fraction": 0.2, "judge_fraction": 0.2}


@pytest.fixture(autouse=True)
def no_summary(monkeypatch):
    """Figures are slow and not looked at here."""
    monkeypatch.setattr(prepare, "write_summary", lambda *_, **__: [])


def rows(word, n=40):
    words = ("river", "bread", "engine", "violin", "garden", "winter", "market", "planet")
    return [
        {
            "prompt": f"{word}: say {words[i % 8]} {words[i // 8]} {i}?",
            "chosen": f"good {word} {i}",
            "rejected": f"bad {word} {i}",
        }
        for i in range(n)
    ]


def write_jsonl(path, values):
    path.write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
    return path


def config_of(root, objectives=None, scored=None):
    own = {"objectives": objectives or {}, **({"scored": scored} if scored else {})}
    data = {"approach": "own_pairs", "own_pairs": own, "splits": SPLIT_FRACTIONS}
    return RewardModelConfig.model_validate({"artifact_root": str(root), "data": data})


def own_config(root, polite, **settings):
    """`concise` from a file that is in order, `polite` as given."""
    write_jsonl(root / "concise.jsonl", rows("concise"))
    return config_of(
        root,
        {"concise": {"path": str(root / "concise.jsonl")}, "polite": {"path": str(polite), **settings}},
    )


def prepared(config):
    download_dataset(config)
    return split_objectives(config)


def all_pairs(config, objective):
    return [pair for split in SPLITS for pair in read_pairs(config.paths, objective, split)]


# ------------------------------------------------------------------ files
def as_jsonl(path, values):
    return write_jsonl(path / "p.jsonl", values)


def as_json(path, values):
    (path / "p.json").write_text(json.dumps(values), encoding="utf-8")
    return path / "p.json"


def as_csv(path, values):
    with (path / "p.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(values[0]))
        writer.writeheader()
        writer.writerows(values)
    return path / "p.csv"


def as_parquet(path, values):
    parquet.write_table(pa.Table.from_pylist(values), path / "p.parquet")
    return path / "p.parquet"


def as_folder(path, values):
    folder = path / "folder"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", values[:15])
    as_csv(folder, values[15:])
    (folder / "README.md").write_text("not a table", encoding="utf-8")
    return folder


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("write", [as_jsonl, as_json, as_csv, as_parquet, as_folder])
def test_every_kind_of_file_gives_the_same_pairs(write, zipped, tmp_path):
    path = write(tmp_path, rows("polite"))
    for file in [*([path] if path.is_file() else path.iterdir())] if zipped else ():
        if file.suffix != ".md":
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    config = own_config(tmp_path, path if path.exists() else path.with_name(f"{path.name}.gz"))
    prepared(config)
    found = {(p.first_turn, p.chosen, p.rejected) for p in all_pairs(config, "polite")}
    assert found == {(r["prompt"], r["chosen"], r["rejected"]) for r in rows("polite")}


@pytest.mark.parametrize(
    ("names", "stored"),
    [
        (("part.0.jsonl", "part.1.jsonl"), {"polite-part.jsonl", "polite-part_2.jsonl"}),
        (("höflich.jsonl", "hüflich.jsonl"), {"polite-h--flich.jsonl", "polite-h--flich_2.jsonl"}),
        (("一.jsonl", "二.jsonl"), {"polite.jsonl", "polite---_2.jsonl"}),
    ],
)
def test_files_of_a_folder_that_would_be_stored_under_one_name_are_all_read(names, stored, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / names[0], rows("polite")[:15])
    write_jsonl(folder / names[1], rows("polite")[15:])
    config = own_config(tmp_path, folder)
    prepared(config)
    assert {p.first_turn for p in all_pairs(config, "polite")} == {r["prompt"] for r in rows("polite")}
    kept = {path.name for path in config.paths.raw("own_pairs").glob("polite*.jsonl")}
    assert kept == stored


def test_a_spreadsheet_writes_a_mark_line_ends_and_empty_columns_that_do_no_harm(tmp_path):
    lines = [f"{r['prompt']},{r['chosen']},{r['rejected']},," for r in rows("polite")]
    text = "\r\n".join(["prompt,chosen,rejected,,", *lines, ",,,,", ""])
    (tmp_path / "p.csv").write_bytes(text.encode("utf-8-sig"))
    config = own_config(tmp_path, tmp_path / "p.csv")
    stats = json.loads((prepared(config) / "stats.json").read_text(encoding="utf-8"))
    assert len(all_pairs(config, "polite")) == 40 and stats["quarantined"] == {"empty_response": 1}


def test_messages_in_a_csv_cell_are_messages(tmp_path):
    values = [
        {
            "chosen": json.dumps(
                [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}]
            ),
            "rejected": json.dumps(
                [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["rejected"]}]
            ),
        }
        for r in rows("polite")
    ]
    config = own_config(tmp_path, as_csv(tmp_path, values))
    prepared(config)
    assert {p.chosen for p in all_pairs(config, "polite")} == {r["chosen"] for r in rows("polite")}


def test_columns_are_mapped_and_ids_and_sources_kept(tmp_path):
    values = [
        {"ask": r["prompt"], "win": r["chosen"], "lose": r["rejected"], "id": f"n{i}", "key": i, "from": "me"}
        for i, r in enumerate(rows("polite"))
    ]
    columns = {"prompt": "ask", "chosen": "win", "rejected": "lose", "source": "from"}
    config = own_config(tmp_path, as_parquet(tmp_path, values), columns=columns)
    prepared(config)
    pairs = all_pairs(config, "polite")
    assert {p.id for p in pairs} == {f"n{i}" for i in range(40)} and {p.source for p in pairs} == {"me"}
    made = all_pairs(config, "concise")
    assert all(p.id.startswith("concise-") for p in made)
    assert {p.source for p in made} == {f"own_pairs/concise:{i + 1}" for i in range(40)}


def test_an_id_of_two_objectives_is_made_unique(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [r | {"id": f"n{i}"} for i, r in enumerate(rows("concise"))])
    write_jsonl(tmp_path / "b.jsonl", [r | {"id": f"n{i}"} for i, r in enumerate(rows("polite"))])
    config = config_of(
        tmp_path, {k: {"path": str(tmp_path / f)} for k, f in (("concise", "a.jsonl"), ("polite", "b.jsonl"))}
    )
    prepared(config)
    assert {p.id for p in all_pairs(config, "polite")} == {f"polite-n{i}" for i in range(40)}


def test_a_hub_data_set_is_read_at_its_revision_and_split(tmp_path, monkeypatch):
    asked = []

    def load(key, path, revision, name, subset):
        asked.append((key, path, revision))
        return {"train": [], "train_prefs": rows("polite")}

    monkeypatch.setattr(readers, "_load", load)
    config = own_config(tmp_path, "me/prefs", revision="abc", split="train_prefs")
    prepared(config)
    assert len(all_pairs(config, "polite")) == 40
    assert asked == [("data.own_pairs.objectives.polite.path", "me/prefs", "abc")]
    with pytest.raises(ConfigError, match=r"polite\.revision: got none, wanted the commit of me/prefs"):
        download_dataset(own_config(tmp_path, "me/prefs"))
    said = r"^data\.own_pairs\.objectives\.polite\.split: me/prefs@abc has no split 'test' \(it has train, train_prefs\)"
    with pytest.raises(ConfigError, match=said):
        download_dataset(own_config(tmp_path, "me/prefs", revision="abc", split="test"))


@pytest.fixture
def two_configurations(monkeypatch):
    """A data set on the hub with two of them, as `datasets` loads it."""

    def load_dataset(path, name=None, *, data_dir, revision):
        sets = {"polite": rows("polite"), "gruff": rows("garrulous")}
        if name is None:
            raise ValueError(
                f"Config name is missing.\nPlease pick one among the available configs: {[*sets]}"
            )
        if name not in sets:
            raise ValueError(f"BuilderConfig {name!r} not found. Available: {[*sets]}")
        return {"train": sets[name]}

    readers._load.cache_clear()
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    yield
    readers._load.cache_clear()


def test_one_of_the_configurations_of_a_hub_data_set_is_read_by_name(tmp_path, two_configurations):
    config = own_config(tmp_path, "me/prefs", revision="abc", name="polite")
    prepared(config)
    assert {p.chosen for p in all_pairs(config, "polite")} == {row["chosen"] for row in rows("polite")}
    other = own_config(tmp_path, "me/prefs", revision="abc", name="gruff")
    with pytest.raises(DataError, match="the configuration says"):
        split_objectives(other)
    prepared(other)
    assert {p.chosen for p in all_pairs(other, "polite")} == {row["chosen"] for row in rows("garrulous")}


@pytest.mark.parametrize("given", [{}, {"name": "kind"}])
def test_a_hub_data_set_without_such_a_configuration_says_which_it_has(given, tmp_path, two_configurations):
    with pytest.raises(ConfigError) as said:
        download_dataset(own_config(tmp_path, "me/prefs", revision="abc", **given))
    got = given.get("name", "none")
    wanted = f"data.own_pairs.objectives.polite.name: got {got}, wanted a configuration of me/prefs@abc ("
    assert str(said.value).startswith(wanted) and str(said.value).endswith("['polite', 'gruff'])")


@pytest.mark.parametrize("name", ["p.jsonl", "."])
def test_a_configuration_of_files_that_are_here_is_refused(name, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", rows("polite"))
    with pytest.raises(
        ConfigError, match=r"^data\.own_pairs\.objectives\.polite\.name: got x, .*is here; leave it out$"
    ):
        download_dataset(own_config(tmp_path, tmp_path / name, name="x"))


def test_without_a_name_nothing_that_was_finished_changes(tmp_path):
    config = own_config(tmp_path, tmp_path / "p.jsonl")
    (concise, polite) = config.model_dump(mode="json")["data"]["own_pairs"]["objectives"].values()
    assert list(polite) == list(concise) == ["path", "revision", "split", "columns"]
    identity = _identity("own_pairs", config.data)
    assert identity["named"]["polite"] == [str(tmp_path / "p.jsonl"), None, "train", {"columns": {}}]
    named = own_config(tmp_path, "me/prefs", revision="abc", name="x").data
    assert named.model_dump()["own_pairs"]["objectives"]["polite"]["name"] == "x"
    assert _identity("own_pairs", named)["named"]["polite"] == [
        "me/prefs",
        "abc",
        "train",
        {"columns": {}},
        "x",
    ]


# ------------------------------------------------------------------ every row
def test_what_became_of_every_row_is_counted_logged_and_reported(tmp_path, caplog):
    caplog.set_level("INFO", logger="prmd")
    good = rows("polite")
    bad = [good[0] | {"chosen": ""}, good[1] | {"rejected": good[1]["chosen"]}, good[2] | {"chosen": None}]
    config = own_config(tmp_path, write_jsonl(tmp_path / "p.jsonl", [*good, *bad, good[3]]))
    stats = json.loads((prepared(config) / "stats.json").read_text(encoding="utf-8"))
    row = stats["rows"]["polite"]
    assert row["read"] == 44
    assert row["refused"] == {"empty_response": 2, "identical_responses": 1}
    assert row["left_out"] == {"repeated_pair": 1} and sum(row["kept"].values()) == 40
    assert row["kept"] == stats["sizes"]["polite"]
    line = next(text for text in caplog.messages if text.split()[:1] == ["polite"])
    assert line.split()[1:4] == ["44", "3", "1"]
    assert "polite: empty_response 2, identical_responses 1, repeated_pair 1" in caplog.messages
    table = data_section(config.paths)["rows"]
    assert table.rows[1][:4] == (
        "polite",
        "44",
        "3 (empty_response 2, identical_responses 1)",
        "1 (repeated_pair 1)",
    )


def test_small_data_say_what_can_be_told(tmp_path):
    config = own_config(tmp_path, write_jsonl(tmp_path / "p.jsonl", rows("polite", 64)))
    stats = json.loads((prepared(config) / "stats.json").read_text(encoding="utf-8"))
    n = stats["sizes"]["polite"]["test"]
    half = 100 * 1.96 * (0.25 / n) ** 0.5
    assert (
        f"on {n} test pairs an accuracy is known to about ±{half:.0f} percentage points"
        in (stats["can_be_told"]["polite"])
    )
    assert data_section(config.paths)["told"][1].startswith("polite: on ")


def test_no_training_pair_names_counts_and_the_reason(tmp_path, caplog):
    values = [r | {"prompt": "Always the same?"} for r in rows("polite")]
    with pytest.raises(DataError, match="no training pair is left for polite") as refused:
        # the one prompt of polite falls into one split: try words until that is not train
        for word in ("same", "one", "only", "single", "this", "that"):
            values = [r | {"prompt": f"Always {word}?"} for r in values]
            prepared(own_config(tmp_path, write_jsonl(tmp_path / "p.jsonl", values)))
    assert "kept of polite: train 0" in str(refused.value) and "\n" not in str(refused.value)
    assert "all 40 pairs have one prompt" in caplog.text


# ------------------------------------------------------------------ scored responses
def scored_row(i, **changes):
    row = {
        "prompt": rows("scored")[i]["prompt"],
        "responses": [f"a{i}", f"b{i}", f"c{i}"],
        "helpfulness": [1, 5, 3],
        "honesty": [2, 2, 4],
    }
    return row | changes


SCORES = {"helpful": "helpfulness", "honest": "honesty"}


def test_scores_make_pairs_for_each_objective_and_ties_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", [scored_row(i) for i in range(40)])
    columns = {"response": "responses"}
    config = config_of(tmp_path, scored={"path": str(path), "scores": SCORES, "columns": columns})
    assert config.paths.objectives == ("helpful", "honest")
    stats = json.loads((prepared(config) / "stats.json").read_text(encoding="utf-8"))
    helpful = {(p.chosen[0], p.rejected[0]) for p in all_pairs(config, "helpful")}
    assert helpful == {("b", "a"), ("c", "a"), ("b", "c")}
    assert {(p.chosen[0], p.rejected[0]) for p in all_pairs(config, "honest")} == {("c", "a"), ("c", "b")}
    assert stats["rows"]["helpful"]["read"] == stats["rows"]["honest"]["read"] == 120
    assert stats["rows"]["honest"]["left_out"]["tied_scores"] == 40
    assert sum(stats["rows"]["honest"]["kept"].values()) == 80


def test_a_least_difference_and_pairs_a_prompt(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", [scored_row(i) for i in range(40)])
    scored = {"path": str(path), "scores": SCORES, "columns": {"response": "responses"}}
    config = config_of(tmp_path, scored=scored | {"pairs_per_prompt": 1, "least_difference": 2.0})
    stats = json.loads((prepared(config) / "stats.json").read_text(encoding="utf-8"))
    assert Counter(p.first_turn for p in all_pairs(config, "helpful")).most_common(1)[0][1] == 1
    assert stats["rows"]["helpful"]["left_out"]["over_pairs_per_prompt"] == 80
    config = config_of(
        tmp_path, scored=scored | {"least_difference": 3.0} | {"scores": {"x": "helpfulness", **SCORES}}
    )
    with pytest.raises(
        DataError, match=r"honest has 0 pairs of 120 rows \(tied_scores 40, below_least_difference 80\)"
    ):
        prepared(config)


def test_a_row_for_each_response_is_brought_together_by_prompt(tmp_path):
    values = [
        {"prompt": scored_row(i)["prompt"], "response": f"{r}{i}", "helpfulness": h, "honesty": o}
        for r, h, o in (("a", 1, "2"), ("b", 5, "N/A"), ("c", 3, 4))
        for i in range(40)
    ]
    path = write_jsonl(tmp_path / "s.jsonl", values)
    config = config_of(tmp_path, scored={"path": str(path), "scores": SCORES})
    prepared(config)
    assert {(p.chosen[0], p.rejected[0]) for p in all_pairs(config, "honest")} == {("c", "a")}
    assert len(all_pairs(config, "helpful")) == 120


def completion(response, *, helpfulness, honesty, truthfulness, instruction):
    """As in openbmb/UltraFeedback: ratings are texts, and the rationale of two aspects is about the rating."""
    ratings = {
        "helpfulness": helpfulness,
        "honesty": honesty,
        "truthfulness": truthfulness,
        "instruction_following": instruction,
    }
    two = {"Type": ["1"], "Rationale": "...", "Rationale For Rating": "..."}
    return {
        "annotations": {
            k: {"Rating": v, **(two if k in ("helpfulness", "truthfulness") else {"Rationale": "..."})}
            for k, v in ratings.items()
        },
        "custom_system_prompt": "As an AI assistant, ...",
        "model": "alpaca-7b",
        "principle": "helpfulness",
        "response": response,
        "critique": "...",
        "overall_score": 7.5,
        "fine-grained_score": 4.25,
    }


def ultrafeedback_row(i):
    return {
        "source": "evol_instruct",
        "instruction": rows("ultra")[i]["prompt"],
        "models": ["alpaca-7b", "ultralm-13b"],
        "completions": [
            completion(f"a{i}", helpfulness="5", honesty="N/A", truthfulness="3", instruction="2"),
            completion(f"b{i}", helpfulness="1", honesty="4", truthfulness="5", instruction="4"),
            completion(f"c{i}", helpfulness="1", honesty="5", truthfulness="3", instruction="3"),
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def test_ultrafeedback_by_name_gives_its_four_aspects(tmp_path):
    path = write_jsonl(tmp_path / "u.jsonl", [ultrafeedback_row(i) for i in range(40)])
    config = config_of(tmp_path, scored={"path": str(path), "preset": "ultrafeedback"})
    assert config.paths.objectives == ("helpful", "honest", "truthful", "instruction_following")
    prepared(config)
    preferences = {
        k: {(p.chosen[0], p.rejected[0]) for p in all_pairs(config, k)} for k in config.paths.objectives
    }
    assert preferences == {
        "helpful": {("a", "b"), ("a", "c")},
        "honest": {("c", "b")},
        "truthful": {("b", "a"), ("b", "c")},
        "instruction_following": {("b", "a"), ("b", "c"), ("c", "a")},
    }
    path = as_parquet(tmp_path, [ultrafeedback_row(i) for i in range(40)])
    two = {"helpful": "helpfulness", "honest": "honesty"}
    config = config_of(tmp_path / "two", scored={"path": str(path), "preset": "ultrafeedback", "scores": two})
    prepared(config)
    assert config.paths.objectives == ("helpful", "honest") and len(all_pairs(config, "helpful")) == 80


def test_preferred_keeps_the_same_pairs_whatever_the_order_of_asking():
    kept, left_out = preferred("p", [1.0, None, 3.0, 2.0, 3.0], least_difference=1.5, at_most=1)
    assert kept in ([(2, 0)], [(4, 0)])
    assert left_out == {
        "no_score": 4,
        "tied_scores": 1,
        "below_least_difference": 3,
        "over_pairs_per_prompt": 1,
    }
    assert preferred("p", [1.0, None, 3.0, 2.0, 3.0], least_difference=1.5, at_most=1)[0] == kept
    assert [as_score(v) for v in ("4", " 2.5", 3, "N/A", None, True, float("nan"), [1])] == [
        4.0,
        2.5,
        3.0,
        None,
        None,
        None,
        None,
        None,
    ]


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (
            lambda r, i: {"q": r["prompt"], "win": "a", "lose": "b"},
            {},
            "no column 'chosen' for chosen; it has q, win, lose",
        ),
        (
            lambda r, i: r,
            {"columns": {"prompt": "ask"}},
            "no column 'ask' for prompt; it has prompt, chosen, rejected",
        ),
        (lambda r, i: r | {"id": i}, {}, r"polite \(.*p.jsonl\): row 1: id is 0, wanted text"),
        (lambda r, i: r | {"id": "one"}, {}, "the id 'one' is that of two pairs of polite"),
        (
            lambda r, i: r if i < 7 else {k: [{"role": "user", "content": "a"}] for k in r},
            {},
            "prompt is messages in row 8 and text in row 1; one format a file",
        ),
        (
            lambda r, i: r if i < 12 else r | {"chosen": " "},
            {},
            r"polite has 12 pairs of 40 rows \(empty_response 28\)",
        ),
        (lambda r, i: rows("concise")[i], {}, "concise and polite have the same 40 pairs"),
        (
            lambda r, i: rows("concise")[i] | {"id": f"n{i}", "weight": i + 1},
            {},
            "concise and polite have the same 40 pairs",
        ),
        (
            lambda r, i: rows("polite")[i % 2] | {"id": f"n{i}"},
            {},
            r"polite has 2 pairs of 40 rows \(repeated_pair 38\)",
        ),
    ],
)
def test_bad_files_are_one_line_before_anything_is_written(change, settings, said, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [change(r, i) for i, r in enumerate(rows("polite"))])
    with pytest.raises(DataError, match=said) as refused:
        prepared(own_config(tmp_path, path, **settings))
    assert "\n" not in str(refused.value)
    assert not ArtifactPaths(tmp_path, "own_pairs").processed.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"honesty": [3, 3, 3]}, r"all scores are 3 in 'honesty' \(honest\)"),
        ({"honesty": ["N/A", "", None]}, r"no score is a number in 'honesty' \(honest\)"),
        ({"honesty": [1, 2]}, r"row 1: 'honesty' holds \[1, 2\], wanted a list of 3 scores"),
    ],
)
def test_scores_that_prefer_nothing_are_one_line(change, said, tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", [scored_row(i, **change) for i in range(40)])
    scored = {"path": str(path), "scores": SCORES, "columns": {"response": "responses"}}
    with pytest.raises(DataError, match=said):
        prepared(config_of(tmp_path, scored=scored))


def test_a_file_of_equal_scores_among_others_is_read(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [scored_row(i) for i in range(30)])
    write_jsonl(folder / "b.jsonl", [scored_row(i, honesty=[3, 3, 3]) for i in range(30, 40)])
    scored = {"path": str(folder), "scores": SCORES, "columns": {"response": "responses"}}
    config = config_of(tmp_path, scored=scored)
    stats = json.loads((prepared(config) / "stats.json").read_text(encoding="utf-8"))
    assert stats["rows"]["honest"]["left_out"]["tied_scores"] == 30 + 3 * 10


def test_an_id_or_source_of_blanks_is_none(tmp_path):
    values = [r | {"id": "  ", "source": " "} for r in rows("polite")]
    config = own_config(tmp_path, write_jsonl(tmp_path / "p.jsonl", values))
    prepared(config)
    pairs = all_pairs(config, "polite")
    assert all(p.id.startswith("polite-") and p.source.startswith("own_pairs/polite:") for p in pairs)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "a", "got .txt, wanted .jsonl"),
        ("p.csv", "chosen,rejected\na\n", "row 1 has more or fewer cells"),
        ("p.csv", 'chosen,rejected\n"a', "not readable as UTF-8 CSV"),
        (
            "p.csv",
            "\ufeffprompt;chosen;rejected\r\na, b;c, d, e;f\r\n",
            r"p.csv: its cells are separated by ';', wanted commas",
        ),
        ("p.csv", "sep=;\nprompt;chosen\n", "its cells are separated by ';'"),
        ("p.csv", "prompt\tchosen\na\tb\n", r"its cells are separated by '\\t'"),
        ("p.csv", "prompt,chosen,rejected,chosen\na,b,c,d\n", "the header names 'chosen' twice"),
        ("p.parquet", "a", "not readable as parquet"),
        ("p.jsonl", "{", "p.jsonl:1: not JSON"),
        ("p.jsonl", "", "polite has 0 pairs of 0 rows"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, content, said, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        prepared(own_config(tmp_path, tmp_path / name))


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "folder"])
def test_an_objective_without_a_row_is_refused_at_the_download(name, tmp_path):
    (tmp_path / "folder").mkdir()
    header = "prompt,chosen,rejected\n"
    for file, text in (("p.jsonl", ""), ("p.csv", header), ("folder/a.csv", header), ("folder/b.json", "[]")):
        (tmp_path / file).write_text(text, encoding="utf-8")
    config = own_config(tmp_path, tmp_path / name)
    for _ in range(2):  # also where the empty file was kept
        with pytest.raises(DataError) as said:
            download_dataset(config)
        place = f"data.own_pairs.objectives.polite.path: {tmp_path / name} holds no row"
        assert str(said.value).startswith(place) and "\n" not in str(said.value)


def test_an_empty_file_beside_others_of_its_objective_is_no_mistake(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_text("", encoding="utf-8")
    write_jsonl(tmp_path / "folder" / "b.jsonl", rows("polite"))
    config = own_config(tmp_path, tmp_path / "folder")
    prepared(config)
    assert len(all_pairs(config, "polite")) == 40


def test_a_scored_file_without_a_row_is_refused_at_the_download(tmp_path):
    concise, scored = (
        write_jsonl(tmp_path / "c.jsonl", rows("concise")),
        write_jsonl(tmp_path / "s.jsonl", []),
    )
    config = config_of(
        tmp_path, {"concise": {"path": str(concise)}}, scored={"path": str(scored), "scores": SCORES}
    )
    with pytest.raises(
        DataError, match=r"^data\.own_pairs\.scored\.path: .*s\.jsonl holds no row, so \w+ has 0"
    ):
        download_dataset(config)


def test_an_empty_folder_and_a_lost_path_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"objectives\.polite\.path: .*empty holds no \.jsonl"):
        download_dataset(own_config(tmp_path, tmp_path / "empty"))
    with pytest.raises(
        ConfigError, match=r"objectives\.polite\.path: .*lost\.jsonl.* neither an existing file or folder"
    ):
        download_dataset(own_config(tmp_path, tmp_path / "lost.jsonl"))


@pytest.mark.parametrize("name", ["lost.jsonl", "lost.CSV", "folder/lost.parquet.gz"])
def test_a_lost_file_beside_the_command_is_no_hub_id(name, tmp_path):
    with pytest.raises(
        ConfigError, match=rf"polite\.path: got {name}, wanted a file; .*{name} is not there"
    ) as said:
        download_dataset(own_config(tmp_path, name))
    assert "hub" not in str(said.value)


def test_the_shipped_example_prepares_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = [f"artifact_root={tmp_path.as_posix()}"]
    config = load_pipeline(CONFIG_DIR / "own_pairs", overrides)[RewardModelConfig]
    assert config.paths.objectives == ("helpful", "honest")
    stats = json.loads((prepared(config) / "stats.json").read_text(encoding="utf-8"))
    for row in stats["rows"].values():
        assert row["read"] == 224 == sum(sum(row[key].values()) for key in ("refused", "left_out", "kept"))
        assert all(row["kept"].values()) and not row["refused"]
    split_objectives(config)  # current: reused
    download_dataset(config)
    with pytest.raises(DataError, match="was downloaded with"):
        changed = load_pipeline(
            CONFIG_DIR / "own_pairs", [*overrides, "data.own_pairs.objectives.honest.columns={id: null}"]
        )
        split_objectives(changed[RewardModelConfig])


# ------------------------------------------------------------------ columns that hold rewards
def with_rewards(config, rewards):
    own = config.data.own_pairs.model_dump() | {"rewards": rewards, "allow_code": True}
    values = config.model_dump() | {
        "data": config.data.model_dump() | {"own_pairs": own},
        "calibration": {"source": "validation_responses"},
    }
    return RewardModelConfig.model_validate(values)


def test_rewards_in_columns_come_with_every_pair_and_change_nothing_else(tmp_path):
    plain = own_config(tmp_path, write_jsonl(tmp_path / "polite.jsonl", rows("polite")))
    prepared(plain)
    before = {(k, s): plain.paths.split(k, s).read_bytes() for k in ("concise", "polite") for s in SPLITS}
    assert b"rewards" not in before["polite", "train"]
    scored = [row | {"up": i / 3, "down": f"-{i}"} for i, row in enumerate(rows("polite"))]
    write_jsonl(tmp_path / "polite.jsonl", scored)
    write_jsonl(
        tmp_path / "concise.jsonl", [row | {"up": 1, "down": 2.5, "more": "x"} for row in rows("concise")]
    )
    config = with_rewards(plain, {"polite": {"column_chosen": "up", "column_rejected": "down"}})
    prepared(config)
    for objective in ("concise", "polite"):
        for pair in all_pairs(config, objective):
            i = int(pair.chosen.split()[-1])
            assert list(pair.rewards["polite"]) == (
                [i / 3, -float(i)] if objective == "polite" else [1.0, 2.5]
            )
    for (objective, split), content in before.items():
        lines = config.paths.split(objective, split).read_text(encoding="utf-8").splitlines()
        bare = [{k: v for k, v in json.loads(line).items() if k != "rewards"} for line in lines]
        assert bare == [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize("value", [None, "N/A", "", float("nan"), True])
def test_a_pair_without_its_reward_is_refused_with_the_counts(tmp_path, value):
    polite = [row | {"up": 1.0, "down": 0.0} for row in rows("polite")]
    concise = [
        row | {"up": 1.0, "down": value if i in (3, 9) else 0.0} for i, row in enumerate(rows("concise"))
    ]
    plain = own_config(tmp_path, write_jsonl(tmp_path / "polite.jsonl", polite))
    write_jsonl(tmp_path / "concise.jsonl", concise)
    config = with_rewards(plain, {"polite": {"column_chosen": "up", "column_rejected": "down"}})
    with pytest.raises(
        DataError, match=r"objectives\.concise .*: 2 of 40 pairs have no number in 'up' or 'down'.*:4\)"
    ):
        prepared(config)


def test_a_file_without_the_columns_is_refused(tmp_path):
    polite = [row | {"up": 1.0, "down": 0.0} for row in rows("polite")]
    plain = own_config(tmp_path, write_jsonl(tmp_path / "polite.jsonl", polite))
    config = with_rewards(plain, {"polite": {"column_chosen": "up", "column_rejected": "down"}})
    with pytest.raises(DataError, match=r"concise\.jsonl: no column 'up' for the rewards of polite"):
        prepared(config)


def test_a_function_prepares_no_data_anew(tmp_path):
    plain = own_config(tmp_path, write_jsonl(tmp_path / "polite.jsonl", rows("polite")))
    folder = prepared(plain)
    record = (folder / "run.json").read_bytes()
    prepared(with_rewards(plain, {"polite": {"function": "my_rewards.py:polite"}}))
    assert (folder / "run.json").read_bytes() == record
