"""Rows of a fetched file, and the pairs made of them with every row that cannot be used and why."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.data.readers import Row
from prmd.pairs import PreferencePair


@dataclass(frozen=True)
class StoredRows:
    """Rows of a JSON Lines file, read anew whenever they are iterated over, so that they are never all in memory."""

    path: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Row]:
        return io.iterate_jsonl(self.path)


@dataclass(frozen=True)
class RawFile:
    """One file of a source, read back.

    Attributes:
        source: `hh_rlhf`, `truthfulqa`, `pku_safe_rlhf`, `embedded` or `own_pairs`.
        label: `helpful-base/train`.
        upstream_split: `train`, `test` or None.
        path: the file, for messages.
        rows: its rows; row i is line i + 1.
    """

    source: str
    label: str
    upstream_split: str | None
    path: Path
    rows: list[Row] | StoredRows

    def where(self, index: int) -> str:
        """The `source` of the pair made from row `index` (0-based): `hh_rlhf/helpful-base/train:12`."""
        return f"{self.source}/{self.label}:{index + 1}"


@dataclass(frozen=True, slots=True)
class SourcedPair:
    """A pair and the split its source gives it: `train`, `test`, or None where the source is not split."""

    pair: PreferencePair
    upstream_split: str | None


@dataclass(frozen=True)
class PairCollection:
    """What was made of some source.

    Attributes:
        pairs: the usable pairs.
        quarantine: the refused rows: `source`, `objective` (None: of all), `reason`, `row`, and `detail` where the reason
            needs one.
        counts: other facts worth reporting, by name.
        read: rows by objective (of scored responses: pairs of two), where each row is of one objective; else empty.
        left_out: usable ones of these that make no pair all the same, by objective and reason.
        benchmark_questions: TruthfulQA questions of which no pair was made; None where TruthfulQA takes no part.
    """

    pairs: list[SourcedPair] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    benchmark_questions: list[str] | None = None

    def refuse(
        self,
        *,
        source: str,
        objective: str | None,
        reason: str,
        row: Mapping[str, Any],
        detail: str | None = None,
    ) -> None:
        refused = {"source": source, "objective": objective, "reason": reason, "row": dict(row)}
        self.quarantine.append(refused | ({"detail": detail} if detail else {}))


def merge(collections: Iterable[PairCollection]) -> PairCollection:
    """All collections as one."""
    total = PairCollection()
    questions = None
    for part in collections:
        total.pairs.extend(part.pairs)
        total.quarantine.extend(part.quarantine)
        total.counts.update(part.counts)
        total.read.update(part.read)
        for objective, counts in part.left_out.items():
            total.left_out[objective].update(counts)
        questions = part.benchmark_questions if part.benchmark_questions is not None else questions
    return replace(total, benchmark_questions=questions)
