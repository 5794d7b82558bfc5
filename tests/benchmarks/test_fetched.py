"""Benchmarks whose data are fetched: what is pinned, what they cost, and that no connection stops nothing."""

import hashlib
import io as streams
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_mt_bench import write_files
from tiny_workspace import benchmarks_config, candidate, evaluation_config, write_workspace

from prmd.artifacts import io
from prmd.benchmarks import mt_bench_data
from prmd.benchmarks.base import NotRunError
from prmd.benchmarks.costs import cost_of
from prmd.benchmarks.jailbreakbench import run_jailbreakbench
from prmd.benchmarks.mt_bench import run_mt_bench
from prmd.benchmarks.mt_bench_data import FILES, UPSTREAM, fetch_files
from prmd.benchmarks.realtoxicityprompts import run_realtoxicityprompts
from prmd.benchmarks.run import _read_of
from prmd.config.evaluation import (
    EvaluationConfig,
    JailbreakBenchConfig,
    MtBenchConfig,
    RealToxicityPromptsConfig,
    TextJudgeConfig,
)
from prmd.data import readers
from prmd.errors import ConfigError, DataError
from prmd.evaluation.evaluate import benchmark_eval

WRITER = TextJudgeConfig(kind="endpoint", model="m", base_url="http://127.0.0.1:9/v1")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    folder = tmp_path_factory.mktemp("fetched")
    write_workspace(folder, policies=False)
    return evaluation_config(folder)


def fetched_by_default(config: EvaluationConfig, **changes: Any) -> EvaluationConfig:
    benchmarks = benchmarks_config(
        realtoxicityprompts=RealToxicityPromptsConfig(),
        jailbreakbench=JailbreakBenchConfig(),
        mt_bench=MtBenchConfig(),
    )
    return config.model_copy(update={"benchmarks": benchmarks, **changes})


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """FastChat's repository, of tiny files; the addresses that were asked for."""
    folder, asked, files = write_files(tmp_path / "upstream"), [], {}
    for name, (place, _) in mt_bench_data._PUBLISHED.items():
        files[name] = (place, hashlib.sha256((folder / name).read_bytes()).hexdigest())
    monkeypatch.setattr(mt_bench_data, "_PUBLISHED", files)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def urlopen(address: str, timeout: float) -> streams.BytesIO:
        asked.append(address)
        (name,) = (name for name, (place, _) in files.items() if address.endswith(place))
        return streams.BytesIO((folder / name).read_bytes())

    monkeypatch.setattr(mt_bench_data.urllib.request, "urlopen", urlopen)
    return asked


# ------------------------------------------------------------------ MT-Bench
def test_the_three_files_are_fetched_once_from_the_pinned_commit(
    workspace: EvaluationConfig, upstream: list[str]
) -> None:
    revision = MtBenchConfig().revision
    for _ in range(2):
        folder = fetch_files(revision, workspace.paths)
    assert folder == workspace.paths.raw("mt_bench") and all((folder / name).is_file() for name in FILES)
    assert len(upstream) == 3
    assert all(
        address.startswith(f"https://raw.githubusercontent.com/{UPSTREAM}/{revision}/")
        for address in upstream
    )
    (folder / FILES[0]).write_text("cut", encoding="utf-8")
    fetch_files(revision, workspace.paths)
    assert len(upstream) == 4


