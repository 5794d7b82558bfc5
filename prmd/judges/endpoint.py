"""A client of any OpenAI-compatible endpoint: one chat completion per request.

Here: the request, its retries with growing pauses, the rate limit, what an answer says, and counted tokens. The key comes from the
environment and is sent to the configured host alone (redirects are not followed); neither it nor a secret in the address appears
in a message or reply. The deadline and the size of an answer are in `exchange`, caching the replies in `chats`, what they are
asked for in `text`.
"""

import json
import logging
import os
import re
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, InvalidURL
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from prmd.config.evaluation import TextJudgeConfig
from prmd.config.masking import MASK, SHORTEST_SECRET, basic_credentials, masked_address, secrets_in
from prmd.errors import UserError
from prmd.judges.exchange import Answer, AnswerTooLargeError, exchange
from prmd.pairs import Message

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
TIMEOUT_SECONDS, TOKEN_SECONDS = 20.0, 0.1
"""For a request as a whole, from looking up the host to the last byte of the answer, and more for every token it may write:
a verdict of one word is given up in seconds, a page may be written slowly."""
REPLY_BYTES = 64 << 20
PASSING_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP statuses that may be another one a little later."""
_SHOWN_CHARACTERS = 200


class EndpointError(UserError):
    """The endpoint does not answer, or refuses; what it answered before is kept."""


@dataclass(frozen=True)
class Reply:
    """What the endpoint wrote, and the tokens it charged for.

    Attributes:
        text: None where the answer is a chat completion whose content is no text: null, a number, half a character.
    """

    text: str | None
    prompt_tokens: int
    reply_tokens: int


class _PassingError(Exception):
    """A failure that is worth another attempt after `pause` seconds (None: the usual pause)."""

    def __init__(self, detail: str, pause: float | None = None) -> None:
        super().__init__(detail)
        self.pause = pause


@dataclass
class Endpoint:
    """Where completions come from.

    Attributes:
        base_url: address before `/chat/completions`; may hold `user:password@` and a query, which are sent and never shown.
        model: the endpoint's name for its model.
        key_variable: environment variable the key came from, for messages.
        key: sent as a bearer token; empty where the endpoint wants none.
        seconds_between: least time between the starts of two requests.
        first_pause: seconds before the second attempt; doubled before each further one.
    """

    base_url: str = field(repr=False)
    model: str
    key_variable: str
    key: str = field(repr=False)
    seconds_between: float
    first_pause: float = FIRST_PAUSE_SECONDS
    _next_start: float = field(default=0.0, repr=False)

    @property
    def address(self) -> str:
        """`base_url` without its secrets, for messages and keys."""
        return masked_address(self.base_url)

    def complete(self, messages: Sequence[Message], *, max_new_tokens: int) -> Reply:
        """One greedy completion.

        Raises:
            EndpointError: it refuses the request, or all attempts failed.
        """
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": 0,
            "max_tokens": max_new_tokens,
        }
        pause = self.first_pause
        for attempt in range(1, ATTEMPTS + 1):
            self._wait_for_turn()
            try:
                return self._attempt(body)
            except _PassingError as failure:
                if attempt == ATTEMPTS:
                    raise EndpointError(
                        f"{self.address}: no answer after {ATTEMPTS} attempts ({failure}); see that the endpoint runs"
                    ) from failure
                wait = min(failure.pause if failure.pause is not None else pause, LONGEST_PAUSE_SECONDS)
                logger.warning("%s: %s; trying again in %.1f s", self.address, failure, wait)
                time.sleep(wait)
                pause *= 2
        raise AssertionError("unreachable")

    def _wait_for_turn(self) -> None:
        time.sleep(max(0.0, self._next_start - time.monotonic()))
        self._next_start = time.monotonic() + self.seconds_between

    def _attempt(self, body: dict[str, Any]) -> Reply:
        seconds = TIMEOUT_SECONDS + TOKEN_SECONDS * body["max_tokens"]
        answer = exchange(self._request(body), seconds=seconds, most_bytes=REPLY_BYTES)
        if isinstance(answer.error, AnswerTooLargeError):
            raise EndpointError(f"{self.address}: {answer.error}; see text_judge.base_url")
        if answer.status is None:
            raise self._failure(answer.error)
        if not 200 <= answer.status < 300:
            raise self._refusal(answer.status, answer)
        return self._reply(answer)

    def _request(self, body: dict[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json", "User-Agent": "prmd"}
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise EndpointError(
                f"{self.address}: the key in the environment variable {self.key_variable} holds a line break or another "
                "character that no key has; set it again"
            )
        parts = urlsplit(self.base_url)
        user, _, host = parts.netloc.rpartition("@")
        if user:  # written for this host, which the key in the environment may not be
            headers["Authorization"] = f"Basic {basic_credentials(user)}"
        elif self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        path = f"{parts.path.rstrip('/')}/chat/completions"
        return urllib.request.Request(
            urlunsplit((parts.scheme, host, path, parts.query, "")),
            data=json.dumps(body).encode("utf-8"),
            headers=headers,
            method="POST",
        )

    def _failure(self, error: Exception | None) -> Exception:
        """No status came."""
        if not isinstance(error, OSError | HTTPException | ValueError):
            return error or AssertionError("neither an answer nor an error")
        said = self._clean(str(error)) or type(error).__name__
        if isinstance(error, InvalidURL | ValueError) and not isinstance(error, OSError):
            return EndpointError(f"{self.address}: cannot be asked ({said}); see text_judge.base_url")
        return _PassingError(said)  # unreachable, reset, timed out, cut short

    def _refusal(self, status: int, answer: Answer) -> Exception:
        detail = f"HTTP {status}: {self._said(answer.body) or self._clean(answer.reason)}"
        if status in PASSING_STATUSES:
            wanted = re.fullmatch(r"\d+(\.\d+)?", answer.headers.get("Retry-After", ""), re.ASCII)
            pause = float(wanted[0]) if wanted else None
            if pause is not None and pause > LONGEST_PAUSE_SECONDS:
                detail += f"; it wants a pause of {pause:.0f} s"
            return _PassingError(detail, pause)
        remedy = "see text_judge.model and text_judge.base_url"
        if status in (401, 403):
            remedy = f"the key in the environment variable {self.key_variable} {'was refused' if self.key else 'is not set'}"
            if "@" in urlsplit(self.base_url).netloc:
                remedy = "user and password in text_judge.base_url were refused"
        return EndpointError(f"{self.address}: {detail}; {remedy}")

    def _reply(self, answer: Answer) -> Reply:
        try:
            found = json.loads(answer.body)
            content = found["choices"][0]["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            cut = f"{self._clean(str(answer.error))}; " if answer.error else ""
            said = f"its answer is no chat completion: {self._said(answer.body)!r}"
            raise _PassingError(f"{cut}{said}") from None
        usage = found.get("usage")
        text = text_of(content)
        if text is not None:
            text = self._without_secrets(text)
        return Reply(text, _tokens(usage, "prompt_tokens"), _tokens(usage, "completion_tokens"))

    def _said(self, body: bytes) -> str:
        """The endpoint's own words, in one line."""
        text: Any = body.decode("utf-8", "replace")
        try:
            found = json.loads(body)["error"]
            text = found["message"] if isinstance(found, dict) else found
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        return self._clean(str(text))

    def _clean(self, text: str) -> str:
        """One short line that any console can show, without a secret; it is cut last, so that no part of one is left."""
        text = self._without_secrets(text)[: 20 * _SHOWN_CHARACTERS]
        line = "".join(c if c.isprintable() else " " for c in text)
        return " ".join(line.split())[:_SHOWN_CHARACTERS]

    def _without_secrets(self, text: str) -> str:
        secrets = [self.key] if len(self.key) >= SHORTEST_SECRET else []
        for secret in sorted([*secrets, *secrets_in(self.base_url)], key=len, reverse=True):
            text = text.replace(secret, MASK)
        return text


def text_of(content: Any) -> str | None:
    """The text of a message's content, or of a list of text parts; None where it is none or no whole characters."""
    if isinstance(content, list) and content:
        parts = [_part_text(part) for part in content]
        content = None if None in parts else "".join(parts)
    if not isinstance(content, str):
        return None
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which no file can hold
        return None
    return content


def _part_text(part: Any) -> str | None:
    is_text = isinstance(part, dict) and part.get("type", "text") == "text"
    return part["text"] if is_text and isinstance(part.get("text"), str) else None


def _tokens(usage: Any, name: str) -> int:
    """A count of tokens; 0 where the endpoint gives none, or something else."""
    count = usage.get(name) if isinstance(usage, dict) else None
    if isinstance(count, bool) or not isinstance(count, int | float) or not 0 <= count < 2**53:
        return 0
    return int(count)


def make_endpoint(settings: TextJudgeConfig) -> Endpoint:
    """The endpoint of `text_judge`, with its key from the environment."""
    return Endpoint(
        base_url=settings.base_url or "",
        model=settings.model or "",
        key_variable=settings.api_key_env,
        key=os.environ.get(settings.api_key_env, "").strip(),
        seconds_between=60.0 / settings.max_requests_per_minute,
    )
