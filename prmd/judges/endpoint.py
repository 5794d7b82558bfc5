"""A client of any OpenAI-compatible endpoint: one chat completion per request.

Here: the request, its retries with growing pauses, the rate limit, and counted tokens. The key comes from the environment, is
sent to the configured host alone (redirects are not followed) and appears in no message. Caching the replies is in
`chats`, what they are asked for in `text`.
"""

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from prmd.config.evaluation import TextJudgeConfig
from prmd.errors import UserError
from prmd.pairs import Message

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
TIMEOUT_SECONDS = 120.0
PASSING_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP statuses that may be another one a little later."""


class EndpointError(UserError):
    """The endpoint does not answer, or refuses; what it answered before is kept."""


@dataclass(frozen=True)
class Reply:
    """What the endpoint wrote, and the tokens it charged for."""

    text: str
    prompt_tokens: int
    reply_tokens: int


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _PassingError(Exception):
    """A failure that is worth another attempt after `pause` seconds (None: the usual pause)."""

    def __init__(self, detail: str, pause: float | None = None) -> None:
        super().__init__(detail)
        self.pause = pause


@dataclass
class Endpoint:
    """Where completions come from.

    Attributes:
        base_url: address before `/chat/completions`.
        model: the endpoint's name for its model.
        key_variable: environment variable the key came from, for messages.
        key: sent as a bearer token; empty where the endpoint wants none.
        seconds_between: least time between the starts of two requests.
        first_pause: seconds before the second attempt; doubled before each further one.
    """

    base_url: str
    model: str
    key_variable: str
    key: str = field(repr=False)
    seconds_between: float
    first_pause: float = FIRST_PAUSE_SECONDS
    _next_start: float = field(default=0.0, repr=False)

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
                        f"{self.base_url}: no answer after {ATTEMPTS} attempts ({failure}); see that the endpoint runs"
                    ) from failure
                wait = min(failure.pause if failure.pause is not None else pause, LONGEST_PAUSE_SECONDS)
                logger.warning("%s: %s; trying again in %.1f s", self.base_url, failure, wait)
                time.sleep(wait)
                pause *= 2
        raise AssertionError("unreachable")

    def _wait_for_turn(self) -> None:
        time.sleep(max(0.0, self._next_start - time.monotonic()))
        self._next_start = time.monotonic() + self.seconds_between

    def _attempt(self, body: dict[str, Any]) -> Reply:
        headers = {"Content-Type": "application/json", "User-Agent": "prmd"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.base_url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode("utf-8"),
            headers=headers,
            method="POST",
        )
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_SECONDS) as response:
                raw = response.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None  # the request it carries holds the key
        except (OSError, HTTPException) as error:  # unreachable, reset, timed out, cut short
            raise _PassingError(self._clean(str(error) or type(error).__name__)) from None
        return self._reply(raw)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        detail = f"HTTP {error.code}: {self._message(error)}"
        if error.code in PASSING_STATUSES:
            wanted = error.headers.get("Retry-After", "")
            return _PassingError(detail, float(wanted) if wanted.replace(".", "", 1).isdigit() else None)
        remedy = "see text_judge.model and text_judge.base_url"
        if error.code in (401, 403):
            state = "was refused" if self.key else "is not set"
            remedy = f"the key in the environment variable {self.key_variable} {state}"
        return EndpointError(f"{self.base_url}: {detail}; {remedy}")

    def _message(self, error: urllib.error.HTTPError) -> str:
        """The endpoint's own words, in one line."""
        try:
            text = error.read(4096).decode("utf-8", "replace")
        except (OSError, HTTPException):
            return str(error.reason)
        try:
            found = json.loads(text)
            text = found["error"]["message"] if isinstance(found["error"], dict) else found["error"]
        except (ValueError, KeyError, TypeError):
            pass
        return self._clean(str(text)) or str(error.reason)

    def _clean(self, text: str) -> str:
        line = " ".join(text.split())[:200]
        return line.replace(self.key, "***") if self.key else line

    def _reply(self, raw: bytes) -> Reply:
        try:
            found = json.loads(raw)
            text = found["choices"][0]["message"].get("content")
            usage = found.get("usage") or {}
            prompt, reply = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
            return Reply(text or "", int(prompt), int(reply))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            said = self._clean(raw[:400].decode("utf-8", "replace"))
            raise _PassingError(f"its answer is no chat completion: {said!r}") from error


def make_endpoint(settings: TextJudgeConfig) -> Endpoint:
    """The endpoint of `text_judge`, with its key from the environment."""
    return Endpoint(
        base_url=settings.base_url or "",
        model=settings.model or "",
        key_variable=settings.api_key_env,
        key=os.environ.get(settings.api_key_env, "").strip(),
        seconds_between=60.0 / settings.max_requests_per_minute,
    )
