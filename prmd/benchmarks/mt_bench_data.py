"""The files of MT-Bench as published by FastChat: questions, reference answers, the judge's templates and its replies.

The files are not part of this project; every mistake in one names file, row and field.
"""

import hashlib
import re
import string
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from prmd.artifacts import io
from prmd.artifacts.hub import is_offline
from prmd.artifacts.paths import ArtifactPaths, find_user_path
from prmd.benchmarks.truthfulqa import strided
from prmd.config.evaluation import MtBenchConfig
from prmd.errors import ConfigError, DataError
from prmd.pairs import Message

REFERENCE_CATEGORIES = frozenset({"math", "reasoning", "coding"})
"""Categories whose answers the judge compares with a reference answer."""
LOWEST, HIGHEST = 1.0, 10.0
"""Ends of the scale the templates ask for."""

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_IN_SINGLE_BRACKETS = re.compile(r"\[(\d+\.?\d*)\]")
_SINGLE_FIELDS = {"question", "answer", "ref_answer_1"}
_FIELDS = {
    "single-v1": _SINGLE_FIELDS,
    "single-math-v1": _SINGLE_FIELDS,
    "single-v1-multi-turn": {"question_1", "question_2", "answer_1", "answer_2"},
    "single-math-v1-multi-turn": {
        *("question_1", "question_2", "answer_1", "answer_2", "ref_answer_1", "ref_answer_2")
    },
    "pair-v2": {"question", "answer_a", "answer_b"},
    "pair-math-v1": {"question", "answer_a", "answer_b", "ref_answer_1"},
    "pair-v2-multi-turn": {
        *("question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2")
    },
    "pair-math-v1-multi-turn": {
        *("question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"),
        *("ref_answer_1", "ref_answer_2"),
    },
}
"""The templates in use and what each may ask for."""


@dataclass(frozen=True)
class Template:
    """A judge's instructions: a system message and a user message with fields to fill."""

    system: str
    user: str

    def fill(self, fields: Mapping[str, str]) -> list[Message]:
        """The prompt; fields that the template does not name are left out."""
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.user.format_map(fields)},
        ]


def read_templates(path: Path) -> dict[str, Template]:
    """The eight templates of FastChat's `judge_prompts.jsonl`.

    Raises:
        DataError: one is missing, comes twice, lacks a text, or has a field that nothing fills.
    """
    found: dict[str, Template] = {}
    for number, row in enumerate(io.read_jsonl(path), start=1):
        name = row.get("name")
        if not isinstance(name, str) or name not in _FIELDS:
            continue
        where = f"{path}:{number}: template {name!r}"
        if name in found:
            raise DataError(f"{where} is there twice; remove one")
        for key in ("system_prompt", "prompt_template"):
            if not isinstance(row.get(key), str):
                raise DataError(f"{where}: {key!r} must be text, got {row.get(key)!r:.40}; mend this line")
        if unknown := _placeholders(row["prompt_template"], where) - _FIELDS[name]:
            raise DataError(f"{where}: asks for {sorted(unknown)}, it may name {sorted(_FIELDS[name])}")
        found[name] = Template(row["system_prompt"], row["prompt_template"])
    if missing := sorted(set(_FIELDS) - set(found)):
        raise DataError(f"{path}: lacks the templates {', '.join(missing)}; fetch the file again")
    return found


