"""Judges that read a response and say something about it: harmful or not, refused or not, better or worse.

One protocol for refusal phrases, a classifier, a local instruct model, an endpoint and a file of verdicts. What is asked is in
`rubrics`; a verdict that cannot be read is counted, never guessed. Who writes the replies is in `chats`, the card that goes with
every judged result and the two orders of a comparison are in `cards`; judges of preference are reward models, in `judges`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prmd.artifacts import io
from prmd.artifacts.paths import resolve_user_path
from prmd.config.evaluation import EvaluationConfig
from prmd.config.shared import ModelConfig
from prmd.errors import ConfigError
from prmd.features import refuses
from prmd.judges.chats import Chat, EndpointChat, LocalChat, ReplayChat
from prmd.judges.classifier import LabelClassifier
from prmd.judges.endpoint import make_endpoint
from prmd.judges.rubrics import JAILBREAK, REFUSAL, JudgeItem, Rubric, Verdict, item_key
from prmd.pairs import Message

VERDICT_TOKENS = 16


class TextJudge(Protocol):
    """What a benchmark needs of a judge."""

    @property
    def kind(self) -> str:
        """As in `text_judge.kind`."""

    @property
    def name(self) -> str:
        """Stands in the brackets of metric names."""

    @property
    def fingerprint(self) -> str:
        """Key of the judge; results of different judges are never compared."""

    @property
    def writes(self) -> bool:
        """Whether `complete` works."""

    def answers(self, rubric: Rubric) -> bool:
        """Whether it can judge by this rubric."""

    def judge(self, items: Sequence[JudgeItem], rubric: Rubric) -> list[Verdict]:
        """One verdict per item, in order."""

    def complete(self, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int) -> list[str]:
        """One greedy chat completion per conversation, kept on disk by content.

        Raises:
            ConfigError: the judge does not write (phrases, a classifier).
            EndpointError: the endpoint stopped answering; what it said is kept.
        """

    def usage(self) -> dict[str, Any]:
        """What judging took so far."""


class _Silent:
    """A judge that writes nothing."""

    kind: str
    writes = False

    def complete(self, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int) -> list[str]:
        """Refused: see `Raises` of the protocol."""
        raise ConfigError(
            f"text_judge.kind: {self.kind} cannot write a judgement; wanted local_model, endpoint or replay"
        )

    def usage(self) -> dict[str, Any]:
        """Nothing that is paid for."""
        return {}


@dataclass(frozen=True)
class StringJudge(_Silent):
    """Refusal phrases."""

    kind: str = "strings"
    name: str = "strings"

    @property
    def fingerprint(self) -> str:
        return io.fingerprint("strings, version 1")

    def answers(self, rubric: Rubric) -> bool:
        """Refusals alone: phrases do not tell harm."""
        return rubric.name == REFUSAL.name

    def judge(self, items: Sequence[JudgeItem], rubric: Rubric) -> list[Verdict]:
        """Whether each response refuses."""
        found = [refuses(item.response) for item in items]
        return [
            # marked, so that a file with the verdicts of phrases and of a judge can be replayed as the judge
            Verdict(f"{self.name}-{item_key(item, rubric)}", said, None, rubric.label(said) or "")
            for item, said in zip(items, found, strict=True)
        ]


@dataclass(frozen=True)
class ClassifierJudge(_Silent):
    """A sequence classifier with a label that means harmful; reads request and response as a pair."""

    classifier: LabelClassifier
    kind: str = "classifier"

    @property
    def name(self) -> str:
        return self.classifier.name

    @property
    def fingerprint(self) -> str:
        return self.classifier.fingerprint

    def answers(self, rubric: Rubric) -> bool:
        """Harm alone."""
        return rubric.name == JAILBREAK.name

    def judge(self, items: Sequence[JudgeItem], rubric: Rubric) -> list[Verdict]:
        """Positive where the probability of the label is above one half."""
        scores = self.classifier.probabilities(
            [item.response for item in items], [item.request for item in items]
        )
        return [
            Verdict(item_key(item, rubric), bool(score > 0.5), float(score), f"{score:.6f}")
            for item, score in zip(items, scores, strict=True)
        ]


@dataclass(frozen=True)
class ChatJudge:
    """A model that is asked in words, or shown the exchange itself.

    Attributes:
        kind: `local_model` or `endpoint`.
        chat: who replies.
        conversation: show the exchange as a conversation, for models trained to judge it (Llama Guard).
    """

    kind: str
    chat: Chat
    conversation: bool = False

    @property
    def name(self) -> str:
        return self.chat.name

    @property
    def fingerprint(self) -> str:
        return io.fingerprint([self.chat.fingerprint, self.conversation])

    @property
    def writes(self) -> bool:
        return not self.conversation

    def answers(self, rubric: Rubric) -> bool:
        """Everything; harm alone where the exchange is shown without a question."""
        return not self.conversation or rubric.name == JAILBREAK.name

    def judge(self, items: Sequence[JudgeItem], rubric: Rubric) -> list[Verdict]:
        """The reply read by the rubric."""
        prompts = [_exchange(item) if self.conversation else rubric.ask(item) for item in items]
        replies = self.complete(prompts, max_new_tokens=VERDICT_TOKENS)
        return [
            Verdict(item_key(item, rubric), rubric.read(reply), None, reply)
            for item, reply in zip(items, replies, strict=True)
        ]

    def complete(self, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int) -> list[str]:
        """As `TextJudge.complete`."""
        return self.chat.complete(prompts, max_new_tokens=max_new_tokens)

    def usage(self) -> dict[str, Any]:
        """Replies, tokens and cost."""
        return self.chat.usage()


def _exchange(item: JudgeItem) -> list[Message]:
    return [{"role": "user", "content": item.request}, {"role": "assistant", "content": item.response}]


@dataclass(frozen=True)
class ReplayJudge(ChatJudge):
    """Verdicts from a file, by `item_key`; replies by `chats.conversation_key`."""

    chat: ReplayChat

    def judge(self, items: Sequence[JudgeItem], rubric: Rubric) -> list[Verdict]:
        """The verdicts of the file, as labels (`unsafe`, `no`, ...).

        Raises:
            DataError: the file lacks one.
        """
        keys = [item_key(item, rubric) for item in items]
        replies = self.chat.texts(keys)
        return [
            Verdict(key, rubric.read(reply), None, reply) for key, reply in zip(keys, replies, strict=True)
        ]


def make_text_judge(config: EvaluationConfig) -> TextJudge | None:
    """The judge of `text_judge`; None with kind `none`.

    Raises:
        ConfigError: its file or folder is missing.
        DataError: its file is malformed.
    """
    settings, paths, trust = config.text_judge, config.paths, config.shared.model.trust_remote_code
    if settings.kind == "none":
        return None
    if settings.kind == "strings":
        return StringJudge()
    if settings.kind == "classifier":
        source = settings.model or ""
        return ClassifierJudge(LabelClassifier(source, settings.label, "text_judge", paths, trust))
    if settings.kind == "replay":
        file = resolve_user_path(settings.file or "", "text_judge.file", "a file of verdicts", "file")
        return ReplayJudge("replay", ReplayChat(file))
    if settings.kind == "endpoint":
        chat: Chat = EndpointChat(make_endpoint(settings), settings, paths)
    else:  # an instruct model, in the number format of the policies
        dtype = config.shared.model.dtype
        model = ModelConfig(
            source="hub", name=settings.model or "", revision=None, dtype=dtype, trust_remote_code=trust
        )
        chat = LocalChat(model, paths, config.generation.batch_size)
    return ChatJudge(settings.kind, chat, settings.conversation)
