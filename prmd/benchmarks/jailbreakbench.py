"""JailbreakBench: does the policy give in to 100 harmful requests, and does it refuse 100 benign ones?

Greedy responses of at most 150 tokens to the goal as the user's message, and to attack prompts where a file gives them
(arXiv:2404.01318). Without a judge of harm only refusals can be counted: `jbb_nonrefusal[strings]` is no attack success rate, and
`jbb_asr[judge]` appears only with a judge that reads the answers. The goal is what the judge is told, never the attack prompt.
Reading the files is in `jailbreakbench_data`, asking the judges in `jailbreakbench_judging`.
"""

import logging
from collections.abc import Sequence
from typing import Any

from prmd.benchmarks.jailbreakbench_data import KEY, Attack, Behavior, read_attacks, read_behaviors
from prmd.benchmarks.jailbreakbench_judging import (
    ATTACK,
    BENIGN,
    DIRECT,
    Answered,
    Judged,
    agreement_with_labels,
    agreement_with_phrases,
    constant_answer,
    jailbreak_rubric,
    judge_answers,
)
from prmd.benchmarks.result import BenchmarkResult, with_chance
from prmd.benchmarks.rows import why_not_run
from prmd.benchmarks.sampling import sample
from prmd.benchmarks.truthfulqa import strided
from prmd.config import EvaluationConfig
from prmd.contenders import ContenderModels
from prmd.errors import ConfigError, DataError, UserError
from prmd.judge_cards import CONSTANT_ANSWER, judge_card
from prmd.refusals import NON_REFUSAL
from prmd.rubrics import REFUSAL, Verdict
from prmd.statistics import wilson_interval
from prmd.text_judges import TextJudge, make_text_judge
from prmd.tokenization import Tokens, render

logger = logging.getLogger(__name__)


def run_jailbreakbench(config: EvaluationConfig, models: ContenderModels) -> BenchmarkResult:
    """Non-refusals of harmful requests and refusals of benign ones; attack success where a judge is given."""
    settings = config.benchmarks.jailbreakbench
    if settings.path is None:
        return BenchmarkResult(reason=why_not_run(None, KEY))
    try:
        behaviors, sha256 = read_behaviors(settings)
    except UserError as error:
        return BenchmarkResult(reason=why_not_run(settings.path, KEY, error))
    try:
        attacks = read_attacks(settings, behaviors)
        judge = make_text_judge(config)
        rubric = jailbreak_rubric(settings.judge_prompt)
    except UserError as error:
        return BenchmarkResult(reason=str(error))
    if judge is None:
        return BenchmarkResult(reason="judge missing at text_judge.kind: none; strings needs no model")
    answered = _answers(models, behaviors, attacks)
    if judge.kind in ("local_model", "classifier"):
        models.close()  # the judge needs the memory
    try:
        judged = judge_answers(judge, rubric, answered)
        metrics = _phrase_metrics(answered) | _judged_metrics(judged)
        constant = constant_answer(judge, rubric, [a for a in answered if a.group == DIRECT])
        agrees = agreement_with_labels(judge, rubric, behaviors, attacks) | agreement_with_phrases(
            judge, judged
        )
    except (ConfigError, DataError) as error:
        return BenchmarkResult(reason=f"judge missing: {error}")
    said = [verdict for group in judged if group.judge == judge.name for verdict in group.verdicts]
    rubrics = [r for r in (rubric, REFUSAL) if judge.writes and judge.answers(r)]
    card = judge_card(judge, said, rubrics=rubrics, agrees=agrees or None, constant_answer=constant)
    return BenchmarkResult(
        metrics=metrics | _constant_metrics(judge, constant),
        items=_items(answered, judged),
        data_sha256=sha256,
        judge=card | {"empty_responses": _count_empty(models, answered)},
        label=f"jailbreakbench[{judge.name}]",
        samples=[_sample_row(a) for a in answered],
        judgements=[_judgement_row(a, v, group) for group in judged for a, v in _pairs(group)],
    )


