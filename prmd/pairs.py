"""A preference pair, how it is validated, and how the prepared splits are read.

One row of `data/processed/<approach>/<objective>/<split>.jsonl` is one `PreferencePair`. Building pairs from the public
data sets is in `data.collection` and `data.pku_safe_rlhf`, splitting them in `data.splits`; turning them into tokens is in `models.tokenization`.
"""

import hashlib
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from prmd.artifacts import io, runs
from prmd.artifacts.paths import ArtifactPaths, stage_command
from prmd.errors import DataError

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""

PREPARE_COMMAND = stage_command("split_objectives")
BENCHMARK_QUESTIONS_FILE = "truthfulqa_benchmark_questions.json"
_CONTROL_TEXT = re.compile(
    r"<\|\S{1,40}?\|>|<｜\S{1,40}?｜>|<(?:start|end)_of_(?:turn|text)>|</?s>|<(?:bos|eos|pad|unk|sop)>|\[/?(?:INST|gMASK)\]"
    r"|<\|turn>|<turn\|>|</?think>"
)
"""Control tokens of well-known models, as text."""
_FIELDS = ("id", "prompt", "chosen", "rejected", "source")
_WEIGHT = "weight"
"""Key of a stored row whose pair has a weight; others lack it."""
_REWARDS = "rewards"
"""A key that a row has besides where its source brings rewards: {objective: [of chosen, of rejected]}."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt and two responses, of which `chosen` is preferred for `objective`.

    Attributes:
        id: unique within an approach, stable between runs.
        prompt: messages that start with the user (after an optional system message), alternate, and end with the user.
        chosen: text of the preferred response.
        rejected: text of the other one.
        source: where it comes from, `hh_rlhf/helpful-base/train:12` (source, file, 1-based row).
        objective: one of the approach, `helpful`, `harmless` or `honest` of the built-in ones.
        weight: factor of the pair's loss in every training, of mean 1 over the training pairs of its objective once stored;
            None: no weights were given, which counts as 1.
        rewards: (of chosen, of rejected) for each objective whose rewards the row brings (`data.own_pairs.rewards`).
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str
    objective: str
    weight: float | None = None
    rewards: Mapping[str, Sequence[float]] = field(default_factory=dict, hash=False)

    @property
    def first_turn(self) -> str:
        """Text of the first user message, by which pairs are split."""
        return next(m["content"] for m in self.prompt if m["role"] == "user")

    @property
    def prompt_key(self) -> str:
        """`first_turn`, normalised: pairs with equal keys share a split in every objective."""
        return prompt_key(self.first_turn)

    @property
    def spells_control_tokens(self) -> bool:
        """Whether a text of it holds what is a control token of some well-known model; it is read as text all the same."""
        texts = [m["content"] for m in self.prompt] + [self.chosen, self.rejected]
        return any(map(_CONTROL_TEXT.search, texts))

    def to_row(self) -> dict[str, Any]:
        """The row as stored: `chosen` and `rejected` are lists of one assistant message."""
        return {
            "id": self.id,
            "prompt": [dict(m) for m in self.prompt],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
            "source": self.source,
            **({} if self.weight is None else {_WEIGHT: self.weight}),
            **({_REWARDS: {k: list(both) for k, both in self.rewards.items()}} if self.rewards else {}),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, objective: str, where: str) -> "PreferencePair":
        """Read and validate a stored row.

        Args:
            row: keys id, prompt, chosen, rejected, source, perhaps weight and rewards, and no others.
            objective: the objective the row is stored under.
            where: `file:line`, for the error.

        Raises:
            DataError: the row breaks a rule of the format; one line that names `where` and the rule.
        """
        if problem := _row_problem(row):
            raise DataError(f"{where}: {problem}; mend or remove this row")
        return cls(
            id=row["id"],
            prompt=tuple({"role": m["role"], "content": m["content"]} for m in row["prompt"]),
            chosen=row["chosen"][0]["content"],
            rejected=row["rejected"][0]["content"],
            source=row["source"],
            objective=objective,
            weight=float(row[_WEIGHT]) if _WEIGHT in row else None,
            rewards=row.get(_REWARDS, {}),
        )


def make_pair(
    *, prompt: Sequence[Message], chosen: str, rejected: str, source: str, objective: str
) -> PreferencePair:
    """A pair whose id is a hash of its content and objective, so that the same row gets the same id in every run."""
    turns = [part for m in prompt for part in (m["role"], m["content"])]
    key = io.fingerprint([objective, *turns, chosen, rejected])
    return PreferencePair(f"{objective}-{key}", tuple(prompt), chosen, rejected, source, objective)


def prompt_key(text: str) -> str:
    """Normalise a first human turn: compatibility forms, case, punctuation and spacing do not tell prompts apart."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(r"\w+", folded)
    return " ".join(words) if words else " ".join(folded.split())


