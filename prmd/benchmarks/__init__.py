"""The benchmarks by name. To add one: a module here that ends in its `Task`, its row in `TASKS`, and the section it reads."""

from collections.abc import Sequence

from prmd.benchmarks import (
    hh_holdout,
    jailbreakbench,
    mt_bench,
    realtoxicityprompts,
    truthfulqa,
    truthfulqa_generation,
)
from prmd.benchmarks.base import Task

TASKS: dict[str, Task] = {
    "hh_holdout": hh_holdout.TASK,
    "heldout_pairs": hh_holdout.OWN_PAIRS,
    "truthfulqa": truthfulqa.TASK,
    "truthfulqa_generation": truthfulqa_generation.TASK,
    "realtoxicityprompts": realtoxicityprompts.TASK,
    "jailbreakbench": jailbreakbench.TASK,
    "mt_bench": mt_bench.TASK,
}


def benchmark_names(run: Sequence[str]) -> tuple[str, ...]:
    """What `benchmarks.run` asks for, each with those that read the same settings."""
    return tuple(name for section in run for name, task in TASKS.items() if task.section == section)
