"""What checks a commit elsewhere runs the commands that a user is given."""

import re
from typing import Any

import pytest
import yaml

from prmd.artifacts.paths import PROJECT_ROOT

WORKFLOW = PROJECT_ROOT / ".github" / "workflows" / "checks.yml"
INSTALL = "pip install -r requirements.txt -c constraints-cpu.txt"


def commands_of(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


@pytest.fixture(scope="module")
def jobs() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]


def test_tests_and_quickstart_are_those_of_the_readme(jobs: dict[str, dict[str, Any]]) -> None:
    readme = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    local = (PROJECT_ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name, last in (
        ("tests", "python -m pytest"),
        ("quickstart", "python run_pipeline.py --config configs/quickstart"),
    ):
        assert commands_of(jobs[name]) == [INSTALL, last]
        assert last in readme
    assert f"{INSTALL} && python -m pytest" in local
    assert all(command in local for command in commands_of(jobs["lint"])[1:])


def test_both_systems_are_covered_and_nothing_runs_for_ever(jobs: dict[str, dict[str, Any]]) -> None:
    for name in ("tests", "quickstart"):
        assert jobs[name]["strategy"]["matrix"]["os"] == ["ubuntu-latest", "windows-latest"]
    assert all(0 < job["timeout-minutes"] <= 90 for job in jobs.values())


def test_every_lower_edge_is_named() -> None:
    """`.ci/edges lower` installs the oldest release that a line allows; a line without one would mean the first ever."""
    lines = (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in requirements if not re.match(r"[a-z0-9_-]+>=[0-9.]+", line)] == []
