"""A disk that is full, read-only or forbidden is one line and status 2 in every script, and leaves nothing half-published."""

import errno
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny_models import tiny_causal_lm
from tiny_pipeline import no_model_loads
from tiny_training import LORA, TRAINING, a_run, train
from tiny_workspace import reward_model_config

import utils
from prmd import runtime
from prmd.artifacts import io, locks
from prmd.artifacts.paths import CONFIG_DIR, PROJECT_ROOT
from prmd.config.loading import load_config
from prmd.config.shared import RewardModelConfig
from prmd.data.prepare import download_dataset, split_objectives
from prmd.errors import ConfigError, DataError, user_line
from prmd.training.run import check_training

SCRIPTS = sorted(path.relative_to(PROJECT_ROOT).as_posix() for path in PROJECT_ROOT.glob("[0-9]_*/*.py"))
MENDABLE = (
    "ENOSPC",
    "EDQUOT",
    "EROFS",
    "EACCES",
    "EPERM",
    "ENAMETOOLONG",
    "EFBIG",
    "EIO",
    "ENOTDIR",
    "EEXIST",
)
Said = Callable[..., str]


def error_of(name: str, path: Path | str | None) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), *([] if path is None else [str(path)]))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Said:
    """Run a script, which has to stop with status 2; returns its lines on stderr."""
    monkeypatch.setattr("prmd.runtime.configure_logging", lambda shown: None)

    def run(script: str, *overrides: str) -> str:
        config = [
            "--config",
            str(CONFIG_DIR / "quickstart"),
            f"artifact_root={(tmp_path / 'root').as_posix()}",
        ]
        monkeypatch.setattr(sys, "argv", [script, *config, *overrides])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(PROJECT_ROOT / script), run_name="__main__")
        captured = capsys.readouterr()
        assert stop.value.code == 2 and "Traceback" not in captured.err
        return captured.err

    return run


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Every write beyond this size of a file fails, as on a full disk, also for root."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------ the line
@pytest.mark.parametrize("name", MENDABLE)
def test_an_error_of_the_disk_is_one_line_that_names_the_path(name: str) -> None:
    line = user_line(error_of(name, "/data/run/x.json"))
    assert line.startswith(f"/data/run/x.json: {os.strerror(getattr(errno, name))}; ") and "\n" not in line


def test_other_errors_keep_their_traceback() -> None:
    for error in (
        error_of("ENOENT", "x"),
        ConnectionRefusedError(111, "refused"),
        OSError("odd"),
        ValueError("x"),
    ):
        assert user_line(error) == ""
    assert user_line(DataError("mend it")) == "mend it"
    assert user_line(error_of("ENOSPC", None)).startswith("a file that a library writes: ")


