"""MT-Bench for tests: made-up questions and templates in FastChat's layout, and a judge whose replies are known."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prmd.pairs import Message

BODIES = {
    "single-v1": "Q {question} A {answer}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-v1-multi-turn": "Q1 {question_1} A1 {answer_1} Q2 {question_2} A2 {answer_2}",
    "single-math-v1-multi-turn": "R2 {ref_answer_2} R1 {ref_answer_1} Q1 {question_1} A1 {answer_1} Q2 {question_2} A2 {answer_2}",
    "pair-v2": "PAIR Q {question} A {answer_a} B {answer_b}",
    "pair-math-v1": "PAIR Q {question} R {ref_answer_1} A {answer_a} B {answer_b}",
    "pair-v2-multi-turn": "PAIR A {answer_a_1} {answer_a_2} B {answer_b_1} {answer_b_2} Q {question_1} {question_2}",
    "pair-math-v1-multi-turn": "PAIR R {ref_answer_1} {ref_answer_2} A {answer_a_1} {answer_a_2} B {answer_b_1} {answer_b_2} "
    "Q {question_1} {question_2}",
}
CATEGORIES = ("writing", "math", "stem", "math", "surprising")


def write_files(folder: Path) -> Path:
    """Five made-up questions, references for those of math, and short templates."""
    (folder / "reference_answer").mkdir(parents=True)
    questions = [
        {"question_id": 81 + i, "category": category, "turns": [f"first {i}?", f"second {i}?"]}
        for i, category in enumerate(CATEGORIES)
    ]
    references = [
        {"question_id": 81 + i, "choices": [{"turns": [f"one {i}", f"two {i}"]}]}
        for i, category in enumerate(CATEGORIES)
        if category == "math"
    ]
    templates = [
        {"name": name, "system_prompt": "Judge.", "prompt_template": body} for name, body in BODIES.items()
    ]
    write_rows(folder / "question.jsonl", questions)
    write_rows(folder / "reference_answer" / "gpt-4.jsonl", references)
    write_rows(folder / "judge_prompts.jsonl", templates)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@dataclass
class ScriptedJudge:
    """Rates by the length of the prompt, prefers what is longer, and now and then says nothing of use."""

    silent_every: int = 0
    kind: str = "endpoint"
    name: str = "scripted"
    fingerprint: str = "scripted"
    writes: bool = True
    asked: list[list[Message]] = field(default_factory=list)

    def complete(self, prompts: Sequence[list[Message]], *, max_new_tokens: int) -> list[str]:
        self.reply_tokens = max_new_tokens
        self.asked += prompts
        return [self._reply(prompt[-1]["content"], i) for i, prompt in enumerate(prompts)]

    def _reply(self, text: str, index: int) -> str:
        if self.silent_every and index % self.silent_every == 0:
            return "I would rather not say."
        if text.startswith("PAIR"):
            return "I prefer the first: [[A]]"
        return f"Rating: [[{1 + len(text) % 10}]]"

    def usage(self) -> dict[str, Any]:
        return {}


def changed(path: Path, row: int, **values: Any) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[row] = {key: value for key, value in (rows[row] | values).items() if value != "DELETED"}
    write_rows(path, rows)
