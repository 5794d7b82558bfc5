"""Who completes a conversation for a judge: a local instruct model, an endpoint, or a file of earlier replies.

Decoding is greedy, so a reply depends on the conversation alone; every reply is kept on disk by content. An endpoint's replies are
written one by one, as they come; of a local model's an interruption costs at most the few that were under way. What is asked and how the reply is read is in `text`.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.evaluation import TextJudgeConfig
from prmd.config.shared import BatchSize, ModelConfig
from prmd.data.readers import json_rows
from prmd.errors import ConfigError, DataError
from prmd.inference.cache import JsonTable
from prmd.inference.generation import generate
from prmd.judges.endpoint import Endpoint, EndpointError
from prmd.models.chat_templates import render, template_fingerprint
from prmd.models.loading import base_model_key, load_causal_lm, load_source_tokenizer
from prmd.pairs import Message
from prmd.runtime import free_memory, progress

logger = logging.getLogger(__name__)


class Chat(Protocol):
    """What writes replies."""

    @property
    def name(self) -> str:
        """Short name, for the brackets of a metric."""

    @property
    def fingerprint(self) -> str:
        """Key of everything a reply depends on but the conversation."""

    def complete(self, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int) -> list[str]:
        """One greedy reply per conversation, in order; empty where there is none."""

    def usage(self) -> dict[str, Any]:
        """What the replies given so far took."""


def conversation_key(messages: Sequence[Message], max_new_tokens: int) -> str:
    """Key of one request, under which its reply is kept."""
    return io.fingerprint([[[m["role"], m["content"]] for m in messages], max_new_tokens])


def short_name(model: str) -> str:
    """`meta/Llama-3-8B` or a folder's path -> its last part."""
    return model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