def _placeholders(text: str, where: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise DataError(f"{where}: a brace is not closed ({error}); fetch the file again") from error


def template_name(kind: Literal["single", "pair"], *, category: str, turn: int) -> str:
    """The template for a question of a category and a turn (1 or 2)."""
    plain = {"single": "single-v1", "pair": "pair-v2"}[kind]
    name = f"{kind}-math-v1" if category in REFERENCE_CATEGORIES else plain
    return name if turn == 1 else f"{name}-multi-turn"


def single_prompt(
    templates: Mapping[str, Template],
    *,
    category: str,
    turn: int,
    questions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[str],
) -> list[Message]:
    """The judge's prompt for one answer.

    Args:
        turn: 1, or 2 for the second answer with both turns shown.
        questions: both turns' questions; `answers` and `references` likewise (no references: none are asked for).
    """
    fields = _numbered("question", questions) | _numbered("answer", answers)
    fields |= _numbered("ref_answer", references) | {"question": questions[0], "answer": answers[0]}
    return templates[template_name("single", category=category, turn=turn)].fill(fields)


def pair_prompt(
    templates: Mapping[str, Template],
    *,
    category: str,
    turn: int,
    questions: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    references: Sequence[str],
) -> list[Message]:
    """The judge's prompt for two assistants' answers, A shown first."""
    fields = _numbered("question", questions) | _numbered("ref_answer", references)
    fields |= _numbered("answer_a", answers_a) | _numbered("answer_b", answers_b)
    fields |= {"question": questions[0], "answer_a": answers_a[0], "answer_b": answers_b[0]}
    return templates[template_name("pair", category=category, turn=turn)].fill(fields)


def _numbered(name: str, texts: Sequence[str]) -> dict[str, str]:
    return {f"{name}_{number}": text for number, text in enumerate(texts, start=1)}


def parse_rating(reply: str) -> float | None:
    """The rating in a judge's reply, or None.

    The first `[[number]]`, else the first `[number]`, as FastChat reads it. Unlike there a number outside 1 to 10 is no
    rating: `[[95]]` would count as 95.
    """
    found = _RATING.search(reply) or _RATING_IN_SINGLE_BRACKETS.search(reply)
    rating = float(found[1]) if found else None
    return rating if rating is not None and LOWEST <= rating <= HIGHEST else None


def parse_verdict(reply: str) -> str | None:
    """Which of two answers a judge prefers, `first` (shown as A), `second` or `tie`; None where its reply does not say."""
    for mark, verdict in (("[[A]]", "first"), ("[[B]]", "second"), ("[[C]]", "tie")):
        if mark in reply:
            return verdict
    return None


QUESTIONS, TEMPLATES = "question.jsonl", "judge_prompts.jsonl"
REFERENCES = "reference_answer/gpt-4.jsonl"
FILES = (QUESTIONS, TEMPLATES, REFERENCES)


UPSTREAM = "lm-sys/FastChat"
_ADDRESS = "https://raw.githubusercontent.com/{repository}/{revision}/fastchat/llm_judge/data/{name}"
_PUBLISHED = {
    QUESTIONS: (
        "mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    TEMPLATES: ("judge_prompts.jsonl", "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6"),
    REFERENCES: (
        "mt_bench/reference_answer/gpt-4.jsonl",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    ),
}
"""File -> where FastChat has it, and the sha256 of the pinned revision."""
_FETCH_SECONDS = 30.0


def is_upstream(path: str) -> bool:
    """Whether the files are to be fetched from FastChat's repository."""
    return path == UPSTREAM and find_user_path(path, "folder") is None


def fetch_files(revision: str, paths: ArtifactPaths) -> Path:
    """The folder below `data/raw` with FastChat's three files, fetched once.

    Raises:
        ConfigError: they cannot be fetched.
        DataError: a file of the pinned revision has another content.
    """
    folder = paths.raw("mt_bench")
    pinned = MtBenchConfig().revision
    for name, (place, sha256) in _PUBLISHED.items():
        if (folder / name).is_file() and revision == pinned and io.file_sha256(folder / name) == sha256:
            continue
        content = _fetched(_ADDRESS.format(repository=UPSTREAM, revision=revision, name=place))
        if revision == pinned and hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(
                f"benchmarks.mt_bench: {place} of {UPSTREAM} at {revision} is not the file that was published; fetch the "
                "three files elsewhere and set benchmarks.mt_bench.path to their folder"
            )
        io.write_text(folder / name, content.decode("utf-8"))
    return folder


def _fetched(address: str) -> bytes:
    problem = "switched off by HF_HUB_OFFLINE"
    if not is_offline():
        try:
            with urllib.request.urlopen(address, timeout=_FETCH_SECONDS) as reply:
                return reply.read()
        except (OSError, HTTPException) as error:  # unreachable, unknown revision, broken off
            problem = str(error)
    raise ConfigError(
        f"benchmarks.mt_bench.path: cannot get {address} ({problem}); check the connection, or set it to a folder with the "
        "three files"
    )


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
