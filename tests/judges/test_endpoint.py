"""`judges.endpoint`: requests, retries, rate limit and refusals against a server on this machine."""

import logging
import socket
import time

import pytest
from chat_server import ChatServer, completion

from prmd.config.evaluation import TextJudgeConfig
from prmd.judges import endpoint as endpoint_module
from prmd.judges.endpoint import ATTEMPTS, Endpoint, EndpointError, Reply, make_endpoint

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


def test_no_key_no_header_and_no_content_is_an_empty_reply() -> None:
    with ChatServer(lambda i, body: completion(None)) as server:
        assert endpoint(server.url, key="").complete(ASKED, max_new_tokens=7).text == ""
    assert "Authorization" not in server.requests[0]["headers"]


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"Retry-After": "0.01"}, b'{"error": {"message": "slow down"}}'),
        (503, {}, b"busy"),
        (200, {}, b"<html>not json</html>"),
        (200, {}, b'{"choices": []}'),
    ],
    ids=["429", "503", "html", "no choices"],
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
        ({"api_key_env": "sk-123"}, "pattern"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TextJudgeConfig(**values)
