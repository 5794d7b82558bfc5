"""The measurement of stage 1 at size, at 300 rows: everything made is counted, rows are repeatable, sizes are kept."""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import stage1_size
from benchmarks.stage1_size import generated_rows, share_of_near_copies
from prmd.artifacts import io
from prmd.data.splits import _jaccard, _shingles
from prmd.pairs import prompt_key


def test_rows_are_repeatable_and_of_the_stated_length_and_kinds() -> None:
    made = Counter[str]()
    rows = list(generated_rows(2500, seed=3, made=made))
    assert rows == list(generated_rows(2500, seed=3, made=Counter()))
    assert rows != list(generated_rows(2500, seed=4, made=Counter()))
    assert made == {"rows": 2500, "copies": 25, "near_copies": 25} | dict.fromkeys(stage1_size.ODD, 3)
    texts = Counter(json.dumps(row) for row in rows)
    assert sum(n - 1 for n in texts.values()) == 25
    words = [len(row["prompt"].split()) for row in rows]
    assert sum(words) / len(words) == pytest.approx(40, abs=1)
    assert sum(len(row["rejected"].split()) for row in rows) / len(rows) == pytest.approx(60, abs=1.5)
    prompts = sorted({prompt_key(row["prompt"]) for row in rows}, key=lambda text: text.split()[1:5])
    near = [_jaccard(_shingles(a), _shingles(b)) for a, b in zip(prompts, prompts[1:], strict=False)]
    assert sum(0.8 <= value < 1 for value in near) == 25


def test_share_of_near_copies_that_must_go_by_enumeration() -> None:
    chances = {"test": 0.1, "val": 0.05, "judge": 0.1, "train": 0.75}
    guarded = {"test": (), "val": (), "judge": ("test", "val"), "train": ("test", "val", "judge")}
    pairs = [(a, b) for a in chances for b in chances if b in guarded[a] or a in guarded[b]]
    assert share_of_near_copies() == pytest.approx(sum(chances[a] * chances[b] for a, b in pairs)) == 0.405


@pytest.mark.slow
def test_both_scripts_are_measured_and_sizes_of_the_same_code_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, work = tmp_path / "size.json", tmp_path / "work"
    for size in (300, 200):
        stage1_size.main(["--rows", str(size), "--json", str(file), "--work", str(work)])
    results = io.read_json(file)
    assert [row["rows"] for row in results["rows"]] == [200, 300] and not list(work.iterdir())
    assert {"prmd/data/splits.py", "benchmarks/stage1_size.py"} <= set(results["setup"]["sources"])
    row = results["rows"][1]
    assert row["repeated"] == row["made"]["copies"] == 2 and row["refused"] == dict.fromkeys(
        stage1_size.ODD, 2
    )
    assert row["kept"] == 300 - 2 - 8 - row["near"]
    for script in stage1_size.SCRIPTS:
        assert row[script]["cpu_seconds"] > 0 and row[script]["peak_mib"] > 100
    seconds = sum(row[script]["cpu_seconds"] for script in stage1_size.SCRIPTS)
    assert row["rows_per_cpu_second"] == pytest.approx(300 / seconds, rel=0.05)
    page = file.with_suffix(".md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out and "NOT counted" not in page
    results["setup"]["sources"]["prmd/data/splits.py"] = "of another version"
    io.write_json(file, results)
    stage1_size.main(["--rows", "200", "--json", str(file), "--work", str(work)])
    assert [row["rows"] for row in io.read_json(file)["rows"]] == [200]
