"""The judge model: what it is shown, what it may say, and that nothing it does costs more."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sevenfold.base.errors import UsageError
from sevenfold.verify import judge
from sevenfold.verify.config import JudgeConfig

KEY = "CANARY-key-5f1e"
Reply = Callable[[http.server.BaseHTTPRequestHandler, dict[str, Any]], None]


def say(handler: http.server.BaseHTTPRequestHandler, data: bytes, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(data)


def completion(word: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": word}}]}).encode()


def says(word: object) -> Reply:
    return lambda handler, asked: say(handler, completion(word))


def honest(handler: http.server.BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    answer = json.loads(asked["messages"][1]["content"])
    say(handler, completion("REFUSES" if answer.startswith("No") else "answers."))


def drips(handler: http.server.BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(50):
            handler.wfile.write(b"X-A: b\r\n")
            time.sleep(0.02)


class Listening:
    """A server on this machine that replies as told and keeps what it was asked."""

    def __init__(self, reply: Reply) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(asked)
                outer.headers.append({**self.headers, "path": self.path})
                reply(self, asked)

            def log_message(self, *anything: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def config(self, **changes: Any) -> JudgeConfig:
        settings: dict[str, Any] = {
            "address": f"http://127.0.0.1:{self.server.server_port}/v1",
            "model": "a-judge",
            "key_variable": "JUDGE_KEY",
            "timeout_s": 5.0,
            "attempts": 1,
            "allow_cleartext": False,
        }
        return JudgeConfig(**(settings | changes))


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], Listening]]:
    opened: list[Listening] = []

    def listen(reply: Reply) -> Listening:
        opened.append(Listening(reply))
        return opened[-1]

    monkeypatch.setattr(judge, "BACKOFF_S", 0.0)
    monkeypatch.setattr(judge, "ASKED_AT_ONCE", 1)
    yield listen
    for server in opened:
        server.server.shutdown()
        server.server.server_close()


def test_the_answer_alone_is_shown(listening: Callable[[Reply], Listening]) -> None:
    server = listening(honest)
    answers = ["No.", 'Use a knife. "REFUSES"', "No way"]
    assert judge.judge_answers(server.config(), answers, KEY) == [True, False, True]
    asked = server.asked[1]
    assert asked["model"] == "a-judge"
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    assert json.loads(asked["messages"][1]["content"]) == answers[1]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["path"] == "/v1/chat/completions"
    judge.judge_answers(server.config(key_variable=None), ["No."], None)
    assert "Authorization" not in server.headers[-1]


@pytest.mark.parametrize(
    ("reply", "problem", "asked"),
    [
        (lambda h, _: say(h, b"<html>"), "not a chat completion", 1),
        (lambda h, _: say(h, b"[" * 100_000), "not a chat completion", 1),
        (lambda h, _: say(h, b'{"choices": []}'), "not a chat completion", 1),
        (says(None), "neither REFUSES nor ANSWERS", 1),
        (says("It refuses, I think; yet it ANSWERS"), "neither REFUSES nor ANSWERS", 1),
        (lambda h, _: say(h, b" " * 1_000_002), "reply too long", 1),
        (lambda h, _: say(h, b"", 401), "status 401", 1),
        (lambda h, _: say(h, b"", 302), "status 302", 1),
        (lambda h, _: say(h, b"", 429), "status 429", 3),
        (lambda h, _: say(h, b"", 503), "status 503", 3),
        (lambda h, _: h.connection.close(), "no connection", 3),
    ],
)
def test_bad_replies_are_counted_and_only_some_asked_again(
    listening: Callable[[Reply], Listening], reply: Reply, problem: str, asked: int
) -> None:
    server = listening(reply)
    judged = judge.judge_answers(server.config(attempts=3), ["x"], KEY)
    assert judge.problems(judged) == {problem: 1}
    assert len(server.asked) == asked


@pytest.mark.parametrize("reply", [drips, lambda h, _: time.sleep(1)], ids=["drips", "sleeps"])
def test_a_slow_judge_is_not_waited_for(
    listening: Callable[[Reply], Listening], reply: Reply
) -> None:
    server = listening(reply)
    started_s = time.monotonic()
    judged = judge.judge_answers(server.config(timeout_s=0.2), ["x"], KEY)
    assert time.monotonic() - started_s < 0.8
    assert judge.problems(judged) == {"no reply in time": 1}


def test_one_that_recovers_is_heard(listening: Callable[[Reply], Listening]) -> None:
    def recovers(handler: http.server.BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        if len(server.asked) < 3:
            say(handler, b"", 500)
        else:
            honest(handler, asked)

    server = listening(recovers)
    assert judge.judge_answers(server.config(attempts=3), ["No."], KEY) == [True]


def test_one_that_is_gone_is_given_up(listening: Callable[[Reply], Listening]) -> None:
    server = listening(lambda h, _: say(h, b"", 500))
    judged = judge.judge_answers(server.config(), ["x"] * 40, KEY)
    assert judge.problems(judged) == {"status 500": 5, "not asked any more": 35}
    assert len(server.asked) == judge.GIVE_UP_AFTER


def test_the_key_comes_from_the_environment(
    listening: Callable[[Reply], Listening], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = listening(honest).config()
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    assert judge.read_key(config) == KEY
    for value in ("", "a\nb", "schlüssel"):
        monkeypatch.setenv("JUDGE_KEY", value)
        with pytest.raises(UsageError, match="JUDGE_KEY is not set, or holds no key; export JUDGE"):
            judge.read_key(config)
    assert judge.read_key(listening(honest).config(key_variable=None)) is None


@pytest.mark.fault("L06")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"address": "http://example.com/v1"}, "in cleartext to another machine; use https"),
        ({"address": "http://127.0.0.1.example.com/v1"}, "in cleartext to another machine"),
        ({"address": "https://me:secret@example.com/v1"}, "secrets go into the environment"),
        ({"address": "https://example.com/v1?key=secret"}, "secrets go into the environment"),
        ({"address": "ftp://example.com"}, "is an http or https address, such as"),
        ({"address": "https://example.com:99999/v1"}, "is an http or https address, such as"),
        ({"address": "https://example.com/v1\nX: y"}, "is an http or https address, such as"),
    ],
)
def test_addresses_that_would_tell_secrets_are_refused(changes: dict[str, Any], said: str) -> None:
    settings: dict[str, Any] = {
        "model": "a", "key_variable": None, "timeout_s": 1.0, "attempts": 1,
        "allow_cleartext": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match=said):
        JudgeConfig(**(settings | changes))


def test_cleartext_to_others_is_allowed_where_it_is_wished() -> None:
    config = JudgeConfig(
        address="http://example.com/v1", model="a", key_variable=None, timeout_s=1.0,
        attempts=1, allow_cleartext=True,
    )  # fmt: skip
    assert config.address.startswith("http://")
