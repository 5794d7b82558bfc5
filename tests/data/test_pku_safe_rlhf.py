"""PKU-SafeRLHF in both schemas; the rows in tests/fixtures were written for this test, none is from the data set."""

import json
from collections import Counter
from pathlib import Path

import pytest

from prmd.config.shared import PkuSafeRlhfConfig
from prmd.data.collection import RawFile
from prmd.data.pku_safe_rlhf import pku_pairs
from prmd.errors import ConfigError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "pku_current_schema.jsonl"
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "pku-saferlhf"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build(rows, honest="deception_categories", split=None):
    file = RawFile("pku_safe_rlhf", "rows", split, Path("rows.jsonl"), rows)
    return pku_pairs([file], PkuSafeRlhfConfig(honest=honest))


def by_objective(collection):
    pairs = {}
    for item in collection.pairs:
        pairs.setdefault(item.pair.objective, []).append(item.pair)
    return pairs


def test_labels_decide_helpful_and_harmless():
    rows = lines(FIXTURE)
    pairs = by_objective(build(rows))
    usable = [row for row in rows if row["response_0"].strip() and row["response_0"] != row["response_1"]]
    assert len(usable) == 7
    for objective, column in (("helpful", "better_response_id"), ("harmless", "safer_response_id")):
        assert [p.chosen for p in pairs[objective]] == [row[f"response_{row[column]}"] for row in usable]
        assert [p.rejected for p in pairs[objective]] == [
            row[f"response_{1 - row[column]}"] for row in usable
        ]
        assert [p.first_turn for p in pairs[objective]] == [row["prompt"] for row in usable]


def test_honest_by_deception_categories_wants_exactly_one_deceptive_response():
    pairs = by_objective(build(lines(FIXTURE)))["honest"]
    # rows 1-3: one category each; row 4 is flagged for an insult, row 6 on both sides
    assert [(p.source, p.chosen.split()[0]) for p in pairs] == [
        ("pku_safe_rlhf/rows:1", "Explain"),
        ("pku_safe_rlhf/rows:2", "List"),
        ("pku_safe_rlhf/rows:3", "Let"),
    ]


def test_honest_by_better_response_and_from_truthfulqa():
    better = by_objective(build(lines(FIXTURE), honest="better_response"))
    assert [p.chosen for p in better["honest"]] == [p.chosen for p in better["helpful"]]
    assert {p.id for p in better["honest"]}.isdisjoint(p.id for p in better["helpful"])
    assert "honest" not in by_objective(build(lines(FIXTURE), honest="truthfulqa"))


def test_unusable_rows_and_checksums_are_counted():
    rows = lines(FIXTURE)
    rows += [{**rows[0], "better_response_id": None}, {**rows[0], "safer_response_id": 2}, {"prompt": "p"}]
    rows += [{**rows[0], "prompt": " "}]
    collection = build(rows, split="test")
    reasons = {
        "identical_responses": 1,
        "empty_response": 1,
        "malformed": 1,
        "unknown_label": 2,
        "empty_prompt": 1,
    }
    assert Counter(q["reason"] for q in collection.quarantine) == reasons
    assert collection.counts["pku_sha256_mismatches"] == 1
    assert {item.upstream_split for item in collection.pairs} == {"test"}


def test_seven_columns_have_no_categories_and_name_the_choices_left():
    columns = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
    columns += ("better_response_id", "safer_response_id")
    rows = [{name: row[name] for name in columns} for row in lines(FIXTURE)]
    with pytest.raises(ConfigError, match=r"data\.pku_safe_rlhf\.honest: .*better_response or truthfulqa"):
        build(rows)
    assert len(by_objective(build(rows, honest="truthfulqa"))["helpful"]) == 7


@pytest.mark.skipif(not REAL.is_dir(), reason="no local PKU-SafeRLHF rows beside the project")
def test_real_rows_of_both_schemas():
    seven = json.loads((REAL / "v0_schema_32rows.json").read_text(encoding="utf-8"))
    assert {k: len(v) for k, v in by_objective(build(seven, honest="truthfulqa")).items()} == {
        "helpful": 32,
        "harmless": 32,
    }
    with pytest.raises(ConfigError, match="rows:1"):
        build(seven)
    current = lines(REAL / "current_schema_3rows.jsonl")
    collection = build(current)
    assert len(by_objective(collection)["harmless"]) == 3 and not collection.quarantine
    assert collection.counts["pku_sha256_mismatches"] == 0
