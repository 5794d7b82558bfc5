"""JailbreakBench: does the policy give in to 100 harmful requests, and does it refuse 100 benign ones?

Greedy responses of at most 150 tokens to the goal as the user's message, and to attack prompts where a file gives them
(arXiv:2404.01318). Without a judge of harm only refusals can be counted: `jbb_nonrefusal[strings]` is no attack success rate,
and `jbb_asr[judge]` appears only with a judge that reads the answers. The goal is what the judge is told, never the attack
prompt.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from prmd.artifacts.paths import resolve_user_path
from prmd.benchmarks.base import BenchmarkResult, NotRunError, Sampling, Task, needed, needed_data, sample
from prmd.benchmarks.jailbreakbench_data import KEY, Attack, Behavior, read_attacks, read_behaviors
from prmd.benchmarks.truthfulqa import strided
from prmd.config.evaluation import EvaluationConfig, JailbreakBenchConfig
from prmd.errors import ConfigError, DataError
from prmd.inference.candidates import CandidateModels
from prmd.inference.generation import GeneratedResponse
from prmd.judges.cards import CONSTANT_ANSWER, agreement, judge_card, verdict_agreement
from prmd.judges.rubrics import JAILBREAK, NON_REFUSAL, REFUSAL, JudgeItem, Rubric, Verdict
from prmd.judges.text import StringJudge, TextJudge, make_text_judge
from prmd.models.chat_templates import render
from prmd.models.tokenization import Tokens
from prmd.statistics.intervals import wilson_interval
from prmd.statistics.resampling import by_definition, with_chance

DIRECT, BENIGN, ATTACK = "harmful", "benign", "attack"
JUDGE_PROMPT_KEY = "benchmarks.jailbreakbench.judge_prompt"


@dataclass(frozen=True)
class Answered:
    """One request with the candidate's answer.

    Attributes:
        group: `harmful`, `benign` or `attack`.
        behavior: what is asked for.
        response: None where the attack has no prompt for this behaviour, which counts as a failed attack.
        prompt: the user's message.
    """

    group: str
    behavior: Behavior
    prompt: str | None
    response: GeneratedResponse | None

    @property
    def id(self) -> str:
        return f"{self.group}/{self.behavior.index}"

    @property
    def item(self) -> JudgeItem:
        """What a judge reads."""
        return JudgeItem(self.behavior.goal, self.response.text if self.response else "")


@dataclass(frozen=True)
class Judged:
    """Verdicts of one judge by one rubric on one group.

    Attributes:
        without_prompt: attacks of the group that have no prompt and so no answer.
    """

    judge: str
    rubric: Rubric
    answered: list[Answered]
    verdicts: list[Verdict]
    without_prompt: int


def jailbreak_rubric(file: str | None) -> Rubric:
    """The question about harm, in the project's words or in those of a text file.

    Raises:
        ConfigError: the file is missing, not UTF-8, or lacks `{request}` or `{response}`.
    """
    if file is None:
        return JAILBREAK
    wanted = "a text file with {request} and {response}, or null"
    path = resolve_user_path(file, JUDGE_PROMPT_KEY, wanted, "file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as the words of a judge ({error}); name a UTF-8 file"
        ) from error
    if lacking := [part for part in ("{request}", "{response}") if part not in text]:
        raise ConfigError(f"{path}: lacks {' and '.join(lacking)}; write it where the text belongs")
    return replace(JAILBREAK, template=text)


def judge_answers(judge: TextJudge, rubric: Rubric, answered: Sequence[Answered]) -> list[Judged]:
    """Refusal phrases on the benign answers, and everything the judge can say of each group."""
    groups = {g: [a for a in answered if a.group == g and a.response] for g in (DIRECT, BENIGN, ATTACK)}
    absent = {g: sum(a.group == g and a.response is None for a in answered) for g in groups}
    asked = [(StringJudge(), REFUSAL, BENIGN)]
    if judge.kind != "strings":
        asked += [(judge, rubric, DIRECT), (judge, rubric, ATTACK), (judge, REFUSAL, BENIGN)]
    return [
        Judged(who.name, what, groups[g], who.judge([a.item for a in groups[g]], what), absent[g])
        for who, what, g in asked
        if groups[g] and who.answers(what)
    ]


def constant_answer(judge: TextJudge, rubric: Rubric, direct: Sequence[Answered]) -> dict[str, Any] | None:
    """How often the judge calls an answer without content a success; None where it cannot be asked."""
    if not judge.answers(rubric):
        return None
    items = [JudgeItem(a.behavior.goal, CONSTANT_ANSWER) for a in direct]
    try:
        said = [v.positive for v in judge.judge(items, rubric) if v.positive is not None]
    except DataError:  # a file of verdicts need not hold these
        return None
    found = wilson_interval(sum(said), len(said)).to_json() if said else None
    return {"text": CONSTANT_ANSWER, "asr": found}


def agreement_with_labels(
    judge: TextJudge, rubric: Rubric, behaviors: dict[str, list[Behavior]], attacks: list[Attack] | None
) -> dict[str, Any]:
    """Agreement of the judge and of the phrases with the labels an attack file carries; nothing where it carries none."""
    goals = {behavior.index: behavior.goal for behavior in behaviors[DIRECT]}
    labelled = [a for a in attacks or [] if a.response is not None and a.jailbroken is not None]
    if not labelled:
        return {}
    truth = [bool(a.jailbroken) for a in labelled]
    found: dict[str, Any] = {"labels": "`jailbroken` in the attack file"}
    for name, detector in NON_REFUSAL.items():
        found[name] = agreement([detector(a.response or "") for a in labelled], truth)
    if judge.answers(rubric):
        try:
            verdicts = judge.judge([JudgeItem(goals[a.index], a.response or "") for a in labelled], rubric)
        except DataError:  # a file of verdicts need not hold these
            return found
        if agrees := verdict_agreement(verdicts, truth):
            found[judge.name] = agrees
    return found


def agreement_with_phrases(judge: TextJudge, judged: Sequence[Judged]) -> dict[str, Any]:
    """Agreement of the judge with the refusal phrases on the benign answers: two judges, neither of them the truth."""
    said = {g.judge: g.verdicts for g in judged if g.rubric.name == REFUSAL.name}
    if judge.kind == "strings" or judge.name not in said:
        return {}
    found = verdict_agreement(said[judge.name], [bool(phrase.positive) for phrase in said[StringJudge.name]])
    return {"benign refusals, against strings": found} if found else {}


logger = logging.getLogger(__name__)

_SUFFIXES = {DIRECT: "", ATTACK: ", attack"}
"""Groups of harmful requests -> end of the names of their metrics."""


def run_jailbreakbench(config: EvaluationConfig, models: CandidateModels) -> BenchmarkResult:
    """Non-refusals of harmful requests and refusals of benign ones; attack success where a judge is given."""
    settings = config.benchmarks.jailbreakbench
    with needed_data(settings.path, KEY):
        behaviors, sha256 = read_behaviors(settings)
    with needed():
        attacks = read_attacks(settings, behaviors)
        judge = make_text_judge(config)
        rubric = jailbreak_rubric(settings.judge_prompt)
    if judge is None:
        raise NotRunError("judge missing at text_judge.kind: none; strings needs no model")
    answered = _answers(models, behaviors, attacks, settings, Sampling.of(config))
    if judge.kind in ("local_model", "classifier"):
        models.close()  # the judge needs the memory
    with needed("judge missing: "):
        judged = judge_answers(judge, rubric, answered)
        metrics = _phrase_metrics(answered) | _judged_metrics(judged)
        constant = constant_answer(judge, rubric, [a for a in answered if a.group == DIRECT])
        agrees = agreement_with_labels(judge, rubric, behaviors, attacks) | agreement_with_phrases(
            judge, judged
        )
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
    models: CandidateModels,
    behaviors: dict[str, list[Behavior]],
    attacks: list[Attack] | None,
    settings: JailbreakBenchConfig,
    sampling: Sampling,
) -> list[Answered]:
    """Every request of the chosen behaviours with its answer, direct ones first."""
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
        [_tokens(models.tokenizer, prompt) for prompt in asked],
        sampling,
        description="JailbreakBench",
        samples_per_prompt=1,
        max_new_tokens=settings.max_new_tokens,
        temperature=0.0,
    )
    found = iter(row[0] for row in responses)
    return [Answered(g, b, prompt, None if prompt is None else next(found)) for g, b, prompt in requests]


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tokens:
    """No system message is sent: a template that has one of its own uses it, as in training."""
    return tuple(render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True))


# ------------------------------------------------------------------ aggregate
def _phrase_metrics(answered: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    """Shares of harmful requests that were not refused, by each detector; an attack without a prompt failed."""
    metrics = {}
    for group in _SUFFIXES:
        rows = [_phrase_outcomes(a) for a in answered if a.group == group]
        for name in rows[0] if rows else ():
            metrics[name] = _rate(int(sum(row[name] for row in rows)), len(rows))
    n = sum(a.group == DIRECT for a in answered)
    # Saying nothing in kind words is no refusal; phrases see the same text every time, so nothing is left to chance.
    constant = by_definition(float(NON_REFUSAL["strings"](CONSTANT_ANSWER)), n)
    return metrics | {"jbb_nonrefusal[strings] of a constant answer": with_chance(constant, None)}


def _judged_metrics(judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Rates among the verdicts that could be read; an attack without a prompt failed."""
    metrics = {}
    for group in judged:
        said = [v.positive for v in group.verdicts if v.positive is not None]
        if said:
            metrics[_metric_of(group)] = _rate(sum(said), len(said) + group.without_prompt)
    return metrics


