"""`judges.endpoint` and `judges.exchange`: requests, retries, limits and refusals against a server on this machine."""

import base64
import gzip
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_server import ChatServer, completion

from prmd.artifacts import io
from prmd.artifacts.runs import finish_run, start_run
from prmd.config.evaluation import EvaluationConfig, TextJudgeConfig
from prmd.config.shared import RewardModelConfig
from prmd.inference.cache import JsonTable
from prmd.judges import endpoint as endpoint_module
from prmd.judges.chats import EndpointChat, conversation_key
from prmd.judges.endpoint import ATTEMPTS, Endpoint, EndpointError, Reply, make_endpoint
from prmd.judges.exchange import Answer

KEY = "secret-key-0123456789"
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Häßlich?"}]


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def endpoint(url: str, key: str = KEY, seconds_between: float = 0.0) -> Endpoint:
    return Endpoint(url, "org/judge-7b", "JUDGE_KEY", key, seconds_between, first_pause=0.005)


def test_a_request_is_what_the_protocol_says() -> None:
    with ChatServer(lambda i, body: completion("safe", 21, 1)) as server:
        reply = endpoint(server.url + "/").complete(ASKED, max_new_tokens=7)
    assert reply == Reply("safe", 21, 1)
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == f"Bearer {KEY}"
    assert request["body"] == {
        "model": "org/judge-7b", "messages": ASKED, "temperature": 0, "max_tokens": 7,
    }  # fmt: skip


def test_no_key_no_header() -> None:
    with ChatServer(lambda i, body: completion("")) as server:
        assert endpoint(server.url, key="").complete(ASKED, max_new_tokens=7).text == ""
    assert "Authorization" not in server.requests[0]["headers"]


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"Retry-After": "0.01"}, b'{"error": {"message": "slow down"}}'),
        (503, {}, b"busy"),
        (200, {}, b"<html>not json</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"id": 7}'),
        (200, {}, b'{"choices": null}'),
        (200, {}, b'{"choices": [{"message": "yes"}]}'),
        (200, {}, b'["choices"]'),
        (200, {}, b'{"choices": [{"message": {"content": "ye'),
        (200, {"Content-Length": "20"}, completion("yes")[2]),
        (200, {}, gzip.compress(completion("yes")[2])[:40]),
        (200, {"Transfer-Encoding": "chunked"}, b"zz\r\nno length\r\n"),
        (200, {}, b'{"choices": ' + b"[" * 100_000),
        (200, {}, b'{"choices": ' + b"9" * 5000 + b"}"),
        (200, {}, b""),
    ],
    ids=[
        *("429", "503", "html", "no choices", "choices missing", "choices null", "message a text", "a list"),
        *(
            "cut JSON",
            "length too small",
            "cut gzip",
            "broken chunks",
            "too deep",
            "too long a number",
            "empty",
        ),
    ],
)
def test_what_passes_is_tried_again(failure: tuple, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        ChatServer(lambda i, body: failure if i < 2 else completion("yes")) as server,
    ):
        assert endpoint(server.url).complete(ASKED, max_new_tokens=7).text == "yes"
    assert len(server.requests) == 3 and caplog.text.count("trying again in") == 2


def test_it_gives_up_after_the_last_attempt() -> None:
    with (
        ChatServer(lambda i, body: (500, {}, b"broken")) as server,
        pytest.raises(EndpointError, match=rf"{ATTEMPTS} attempts \(HTTP 500: broken\)"),
    ):
        endpoint(server.url).complete(ASKED, max_new_tokens=7)
    assert len(server.requests) == ATTEMPTS


def test_an_endpoint_that_is_down_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match="see that the endpoint runs") as caught:
        endpoint(url).complete(ASKED, max_new_tokens=7)
    assert "\n" not in str(caught.value) and "refused" in str(caught.value)


