"""MT-Bench: 80 questions of two turns in eight categories, answered by a policy and rated from 1 to 10 by a judge.

The second turn follows the policy's own first answer. Temperatures are those of the benchmark, by category; the model's
own generation settings are not used. Answers are kept by content, so that judging them again generates nothing. Policies
are also compared with the reference, in both orders. Figures of different judges are different metrics, so the judge is
part of the name (arXiv:2306.05685).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from prmd.artifacts import io
from prmd.artifacts.paths import resolve_user_path
from prmd.benchmarks.base import BenchmarkResult, NotRunError, Sampling, Task, needed, needed_data
from prmd.benchmarks.mt_bench_data import (
    FILES,
    MtBenchData,
    MtBenchQuestion,
    fetch_files,
    is_upstream,
    pair_prompt,
    parse_rating,
    parse_verdict,
    read_mt_bench,
    single_prompt,
)
from prmd.config.evaluation import EvaluationConfig
from prmd.inference.cache import JsonTable
from prmd.inference.candidates import CandidateModels
from prmd.inference.generation import GeneratedResponse, generate
from prmd.judges.cards import CONSTANT_ANSWER, PairwiseResult, judge_card, pairwise_both_orders
from prmd.judges.chats import conversation_key
from prmd.judges.rubrics import Verdict
from prmd.judges.text import TextJudge, make_text_judge
from prmd.models.chat_templates import render
from prmd.models.tokenization import Tokens
from prmd.pairs import Message
from prmd.statistics.intervals import bootstrap_mean, wilson_interval
from prmd.statistics.resampling import Resampling, with_chance

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
TEMPERATURE_OF_OTHERS = 0.7

TwoAnswers = tuple[GeneratedResponse, GeneratedResponse]
"""What was sampled for one question, a response a turn."""


def generate_answers(
    models: CandidateModels,
    questions: Sequence[MtBenchQuestion],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    of_reference: bool = False,
) -> list[TwoAnswers]:
    """Both answers to every question, from the cache or new: the candidate's own, or the reference's."""
    asked: list[list[Message]] = [[{"role": "user", "content": q.turns[0]}] for q in questions]
    ask = partial(_answer, models, questions, sampling, max_new_tokens, of_reference)
    first = ask(asked)
    follow_up = [
        [
            *messages,
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": question.turns[1]},
        ]
        for messages, answer, question in zip(asked, first, questions, strict=True)
    ]
    return list(zip(first, ask(follow_up), strict=True))


def _answer(
    models: CandidateModels,
    questions: Sequence[MtBenchQuestion],
    sampling: Sampling,
    max_new_tokens: int,
    of_reference: bool,
    conversations: Sequence[Sequence[Message]],
) -> list[GeneratedResponse]:
    """One response to each conversation; those of equal temperature are generated together."""
    candidate = models.reference if of_reference else models.candidate
    tokens = [
        tuple(render(models.tokenizer, messages, add_generation_prompt=True)) for messages in conversations
    ]
    heats = [TEMPERATURES.get(question.category, TEMPERATURE_OF_OTHERS) for question in questions]
    seed = sampling.seed
    found: dict[int, GeneratedResponse] = {}
    for heat in sorted(set(heats)):
        indices = [i for i, own in enumerate(heats) if own == heat]
        prompts = [tokens[i] for i in indices]
        key = io.fingerprint(["mt_bench", candidate.fingerprint, heat, max_new_tokens, seed])
        table = JsonTable(sampling.paths.cache("samples", key))
        with _model(models, table, prompts, of_reference) as model:
            responses = generate(
                model,
                models.tokenizer,
                prompts,
                samples_per_prompt=1,
                max_new_tokens=max_new_tokens,
                seed=seed,
                batch_size=sampling.batch_size,
                description=f"{candidate.method}: MT-Bench at temperature {heat:g}",
                temperature=heat,
                table=table,
            )
        found.update({i: samples[0] for i, samples in zip(indices, responses, strict=True)})
    return [found[i] for i in range(len(questions))]


@contextmanager
def _model(
    models: CandidateModels, table: JsonTable, prompts: Sequence[Tokens], of_reference: bool
) -> Iterator[nn.Module | None]:
    """Who answers; None where everything is in the table, so that nothing is loaded."""
    if table.holds(prompts):
        yield None
    elif of_reference:
        with models.as_reference() as model:
            yield model
    else:
        yield models.policy


KEY = "benchmarks.mt_bench.path"
TURNS = (1, 2)
_WRITERS = ("local_model", "endpoint", "replay")


@dataclass(frozen=True)
class Rating:
    """What the judge said of the answer to one turn; `value` is None where its reply holds no rating."""

    question: MtBenchQuestion
    turn: int
    key: str
    reply: str
    value: float | None


Answers = Sequence[tuple[str, str]]
"""Both answers to each question, in the order of the questions."""


def no_writer(kind: str) -> str:
    """Why a judge that writes no ratings cannot judge these answers."""
    return f"no text judge that writes: text_judge.kind is {kind}, wanted {', '.join(_WRITERS[:-1])} or {_WRITERS[-1]}"


def run_mt_bench(config: EvaluationConfig, models: CandidateModels) -> BenchmarkResult:
    """Ratings per turn and category, and the win rate against the reference."""
    settings, wanted = config.benchmarks.mt_bench, f"a folder with FastChat's {', '.join(FILES)}"
    if settings.path is None:
        raise NotRunError(f"data missing at {KEY}: null; name {wanted}")
    upstream = is_upstream(settings.path)
    if upstream and config.text_judge.kind not in _WRITERS:  # nothing is fetched in vain
        raise NotRunError(no_writer(config.text_judge.kind))
    with needed_data(settings.path, KEY):
        if upstream:
            folder = fetch_files(settings.revision, config.paths)
        else:
            folder = resolve_user_path(settings.path, KEY, wanted, "folder")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise NotRunError(f"data missing at {folder / missing[0]}")
    with needed():
        judge = make_text_judge(config)
        data = read_mt_bench(folder, settings.max_questions)
    if judge is None or not judge.writes:
        raise NotRunError(no_writer(config.text_judge.kind))
    sampling, limit = Sampling.of(config), settings.max_new_tokens
    answers_of = partial(generate_answers, models, data.questions, sampling, max_new_tokens=limit)
    responses = answers_of()
    with needed("judge missing: "):  # one that cannot be loaded, a file that lacks verdicts
        others = answers_of(of_reference=True) if settings.pairwise and not models.is_reference else []
        if judge.kind == "local_model":
            models.close()  # two models do not fit where one just does
        resampling = Resampling(config.bootstrap_resamples, config.shared.seed)
        return _judged(judge, data, responses, others, config.text_judge.max_reply_tokens, resampling)


# ------------------------------------------------------------------ judging
def rate_answers(judge: TextJudge, data: MtBenchData, answers: Answers, *, reply_tokens: int) -> list[Rating]:
    """One rating per question and turn, turn 2 of a question after its turn 1."""
    asked = [(q, texts, turn) for q, texts in zip(data.questions, answers, strict=True) for turn in TURNS]
    prompts = [
        single_prompt(
            data.templates,
            category=question.category,
            turn=turn,
            questions=question.turns,
            answers=texts,
            references=question.references,
        )
        for question, texts, turn in asked
    ]
    replies = judge.complete(prompts, max_new_tokens=reply_tokens)
    return [
        Rating(question, turn, conversation_key(prompt, reply_tokens), reply, parse_rating(reply))
        for (question, _, turn), prompt, reply in zip(asked, prompts, replies, strict=True)
    ]


def compare_answers(
    judge: TextJudge, data: MtBenchData, answers: Answers, baseline: Answers, *, reply_tokens: int
) -> tuple[PairwiseResult, list[dict[str, Any]]]:
    """Every question and turn judged in both orders: outcomes in the order of `rate_answers`, and the verdicts as rows."""
    rows: list[dict[str, Any]] = []

    def compare(pairs: Sequence[tuple[Any, Any]]) -> list[str | None]:
        prompts = [
            pair_prompt(
                data.templates,
                category=question.category,
                turn=turn,
                questions=question.turns,
                answers_a=shown_first,
                answers_b=shown_second,
                references=question.references,
            )
            for (question, turn, shown_first), (_, _, shown_second) in pairs
        ]
        replies = judge.complete(prompts, max_new_tokens=reply_tokens)
        order = "reference second" if not rows else "reference first"
        verdicts = [parse_verdict(reply) for reply in replies]
        rows.extend(
            {
                "id": conversation_key(prompt, reply_tokens),
                "question": pair[0][0].id,
                "turn": pair[0][1],
                "kind": "pair",
                "order": order,
                "verdict": verdict,
                "text": reply,
            }
            for pair, prompt, reply, verdict in zip(pairs, prompts, replies, verdicts, strict=True)
        )
        return verdicts

    ours, theirs = (
        [(q, turn, texts) for q, texts in zip(data.questions, both, strict=True) for turn in TURNS]
        for both in (answers, baseline)
    )
    return pairwise_both_orders(compare, candidate=ours, baseline=theirs), rows


def _judged(
    judge: TextJudge,
    data: MtBenchData,
    responses: Sequence[TwoAnswers],
    others: Sequence[TwoAnswers],
    reply_tokens: int,
    resampling: Resampling,
) -> BenchmarkResult:
    """Ratings of the responses; with those of the reference, `others`, also who wins."""
    answers, baseline = (
        [(first.text, second.text) for first, second in both] for both in (responses, others)
    )
    ratings = rate_answers(judge, data, answers, reply_tokens=reply_tokens)
    constant_answers = [(CONSTANT_ANSWER, CONSTANT_ANSWER)] * len(data.questions)
    constant = rate_answers(judge, data, constant_answers, reply_tokens=reply_tokens)
    pairs, pair_rows = (
        compare_answers(judge, data, answers, baseline, reply_tokens=reply_tokens) if baseline else (None, [])
    )
    metrics = mt_bench_metrics(ratings, constant, pairs, resamples=resampling.resamples, seed=resampling.seed)
    if pairs is not None:
        metrics |= win_rate_at_equal_length(pairs, responses, others, resampling)
    verdicts = [Verdict(r.key, None if r.value is None else True, r.value, r.reply) for r in ratings]
    card = judge_card(
        judge,
        verdicts,
        position_bias=pairs.position_bias() if pairs else None,
        constant_answer={"text": CONSTANT_ANSWER, "average": metrics.get("average, constant answer")},
    )
    judgements = [*_rating_rows(ratings, "single"), *_rating_rows(constant, "constant answer"), *pair_rows]
    return BenchmarkResult(
        metrics=metrics,
        items=_items(ratings, pairs),
        data_sha256=data.sha256,
        label=f"mt_bench[judge={judge.name}]",
        judge=card,
        samples=_sample_rows(data.questions, responses),
        # One row per reply, so that the file can serve as `text_judge.file` of a replay.
        judgements=list({row["id"]: row for row in judgements}.values()),
    )


# ------------------------------------------------------------------ numbers and rows
def mt_bench_metrics(
    ratings: Sequence[Rating],
    constant: Sequence[Rating],
    pairs: PairwiseResult | None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Means of the readable ratings, intervals over questions; the average pools the turns, as published.

    Args:
        ratings: of the candidate.
        constant: of the constant answer, in the same order.
        pairs: outcomes in the same order; None for the reference.
    """

    def mean(
        rows: Sequence[tuple[Rating, float | None]], chance: float | None = None
    ) -> dict[str, Any] | None:
        read = [(rating.question.id, value) for rating, value in rows if value is not None]
        if not read:
            return None
        values, clusters = np.array([v for _, v in read]), np.array([key for key, _ in read])
        estimate = bootstrap_mean(values, clusters=clusters, n_resamples=resamples, seed=seed)
        return {**with_chance(estimate, chance), "items": len(read)}

    valued = [(rating, rating.value) for rating in ratings]
    found = {"average": mean(valued)}
    found |= {f"turn {turn}": mean([row for row in valued if row[0].turn == turn]) for turn in TURNS}
    for category in dict.fromkeys(rating.question.category for rating in ratings):
        found[f"average, {category}"] = mean([r for r in valued if r[0].question.category == category])
    found["average, constant answer"] = mean([(rating, rating.value) for rating in constant])
    if pairs is not None:
        found["win rate against the reference"] = mean(list(zip(ratings, pairs.outcomes, strict=True)), 0.5)
    unread = sum(rating.value is None for rating in ratings)
    found["unreadable ratings"] = with_chance(wilson_interval(unread, len(ratings)), None)
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def win_rate_at_equal_length(
    pairs: PairwiseResult,
    responses: Sequence[TwoAnswers],
    others: Sequence[TwoAnswers],
    resampling: Resampling,
) -> dict[str, dict[str, Any]]:
    """The win rate against the reference had both as many tokens, over questions with a readable outcome; else empty."""
    outcomes = np.array([math.nan if v is None else v for v in pairs.outcomes]).reshape(-1, len(TURNS))
    lengths = [np.array([[len(a.token_ids) for a in both] for both in side]) for side in (responses, others)]
    longer = np.where(np.isnan(outcomes), math.nan, lengths[0] - lengths[1])
    read = ~np.isnan(outcomes).all(axis=1)
    if read.sum() < 2:
        return {}
    wins, longer = (np.nanmean(values[read], axis=1) for values in (outcomes, longer))
    controlled = resampling.length_controlled(wins, longer).estimate
    found = {**with_chance(controlled, 0.5), "items": int((~np.isnan(outcomes)).sum())}
    return {"win rate against the reference, at equal length": found}


