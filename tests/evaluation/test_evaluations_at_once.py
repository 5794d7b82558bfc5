"""Two evaluations on one artifact root: the second says who works there, and takes over what a killed one left."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_workspace import evaluation_config, write_prepared

from prmd.artifacts import locks
from prmd.artifacts.paths import PROJECT_ROOT
from prmd.config.evaluation import EvaluationConfig
from prmd.errors import ConfigError
from prmd.evaluation import evaluate
from prmd.evaluation.evaluate import benchmark_eval, compute_metrics

HOLDER = """
import sys
from pathlib import Path
from prmd.artifacts import locks
locks.take(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path: Path) -> EvaluationConfig:
    config = evaluation_config(tmp_path)
    write_prepared(config.paths)
    benchmarks = config.benchmarks.model_copy(update={"run": ("hh_holdout", "truthfulqa")})
    return config.model_copy(update={"benchmarks": benchmarks})


@pytest.fixture
def hold() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts a process that holds the lock of an artifact until it is killed."""
    started = []

    def begin(final: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(final)]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=PROJECT_ROOT, text=True, **streams))
        assert started[-1].stdout.readline() == "taken\n"
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stage", [compute_metrics, benchmark_eval])
def test_a_second_evaluation_is_told_who_works_there(
    config: EvaluationConfig,
    stage: Callable[[EvaluationConfig], Path],
    hold: Callable[[Path], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    worked: list[set[str]] = []

    def work(config: EvaluationConfig, target: Path, *, force: bool) -> None:
        worked.append({path.name for path in config.paths.outputs.rglob(".*.lock")})

    monkeypatch.setattr(evaluate, "_evaluate", work)
    monkeypatch.setattr(evaluate, "_benchmark", work)
    place = config.paths.metrics if stage is compute_metrics else config.paths.benchmark("truthfulqa")
    other = hold(place)
    with pytest.raises(ConfigError) as caught:
        stage(config)
    assert re.search(rf"another run is at work on it \(process {other.pid} on ", str(caught.value))
    assert str(place) in str(caught.value) and worked == []
    assert not list(config.paths.outputs.rglob(f"hh_holdout/.{place.name}.lock"))  # it let go of the others
    other.kill()
    other.wait()
    stage(config)
    assert worked == [{f".{place.name}.lock"}]
    assert re.search(rf"taken over .*process {other.pid} ", caplog.text)
    assert not list(config.paths.outputs.rglob(".*"))


def test_other_benchmarks_run_beside_each_other(
    config: EvaluationConfig,
    hold: Callable[[Path], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "_benchmark", lambda config, target, *, force: None)
    hold(config.paths.benchmark("jailbreakbench"))
    with locks.held(config.paths.metrics):
        assert benchmark_eval(config) == config.paths.outputs / "benchmarks"