@pytest.mark.parametrize(("status", "said"), [(401, "JUDGE_KEY was refused"), (404, "text_judge.model")])
def test_a_refusal_is_not_tried_again_and_never_shows_the_key(
    status: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    body = f'{{"error": {{"message": "cannot use\\n {KEY} here"}}}}'.encode()
    with (
        caplog.at_level(logging.DEBUG),
        ChatServer(lambda i, _: (status, {}, body)) as server,
        pytest.raises(EndpointError, match=said) as caught,
    ):
        endpoint(server.url).complete(ASKED, max_new_tokens=7)
    assert len(server.requests) == 1
    chain = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text} {endpoint(server.url)!r}"
    assert KEY not in chain and "cannot use *** here" in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with (
        ChatServer(lambda i, _: (401, {}, b"no key")) as server,
        pytest.raises(EndpointError, match="JUDGE_KEY is not set"),
    ):
        endpoint(server.url, key="").complete(ASKED, max_new_tokens=7)


def test_a_redirect_does_not_carry_the_key_away() -> None:
    with ChatServer(lambda i, _: completion("stolen")) as other:
        away = (302, {"Location": f"{other.url}/chat/completions"}, b"")
        with ChatServer(lambda i, _: away) as server, pytest.raises(EndpointError, match="HTTP 302"):
            endpoint(server.url).complete(ASKED, max_new_tokens=7)
    assert other.requests == []


def test_requests_keep_their_distance() -> None:
    with ChatServer(lambda i, _: completion("yes")) as server:
        client, started = endpoint(server.url, seconds_between=0.1), time.monotonic()
        for _ in range(4):
            client.complete(ASKED, max_new_tokens=7)
    assert time.monotonic() - started >= 0.3


def test_pauses_grow_and_an_answer_to_come_later_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(endpoint_module.time, "sleep", lambda seconds: slept.append(seconds))
    waits = {1: {"Retry-After": "7"}, 2: {"Retry-After": "900"}}
    with (
        ChatServer(lambda i, _: (429, waits.get(i, {}), b"")) as server,
        pytest.raises(EndpointError),
    ):
        Endpoint(server.url, "m", "K", "", 0.0, first_pause=1.0).complete(ASKED, max_new_tokens=7)
    assert [seconds for seconds in slept if seconds] == [1.0, 7.0, 60.0, 8.0, 16.0]


def test_settings_and_environment_make_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TextJudgeConfig(
        kind="endpoint", model="m", base_url="http://x/v1", api_key_env="SOME_KEY", max_requests_per_minute=30
    )
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    made = make_endpoint(settings)
    assert (made.key, made.seconds_between, made.base_url) == (KEY, 2.0, "http://x/v1")
    monkeypatch.delenv("SOME_KEY")
    assert make_endpoint(settings).key == ""


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "endpoint", "model": "m"}, "text_judge.base_url"),
        ({"kind": "local_model"}, "text_judge.model"),
        ({"kind": "replay"}, "text_judge.file"),
        ({"base_url": "file:///etc/passwd"}, "http:// or https://"),
        ({"api_key_env": "sk-123"}, "the name of an environment variable"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TextJudgeConfig(**values)


# ------------------------------------------------------------------ what is no text
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "un"}, {"type": "text", "text": "safe"}], "unsafe"),
        ([{"type": "text", "text": "yes"}, {"type": "image_url", "image_url": {}}], None),
        ([{"type": "thinking", "text": "yes?"}], None),
        (["yes"], None),
        ([], None),
        (None, None),
        (7, None),
        (True, None),
        ({"text": "yes"}, None),
        ("yes \ud83d", None),
        ([{"type": "text", "text": "\ud83d"}, {"type": "text", "text": "\ude00"}], None),
        ("yes \N{GRINNING FACE}", "yes \N{GRINNING FACE}"),
        ("", ""),
    ],
)
def test_content_is_text_or_text_parts_or_is_counted_as_unread(content: object, text: str | None) -> None:
    with ChatServer(lambda i, _: completion(content, 21, 3)) as server:
        assert endpoint(server.url).complete(ASKED, max_new_tokens=7) == Reply(text, 21, 3)
    assert len(server.requests) == 1  # it was paid for