# ------------------------------------------------------------------ endpoint
@dataclass
class EndpointChat:
    """An endpoint behind a cache.

    Attributes:
        endpoint: who answers what is not cached.
        settings: what a token costs.
        paths: replies are cached below this artifact root.
    """

    endpoint: Endpoint
    settings: TextJudgeConfig
    paths: ArtifactPaths
    _counts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return short_name(self.endpoint.model)

    @property
    def fingerprint(self) -> str:
        return io.fingerprint(["endpoint", self.endpoint.address, self.endpoint.model])

    def complete(self, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int) -> list[str]:
        """One reply per conversation; equal conversations are asked once.

        A reply that is no text is empty here, so that it counts as one that cannot be read; it is not kept, and asked for
        again the next time.

        Raises:
            EndpointError: the endpoint stopped answering; says how many replies are kept.
        """
        table = JsonTable(self.paths.cache("judge", self.fingerprint))
        keys = [conversation_key(messages, max_new_tokens) for messages in prompts]
        asked = dict(zip(keys, prompts, strict=True))
        todo = {key: messages for key, messages in asked.items() if not _is_kept(table, key)}
        try:
            unread = self._ask(table, todo, max_new_tokens)
        except EndpointError as error:
            kept = sum(_is_kept(table, key) for key in asked)
            raise EndpointError(
                f"{error}; {kept} of {len(asked)} replies are kept, run the same command again to go on"
            ) from error
        found = {key: table[key] for key in asked if _is_kept(table, key)}
        self._count([*found.values(), *unread], requests=len(todo))
        return [found[key]["text"] if key in found else "" for key in keys]

    def _ask(
        self, table: JsonTable, todo: dict[str, Sequence[Message]], max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Put every reply into the table before the next is asked for; returns those that are no text, which are not put there."""
        unread = []
        for key, messages in progress(todo.items(), len(todo), f"{self.name}: judging"):
            reply = self.endpoint.complete(messages, max_new_tokens=max_new_tokens)
            row = {"text": reply.text, "prompt": reply.prompt_tokens, "reply": reply.reply_tokens}
            if reply.text is None:
                unread.append(row)
            else:
                table.append([(key, row)])  # at once, because each is paid for
        if unread:
            logger.warning(
                "%s: %d of %d replies are no text; they count as not readable and are not kept",
                *(self.name, len(unread), len(todo)),
            )
        return unread

    def _count(self, replies: Sequence[dict[str, Any]], *, requests: int) -> None:
        self._counts["replies"] += len(replies)
        self._counts["requests_now"] += requests
        self._counts["prompt_tokens"] += sum(reply["prompt"] for reply in replies)
        self._counts["reply_tokens"] += sum(reply["reply"] for reply in replies)

    def usage(self) -> dict[str, Any]:
        """Replies, tokens and cost of all replies used, whether asked for now or earlier; cost is None without prices."""
        settings = self.settings
        prices = (settings.price_per_million_prompt_tokens, settings.price_per_million_reply_tokens)
        tokens = (self._counts["prompt_tokens"], self._counts["reply_tokens"])
        cost = None if None in prices else sum(n * p / 1e6 for n, p in zip(tokens, prices, strict=True))
        return {
            name: self._counts[name] for name in ("replies", "requests_now", "prompt_tokens", "reply_tokens")
        } | {"cost": cost}


def _is_kept(table: JsonTable, key: str) -> bool:
    """Whether a reply is there, as text; earlier versions also kept what is none."""
    return key in table and isinstance(table[key]["text"], str)


# ------------------------------------------------------------------ local model
@dataclass
class LocalChat:
    """An instruct model of any size that fits beside nothing else; loaded for what the cache lacks, then let go.

    Attributes:
        paths: replies are cached below this artifact root.
        batch_size: conversations answered at a time, or `auto`.
    """

    model: ModelConfig
    paths: ArtifactPaths
    batch_size: BatchSize
    _counts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return short_name(self.model.name)

    @property
    def fingerprint(self) -> str:
        return io.fingerprint(["local", base_model_key(self.model, self.paths), self.model.dtype])

    def complete(self, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int) -> list[str]:
        """One reply per conversation; none to a conversation that is longer than the model's context.

        Raises:
            ConfigError: the model cannot be loaded.
        """
        try:
            tokenizer = load_source_tokenizer(self.model, self.paths)
            key = io.fingerprint([self.fingerprint, template_fingerprint(tokenizer), max_new_tokens])
            table = JsonTable(self.paths.cache("judge", key))
            tokens = [tuple(render(tokenizer, prompt, add_generation_prompt=True)) for prompt in prompts]
            model = None if table.holds(tokens) else load_causal_lm(self.model, self.paths).eval()
        except ConfigError as error:
            raise ConfigError(str(error).replace("model.name", "text_judge.model")) from error
        room = None if model is None else getattr(model.config, "max_position_embeddings", None)
        fitting = [t for t in tokens if room is None or len(t) + max_new_tokens <= room]
        if len(fitting) < len(tokens):
            logger.warning(
                "%s: %d of %d conversations are longer than its context of %s tokens and get no reply",
                *(self.name, len(tokens) - len(fitting), len(tokens), room),
            )
        replies = generate(
            model,
            tokenizer,
            fitting,
            samples_per_prompt=1,
            max_new_tokens=max_new_tokens,
            seed=0,
            batch_size=self.batch_size,
            description=f"{self.name}: judging",
            temperature=0.0,
            table=table,
        )
        del model
        free_memory()
        found = {t: reply[0] for t, reply in zip(fitting, replies, strict=True)}
        self._counts["replies"] += len(found)
        self._counts["reply_tokens"] += sum(len(reply.token_ids) for reply in found.values())
        return [found[t].text if t in found else "" for t in tokens]

    def usage(self) -> dict[str, Any]:
        """Replies given and their tokens."""
        return dict(self._counts)


# ------------------------------------------------------------------ replay
@dataclass
class ReplayChat:
    """Replies and verdicts from a file of JSON Lines, rows of `id` with `label` or `text`; asks nobody.

    A benchmark's own file of judgements is such a file; `raw` stands in for a label that could not be read.
    """

    path: Path

    def __post_init__(self) -> None:
        self.rows: dict[str, str] = {}
        for number, row in enumerate(json_rows(self.path), start=1):
            where = f"{self.path}: row {number}"
            if not isinstance(row.get("id"), str) or not row["id"]:
                raise DataError(
                    f"{where}: id: got {row.get('id')!r}, wanted the text that names what is judged"
                )
            said = next((row[k] for k in ("label", "text", "raw") if isinstance(row.get(k), str)), None)
            if said is None:
                raise DataError(f"{where}: neither label nor text nor raw is a text; give the verdict in one")
            if self.rows.setdefault(row["id"], said) != said:
                raise DataError(f"{where}: id: {row['id']!r} has another verdict before; keep one")

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def fingerprint(self) -> str:
        return io.fingerprint(["replay", io.file_sha256(self.path)])

    def texts(self, ids: Sequence[str]) -> list[str]:
        """What the file holds for each id.

        Raises:
            DataError: it lacks one; says how many and which is the first.
        """
        lacking = [key for key in ids if key not in self.rows]
        if lacking:
            raise DataError(
                f"{self.path}: {len(lacking)} of {len(ids)} verdicts are missing, the first is {lacking[0]!r}; add them"
            )
        return [self.rows[key] for key in ids]

    def complete(self, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int) -> list[str]:
        """The replies under the keys of the conversations."""
        return self.texts([conversation_key(messages, max_new_tokens) for messages in prompts])

    def usage(self) -> dict[str, Any]:
        """How many verdicts the file holds."""
        return {"rows": len(self.rows)}
