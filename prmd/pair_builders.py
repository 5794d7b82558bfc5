"""Preference pairs from HH-RLHF, TruthfulQA and the embedded files, with every row that cannot be used and why.

PKU-SafeRLHF is in `pairs_pku`, transcript parsing in `transcripts`; which pair goes to which split is decided in `splits`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prmd.config.shared import HhRlhfConfig, TruthfulQaConfig
from prmd.pairs import PreferencePair, hash_share, make_pair, prompt_key
from prmd.raw_data import RawFile
from prmd.runtime import progress
from prmd.transcripts import TranscriptError, compare_transcripts


@dataclass(frozen=True)
class SourcedPair:
    """A pair and the split its source gives it: `train`, `test`, or None where the source is not split."""

    pair: PreferencePair
    upstream_split: str | None


@dataclass(frozen=True)
class PairCollection:
    """What was made of some source.

    Attributes:
        pairs: the usable pairs.
        quarantine: the refused rows: `source`, `objective` (None: of all), `reason`, `row`.
        counts: other facts worth reporting, by name.
        benchmark_questions: TruthfulQA questions of which no pair was made; None where TruthfulQA takes no part.
    """

    pairs: list[SourcedPair] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    benchmark_questions: list[str] | None = None

    def refuse(self, *, source: str, objective: str | None, reason: str, row: Mapping[str, Any]) -> None:
        self.quarantine.append({"source": source, "objective": objective, "reason": reason, "row": dict(row)})


def merge(collections: Iterable[PairCollection]) -> PairCollection:
    """All collections as one."""
    total = PairCollection()
    questions = None
    for part in collections:
        total.pairs.extend(part.pairs)
        total.quarantine.extend(part.quarantine)
        total.counts.update(part.counts)
        questions = part.benchmark_questions if part.benchmark_questions is not None else questions
    return PairCollection(total.pairs, total.quarantine, total.counts, questions)


def hh_rlhf_pairs(files: Iterable[RawFile], settings: HhRlhfConfig) -> PairCollection:
    """Pairs of HH-RLHF: `helpful_subsets` for helpful, `harmless_subsets` for harmless."""
    collection = PairCollection()
    subsets = {"helpful": settings.helpful_subsets, "harmless": settings.harmless_subsets}
    for file in files:
        subset = file.label.split("/")[0]
        objectives = [objective for objective, names in subsets.items() if subset in names]
        for index, row in enumerate(progress(file.rows, len(file.rows), f"pairs of {file.label}")):
            for objective in objectives:
                _add_hh_row(collection, row, source=file.where(index), objective=objective, file=file)
    return collection


def _add_hh_row(
    collection: PairCollection, row: dict[str, Any], *, source: str, objective: str, file: RawFile
) -> None:
    try:
        if not isinstance(row.get("chosen"), str) or not isinstance(row.get("rejected"), str):
            raise TranscriptError("malformed")
        sides = compare_transcripts(row["chosen"], row["rejected"])
    except TranscriptError as error:
        collection.refuse(source=source, objective=objective, reason=str(error), row=row)
        return
    pair = make_pair(
        prompt=sides.chosen.prompt,
        chosen=sides.chosen.response,
        rejected=sides.rejected.response,
        source=source,
        objective=objective,
    )
    collection.pairs.append(SourcedPair(pair, file.upstream_split))


def truthfulqa_pairs(files: Iterable[RawFile], settings: TruthfulQaConfig) -> PairCollection:
    """Honest pairs of TruthfulQA: a correct answer against an incorrect one.

    A share `benchmark_fraction` of the questions, by hash, is left to the benchmark and gives no pair in any split. Each
    other question gives up to `pairs_per_question` pairs: the best answer, then the other correct ones, against the
    incorrect answers in their order.
    """
    collection = PairCollection(benchmark_questions=[])
    for file in files:
        for index, row in enumerate(file.rows):
            question = row["question"]
            if hash_share("truthfulqa benchmark", prompt_key(question)) < settings.benchmark_fraction:
                collection.benchmark_questions.append(question)
            else:
                _add_question(collection, row, source=file.where(index), limit=settings.pairs_per_question)
    collection.counts["truthfulqa_benchmark_questions"] = len(collection.benchmark_questions)
    return collection


def _add_question(collection: PairCollection, row: dict[str, Any], *, source: str, limit: int) -> None:
    correct = list(dict.fromkeys([row["best_answer"], *row["correct_answers"]]))
    correct = [answer for answer in correct if answer]
    incorrect = [answer for answer in dict.fromkeys(row["incorrect_answers"]) if answer not in correct]
    if not row["question"]:
        collection.refuse(source=source, objective="honest", reason="empty_prompt", row=row)
    elif not correct or not incorrect:
        collection.refuse(source=source, objective="honest", reason="empty_response", row=row)
    else:
        prompt = [{"role": "user", "content": row["question"]}]
        for number, rejected in enumerate(incorrect[:limit]):
            chosen = correct[number % len(correct)]
            pair = make_pair(
                prompt=prompt, chosen=chosen, rejected=rejected, source=source, objective="honest"
            )
            collection.pairs.append(SourcedPair(pair, None))


def embedded_pairs(files: Iterable[RawFile]) -> PairCollection:
    """The pairs written for this project, one file per objective.

    Raises:
        DataError: a row breaks a rule of the format; names file and line (these files are ours: none may be refused).
    """
    collection = PairCollection()
    for file in files:
        for index, row in enumerate(file.rows):
            pair = PreferencePair.from_row(row, objective=file.label, where=f"{file.path}:{index + 1}")
            collection.pairs.append(SourcedPair(pair, None))
    return collection