def broken_text(*texts: str) -> bool:
    """Whether a text holds half a character (a lone surrogate) or NUL, which other programs refuse or cut the text at."""
    return any("\0" in text or io.has_surrogate(text) for text in texts)


def hash_share(salt: str, text: str) -> float:
    """A number in [0, 1) that depends on nothing but `salt` and `text`: uniform over texts, the same on every machine."""
    digest = hashlib.sha256(f"{salt}\n{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def read_pairs(paths: ArtifactPaths, objective: str, split: str) -> list[PreferencePair]:
    """Read one prepared split.

    Raises:
        DataError: the approach was not prepared, or the split is missing, empty or malformed; names the remedy.
    """
    path = paths.split(objective, split)
    runs.require_artifact(
        paths.processed,
        what=f"the prepared data of approach {paths.approach!r}",
        command=PREPARE_COMMAND,
        read=(path.relative_to(paths.processed).as_posix(),),
    )
    if not path.is_file():
        raise DataError(f"{path}: missing; make it with `{PREPARE_COMMAND} --force`")
    rows = io.read_jsonl(path)
    if not rows:
        raise DataError(
            f"{path}: the {split} split of {objective} is empty; raise data.splits fractions or "
            f"data.max_pairs_per_objective, or give more data, and run `{PREPARE_COMMAND}` again"
        )
    pairs = [
        PreferencePair.from_row(row, objective=objective, where=f"{path}:{number}")
        for number, row in enumerate(rows, start=1)
    ]
    first: dict[str, int] = {}
    for number, pair in enumerate(pairs, start=1):
        if (before := first.setdefault(pair.id, number)) != number:
            raise DataError(
                f"{path}:{number}: the id {pair.id!r} is also that of row {before}, so a pair would count twice; remove "
                f"the repeated rows, or make the file again with `{PREPARE_COMMAND} --force`"
            )
    return pairs


def read_benchmark_questions(paths: ArtifactPaths) -> frozenset[str] | None:
    """TruthfulQA questions kept out of all training data of the approach.

    Returns:
        The questions the TruthfulQA benchmark may use; None where the approach trains on no TruthfulQA question, so that
        all are free.

    Raises:
        DataError: the approach was not prepared.
    """
    runs.require_artifact(
        paths.processed,
        what=f"the prepared data of approach {paths.approach!r}",
        command=PREPARE_COMMAND,
        read=(BENCHMARK_QUESTIONS_FILE,),
    )
    questions = io.read_json(paths.processed / BENCHMARK_QUESTIONS_FILE)
    return None if questions is None else frozenset(questions)


def is_weight(value: Any) -> bool:
    """Whether a value can be the weight of a pair: a finite number, 0 or more."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= sys.float_info.max


def _row_problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a stored row, or None."""
    missing = [name for name in _FIELDS if name not in row]
    unknown = sorted(set(row) - {*_FIELDS, _WEIGHT, _REWARDS})
    if missing or unknown:
        return f"a row has exactly the keys {', '.join(_FIELDS)}; missing {missing}, unknown {unknown}"
    if _WEIGHT in row and not is_weight(row[_WEIGHT]):
        return f"'{_WEIGHT}' must be a finite number, 0 or more, got {row[_WEIGHT]!r:.80}"
    for name in ("id", "source"):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"{name!r} must be a non-empty string, got {row[name]!r:.80}"
    if problem := _prompt_problem(row["prompt"]):
        return problem
    for name in ("chosen", "rejected"):
        if problem := _messages_problem(row[name], name):
            return problem
        if [m["role"] for m in row[name]] != ["assistant"]:
            return f"{name!r} must be a list of one assistant message"
    if row["chosen"][0]["content"] == row["rejected"][0]["content"]:
        return "chosen and rejected are the same text"
    return _rewards_problem(row[_REWARDS]) if _REWARDS in row else None


def _rewards_problem(rewards: Any) -> str | None:
    for objective, both in rewards.items() if isinstance(rewards, dict) else [(None, rewards)]:
        numbers = isinstance(both, list) and [
            type(value) in (int, float) and isfinite(value) for value in both
        ]
        if objective is None or numbers != [True, True]:
            return f"'rewards' must hold [of chosen, of rejected] by objective, two numbers each, got {both!r:.80}"
    return None


def _prompt_problem(prompt: Any) -> str | None:
    if problem := _messages_problem(prompt, "prompt"):
        return problem
    roles = [m["role"] for m in prompt]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if len(turns) % 2 == 0 or turns != expected:
        return f"'prompt' must alternate user and assistant, from user to user, got roles {roles}"
    return None


def _messages_problem(messages: Any, name: str) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"{name!r} must be a non-empty list of messages"
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return (
                f"each message of {name!r} must have exactly the keys role and content, got {message!r:.80}"
            )
        if not isinstance(message["content"], str) or not message["content"].strip():
            return f"each message of {name!r} must have non-empty text as content"
        if io.has_surrogate(message["content"]):
            return f"a message of {name!r} holds half a character (a lone surrogate such as \\ud83d)"
    return None
