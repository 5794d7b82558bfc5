"""Which runs see a card: a machine with one, in which a small module stands for torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prmd.artifacts.paths import PROJECT_ROOT
from prmd.runtime import get_device

TORCH = """
import os
def visible():
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")  # as the driver reads it
class cuda:
    is_available = staticmethod(visible)
AT_IMPORT = visible()  # torch asks the driver once, and test modules may ask while they are collected
"""
TESTS = """
import os, subprocess, sys
import pytest
import torch

def test_plain():
    assert not torch.AT_IMPORT and not torch.cuda.is_available()
    code = "import torch; sys.exit(torch.cuda.is_available())"
    assert subprocess.run([sys.executable, "-c", "import sys; " + code]).returncode == 0

@pytest.mark.slow
def test_slow():
    assert not torch.AT_IMPORT

@pytest.mark.gpu
def test_card():
    assert torch.AT_IMPORT
"""

pytestmark = pytest.mark.slow


def outcome(folder: Path, *arguments: str, **variables: str) -> str:
    """The last line of pytest on that machine, with the project's own `tests/conftest.py` and settings."""
    tests = folder / "tests"
    tests.mkdir(exist_ok=True)
    for name in ("pyproject.toml", "tests/conftest.py"):
        text = (PROJECT_ROOT / name).read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "torch.py").write_text(TORCH, encoding="utf-8")
    (tests / "test_machine.py").write_text(TESTS, encoding="utf-8")
    names = ("CUDA_VISIBLE_DEVICES", "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_CURRENT_TEST")
    kept = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "--durations=0", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(folder)} | variables,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" not in done.stdout or "no CUDA device" in done.stdout
    return done.stdout.strip().splitlines()[-1].partition(" in ")[0]


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ((), {"CUDA_VISIBLE_DEVICES": "2"}, "2 passed, 1 skipped"),
        (("-m", "gpu or slow"), {}, "1 passed, 1 skipped, 1 deselected"),
        (("-m", "gpu and not slow"), {}, "1 passed, 2 deselected"),
        ((), {"PYTEST_ADDOPTS": "-m gpu"}, "1 passed, 2 deselected"),
        (("-m", "gpu"), {"CUDA_VISIBLE_DEVICES": "-1"}, "1 skipped, 2 deselected"),
    ],
    ids=str,
)
def test_the_card_is_seen_by_its_own_tests_alone(
    tmp_path: Path, arguments: tuple[str, ...], variables: dict[str, str], expected: str
) -> None:
    assert outcome(tmp_path, *arguments, **variables) == expected


def test_this_run_is_on_the_cpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1" and get_device().type == "cpu"
