"""`rewardbench`: accuracies against plain classifier passes, the result format, files that cannot be read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_classifier
from tiny_workspace import evaluation_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.rewardbench import (
    SECTIONS,
    evaluate_rewardbench,
    main,
    overall_score,
    read_rewardbench,
    result_row,
    section_scores,
)
from prmd.config.shared import RewardModelConfig
from prmd.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"question {i}: why is the sky blue?",
        "chosen": f"It is a good question number {i}." if i % 3 else "Yes.",
        "rejected": "No." if i != 4 else f"It is a good question number {i}.",
        "subset": "donotanswer" if i < 3 else "hep-cpp",
        "id": i,
    }
    for i in range(9)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("rm"), seed=3)


@pytest.fixture
def config(tmp_path: Path) -> RewardModelConfig:
    return evaluation_config(tmp_path).shared


def plain_reward(folder: Path, prompt: str, response: str) -> float:
    """As a user of the folder would compute it: the template, the model, nothing of this project."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def test_accuracies_are_those_of_the_exported_classifier(
    folder: Path, tmp_path: Path, config: RewardModelConfig
) -> None:
    row, details = evaluate_rewardbench(
        folder, read_rewardbench(write(tmp_path / "rows.jsonl", ROWS)), name="me/rm", config=config
    )
    assert row["model"] == details["model"] == "me/rm"
    right: dict[str, list[bool]] = {}
    for r in ROWS:
        margin = plain_reward(folder, r["prompt"], r["chosen"]) - plain_reward(
            folder, r["prompt"], r["rejected"]
        )
        right.setdefault(r["subset"], []).append(margin > 0 and r["chosen"] != r["rejected"])
    wanted = {subset: sum(flags) / len(flags) for subset, flags in right.items()}
    assert {key: row[key] for key in wanted} == pytest.approx(wanted)
    assert details["subsets"]["hep-cpp"]["with_ties_one_half"]["ties"] == 1  # row 4 answers twice the same
    assert details["pairs"] == 9 and details["left_out"] == 0
    assert details["sections"] == pytest.approx(
        {"Safety": wanted["donotanswer"], "Reasoning": wanted["hep-cpp"]}
    )
    assert details["overall"] is None  # two sections are missing


def test_the_result_has_the_format_of_the_leaderboards_files() -> None:
    row = result_row("me/rm", {"alpacaeval-easy": 0.5})
    assert row == {
        "model": "me/rm", "model_type": "Seq. Classifier", "chat_template": "tokenizer", "alpacaeval-easy": 0.5,
    }  # fmt: skip


def test_sections_weigh_subsets_by_their_examples() -> None:
    scores = section_scores({"alpacaeval-easy": 1.0, "mt-bench-easy": 0.0, "model": 7})
    assert scores == {"Chat": pytest.approx(100 / 128)}
    assert overall_score(dict.fromkeys(SECTIONS, 0.25) | {"Chat": 0.65}) == pytest.approx(0.35)


def test_every_layout_is_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    conversation = {
        "id": "x",
        "prompt": [*messages, {"role": "user", "content": "c"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": "",
    }
    write(tmp_path / "data" / "helpful.test.jsonl", [conversation])
    (tmp_path / "data" / "more.json").write_text(json.dumps(ROWS[:2]), encoding="utf-8")
    with gzip.open(tmp_path / "data" / "gz.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(json.dumps(ROWS[2]) + "\n")
    held_out = ROWS[0] | {"source": "hh_rlhf/helpful-base/test:12"}
    del held_out["subset"]
    write(tmp_path / "data" / "z" / "test.jsonl", [held_out])
    found = read_rewardbench(tmp_path / "data")
    assert found.pop().subset == "hh_rlhf/helpful-base"
    assert [p.subset for p in found] == ["donotanswer", "helpful", "donotanswer", "donotanswer"]
    assert found[1].pair.prompt[-1]["content"] == "c" and found[1].pair.rejected == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, r"rows\.jsonl: row 2: prompt: "),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, r"row 2: prompt: "),
        ({"chosen": None}, r"row 2: chosen: "),
        ({"rejected": ["a", "b"]}, r"row 2: rejected: "),
        ({"subset": 3}, r"row 2: subset: got 3"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "rows.jsonl", [ROWS[0], ROWS[1] | change])
    with pytest.raises(DataError, match=message):
        read_rewardbench(path)


def test_missing_and_empty_data_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no"):
        read_rewardbench(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no rows"):
        read_rewardbench(write(tmp_path / "empty.jsonl", []))


def test_the_script_writes_both_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out" / "rm.json"
    settings = ("--json", str(out), f"artifact_root={tmp_path}", "model.dtype=float32")
    monkeypatch.chdir(folder.parent)
    main(["--model", folder.name, "--data", str(data), *settings])
    row = json.loads(out.read_text(encoding="utf-8"))
    details = json.loads((tmp_path / "out" / "rm.details.json").read_text(encoding="utf-8"))
    assert row["model"] == folder.name  # as it was given: the file is to be shown to others
    assert row["donotanswer"] == details["subsets"]["donotanswer"]["accuracy"]["value"]
    assert "Safety" in capsys.readouterr().out
    for wrong, said in (
        (("--model", "nowhere", "--data", str(data)), "--model: got nowhere, wanted the folder of a trained"),
        (("--model", folder.name, "--data", "nowhere"), "--data: got nowhere, wanted RewardBench's rows"),
    ):
        with pytest.raises(ConfigError, match=said):
            main([*wrong, *settings])