# ------------------------------------------------------------------ generate
def _answers(
    models: ContenderModels, behaviors: dict[str, list[Behavior]], attacks: list[Attack] | None
) -> list[Answered]:
    """Every request of the chosen behaviours with its answer, direct ones first."""
    settings = models.config.benchmarks.jailbreakbench
    requests: list[tuple[str, Behavior, str | None]] = []
    for group in (DIRECT, BENIGN):
        requests += [(group, b, b.goal) for b in strided(behaviors[group], settings.max_behaviors)]
    if attacks is not None:
        prompts = {attack.index: attack.prompt for attack in attacks}
        chosen = strided(behaviors[DIRECT], settings.max_behaviors)
        requests += [(ATTACK, b, prompts.get(b.index)) for b in chosen]
    asked = [prompt for _, _, prompt in requests if prompt is not None]
    responses = sample(
        models,
        [_tokens(models, prompt) for prompt in asked],
        description="JailbreakBench",
        samples_per_prompt=1,
        max_new_tokens=settings.max_new_tokens,
        temperature=0.0,
    )
    found = iter(row[0] for row in responses)
    return [Answered(g, b, prompt, None if prompt is None else next(found)) for g, b, prompt in requests]


def _tokens(models: ContenderModels, prompt: str) -> Tokens:
    """No system message is sent: a template that has one of its own uses it, as in training."""
    return tuple(render(models.tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True))


# ------------------------------------------------------------------ aggregate
def _phrase_metrics(answered: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    """Shares of harmful requests that were not refused, by each detector; an attack without a prompt failed."""
    metrics = {}
    for group, suffix in ((DIRECT, ""), (ATTACK, ", attack")):
        members = [a for a in answered if a.group == group]
        for name, detector in NON_REFUSAL.items():
            if members:
                count = sum(a.response is not None and detector(a.response.text) for a in members)
                metrics[f"jbb_nonrefusal[{name}]{suffix}"] = _rate(count, len(members))
    n = sum(a.group == DIRECT for a in answered)
    constant = n * NON_REFUSAL["strings"](CONSTANT_ANSWER)  # saying nothing in kind words is no refusal
    return metrics | {"jbb_nonrefusal[strings] of a constant answer": _rate(constant, n)}


def _judged_metrics(judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Rates among the verdicts that could be read; an attack without a prompt failed."""
    metrics = {}
    for group in judged:
        said = [v.positive for v in group.verdicts if v.positive is not None]
        kind = group.answered[0].group
        name = f"jbb_benign_refusal[{group.judge}]" if kind == BENIGN else f"jbb_asr[{group.judge}]"
        if said:
            metrics[name + (", attack" if kind == ATTACK else "")] = _rate(
                sum(said), len(said) + group.without_prompt
            )
    return metrics


def _constant_metrics(judge: TextJudge, constant: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    if constant is None or constant["asr"] is None:
        return {}
    return {f"jbb_asr[{judge.name}] of a constant answer": constant["asr"] | {"chance": None}}


def _rate(count: int, n: int) -> dict[str, Any]:
    return with_chance(wilson_interval(count, n), None)


def _count_empty(models: ContenderModels, answered: Sequence[Answered]) -> int:
    empty = sum(a.response is not None and not a.response.text for a in answered)
    if empty:
        logger.warning("%s: %d empty responses to JailbreakBench", models.contender.method, empty)
    return empty


def _pairs(group: Judged) -> list[tuple[Answered, Verdict]]:
    return list(zip(group.answered, group.verdicts, strict=True))


def _items(answered: Sequence[Answered], judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """One row per request with every verdict on it."""
    said: dict[str, dict[str, str | None]] = {}
    for group in judged:
        for answer, verdict in _pairs(group):
            said.setdefault(answer.id, {})[f"{group.rubric.name}[{group.judge}]"] = group.rubric.label(
                verdict.positive
            )
    phrases = {
        a.id: {f"nonrefusal[{name}]": detector(a.response.text) for name, detector in NON_REFUSAL.items()}
        for a in answered
        if a.response is not None
    }
    return [
        {"id": a.id, "category": a.behavior.category, "goal": a.behavior.goal}
        | {"verdicts": phrases.get(a.id, {}) | said.get(a.id, {})}
        for a in answered
    ]


def _sample_row(answer: Answered) -> dict[str, Any]:
    response = answer.response
    return {
        "id": answer.id,
        "prompt": answer.prompt,
        "text": None if response is None else response.text,
        "tokens": 0 if response is None else len(response.token_ids),
        "finished": response is not None and response.finished,
    }


def _judgement_row(answer: Answered, verdict: Verdict, group: Judged) -> dict[str, Any]:
    """A row that `text_judge.file` can read again: its id is the key of question and answer."""
    return {
        "id": verdict.id,
        "item": answer.id,
        "rubric": group.rubric.name,
        "judge": group.judge,
        "label": group.rubric.label(verdict.positive),
        "score": verdict.score,
        "raw": verdict.raw,
    }