def test_a_message_without_content_is_unread() -> None:
    with ChatServer(lambda i, _: (200, {}, b'{"choices": [{"message": {"refusal": "no"}}]}')) as server:
        assert endpoint(server.url).complete(ASKED, max_new_tokens=7) == Reply(None, 0, 0)


@pytest.mark.parametrize("usage", ["null", "7", '{"prompt_tokens": "many", "completion_tokens": -1}', "[1]"])
def test_an_odd_count_of_tokens_loses_no_reply(usage: str) -> None:
    body = '{"choices": [{"message": {"content": "yes"}}], "usage": ' + usage + "}"
    with ChatServer(lambda i, _: (200, {}, body.encode())) as server:
        assert endpoint(server.url).complete(ASKED, max_new_tokens=7) == Reply("yes", 0, 0)


@pytest.mark.parametrize("count", ["Infinity", "NaN", "1e400", "true", "9" * 400])
def test_a_count_of_tokens_that_is_no_number_is_none(count: str) -> None:
    body = '{"choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": ' + count + "}}"
    with ChatServer(lambda i, _: (200, {}, body.encode())) as server:
        assert endpoint(server.url).complete(ASKED, max_new_tokens=7) == Reply("yes", 0, 0)


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"Content-Encoding": "gzip"}, gzip.compress(completion("yes")[2])),
        (200, {}, gzip.compress(completion("yes")[2])),
        (200, {"Content-Length": "5000"}, completion("yes")[2]),
        (201, {}, b"\xef\xbb\xbf" + completion("yes")[2]),
    ],
    ids=["gzip", "gzip unsaid", "length too large", "byte order mark"],
)
def test_a_whole_reply_in_an_odd_cover_is_read(answer: tuple) -> None:
    with ChatServer(lambda i, _: answer) as server:
        assert endpoint(server.url).complete(ASKED, max_new_tokens=7) == Reply("yes", 10, 2)
    assert len(server.requests) == 1


# ------------------------------------------------------------------ limits
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def drip(begin: bytes, piece: bytes) -> Iterator[bytes]:
    yield begin
    while True:
        time.sleep(0.02)
        yield piece


def threads_end() -> bool:
    limit = time.monotonic() + 5
    while time.monotonic() < limit:
        if not [thread for thread in threading.enumerate() if thread.name == "exchange"]:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("begin", "piece"),
    [(HEAD + b"\r\n", b" "), (HEAD, b"X-A: b\r\n"), (HEAD + b"X-A: ", b"b"), (b"", b"H"), (b"", b"HTTP/1.1 100 C\r\n\r\n")],
    ids=["body", "headers", "one header", "status line", "100 without end"],
)  # fmt: skip
def test_a_request_has_one_deadline_as_a_whole(
    begin: bytes, piece: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(endpoint_module, "TOKEN_SECONDS", 0.0)
    monkeypatch.setattr(endpoint_module, "ATTEMPTS", 2)
    started = time.monotonic()
    with ChatServer(lambda i, _: drip(begin, piece)) as server:
        with pytest.raises(EndpointError, match=r"2 attempts \(no whole answer within 0\.3 s"):
            endpoint(server.url).complete(ASKED, max_new_tokens=7)
        assert 0.6 <= time.monotonic() - started < 5 and len(server.requests) == 2
        assert threads_end()  # while the server would go on


def test_a_refusal_that_drips_is_still_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(endpoint_module, "TOKEN_SECONDS", 0.0)
    with (
        ChatServer(lambda i, _: drip(b"HTTP/1.1 401 No\r\n\r\n", b" ")) as server,
        pytest.raises(EndpointError, match=r"HTTP 401: No; .* JUDGE_KEY was refused"),
    ):
        endpoint(server.url).complete(ASKED, max_new_tokens=7)
    assert len(server.requests) == 1


def test_a_whole_reply_before_the_deadline_is_taken_where_the_line_stays_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint_module, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(endpoint_module, "TOKEN_SECONDS", 0.0)
    begin = HEAD + b"Content-Length: 100000\r\n\r\n" + completion("yes")[2]
    with ChatServer(lambda i, _: drip(begin, b"\n")) as server:
        assert endpoint(server.url).complete(ASKED, max_new_tokens=7) == Reply("yes", 10, 2)
    assert len(server.requests) == 1


def test_no_more_than_the_limit_of_an_endless_answer_is_read() -> None:
    sent = []

    def endless() -> Iterator[bytes]:
        yield HEAD + b"\r\n"
        while True:
            sent.append(1)
            yield b" " * (1 << 20)

    with (
        ChatServer(lambda i, _: endless()) as server,
        pytest.raises(EndpointError, match=r"larger than 64 MiB; see text_judge\.base_url"),
    ):
        endpoint(server.url).complete(ASKED, max_new_tokens=7)
    assert len(server.requests) == 1 and 64 <= len(sent) < 80


def test_no_more_than_the_limit_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "REPLY_BYTES", 1 << 20)
    bomb = gzip.compress(completion("y" * (3 << 20))[2])
    with (
        ChatServer(lambda i, _: (200, {}, bomb)) as server,
        pytest.raises(EndpointError, match="larger than 1 MiB"),
    ):
        endpoint(server.url).complete(ASKED, max_new_tokens=7)
    assert len(bomb) < 1 << 16


