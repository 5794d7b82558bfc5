"""The files of MT-Bench as published by FastChat: questions, reference answers, the judge's templates.

Reading and checking alone; every mistake in a file names file, row and field. The files are not part of this project.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.benchmarks.mt_bench_judging import REFERENCE_CATEGORIES, Template, read_templates
from prmd.benchmarks.truthfulqa import strided
from prmd.errors import DataError

QUESTIONS, TEMPLATES = "question.jsonl", "judge_prompts.jsonl"
REFERENCES = "reference_answer/gpt-4.jsonl"
FILES = (QUESTIONS, TEMPLATES, REFERENCES)


@dataclass(frozen=True)
class MtBenchQuestion:
    """One question: what the user says in both turns, and reference answers where the category has them."""

    id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class MtBenchData:
    """The benchmark's files; `sha256` is a key of all three."""

    questions: list[MtBenchQuestion]
    templates: Mapping[str, Template]
    sha256: str


def read_mt_bench(folder: Path, limit: int | None) -> MtBenchData:
    """Questions with their references, and the judge's templates.

    Args:
        limit: at most so many questions, spread evenly over the file.

    Raises:
        DataError: a row lacks a field or repeats an id, or a reference answer is missing; names file and row.
    """
    references = _read_references(folder / REFERENCES)
    questions: dict[str, MtBenchQuestion] = {}
    for number, row in enumerate(io.read_jsonl(folder / QUESTIONS), start=1):
        where = f"{folder / QUESTIONS}:{number}"
        key, turns = _id(row, where), _texts(row.get("turns"), f"{where}: turns")
        if not isinstance(row.get("category"), str):
            raise DataError(f"{where}: category: got {row.get('category')!r}, wanted text; mend this row")
        if key in questions:
            raise DataError(f"{where}: question_id {key} is there twice; remove one row")
        if row["category"] in REFERENCE_CATEGORIES and key not in references:
            raise DataError(
                f"{where}: {row['category']} question {key} has no answer in {REFERENCES}; add it"
            )
        questions[key] = MtBenchQuestion(key, row["category"], turns, references.get(key, ()))
    if not questions:
        raise DataError(f"{folder / QUESTIONS}: no questions; fetch the file again")
    files = [io.file_sha256(folder / name) for name in FILES]
    return MtBenchData(
        strided(list(questions.values()), limit), read_templates(folder / TEMPLATES), io.fingerprint(files)
    )


def _read_references(path: Path) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(io.read_jsonl(path), start=1):
        where = f"{path}:{number}"
        choices, key = row.get("choices"), _id(row, where)
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise DataError(f"{where}: choices: wanted a list of one answer with turns; mend this row")
        if key in found:
            raise DataError(f"{where}: question_id {key} is there twice; remove one row")
        found[key] = _texts(choices[0].get("turns"), f"{where}: choices[0].turns")
    return found


def _id(row: dict[str, Any], where: str) -> str:
    value = row.get("question_id")
    if not isinstance(value, (int, str)) or value == "":
        raise DataError(f"{where}: question_id: got {value!r}, wanted a number or a name; mend this row")
    return str(value)


def _texts(value: Any, where: str) -> tuple[str, str]:
    good = (
        isinstance(value, list) and len(value) == 2 and all(isinstance(t, str) and t.strip() for t in value)
    )
    if not good:
        raise DataError(f"{where}: got {value!r:.80}, wanted two texts that are not empty; mend this row")
    return value[0], value[1]
