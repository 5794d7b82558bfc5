"""The measurement of stage 1 at size, at 300 rows: everything made is counted, rows are repeatable, sizes are kept."""

import json
from collections import Counter
from itertools import pairwise
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
    near = [_jaccard(_shingles(a), _shingles(b)) for a, b in pairwise(prompts)]
    assert sum(0.8 <= value < 1 for value in near) == 25


def test_share_of_near_copies_that_must_go_by_enumeration() -> None:
    chances = {"test": 0.1, "val": 0.05, "judge": 0.1, "train": 0.75}
    guarded = {"test": (), "val": (), "judge": ("test", "val"), "train": ("test", "val", "judge")}
    pairs = [(a, b) for a in chances for b in chances if b in guarded[a] or a in guarded[b]]
    assert share_of_near_copies() == pytest.approx(sum(chances[a] * chances[b] for a, b in pairs)) == 0.405


@pytest.mark.slow
def test_both_scripts_are_measured_and_everything_made_is_counted(tmp_path: Path) -> None:
    row = stage1_size.measure(300, tmp_path)
    assert row["repeated"] == row["made"]["copies"] == 2 == row["made"]["near_copies"]
    assert row["refused"] == dict.fromkeys(stage1_size.ODD, 2)
    assert row["kept"] == 300 - 2 - 8 - row["near"] and row["near"] <= 2
    for script in stage1_size.SCRIPTS:
        assert row[script]["cpu_seconds"] > 0 and row[script]["peak_mib"] > 100
    seconds = sum(row[script]["cpu_seconds"] for script in stage1_size.SCRIPTS)
    assert row["rows_per_cpu_second"] == pytest.approx(300 / seconds, rel=0.02)


def fake_row(count: int, work: Path) -> stage1_size.Row:
    """A thousand rows a second after ten seconds; one exact copy in a hundred is not counted."""
    (work / f"rows-{count}").mkdir(parents=True)
    one = {"seconds": 12.0, "cpu_seconds": 5 + count / 2000, "peak_mib": 100 + count // 1024}
    made = {"rows": count, "copies": count // 100, "near_copies": count // 100}
    speeds = {"rows_per_second": 1.0, "rows_per_cpu_second": count / (10 + count / 1000)}
    counts = {"kept": count, "repeated": count // 100 - 1, "near": count // 250, "refused": {}}
    both = dict.fromkeys(stage1_size.SCRIPTS, one)
    return (
        {"rows": count, "megabytes": 1.0, "peak_mib": one["peak_mib"], "made": made} | both | speeds | counts
    )


def test_sizes_measured_by_the_same_code_stay_and_the_page_says_what_they_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage1_size, "measure", fake_row)
    file, work = tmp_path / "size.json", tmp_path / "work"
    common = ["--json", str(file), "--work", str(work)]
    stage1_size.main(["--rows", "30720", *common])
    stage1_size.main(["--rows", "10240", *common])
    results = io.read_json(file)
    assert [row["rows"] for row in results["rows"]] == [10_240, 30_720] and not list(work.iterdir())
    assert {"prmd/data/splits.py", "benchmarks/stage1_size.py"} <= set(results["setup"]["sources"])
    page = file.with_suffix(".md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out and "NOT counted" in page
    grown = "3× the rows, 2.01× the CPU time; 1.00 ms and 1.0 KiB of peak memory for each further row"
    assert grown in page and "| 10,240 | 1 | 12 (10) |" in page
    results["setup"]["sources"]["prmd/data/splits.py"] = "of another version"
    io.write_json(file, results)
    stage1_size.main(["--rows", "10240", *common])
    assert [row["rows"] for row in io.read_json(file)["rows"]] == [10_240]
