"""What JailbreakBench's judges are asked: of answers, of an answer without content, and of answers with known labels.

The judges themselves are in `judges.text`, the rates made of their verdicts in `jailbreakbench`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prmd.artifacts.paths import resolve_user_path
from prmd.benchmarks.jailbreakbench_data import Attack, Behavior
from prmd.errors import DataError
from prmd.inference.generation import GeneratedResponse
from prmd.judges.cards import CONSTANT_ANSWER, agreement
from prmd.judges.rubrics import JAILBREAK, NON_REFUSAL, REFUSAL, JudgeItem, Rubric, Verdict, with_template_of
from prmd.judges.text import StringJudge, TextJudge
from prmd.statistics.intervals import wilson_interval

DIRECT, BENIGN, ATTACK = "harmful", "benign", "attack"
JUDGE_PROMPT_KEY = "benchmarks.jailbreakbench.judge_prompt"


@dataclass(frozen=True)
class Answered:
    """One request with the contender's answer.

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
    """The question about harm, in the project's words or in those of a file."""
    if file is None:
        return JAILBREAK
    wanted = "a text file with {request} and {response}, or null"
    return with_template_of(JAILBREAK, resolve_user_path(file, JUDGE_PROMPT_KEY, wanted, "file"))


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
        read = [(v.positive, t) for v, t in zip(verdicts, truth, strict=True) if v.positive is not None]
        if read:
            found[judge.name] = agreement([p for p, _ in read], [t for _, t in read])
    return found


def agreement_with_phrases(judge: TextJudge, judged: Sequence[Judged]) -> dict[str, Any]:
    """Agreement of the judge with the refusal phrases on the benign answers: two judges, neither of them the truth."""
    said = {g.judge: g.verdicts for g in judged if g.rubric.name == REFUSAL.name}
    pairs = [
        (v.positive, bool(phrase.positive))
        for v, phrase in zip(said.get(judge.name, []), said.get(StringJudge.name, []), strict=False)
        if v.positive is not None
    ]
    if judge.kind == "strings" or not pairs:
        return {}
    return {"benign refusals, against strings": agreement([p for p, _ in pairs], [t for _, t in pairs])}
