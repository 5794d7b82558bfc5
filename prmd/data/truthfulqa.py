"""TruthfulQA: its files in both forms, and honest pairs of the questions that are not left to the benchmark."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prmd.config.shared import DataConfig, TruthfulQaConfig
from prmd.data.collection import PairCollection, RawFile, SourcedPair
from prmd.data.readers import (
    Row,
    SourceFile,
    first_existing,
    hub_file,
    local_file,
    local_path,
    open_csv,
    parquet_rows,
    split_rows,
)
from prmd.errors import DataError
from prmd.pairs import broken_text, hash_share, make_pair, prompt_key


def plan_truthfulqa(data: DataConfig) -> list[SourceFile]:
    """The one file of questions, as published or in the hub's form."""
    settings = data.truthfulqa
    key = "data.truthfulqa.path"
    path = local_path(settings.path, key)
    label = "generation"
    if path is None:
        hub = partial(split_rows, key, settings.path, settings.revision, "validation", name="generation")
        return [hub_file("truthfulqa", label, None, settings, lambda: map(truthfulqa_row, hub()))]
    if path.is_dir():
        path = first_existing(path, ("TruthfulQA.csv", "generation/validation-*.parquet"), key)
    rows = partial(parquet_rows, path) if path.suffix == ".parquet" else partial(csv_rows, path)
    return [local_file(path, label, None, read=lambda: _questions(rows(), path))]


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of TruthfulQA.csv, by its column names.

    Raises:
        DataError: it is not UTF-8, no CSV file, or lacks a column; names it.
    """
    with open_csv(path) as reader:
        missing = {"Question", "Best Answer", "Correct Answers", "Incorrect Answers"} - set(
            reader.fieldnames or ()
        )
        if missing:
            raise DataError(
                f"{path}: the columns {sorted(missing)} are missing; it must be TruthfulQA.csv as published"
            )
        yield from reader


def _questions(rows: Iterable[Mapping[str, Any]], path: Path) -> Iterator[Row]:
    """`truthfulqa_row` of each row of a local file; one whose cells are not what they should be is named."""
    for number, row in enumerate(rows, start=1):
        try:
            yield truthfulqa_row(row)
        except (KeyError, AttributeError, TypeError) as error:
            raise DataError(
                f"{path}: row {number}: wanted a text in Question and Best Answer and texts in Correct and Incorrect "
                f"Answers, got {dict(row)!r:.80}; mend or fetch the file again"
            ) from error


def truthfulqa_row(row: Mapping[str, Any]) -> Row:
    """One question in one form, from the CSV (answers separated by `;`) or the hub (lists).

    Answers are stripped, empty ones dropped, and a full stop is added where missing, as the benchmark's authors do.
    """
    plain = {key.lower().replace(" ", "_"): value for key, value in row.items()}

    def answers(value: str | list[str]) -> list[str]:
        parts = [p.strip() for p in (value.split(";") if isinstance(value, str) else value)]
        return [p if p.endswith(".") else f"{p}." for p in parts if p]

    best = answers([plain["best_answer"]])
    return {
        "question": plain["question"].strip(),
        "best_answer": best[0] if best else "",
        "correct_answers": answers(plain["correct_answers"]),
        "incorrect_answers": answers(plain["incorrect_answers"]),
        "type": plain["type"] if isinstance(plain.get("type"), str) else None,
        "category": plain["category"] if isinstance(plain.get("category"), str) else None,
    }


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
            texts = (question, row["best_answer"], *row["correct_answers"], *row["incorrect_answers"])
            if broken_text(*texts):
                collection.refuse(source=file.where(index), objective="honest", reason="broken_text", row=row)
            elif hash_share("truthfulqa benchmark", prompt_key(question)) < settings.benchmark_fraction:
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