def test_a_page_of_html_is_one_short_line_that_any_console_shows() -> None:
    page = b"<html>\r\n\x1b[2J\x00" + b"<p>Log in \xff\xfe</p>\n" * 1000
    with (
        ChatServer(lambda i, _: (200, {"Content-Type": "text/html"}, page)) as server,
        pytest.raises(EndpointError, match="no chat completion: '<html>") as caught,
    ):
        endpoint(server.url).complete(ASKED, max_new_tokens=7)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_half_a_character_in_a_refusal_can_be_printed() -> None:
    with (
        ChatServer(lambda i, _: (400, {}, b'{"error": {"message": "no \\ud83d here"}}')) as server,
        pytest.raises(EndpointError, match="HTTP 400: no here") as caught,
    ):
        endpoint(server.url).complete(ASKED, max_new_tokens=7)
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize("status", [429, 500])
def test_a_pause_beyond_the_limit_is_said_and_not_waited_for(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(endpoint_module.time, "sleep", lambda seconds: slept.append(seconds))
    with (
        ChatServer(lambda i, _: (status, {"Retry-After": "86400"}, b"come back")) as server,
        pytest.raises(EndpointError, match=f"HTTP {status}: come back; it wants a pause of 86400 s"),
    ):
        endpoint(server.url).complete(ASKED, max_new_tokens=7)
    assert max(slept) == 60.0


@pytest.mark.parametrize("wanted", ["²", "-5", "nan", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", ""])
def test_a_pause_that_is_no_number_is_the_usual_one(wanted: str) -> None:
    busy = (503, {"Retry-After": wanted}, b"")
    with ChatServer(lambda i, _: completion("yes") if i else busy) as server:
        assert endpoint(server.url).complete(ASKED, max_new_tokens=7).text == "yes"


# ------------------------------------------------------------------ secrets
SECRET = "SECRET/query+777=="
PASSWORD = "pass-WORD-4711"


def echo(status: int) -> tuple:
    """What a talkative gateway says of a request that it refuses."""
    said = f"{'x' * 190} {SECRET} {PASSWORD} {KEY} user1:{PASSWORD}"
    return status, {}, json.dumps({"error": {"message": said}}).encode()


def with_secrets(url: str) -> str:
    return url.replace("://", f"://user1:{PASSWORD}@") + f"?api-key={SECRET}&api-version=2024-10"


def holds_a_secret(text: str) -> list[str]:
    parts = (SECRET, SECRET[:9], PASSWORD, PASSWORD[:9], KEY, KEY[:9])
    return [part for part in parts if part in text]


def test_what_the_address_holds_is_sent_where_it_belongs() -> None:
    with ChatServer(lambda i, _: completion("yes")) as server:
        endpoint(with_secrets(server.url)).complete(ASKED, max_new_tokens=7)
        endpoint(f"{server.url}/?api-key={SECRET}").complete(ASKED, max_new_tokens=7)
    basic = base64.b64encode(f"user1:{PASSWORD}".encode()).decode()
    first, second = server.requests
    assert first["path"] == f"/v1/chat/completions?api-key={SECRET}&api-version=2024-10"
    assert first["headers"]["Authorization"] == f"Basic {basic}"  # the key is for another host
    assert first["headers"]["Host"] == server.url.split("/")[2]
    assert second["path"] == f"/v1/chat/completions?api-key={SECRET}"
    assert second["headers"]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [200, 302, 401, 404, 503])
def test_no_message_holds_a_secret(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.DEBUG),
        ChatServer(lambda i, _: echo(status)) as server,
        pytest.raises(EndpointError) as caught,
    ):
        endpoint(with_secrets(server.url)).complete(ASKED, max_new_tokens=7)
    said = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text} {endpoint(with_secrets(server.url))!r}"
    assert not holds_a_secret(said)
    address = server.url.replace("://", "://***@") + "?api-key=***&api-version=2024-10"
    assert address in str(caught.value)
    assert status != 401 or "user and password in text_judge.base_url were refused" in said


