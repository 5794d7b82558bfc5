"""Finished, half-written and interrupted artifacts, and what is known about how they were made."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prmd.artifacts import runs
from prmd.artifacts.io import publish_directory, read_json, write_text
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.loading import load_config
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.errors import DataError

COMMAND = "python 2_reward_modeling/train_helpful_rm.py"


def finish(directory: Path, fingerprint: str = "abc", **extra) -> None:
    runs.finish_run(
        directory,
        config=RewardModelConfig(seed=5),
        inputs={"train": "f00"},
        fingerprint=fingerprint,
        clock=runs.start_run(),
        extra=extra or None,
    )


def test_record_says_what_made_the_artifact(tmp_path: Path) -> None:
    finish(tmp_path, pairs=12)
    record = runs.read_run(tmp_path)
    assert record is not None
    assert record["fingerprint"] == "abc" and record["inputs"] == {"train": "f00"} and record["pairs"] == 12
    assert record["seed"] == 5 and record["processes"] == 1 and record["device"]
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["versions"]["torch"] and 0 <= record["seconds"] < 60
    assert record["peak_memory_bytes"] >= 0 and record["hardware"]["cores"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["started"])
    assert {"commit", "dirty"} <= set(record)
    assert load_config(tmp_path / "config.yaml", RewardModelConfig) == RewardModelConfig(seed=5)


def test_seed_of_a_policy_is_the_shared_one(tmp_path: Path) -> None:
    config = PolicyConfig(reward_model_config=RewardModelConfig(seed=11))
    runs.finish_run(tmp_path, config=config, inputs={}, fingerprint="x", clock=runs.start_run())
    assert runs.read_run(tmp_path)["seed"] == 11


def test_run_json_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = runs.write_json
    monkeypatch.setattr(
        runs, "write_json", lambda *a: (seen.append({p.name for p in tmp_path.iterdir()}), real(*a))
    )
    finish(tmp_path)
    assert seen == [{"config.yaml"}]


def test_only_process_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    finish(tmp_path)
    runs.partial_directory(tmp_path / "final", "abc", force=True)
    assert list(tmp_path.iterdir()) == []


def test_current_only_with_the_same_fingerprint(tmp_path: Path) -> None:
    assert not runs.is_current(tmp_path / "none", "abc")
    finish(tmp_path)
    assert runs.is_current(tmp_path, "abc") and not runs.is_current(tmp_path, "abd")


def test_missing_half_written_and_interrupted_artifacts_name_the_command(tmp_path: Path) -> None:
    final = tmp_path / "helpful_rm"

    def complaint() -> str:
        with pytest.raises(DataError) as caught:
            runs.require_artifact(final, what="the helpful reward model", command=COMMAND)
        assert str(caught.value).startswith("the helpful reward model is ")
        assert str(caught.value).endswith(COMMAND) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "is missing" in complaint()
    partial = runs.partial_directory(final, "abc", force=False)
    assert "is unfinished" in complaint() and str(partial) in complaint()
    write_text(final / "model.safetensors", "half")
    assert "is half-written" in complaint()
    finish(final)
    assert runs.require_artifact(final, what="it", command=COMMAND)["fingerprint"] == "abc"


@pytest.mark.parametrize("text", ["", "[]", '{"fingerprint": '])
def test_unreadable_record_is_a_data_error(tmp_path: Path, text: str) -> None:
    write_text(tmp_path / "run.json", text)
    with pytest.raises(DataError, match=r"run\.json"):
        runs.is_current(tmp_path, "abc")


def test_partial_directory_is_kept_for_the_same_work_only(tmp_path: Path) -> None:
    final = tmp_path / "cvar"
    partial = runs.partial_directory(final, "abc", force=False)
    assert partial == tmp_path / ".cvar.partial"
    write_text(partial / "step-10" / "state", "x")
    assert (runs.partial_directory(final, "abc", force=False) / "step-10" / "state").exists()
    assert not (runs.partial_directory(final, "other", force=False) / "step-10").exists()
    write_text(partial / "kept", "x")
    assert not (runs.partial_directory(final, "other", force=True) / "kept").exists()
    (partial / "fingerprint.json").unlink()
    write_text(partial / "of unknown origin", "x")
    assert not (runs.partial_directory(final, "other", force=False) / "of unknown origin").exists()


def test_leftovers_of_dead_processes_are_swept_and_never_published(tmp_path: Path) -> None:
    final = tmp_path / "final"
    partial = runs.partial_directory(final, "abc", force=False)
    dead, own = partial / "a" / ".model.json.2147483646.tmp", partial / f".x.json.{os.getpid()}.tmp"
    dead.parent.mkdir()
    for path in (dead, own, partial / "a" / ".hidden", partial / "kept.tmp"):
        path.write_text("half", encoding="utf-8")
    (partial / "a" / ".33.former").mkdir()
    runs.partial_directory(final, "abc", force=False)
    assert own.exists() and not dead.exists() and not (partial / "a" / ".33.former").exists()
    runs.publish(partial, final)
    left = {p.name for p in final.rglob("*") if p.is_file()}
    assert left == {".hidden", "kept.tmp", runs.FINGERPRINT_FILE}


def test_published_partial_directory_is_the_finished_artifact(tmp_path: Path) -> None:
    final = tmp_path / "cvar"
    partial = runs.partial_directory(final, "abc", force=False)
    finish(partial)
    publish_directory(partial, final)
    assert runs.is_current(final, "abc") and not partial.exists()


def test_what_is_not_as_the_record_says_is_said_and_what_it_does_not_list_is_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_text(tmp_path / "cvar.json", "one")
    write_text(tmp_path / "mean.json", "one")
    assert runs.is_as_recorded(tmp_path, "cvar.json")  # no record yet
    finish(tmp_path)
    write_text(tmp_path / "new.json", "one")
    assert runs.is_as_recorded(tmp_path, "cvar.json", "mean.json", "new.json") and not caplog.text
    write_text(tmp_path / "cvar.json", "two")
    assert not runs.is_as_recorded(tmp_path, "cvar.json") and "cvar.json was changed" in caplog.text
    assert runs.is_as_recorded(tmp_path, "mean.json")
    (tmp_path / "mean.json").unlink()
    assert not runs.is_as_recorded(tmp_path, "mean.json")


def test_step_results_never_overwrite(tmp_path: Path) -> None:
    paths = ArtifactPaths(tmp_path, "embedded")
    written = [runs.write_step_result(paths, "split_objectives", {"rows": i}) for i in range(3)]
    assert len(set(written)) == 3
    assert [read_json(path)["rows"] for path in written] == [0, 1, 2]
    assert all(re.match(r"split_objectives_\d{8}-\d{6}", path.name) for path in written)
    assert ":" not in "".join(path.name for path in written)


# ------------------------------------------------------------------ git
def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_and_dirty_of_a_checkout(tmp_path: Path) -> None:
    git(tmp_path, "init")
    assert runs.git_state(tmp_path) == {"commit": None, "dirty": None}  # no commit yet
    write_text(tmp_path / "a", "1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first", "--no-verify")
    state = runs.git_state(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", state["commit"]) and state["dirty"] is False
    write_text(tmp_path / "a", "2")
    assert runs.git_state(tmp_path) == {"commit": state["commit"], "dirty": True}
    (tmp_path / "inner").mkdir()  # a copy of the project inside somebody else's checkout
    assert runs.git_state(tmp_path / "inner") == {"commit": None, "dirty": None}


def test_outside_a_checkout_and_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.git_state(tmp_path) == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", "")
    assert runs.git_state() == {"commit": None, "dirty": None}


def test_versions_of_what_is_not_installed_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_PACKAGES", ("torch", "surely-not-installed"))
    assert runs.versions()["surely-not-installed"] is None
