"""What a benchmark gives back, and how an accuracy is written into it.

The benchmarks themselves are one module each beside this one; `prmd.benchmarks` lists them.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prmd.statistics.intervals import accuracy_with_ties


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark on one contender.

    Attributes:
        reason: why it did not run; None where it did.
        metrics: name -> estimate with `chance` (None where guessing has no defined score).
        items: one row per question or pair, for paired comparisons and for reading.
        data_sha256: of the data it ran on.
        label: what the metrics are called in tables where they depend on a judge, such as `mt_bench[judge=...]`; None: the
            benchmark's name.
        judge: the judge's card; None where nothing was judged.
        samples: what was generated, one row per response, in a file of its own.
        judgements: what the judge said, one row per verdict, in a file of its own.
    """

    reason: str | None = None
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    data_sha256: str | None = None
    label: str | None = None
    judge: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    judgements: list[dict[str, Any]] = field(default_factory=list)

    @property
    def status(self) -> str:
        return "done" if self.reason is None else "not run"


def accuracy(margins: np.ndarray) -> dict[str, Any]:
    """Share of positive margins, ties one half and counted, with its Wilson interval; chance is one half."""
    found = accuracy_with_ties(margins)
    return {"value": found.pop("accuracy"), **found, "chance": 0.5}