def test_an_endpoint_that_is_down_shows_no_secret() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match="refused") as caught:
        endpoint(with_secrets(url)).complete(ASKED, max_new_tokens=7)
    assert not holds_a_secret(str(caught.value))


def test_a_key_that_no_header_can_hold_is_one_line_without_it() -> None:
    for key in (f"{KEY}\n{KEY}", f"{KEY}…"):
        with pytest.raises(
            EndpointError, match="environment variable JUDGE_KEY holds a line break"
        ) as caught:
            endpoint("http://127.0.0.1:9/v1", key=key).complete(ASKED, max_new_tokens=7)
        assert not holds_a_secret(str(caught.value))


def test_an_address_that_cannot_be_asked_is_not_tried_again() -> None:
    url = f"http://{'a' * 70}.test/v1?api-key={SECRET}"
    with pytest.raises(EndpointError, match=r"cannot be asked .* see text_judge\.base_url") as caught:
        endpoint(url).complete(ASKED, max_new_tokens=7)
    assert not holds_a_secret(str(caught.value))


# ------------------------------------------------------------------ the cache of replies
PROMPTS = [[{"role": "user", "content": f"Question {i}"}] for i in range(5)]


def chat(root: Path, url: str) -> EndpointChat:
    settings = TextJudgeConfig(kind="endpoint", model="m", base_url=url, max_requests_per_minute=1e6)
    return EndpointChat(endpoint(url), settings, RewardModelConfig(artifact_root=str(root)).paths)


def test_what_is_no_text_is_counted_and_asked_for_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {1: [7], 3: "half \ud83d"}
    with ChatServer(lambda i, _: completion(odd.get(i, f"reply {i}"), 10, 2)) as server:
        first = chat(tmp_path, server.url)
        replies = first.complete(PROMPTS, max_new_tokens=7)
        assert replies == ["reply 0", "", "reply 2", "", "reply 4"]
        assert "2 of 5 replies are no text" in caplog.text
        assert (first.usage()["replies"], first.usage()["prompt_tokens"]) == (5, 50)  # all were paid for
        odd.clear()
        replies = chat(tmp_path, server.url).complete(PROMPTS, max_new_tokens=7)
        assert replies == ["reply 0", "reply 5", "reply 2", "reply 6", "reply 4"]
        assert len(server.requests) == 7