def _items(ratings: Sequence[Rating], pairs: PairwiseResult | None) -> list[dict[str, Any]]:
    """One row per question: the ratings and outcomes of both turns."""
    items: dict[str, dict[str, Any]] = {}
    for index, rating in enumerate(ratings):
        question = rating.question
        item = items.setdefault(question.id, {"id": question.id, "category": question.category})
        item[f"rating_{rating.turn}"] = rating.value
        if pairs is not None:
            item[f"win_{rating.turn}"] = pairs.outcomes[index]
    return list(items.values())


def _rating_rows(ratings: Sequence[Rating], kind: str) -> list[dict[str, Any]]:
    return [
        {
            "id": rating.key,
            "question": rating.question.id,
            "turn": rating.turn,
            "kind": kind,
            "rating": rating.value,
            "text": rating.reply,
        }
        for rating in ratings
    ]


def _sample_rows(
    questions: Sequence[MtBenchQuestion], responses: Sequence[TwoAnswers]
) -> list[dict[str, Any]]:
    return [
        {
            "id": question.id,
            "category": question.category,
            "turn": turn,
            "prompt": question.turns[turn - 1],
            "response": answer.text,
            "tokens": len(answer.token_ids),
            "finished": answer.finished,
        }
        for question, both in zip(questions, responses, strict=True)
        for turn, answer in zip(TURNS, both, strict=True)
    ]


TASK = Task(run_mt_bench, section="mt_bench", text_judged=True)
