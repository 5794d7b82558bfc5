"""Running the benchmarks on one candidate.

Each result is a file of its own, written as soon as it is there; one with the same inputs is reused and says so.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.paths import REFERENCE, find_user_path
from prmd.artifacts.runs import is_as_recorded, read_run, vouch_again
from prmd.benchmarks import TASKS, benchmark_names
from prmd.benchmarks.base import BenchmarkResult, NotRunError, content_key
from prmd.config.evaluation import (
    EvaluationConfig,
    JailbreakBenchConfig,
    MtBenchConfig,
    RealToxicityPromptsConfig,
)
from prmd.errors import DataError, NotFiniteError
from prmd.inference.candidates import Candidate, CandidateModels
from prmd.judges.endpoint import EndpointError

logger = logging.getLogger(__name__)

_ITEMS_VERSION = 2
"""Of what items hold; older results would have no outcomes to compare."""


def run_benchmarks(
    config: EvaluationConfig,
    candidate: Candidate,
    *,
    reference: Candidate,
    tokenizer: PreTrainedTokenizerBase,
    force: bool,
) -> list[dict[str, Any]]:
    """Every benchmark of `benchmarks.run` on one candidate.

    Returns:
        The contents of the files `outputs/benchmarks/<name>/<approach>/<method>.json`.
    """
    results = []
    with CandidateModels(
        *(config.shared, config.generation, candidate),
        reference=reference,
        tokenizer=tokenizer,
        max_length=config.reward_model_config.training.max_length,
    ) as models:
        for name in benchmark_names(config.benchmarks.run):
            path = config.paths.benchmark(name) / f"{candidate.method}.json"
            key = _fingerprint(name, config, models)
            if not force and _is_finished(path, key):
                logger.info(
                    "%s on %s: finished before with the same inputs, reused: %s", name, candidate.method, path
                )
            else:
                _run_one(name, partial(TASKS[name].run, config, models), path, config.paths.approach, key)
            results.append({"not_finite": False, **io.read_json(path)})
    return results


def _fingerprint(name: str, config: EvaluationConfig, models: CandidateModels) -> str:
    """Key of everything a result depends on: weights, data, judges, and settings of this benchmark alone."""
    shared, task = config.shared, TASKS[name]
    sections = [getattr(config.benchmarks, task.section), shared.data.truthfulqa]
    sections += [config.text_judge] if task.text_judged else []
    judge = read_run(config.paths.judge("honest")) or {} if task.honest_judged else {}
    return io.fingerprint(
        [
            [name, _ITEMS_VERSION, models.candidate.fingerprint, models.reference.fingerprint],
            [(read_run(config.paths.processed) or {}).get("fingerprint"), judge.get("started")],
            [[_read_of(s), content_key(s)] for s in sections],
            [config.reward_model_config.training.max_length, config.bootstrap_resamples, shared.seed],
        ]
    )


def _read_of(section: BaseModel) -> dict[str, Any]:
    """The settings of a section that are read, as earlier versions wrote them.

    A local path reads no revision. Their default was "main", and `mt_bench` had none: what they finished stays finished.
    """
    values = section.model_dump(mode="json")
    if isinstance(section, RealToxicityPromptsConfig | JailbreakBenchConfig | MtBenchConfig) and (
        section.path is None or find_user_path(section.path)
    ):
        values["revision"] = "main"
        if isinstance(section, MtBenchConfig):
            del values["revision"]
    return values


_ROWS = ("items", "samples", "judgements")
"""Fields of a result that are files of their own."""


def _is_finished(path: Path, key: str) -> bool:
    rows = [f"{path.stem}.{kind}.jsonl" for kind in _ROWS]
    for file in (path, *map(path.with_name, rows)):
        if file.is_dir():
            raise DataError(f"{file}: is a folder, wanted a file; remove it and give the same command again")
    if not path.is_file() or not is_as_recorded(path.parent, path.name, *rows):
        return False
    found = io.read_json(path)
    lost = found.get("n", 0) and not path.with_name(rows[0]).is_file()
    return found.get("status") == "done" and found.get("fingerprint") == key and not lost


def _stoppable(benchmark: Callable[[], BenchmarkResult], method: str) -> BenchmarkResult:
    """A benchmark did not run that lacks something, whose judge stops answering (samples and verdicts are kept for the next
    run), or whose policy is not finite; a reference that is not finite stops everything.
    """
    try:
        return benchmark()
    except NotRunError as error:
        return BenchmarkResult(reason=str(error))
    except EndpointError as error:
        return BenchmarkResult(reason=f"judging stopped: {error}")
    except NotFiniteError as error:
        if method == REFERENCE:
            raise
        logger.warning("policy %s is left out: %s", method, error)
        return BenchmarkResult(reason=str(error), not_finite=True)


def _run_one(
    name: str, benchmark: Callable[[], BenchmarkResult], path: Path, approach: str, key: str
) -> None:
    method, started = path.stem, time.monotonic()
    result = _stoppable(benchmark, method)
    if result.reason is None:
        for kind in _ROWS:
            if rows := getattr(result, kind):
                vouch_again(io.write_jsonl(path.with_name(f"{method}.{kind}.jsonl"), rows))
    seconds = time.monotonic() - started
    said = f"done, n = {len(result.items)}" if result.reason is None else f"not run: {result.reason}"
    level = logging.INFO if result.reason is None else logging.DEBUG  # the stage says once what did not run
    logger.log(level, "%s on %s: %s, %.0f s", result.label or name, method, said, seconds)
    record = {
        "benchmark": result.label or name,
        "name": name,
        "method": method,
        "approach": approach,
        "status": result.status,
        "reason": result.reason,
        "metrics": result.metrics,
        "data_sha256": result.data_sha256,
        "judge": result.judge,
        "n": len(result.items),
        "seconds": round(seconds, 2),
        "fingerprint": key,
    }
    if result.not_finite:
        record["not_finite"] = True
    vouch_again(io.write_json(path, record))