@pytest.mark.parametrize("script", [*SCRIPTS, "run_pipeline.py"])
def test_every_script_turns_it_into_that_line(
    script: str, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Path:
        raise error_of("ENOSPC", "/data/run/x.json")

    monkeypatch.setattr(utils, "load_stage", lambda stage: full)
    first, *rest = said(script).splitlines()
    assert first.startswith("/data/run/x.json: No space left on device; make room")
    assert len(rest) == (script == "run_pipeline.py")  # what to do with the finished stages


def test_other_errors_of_the_system_are_raised_by_a_script() -> None:
    with pytest.raises(FileNotFoundError), utils.user_errors_exit():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")


# ------------------------------------------------------------------ the path
def test_a_write_that_fails_is_told_its_path_and_leaves_nothing(tmp_path: Path) -> None:
    before = io.write_text(tmp_path / "kept.txt", "before")
    with files_of_at_most(1000):
        for write in (
            lambda path: io.write_text(path, "x" * 5000),
            lambda path: io.write_json(path, ["x" * 5000]),
            lambda path: io.write_jsonl(path, [{"x": "x" * 5000}]),
            lambda path: io.write_tensors(path, {"x": torch.zeros(5000)}),
        ):
            for name in ("kept.txt", "new.txt"):
                with pytest.raises(OSError) as failure:
                    write(tmp_path / name)
                assert failure.value.errno == errno.EFBIG and failure.value.filename == str(tmp_path / name)
                assert "ulimit -f" in user_line(failure.value)
    assert before.read_text(encoding="utf-8") == "before" and list(tmp_path.iterdir()) == [before]


def test_errors_of_libraries_are_those_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    torchs = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    monkeypatch.setattr(io, "free_disk_bytes", lambda path: 100)
    for error in (rust, torchs):
        with pytest.raises(OSError) as failure, io.disk_errors_named(tmp_path / "model"):
            raise error
        assert failure.value.errno == errno.ENOSPC and failure.value.filename == str(tmp_path / "model")
    monkeypatch.setattr(io, "free_disk_bytes", lambda path: 10**12)
    with pytest.raises(OSError) as failure, io.disk_errors_named(tmp_path / "model"):
        raise torchs
    assert failure.value.errno == errno.EIO  # a quota, a limit, a failing disk: it cannot be known
    for other in (RuntimeError("shapes differ"), DataError("mend it")):
        with pytest.raises(type(other)) as failure, io.disk_errors_named(tmp_path):
            raise other
        assert failure.value is other
    with pytest.raises(OSError) as failure, io.disk_errors_named(tmp_path):
        raise error_of("EACCES", "its own")
    assert failure.value.filename == "its own"


# ------------------------------------------------------------------ nothing half-published
def test_a_folder_that_cannot_be_moved_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("final", "partial"):
        io.write_text(tmp_path / name / "who.txt", name)
    real, moves = io.replace, []

    def second_fails(source: Path, target: Path, attempts: int = 5) -> None:
        moves.append((source.name, target.name))
        if source.name == "partial":
            raise error_of("EACCES", source)
        real(source, target, attempts)

    monkeypatch.setattr(io, "replace", second_fails)
    with pytest.raises(PermissionError):
        io.publish_directory(tmp_path / "partial", tmp_path / "final")
    assert (tmp_path / "final" / "who.txt").read_text(encoding="utf-8") == "final"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final", "partial"] and len(moves) == 3


def test_a_disk_that_fills_while_stage_1_writes(said: Said, tmp_path: Path) -> None:
    config = load_config(
        CONFIG_DIR / "quickstart", RewardModelConfig, [f"artifact_root={(tmp_path / 'root').as_posix()}"]
    )
    download_dataset(config)
    with files_of_at_most(3000):
        line = said("1_data_preparation/split_objectives.py")
    assert line.count("\n") == 1 and "File too large" in line and str(tmp_path / "root" / "data") in line
    assert not config.paths.processed.exists() and not list(tmp_path.rglob("*.tmp"))
    assert split_objectives(config).is_dir()  # the same command, with room


def test_a_disk_that_fills_while_a_checkpoint_is_saved(tmp_path: Path) -> None:
    shared = reward_model_config(tmp_path / "root", tiny_causal_lm(tmp_path / "base"))
    folder = tmp_path / "run"
    with files_of_at_most(12_000), pytest.raises(OSError) as failure, io.disk_errors_named(folder):
        train(a_run(shared, folder))
    assert user_line(failure.value) and str(failure.value.filename).startswith(str(folder))


def test_letting_go_of_a_lock_on_a_disk_that_went_read_only_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks.take(tmp_path / "artifact")

    def refuse(*_: object, **__: object) -> None:
        raise error_of("EROFS", "note")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        locks.let_go(tmp_path / "artifact")
    locks.take(tmp_path / "artifact")  # it was let go of all the same
    locks.let_go(tmp_path / "artifact")


# ------------------------------------------------------------------ before anything is trained
def test_a_folder_without_rights_is_refused_before_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = reward_model_config(tmp_path / "root", tiny_causal_lm(tmp_path / "base"))
    (tmp_path / "root").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "root" and real(path, mode))
    no_model_loads(monkeypatch)
    directory = shared.paths.policy("hard_min")
    with pytest.raises(ConfigError, match=r"hard_min: .*root cannot be written"):
        check_training(shared.model, shared.paths, LORA, TRAINING, task="policy", directory=directory)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("notes", encoding="utf-8")
    with pytest.raises(ConfigError, match="models is a file, wanted a folder"):
        runtime.require_disk(tmp_path / "models" / "policy", 1)
