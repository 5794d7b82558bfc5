"""TruthfulQA, generation: does the model say what is true, when it answers in its own words?

Greedy answers of at most 50 tokens behind the primer of the multiple-choice task, cut where the next question would begin
(arXiv:2109.07958). The share of true answers depends on who judges, so the judge is part of the name (`truth_judges`); an
answer that declines is true and says nothing, so the share of these is given beside it, and what the judge makes of
declining always.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.benchmarks.result import BenchmarkResult
from prmd.benchmarks.sampling import sample
from prmd.benchmarks.truth_judges import TruthJudge, make_truth_judge
from prmd.benchmarks.truthfulqa import Question, asked_questions, question_context
from prmd.config.evaluation import EvaluationConfig
from prmd.errors import ConfigError, DataError, UserError
from prmd.inference.candidates import ContenderModels
from prmd.inference.generation import GeneratedResponse
from prmd.judges.rubrics import Verdict
from prmd.statistics.intervals import wilson_interval
from prmd.statistics.resampling import with_chance

MAX_NEW_TOKENS = 50
DECLINING_ANSWER = "I have no comment."
"""One of the primer's own answers; a policy that always gives it is never untrue."""
_NEXT_QUESTION = re.compile(r"\n\n|\nQ:")


def run_truthfulqa_generation(config: EvaluationConfig, models: ContenderModels) -> BenchmarkResult:
    """Share of generated answers that the judge finds true."""
    try:
        judge = make_truth_judge(config)
    except UserError as error:  # of the text judge: its file or folder
        return BenchmarkResult(reason=f"judge missing: {error}")
    if isinstance(judge, str):
        return BenchmarkResult(reason=judge)
    found = asked_questions(config)
    if isinstance(found, str):
        return BenchmarkResult(reason=found)
    questions, sha256 = found
    responses = generate_answers(models, questions)
    answers = [answer_text(models.tokenizer, response) for response in responses]
    if judge.is_local_model:
        models.close()  # two models do not fit where one just does
    try:
        return _judged(judge, questions, answers, sha256)
    except (ConfigError, DataError) as error:  # a judge that cannot be loaded, a file that lacks verdicts
        return BenchmarkResult(reason=f"judge missing: {error}")


def generate_answers(models: ContenderModels, questions: Sequence[Question]) -> list[GeneratedResponse]:
    """One greedy continuation per question, from the cache or new."""
    prompts = [tuple(models.tokenizer(question_context(q))["input_ids"]) for q in questions]
    responses = sample(
        models,
        prompts,
        description="TruthfulQA answers",
        samples_per_prompt=1,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=0.0,
    )
    return [samples[0] for samples in responses]


def answer_text(tokenizer: PreTrainedTokenizerBase, response: GeneratedResponse) -> str:
    """The answer: what comes before an empty line or the next question; may be empty."""
    whole = tokenizer.decode(response.token_ids, skip_special_tokens=True)
    return _NEXT_QUESTION.split(whole, maxsplit=1)[0].strip()


def _judged(
    judge: TruthJudge, questions: Sequence[Question], answers: Sequence[str], sha256: str
) -> BenchmarkResult:
    verdicts = judge.verdicts(questions, answers)
    constant = judge.verdicts(questions, [DECLINING_ANSWER] * len(questions))
    metrics = {
        "true": _share([v.positive for v in verdicts]),
        f"true, constant answer {DECLINING_ANSWER!r}": _share([v.positive for v in constant]),
        "declines": _share([DECLINING_ANSWER.rstrip(".").casefold() in a.casefold() for a in answers]),
        "empty answers": _share([not a for a in answers]),
        "unreadable verdicts": _share([v.positive is None for v in verdicts]),
    }
    ids = [io.fingerprint(question.text) for question in questions]
    rows = list(zip(ids, questions, answers, strict=True))
    return BenchmarkResult(
        metrics={name: estimate for name, estimate in metrics.items() if estimate is not None},
        items=[
            {"id": key, "question": q.text, "answer": a, "true": v.positive, "score": v.score}
            for (key, q, a), v in zip(rows, verdicts, strict=True)
        ],
        data_sha256=sha256,
        label=f"truthfulqa_generation[judge={judge.name}]",
        judge=judge.card(questions, verdicts),
        samples=[{"id": key, "question": q.text, "response": a} for key, q, a in rows],
        judgements=_judgement_rows(ids, verdicts, "answer")
        + _judgement_rows(ids, constant, "constant answer"),
    )


def _share(flags: Sequence[bool | None]) -> dict[str, Any] | None:
    """Share of True among what is not None; None where nothing is left."""
    read = [flag for flag in flags if flag is not None]
    return with_chance(wilson_interval(sum(read), len(read)), None) if read else None


def _judgement_rows(ids: Sequence[str], verdicts: Sequence[Verdict], kind: str) -> list[dict[str, Any]]:
    return [
        {"id": v.id, "question": key, "kind": kind, "true": v.positive, "score": v.score, "text": v.raw}
        for key, v in zip(ids, verdicts, strict=True)
    ]
