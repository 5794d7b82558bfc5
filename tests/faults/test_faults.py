"""The small part of the faults, by the command that injects all of them; and some hundred examples of every odd input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from faults import fuzz

from prmd.artifacts.paths import PROJECT_ROOT

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="commands are forks of one interpreter")


@LINUX
@pytest.mark.slow
def test_a_few_faults_of_every_kind_lose_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    words = ["--json", str(rows), "--only", "kills", "corruptions", "races", "disk"]
    done = subprocess.run(
        [sys.executable, str(PROJECT_ROOT / "tests/faults/run.py"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()[1:]]
    assert [row for row in found if row["outcome"] == "bad"] == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["kind"] for row in found} == {"kills", "corruptions", "races", "disk"}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_odd_input_is_a_result_or_a_clear_error(name: str) -> None:
    fuzz.check(name, 30)
