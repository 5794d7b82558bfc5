"""Device, processes, seeds, memory, disk, log lines and progress."""

import logging
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from prmd import runtime
from prmd.errors import ConfigError


def test_device_follows_cuda_and_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.get_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runtime.get_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert runtime.get_device() == torch.device("cuda", 3)


def test_process_zero_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert runtime.is_main_process()
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not runtime.is_main_process()
    assert runtime.get_runtime().world_size == 4


def test_seed_repeats_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    runtime.set_seed(3)
    first = draw()
    assert draw() != first
    runtime.set_seed(3)
    assert draw() == first
    runtime.set_seed(4)
    assert not set(draw()) & set(first)


def test_peak_memory_counts_bytes_and_never_falls() -> None:
    before = runtime.peak_memory_bytes()
    block = np.ones(64 * 1024**2, dtype=np.uint8)
    during = runtime.peak_memory_bytes()
    del block
    if not torch.cuda.is_available():
        assert 10 * 1024**2 < before < 1024**4  # bytes, not KiB
    assert runtime.peak_memory_bytes() >= during >= before


def test_require_disk_names_the_place_and_both_sizes(tmp_path: Path) -> None:
    runtime.require_disk(tmp_path / "not" / "yet", 1)
    free = runtime.free_disk_bytes(tmp_path)
    with pytest.raises(ConfigError, match=r"GiB of free disk, wanted \d+\.\d GiB; make room") as caught:
        runtime.require_disk(tmp_path / "not" / "yet", free * 2)
    assert str(tmp_path / "not" / "yet") in str(caught.value)


def test_hardware_is_named() -> None:
    machine = runtime.hardware()
    assert machine["cpu"] and machine["os"] and machine["cores"] >= 1 and machine["memory_gib"] > 0
    assert len(machine["gpus"]) == torch.cuda.device_count()


def test_progress_yields_everything_and_is_quiet_when_quick(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(runtime.progress(range(5), 5, "scoring")) == [0, 1, 2, 3, 4]
    assert "scoring" not in capsys.readouterr().err


def test_progress_shows_itself_when_slow_on_process_zero_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_PROGRESS_AFTER_SECONDS", 0.0)
    list(runtime.progress(range(5), 5, "scoring"))
    shown = capsys.readouterr().err
    assert "scoring" in shown and "5/5" in shown
    monkeypatch.setenv("RANK", "1")
    list(runtime.progress(range(5), 5, "generating"))
    assert "generating" not in capsys.readouterr().err


def test_what_takes_long_is_said_and_what_is_quick_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with runtime.said_if_slow("loading quick"):
        pass
    monkeypatch.setattr(runtime, "_PROGRESS_AFTER_SECONDS", 0.05)
    with runtime.said_if_slow("loading 100% of it"):
        time.sleep(0.5)
        assert caplog.messages == ["loading 100% of it ..."]
    with pytest.raises(OSError, match="gone"), runtime.said_if_slow("loading what is not there"):
        raise OSError("gone")
    time.sleep(0.2)
    assert caplog.messages == ["loading 100% of it ..."]


def test_progress_in_a_file_speaks_after_five_seconds_and_then_seldom(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_PROGRESS_AFTER_SECONDS", 0.1)
    monkeypatch.setattr(runtime, "_PROGRESS_INTERVAL_IN_FILES", 60.0)
    for _ in runtime.progress(range(100), 200, "hashing", unit="MiB"):
        time.sleep(0.005)
    first, *others = [line for line in capsys.readouterr().err.split("\r") if line.strip()]
    assert "hashing" in first and "MiB/s" in first and len(others) <= 1  # the last line, of the end
    assert int(first.split("/200")[0].split()[-1]) <= 21  # 5 ms each, at least


def test_log_lines_are_ours_from_info_and_others_from_warning(capsys: pytest.CaptureFixture[str]) -> None:
    runtime.configure_logging()
    runtime.configure_logging()  # a second call must not double the lines
    logging.getLogger("prmd.inference.scoring").info("scored %d rows", 3)
    logging.getLogger("httpx").info("GET")
    logging.getLogger("httpx").warning("slow")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("INFO prmd.inference.scoring: scored 3 rows") and lines[1].endswith(
        "WARNING httpx: slow"
    )


def test_a_log_line_is_shown_as_the_caller_wants_it(capsys: pytest.CaptureFixture[str]) -> None:
    runtime.configure_logging(lambda line: line.replace("%d of 3", "two"))
    logging.getLogger("prmd.data").info("give %s", "%d of 3")
    assert capsys.readouterr().err.endswith("INFO prmd.data: give two\n")


def test_other_processes_only_report_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    runtime.configure_logging()
    logging.getLogger("prmd.inference.scoring").info("scored")
    logging.getLogger("prmd.inference.scoring").error("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "failed" in line


def test_libraries_say_nothing_of_themselves_at_their_import() -> None:
    for name in ("torchao", "torch.utils._pytree"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
        assert logging.getLogger(name).isEnabledFor(logging.ERROR)
