"""The benchmarks by name.

A benchmark is a function of the evaluation's configuration and one candidate. To add one: a module here with a function of
that type, its name in `BENCHMARKS`, in `config.BenchmarksConfig.run` and in `evaluation_config.yaml`.
"""

from collections.abc import Callable, Sequence

from prmd.benchmarks import (
    hh_holdout,
    jailbreakbench,
    mt_bench,
    realtoxicityprompts,
    truthfulqa,
    truthfulqa_generation,
)
from prmd.benchmarks.base import BenchmarkResult
from prmd.config.evaluation import EvaluationConfig
from prmd.inference.candidates import CandidateModels

Benchmark = Callable[[EvaluationConfig, CandidateModels], BenchmarkResult]

BENCHMARKS: dict[str, Benchmark] = {
    "hh_holdout": hh_holdout.run_hh_holdout,
    "heldout_pairs": hh_holdout.run_heldout_pairs,
    "truthfulqa": truthfulqa.run_truthfulqa,
    "truthfulqa_generation": truthfulqa_generation.run_truthfulqa_generation,
    "realtoxicityprompts": realtoxicityprompts.run_realtoxicityprompts,
    "jailbreakbench": jailbreakbench.run_jailbreakbench,
    "mt_bench": mt_bench.run_mt_bench,
}
"""Name -> what runs it; what lacks its data or its judge says so in its result."""


COMPANIONS = {"hh_holdout": "heldout_pairs", "truthfulqa": "truthfulqa_generation"}
"""Benchmarks that run with another: the approach's own held-out pairs, and the same questions answered in words."""


def benchmark_names(run: Sequence[str]) -> tuple[str, ...]:
    """What `benchmarks.run` asks for, each with its companion."""
    names = []
    for name in run:
        names += [name, COMPANIONS[name]] if name in COMPANIONS else [name]
    return tuple(names)
