"""Two runs on one artifact: the second says who works there; what a killed run left is taken over."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prmd.artifacts import locks, runs
from prmd.artifacts.io import read_json, write_json
from prmd.artifacts.paths import PROJECT_ROOT
from prmd.config.shared import RewardModelConfig
from prmd.errors import ConfigError

HOLDER = """
import sys
from pathlib import Path
from prmd.artifacts import locks
locks.take(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path / "cvar"` until it is killed."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "cvar")]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, text=True, **streams)
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_told_who_works_there_and_takes_over_when_that_one_was_killed(
    tmp_path: Path, other: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    final = tmp_path / "cvar"
    with pytest.raises(ConfigError) as caught:
        runs.partial_directory(final, "abc", force=False)
    who = rf"process {other.pid} on {re.escape(platform.node())}, since \d{{4}}-\d\d-\d\dT"
    assert re.search(who, str(caught.value)) and str(final) in str(caught.value)
    assert "\n" not in str(caught.value) and not runs.partial_path(final).exists()
    runs.partial_directory(tmp_path / "hard_min", "abc", force=False)  # another artifact of the same folder
    locks.let_go(tmp_path / "hard_min")
    other.kill()
    other.wait()
    runs.partial_directory(final, "abc", force=False)
    assert re.search(rf"taken over .*process {other.pid} ", caplog.text)
    locks.let_go(final)


def test_the_lock_is_held_until_the_artifact_is_published(tmp_path: Path) -> None:
    final = tmp_path / "cvar"
    partial = runs.partial_directory(final, "abc", force=False)
    note = read_json(tmp_path / ".cvar.lock.json")
    assert note["pid"] == os.getpid() and note["host"] == platform.node()
    assert runs.partial_directory(final, "abc", force=False) == partial  # the same process goes on
    config, clock = RewardModelConfig(), runs.start_run()
    runs.finish_run(partial, config=config, inputs={}, fingerprint="abc", clock=clock)
    runs.publish(partial, final)
    assert [path.name for path in tmp_path.iterdir()] == ["cvar"]


@pytest.mark.parametrize(
    "note",
    [
        {"pid": os.getpid(), "host": "before-the-reboot", "since": "2020-01-01T00:00:00+00:00"},
        {"pid": 1, "host": platform.node(), "since": "2199-01-01T00:00:00+00:00"},  # a clock that jumped
    ],
)
def test_a_note_without_a_lock_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, note: dict[str, object]
) -> None:
    write_json(tmp_path / ".cvar.lock.json", note)
    (tmp_path / ".cvar.lock").touch()
    with locks.held(tmp_path / "cvar"):
        assert "taken over" in caplog.text and str(note["since"]) in caplog.text
        assert read_json(tmp_path / ".cvar.lock.json")["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_main_process_holds_the_lock_for_a_whole_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locks.held(tmp_path / "cvar"):
        monkeypatch.setenv("RANK", "1")
        locks.take(tmp_path / "hard_min")
        assert not (tmp_path / ".hard_min.lock").exists()


def test_what_another_run_finished_in_the_meantime_is_not_built_again(tmp_path: Path) -> None:
    final = tmp_path / "cvar"
    runs.finish_run(final, config=RewardModelConfig(), inputs={}, fingerprint="abc", clock=runs.start_run())
    with pytest.raises(ConfigError, match="another run has just finished it"):
        runs.partial_directory(final, "abc", force=False)
    for fingerprint, force in (("abd", False), ("abc", True)):
        assert runs.partial_directory(final, fingerprint, force=force) == runs.partial_path(final)
    locks.let_go(final)


def test_what_was_damaged_is_built_again_and_no_other_run_is_blamed(tmp_path: Path) -> None:
    final = tmp_path / "cvar"
    write_json(final / "calibration.json", 1)
    runs.finish_run(final, config=RewardModelConfig(), inputs={}, fingerprint="abc", clock=runs.start_run())
    write_json(final / "calibration.json", 2)  # of the same size
    assert runs.partial_directory(final, "abc", force=False) == runs.partial_path(final)
    locks.let_go(final)