def test_every_reply_is_on_disk_before_the_next_is_asked_for(tmp_path: Path) -> None:
    kept: list[int] = []

    def answer(i: int, _: dict) -> tuple:
        table = JsonTable(client.paths.cache("judge", client.fingerprint))
        kept.append(sum(conversation_key(prompt, 7) in table for prompt in PROMPTS))
        return completion("yes")

    with ChatServer(answer) as server:
        client = chat(tmp_path, server.url)
        client.complete(PROMPTS, max_new_tokens=7)
    assert kept == [0, 1, 2, 3, 4]


def test_ctrl_c_loses_and_asks_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatServer(lambda i, _: completion(f"reply {i}")) as server:
        stopped = chat(tmp_path, server.url)
        ask = stopped.endpoint.complete

        def complete(messages: list, *, max_new_tokens: int) -> Reply:
            if len(server.requests) == 3:
                raise KeyboardInterrupt
            return ask(messages, max_new_tokens=max_new_tokens)

        monkeypatch.setattr(stopped.endpoint, "complete", complete)
        with pytest.raises(KeyboardInterrupt):
            stopped.complete(PROMPTS, max_new_tokens=7)
        replies = chat(tmp_path, server.url).complete(PROMPTS, max_new_tokens=7)
    assert replies == [f"reply {i}" for i in range(5)] and len(server.requests) == 5


def test_what_an_earlier_version_kept_that_is_no_text_is_asked_for_again(tmp_path: Path) -> None:
    with ChatServer(lambda i, _: completion("yes")) as server:
        client = chat(tmp_path, server.url)
        rows = [
            (conversation_key(PROMPTS[i], 7), {"text": text, "prompt": 1, "reply": 1})
            for i, text in enumerate(["kept", [{"type": "text", "text": "list"}], 7])
        ]
        key = io.fingerprint(["endpoint", server.url, "org/judge-7b"])  # as it always was
        JsonTable(client.paths.cache("judge", key)).append(rows)
        assert client.complete(PROMPTS[:3], max_new_tokens=7) == ["kept", "yes", "yes"]
        assert len(server.requests) == 2
        assert client.complete(PROMPTS[:3], max_new_tokens=7) == ["kept", "yes", "yes"]
        assert len(server.requests) == 2


def test_no_file_holds_a_secret_and_another_key_asks_nothing_again(tmp_path: Path) -> None:
    said = f"yes, {SECRET} and {PASSWORD} of {KEY}"
    with ChatServer(lambda i, _: completion(said)) as server:
        client = chat(tmp_path, with_secrets(server.url))
        replies = client.complete(PROMPTS, max_new_tokens=7)
        assert replies == ["yes, *** and *** of ***"] * 5
        config = EvaluationConfig(
            reward_model_config=RewardModelConfig(artifact_root=str(tmp_path)), text_judge=client.settings
        )
        finish_run(tmp_path / "done", config=config, inputs={}, fingerprint="f", clock=start_run())
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(files) >= 7 and not any(holds_a_secret(file.read_text("utf-8")) for file in files)
        other = with_secrets(server.url).replace(SECRET, "another").replace(PASSWORD, "another")
        assert chat(tmp_path, other).complete(PROMPTS, max_new_tokens=7) == replies
        assert len(server.requests) == 5


def test_a_long_reply_gets_more_time_than_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def note(request: object, *, seconds: float, most_bytes: int) -> Answer:
        given.append(seconds)
        return Answer(error=TimeoutError("late"))

    monkeypatch.setattr(endpoint_module, "exchange", note)
    monkeypatch.setattr(endpoint_module, "ATTEMPTS", 1)
    for tokens in (16, 2048):
        with pytest.raises(EndpointError, match="no answer after 1 attempts"):
            endpoint("http://127.0.0.1:9/v1").complete(ASKED, max_new_tokens=tokens)
    assert given == pytest.approx([21.6, 224.8])
