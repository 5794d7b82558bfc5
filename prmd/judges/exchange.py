"""One HTTP request and its answer within one deadline: whatever the server does, it ends, and what had come is kept.

The request runs in a thread of its own, because a name that is looked up, headers that drip and a body that drips have no
limit in common; at the deadline its connection is cut, which ends the thread too. Redirects are not followed.
"""

import contextlib
import socket
import threading
import time
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any

PIECE_BYTES = 1 << 16
"""Read at once; of an answer that is no success no more is kept."""
_LOOK_UP_SECONDS = 0.25
_GZIP = b"\x1f\x8b"


class AnswerTooLargeError(Exception):
    """An answer beyond the limit, before or after it was unpacked."""


@dataclass
class Answer:
    """What came back.

    Attributes:
        status: HTTP status; None where none came.
        reason: what the server calls that status.
        headers: of the answer.
        body: what was read of it.
        error: why the answer is not whole; None where nothing is known to be missing.
    """

    status: int | None = None
    reason: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: Exception | None = None


class _Line:
    """The connections of one request, for another thread to cut."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._is_cut = False

    def add(self, connection: socket.socket) -> None:
        self._sockets.append(connection)
        if self._is_cut:
            self.cut()

    def cut(self) -> None:
        self._is_cut = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):  # closed before
                connection.shutdown(socket.SHUT_RDWR)


class _Opener(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections that the line knows of."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self._line = line

    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_known_to(self._line, HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_known_to(self._line, HTTPSConnection), request)


def _known_to(line: _Line, kind: type[HTTPConnection]) -> type[HTTPConnection]:
    class Known(kind):
        def connect(self) -> None:
            super().connect()
            line.add(self.sock)

    return Known


class _EveryStatus(urllib.request.HTTPErrorProcessor):
    """Hands out refusals and redirects as they are; a redirect would carry the key to another host."""

    def http_response(self, _: urllib.request.Request, response: Any) -> Any:
        return response

    https_response = http_response


def exchange(request: urllib.request.Request, *, seconds: float, most_bytes: int) -> Answer:
    """Send a request and read its answer in pieces; never raises for what server or network do.

    Args:
        seconds: for the whole of it; afterwards the answer holds what had come, and a `TimeoutError`.
        most_bytes: of the answer's body, packed and unpacked; beyond it an `AnswerTooLargeError` is its error.
    """
    answer, line, done = Answer(), _Line(), threading.Event()

    def work() -> None:
        try:
            _receive(request, answer, line, seconds=seconds, most_bytes=most_bytes)
        except Exception as error:  # every kind: the caller's thread looks at it
            answer.error = error
        finally:
            done.set()

    deadline = time.monotonic() + seconds
    threading.Thread(target=work, name="exchange", daemon=True).start()
    try:
        while not done.is_set() and (left := deadline - time.monotonic()) > 0:
            done.wait(min(left, _LOOK_UP_SECONDS))  # on Windows Ctrl-C is only seen between two waits
        is_late = not done.is_set()
    finally:
        line.cut()
    if not is_late:
        return answer
    done.wait(_LOOK_UP_SECONDS)  # so that the thread, which is cut, hands out what it has
    late = TimeoutError(f"no whole answer within {seconds:g} s")
    return replace(answer, error=late)


def _receive(
    request: urllib.request.Request, answer: Answer, line: _Line, *, seconds: float, most_bytes: int
) -> None:
    opener = urllib.request.build_opener(_Opener(line), _EveryStatus)
    body = bytearray()
    with opener.open(request, timeout=seconds) as response:
        answer.headers, answer.reason, answer.status = response.headers, response.reason, response.status
        limit = most_bytes if 200 <= response.status < 300 else PIECE_BYTES
        try:
            while len(body) <= limit and (piece := response.read1(PIECE_BYTES)):
                body += piece
        finally:
            answer.body = _unpacked(bytes(body), limit)
    if limit == most_bytes and len(answer.body) > most_bytes:
        answer.body = b""
        raise AnswerTooLargeError(f"its answer is larger than {most_bytes >> 20} MiB")


def _unpacked(body: bytes, limit: int) -> bytes:
    """The body, unpacked where it is gzip, asked for or not; at most one byte more than `limit`."""
    if not body.startswith(_GZIP):
        return body
    try:
        return zlib.decompressobj(wbits=31).decompress(body, limit + 1)
    except zlib.error:
        return body