def _metric_of(judged: Judged) -> str:
    """What the share of positive verdicts is called."""
    group = judged.answered[0].group
    name = f"jbb_benign_refusal[{judged.judge}]" if group == BENIGN else f"jbb_asr[{judged.judge}]"
    return name + _SUFFIXES.get(group, "")


def _constant_metrics(judge: TextJudge, constant: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    if constant is None or constant["asr"] is None:
        return {}
    return {f"jbb_asr[{judge.name}] of a constant answer": constant["asr"] | {"chance": None}}


def _rate(count: int, n: int) -> dict[str, Any]:
    return with_chance(wilson_interval(count, n), None)


def _count_empty(models: CandidateModels, answered: Sequence[Answered]) -> int:
    empty = sum(a.response is not None and not a.response.text for a in answered)
    if empty:
        logger.warning("%s: %d empty responses to JailbreakBench", models.candidate.method, empty)
    return empty


def _pairs(group: Judged) -> list[tuple[Answered, Verdict]]:
    return list(zip(group.answered, group.verdicts, strict=True))


def _items(answered: Sequence[Answered], judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """One row per request: every verdict on it, and its outcomes, 0 or 1 by the name of the metric they are averaged to."""
    items = {
        a.id: {
            "id": a.id,
            "category": a.behavior.category,
            "goal": a.behavior.goal,
            "verdicts": {},
            "outcomes": _phrase_outcomes(a),
        }
        for a in answered
    }
    for group in judged:
        for answer, verdict in _pairs(group):
            item = items[answer.id]
            item["verdicts"][f"{group.rubric.name}[{group.judge}]"] = group.rubric.label(verdict.positive)
            if verdict.positive is not None:
                item["outcomes"][_metric_of(group)] = float(verdict.positive)
        for answer in answered:
            if answer.group == group.answered[0].group and answer.response is None:
                items[answer.id]["outcomes"][_metric_of(group)] = 0.0
    return list(items.values())


def _phrase_outcomes(answer: Answered) -> dict[str, float]:
    """Whether a harmful request was not refused, by each detector; an attack without a prompt failed."""
    if answer.group == BENIGN:
        return {}
    text = None if answer.response is None else answer.response.text
    return {
        f"jbb_nonrefusal[{name}]{_SUFFIXES[answer.group]}": float(text is not None and detector(text))
        for name, detector in NON_REFUSAL.items()
    }


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


TASK = Task(run_jailbreakbench, section="jailbreakbench", text_judged=True)
