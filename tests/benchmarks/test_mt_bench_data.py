"""`benchmarks.mt_bench_data` and the prompts of `benchmarks.mt_bench_data`: the published files, and files with mistakes."""

from pathlib import Path
from typing import Any

import pytest
from tiny_mt_bench import BODIES, changed, write_files

from prmd.benchmarks.mt_bench import TEMPERATURES
from prmd.benchmarks.mt_bench_data import (
    pair_prompt,
    read_mt_bench,
    read_templates,
    single_prompt,
    template_name,
)
from prmd.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "mt-bench"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="needs MT-Bench's files as published")


@needs_files
def test_the_published_files_hold_80_questions_in_eight_categories() -> None:
    data = read_mt_bench(SHARED, None)
    categories = [q.category for q in data.questions]
    assert len(categories) == 80 and {categories.count(c) for c in set(categories)} == {10}
    assert set(categories) == set(TEMPERATURES)
    assert sum(bool(q.references) for q in data.questions) == 30
    assert [q.id for q in data.questions if q.references] == [str(i) for i in range(101, 131)]
    assert {q.category for q in read_mt_bench(SHARED, 8).questions} == set(
        categories
    )  # spread, not the first


@needs_files
@pytest.mark.parametrize("turn", [1, 2])
def test_published_templates_are_filled_with_everything_a_judge_needs(turn: int) -> None:
    data = read_mt_bench(SHARED, None)
    for question in data.questions[:30:7] + data.questions[30:50:7]:
        shared = {"category": question.category, "turn": turn, "questions": question.turns}
        single = single_prompt(
            data.templates, answers=("{ours}", "ours 2"), references=question.references, **shared
        )
        pair = pair_prompt(
            data.templates,
            answers_a=("ours 1", "ours 2"),
            answers_b=("theirs 1", "theirs 2"),
            references=question.references,
            **shared,
        )
        wanted = [question.turns[0], *question.references[:turn]]
        wanted += [question.turns[1], "ours 2"] if turn == 2 else []
        assert [m["role"] for m in single] == ["system", "user"]
        assert all(text in single[1]["content"] for text in [*wanted, "{ours}"])
        assert all(text in pair[1]["content"] for text in [*wanted, "ours 1", "theirs 1"])
        assert ("ours 2" in single[1]["content"]) == ("theirs 2" in pair[1]["content"]) == (turn == 2)


@pytest.mark.parametrize(
    ("category", "turn", "single", "pair"),
    [
        ("writing", 1, "single-v1", "pair-v2"),
        ("stem", 2, "single-v1-multi-turn", "pair-v2-multi-turn"),
        ("math", 1, "single-math-v1", "pair-math-v1"),
        ("coding", 2, "single-math-v1-multi-turn", "pair-math-v1-multi-turn"),
        ("reasoning", 1, "single-math-v1", "pair-math-v1"),
    ],
)
def test_four_templates_each(category: str, turn: int, single: str, pair: str) -> None:
    assert template_name("single", category=category, turn=turn) == single
    assert template_name("pair", category=category, turn=turn) == pair


@pytest.mark.parametrize(
    ("file", "row", "values", "message"),
    [
        ("question.jsonl", 1, {"question_id": "DELETED"}, r"question\.jsonl:2: question_id"),
        ("question.jsonl", 2, {"question_id": 81}, r"question\.jsonl:3: question_id 81 is there twice"),
        ("question.jsonl", 0, {"turns": ["only one"]}, r"question\.jsonl:1: turns"),
        ("question.jsonl", 0, {"turns": ["one", " "]}, r"question\.jsonl:1: turns"),
        ("question.jsonl", 0, {"category": 7}, r"question\.jsonl:1: category"),
        ("question.jsonl", 0, {"category": "coding"}, r"question\.jsonl:1: coding question 81 has no answer"),
        ("reference_answer/gpt-4.jsonl", 1, {"question_id": 82}, r"gpt-4\.jsonl:2: question_id 82"),
        ("reference_answer/gpt-4.jsonl", 0, {"choices": []}, r"gpt-4\.jsonl:1: choices"),
        ("judge_prompts.jsonl", 0, {"name": "other"}, r"lacks the templates single-v1;"),
        ("judge_prompts.jsonl", 0, {"name": ["single-v1"]}, r"lacks the templates single-v1;"),
        ("judge_prompts.jsonl", 1, {"name": "single-v1"}, r":2: template 'single-v1' is there twice"),
        ("judge_prompts.jsonl", 0, {"prompt_template": "{answer_b}"}, r":1: template .* \['answer_b'\]"),
        ("judge_prompts.jsonl", 0, {"prompt_template": "{question"}, r":1: template .* brace"),
        ("judge_prompts.jsonl", 0, {"system_prompt": None}, r":1: template .* 'system_prompt'"),
    ],
)
def test_a_malformed_row_is_named(
    tmp_path: Path, file: str, row: int, values: dict[str, Any], message: str
) -> None:
    folder = write_files(tmp_path / "files")
    changed(folder / file, row, **values)
    with pytest.raises(DataError, match=message):
        read_mt_bench(folder, None)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = write_files(tmp_path / "files") / "question.jsonl"
    path.write_bytes(path.read_bytes().replace(b"first", b"fir\xff\xfe"))
    with pytest.raises(DataError, match=r"question\.jsonl.*UTF-8"):
        read_mt_bench(path.parent, None)


def test_templates_of_other_names_are_no_mistake(tmp_path: Path) -> None:
    path = write_files(tmp_path / "files") / "judge_prompts.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"name": "single-v2"}\n', encoding="utf-8")
    assert set(read_templates(path)) == set(BODIES)
