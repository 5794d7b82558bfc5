"""Results say by which code they were made, and the suite says which of them are older than that code."""

import hashlib
import json
import warnings
from pathlib import Path

from benchmarks.sources import changed_sources, source_hashes, stale_results
from prmd.artifacts.paths import PROJECT_ROOT


def make_project(root: Path) -> Path:
    files = {
        "prmd/__init__.py": "",
        "prmd/a.py": "import numpy\n",
        "prmd/unused.py": "",
        "benchmarks/__init__.py": "",
        "benchmarks/part/__init__.py": "",
        "benchmarks/part/one.py": "from .two import x\n",
        "benchmarks/part/two.py": "def x():\n    from prmd import a\n    return a\n",
        "benchmarks/script.py": "import json\nfrom benchmarks.part import one\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root / "benchmarks" / "script.py"


def test_every_file_that_is_reached_is_hashed_and_no_other(tmp_path: Path) -> None:
    found = source_hashes(make_project(tmp_path), tmp_path)
    assert set(found) == {
        *("prmd/__init__.py", "prmd/a.py", "benchmarks/__init__.py", "benchmarks/part/__init__.py"),
        *("benchmarks/part/one.py", "benchmarks/part/two.py", "benchmarks/script.py"),
    }
    assert found["prmd/a.py"] == hashlib.sha256(b"import numpy\n").hexdigest()


def test_a_changed_and_a_lost_file_make_results_stale(tmp_path: Path) -> None:
    hashes, folder = source_hashes(make_project(tmp_path), tmp_path), tmp_path / "results"
    folder.mkdir()
    (folder / "old.json").write_text("{}", encoding="utf-8")
    (folder / "new.json").write_text(json.dumps({"setup": {"sources": hashes}}), encoding="utf-8")
    assert stale_results(folder, tmp_path) == {"old.json": "records no hashes of the code that made it"}
    (tmp_path / "prmd" / "unused.py").write_text("x = 1\n", encoding="utf-8")
    assert changed_sources(hashes, tmp_path) == []
    (tmp_path / "prmd" / "a.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "benchmarks" / "part" / "two.py").unlink()
    assert changed_sources(hashes, tmp_path) == ["benchmarks/part/two.py", "prmd/a.py"]
    assert "two.py, prmd/a.py" in stale_results(folder, tmp_path)["new.json: setup"]


def test_the_scripts_reach_what_their_numbers_come_from() -> None:
    for script, part in (("gold_reward", "gold/labels"), ("real_text", "real_text/run")):
        found = source_hashes(PROJECT_ROOT / "benchmarks" / f"{script}.py")
        assert {f"benchmarks/{script}.py", f"benchmarks/{part}.py", "prmd/pessimism/debias.py"} <= set(found)


def test_stale_results_are_said() -> None:
    """A warning and no failure: results of an earlier commit stay true of that commit."""
    for name, note in stale_results(PROJECT_ROOT / "benchmarks" / "results").items():
        warnings.warn(f"benchmarks/results/{name}: {note}", stacklevel=1)
