"""A chat endpoint on this machine that answers by a script, for tests of judges."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""
Pieces = Iterable[bytes]
"""A whole answer, status line and headers too, piece by piece: for servers that drip, stall or never end."""


def completion(text: object, prompt: int = 10, reply: int = 2) -> Answer:
    """A well-formed answer."""
    body = {
        "choices": [{"message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": reply},
    }
    return 200, {}, json.dumps(body).encode("utf-8")


class ChatServer:
    """Answers the i-th request with `answer(i, body)`; remembers every request."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Answer | Pieces]) -> None:
        self.requests: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
                with contextlib.suppress(OSError):  # the client has gone
                    self.send(answer(len(server.requests) - 1, body))

            def send(self, said: Answer | Pieces) -> None:
                if not isinstance(said, tuple):
                    for piece in said:
                        self.wfile.write(piece)
                    return
                status, headers, content = said
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Tests read no access log."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> "ChatServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