def test_another_content_than_the_published_is_refused(
    workspace: EvaluationConfig, upstream: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = {name: (place, "0" * 64) for name, (place, _) in mt_bench_data._PUBLISHED.items()}
    monkeypatch.setattr(mt_bench_data, "_PUBLISHED", wrong)
    with pytest.raises(DataError, match=r"is not the file that was published.*benchmarks\.mt_bench\.path"):
        fetch_files(MtBenchConfig().revision, workspace.paths)


def test_the_pinned_digests_are_those_of_the_files(shared_mt_bench: Path) -> None:
    for name, (_, sha256) in mt_bench_data._PUBLISHED.items():
        assert io.file_sha256(shared_mt_bench / name) == sha256


@pytest.fixture
def shared_mt_bench() -> Path:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "mt-bench"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


def test_nothing_is_fetched_for_a_judge_that_cannot_rate(
    workspace: EvaluationConfig, upstream: list[str]
) -> None:
    with pytest.raises(
        NotRunError, match=r"text_judge\.kind is strings, wanted local_model, endpoint or replay"
    ):
        run_mt_bench(fetched_by_default(workspace), candidate(workspace, "reference"))
    assert upstream == []


# ------------------------------------------------------------------ no connection
class BrokenOffError(Exception):
    """An error of the hub's client that is no OSError."""


BrokenOffError.__module__ = "httpx"


@pytest.mark.parametrize("error", [ConnectionError("no route"), BrokenOffError("peer closed")])
def test_without_a_connection_they_are_not_run_with_the_reason(
    error: Exception, workspace: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise error

    readers._load.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = fetched_by_default(workspace, text_judge=WRITER)
    for run, key in (
        (run_realtoxicityprompts, "benchmarks.realtoxicityprompts.path"),
        (run_jailbreakbench, "benchmarks.jailbreakbench.path"),
        (run_mt_bench, "benchmarks.mt_bench.path"),
    ):
        with pytest.raises(NotRunError, match=rf"^data missing at .*{re.escape(key)}: cannot get "):
            run(config, candidate(config, "reference"))


def test_a_bug_of_ours_is_no_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    readers._load.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {}["a bug"])
    with pytest.raises(KeyError):
        readers.split_rows("key", "org/name", "main", "train")


def test_a_revision_without_a_connection_is_one_line(
    workspace: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE.*set it to a folder"):
        fetch_files("other", workspace.paths)


# ------------------------------------------------------------------ what it costs, what stays finished
def test_the_dry_run_says_what_each_costs(
    workspace: EvaluationConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        benchmark_eval(fetched_by_default(workspace, text_judge=WRITER), dry_run=True)
    for said in (
        "realtoxicityprompts: costs each of them 200 prompts x 25 samples = 5,000 responses of at most 20 tokens",
        "; downloads allenai/real-toxicity-prompts@f21629712ffd, about 70 MB, once",
        "jailbreakbench: costs each of them 100 harmful and 100 benign requests x 1 response of at most 150 tokens; as many verdicts by endpoint",
        "mt_bench: costs each of them 80 questions x 2 answers of at most 1024 tokens; 160 verdicts, and 320 more",
    ):
        assert said in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        benchmark_eval(fetched_by_default(workspace), dry_run=True)
    assert "mt_bench: would not run: no text judge that writes" in caplog.text
    assert "no judge's verdict (refusal phrases)" in caplog.text


@pytest.mark.parametrize("name", ["realtoxicityprompts", "jailbreakbench", "mt_bench"])
def test_the_dry_run_downloads_no_folder_that_is_nowhere(
    workspace: EvaluationConfig, caplog: pytest.LogCaptureFixture, tmp_path: Path, name: str
) -> None:
    config, lost = fetched_by_default(workspace, text_judge=WRITER), str(tmp_path / "lost")
    getattr(config.benchmarks, name).__dict__["path"] = lost
    with caplog.at_level(logging.INFO):
        benchmark_eval(config, dry_run=True)
    (line,) = [r.message for r in caplog.records if r.message.startswith(f"{name}: ")]
    assert line.startswith(f"{name}: would not run: data missing at {lost}: benchmarks.{name}.path: ")
    assert f"{lost} is not there" in line


def test_local_files_download_nothing(workspace: EvaluationConfig, tmp_path: Path) -> None:
    config = fetched_by_default(workspace)
    config.benchmarks.realtoxicityprompts.__dict__["path"] = str(tmp_path)
    assert "downloads" not in str(cost_of("realtoxicityprompts", config))
    assert cost_of("hh_holdout", config) is None


def test_a_result_of_a_local_path_keeps_the_key_of_an_earlier_version(tmp_path: Path) -> None:
    path = str(tmp_path)
    earlier = {
        "path": path,
        "revision": "main",
        "max_behaviors": None,
        "attacks": None,
        "max_new_tokens": 150,
    }
    assert _read_of(JailbreakBenchConfig(path=path)) == earlier | {"judge_prompt": None}
    assert list(_read_of(MtBenchConfig(path=path))) == ["path", "max_questions", "max_new_tokens", "pairwise"]
    assert _read_of(RealToxicityPromptsConfig(path=path))["revision"] == "main"
    assert _read_of(MtBenchConfig())["revision"] == MtBenchConfig().revision
