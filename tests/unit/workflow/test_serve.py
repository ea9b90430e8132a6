"""The endpoint on a small model with random weights, over real sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.base.records import Run
from sevenfold.workflow import chat, cli, completions
from sevenfold.workflow.completions import AskedWronglyError, Speaker, read_wish
from sevenfold.workflow.serve import PATHS, Server, open_server

ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
COMPLETIONS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def speaker(talking_run: Run) -> Speaker:
    return Speaker(*chat.open_model(talking_run, "sft"), name="run/sft")


@pytest.fixture
def server(speaker: Speaker) -> Iterator[Server]:
    with open_server(speaker, 0) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def send(
    server: Server, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    with contextlib.closing(connection):
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        connection.request(method or ("GET" if body is None else "POST"), path, data, given)
        answer = connection.getresponse()
        return answer, answer.read()


def error_of(data: bytes) -> dict[str, Any]:
    found = json.loads(data)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return dict(found)


def test_an_answer_is_what_the_model_says_greedily(
    server: Server, talking_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, data = send(server, COMPLETIONS, ASK)
    assert (answer.status, answer.getheader("Content-Type")) == (200, "application/json")
    found = json.loads(data)
    assert (found["object"], found["model"]) == ("chat.completion", "run/sft")
    [choice] = found["choices"]
    assert choice["message"]["role"] == "assistant"
    monkeypatch.setattr(chat, "CONVERSE_TOKENS", 5)
    [(_, expected)] = chat.converse(talking_run, "sft", ["Hello"])
    assert choice["message"]["content"].strip() in expected
    assert choice["finish_reason"] == "length"
    usage = found["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5


def test_a_stream_says_the_same_piece_by_piece(server: Server) -> None:
    # Sampled: greedily this model says hardly anything.
    asked = {**ASK, "max_tokens": 20, "temperature": 2.0, "seed": 3}
    whole = json.loads(send(server, COMPLETIONS, asked)[1])["choices"][0]
    assert len(whole["message"]["content"]) > 10
    answer, data = send(server, COMPLETIONS, {**asked, "stream": True})
    assert answer.getheader("Content-Type") == "text/event-stream"
    events = data.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert len(deltas) > 5
    assert "".join(d.get("content", "") for d in deltas) == whole["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["finish_reason"]]


def test_an_end_token_is_why_an_answer_stops(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[int] = []
    stream = completions.TextStream

    class Noting(stream):  # type: ignore[valid-type, misc]
        def put(self, value: torch.Tensor) -> None:
            first.extend([] if self._is_prompt else value.tolist())
            super().put(value)

    monkeypatch.setattr(completions, "TextStream", Noting)
    wish = read_wish(ASK, "run/sft")
    assert speaker.answer(wish, lambda text: None).finish_reason == "length"
    monkeypatch.setattr(completions.generation, "end_token_ids", lambda _: [first[2]])
    said = speaker.answer(wish, lambda text: None)
    assert (said.finish_reason, said.num_tokens) == ("stop", first.index(first[2]) + 1)


def test_sampling_follows_its_seed(server: Server) -> None:
    def say(**more: Any) -> str:
        data = send(server, COMPLETIONS, {**ASK, "max_tokens": 20, "temperature": 2.0, **more})[1]
        return str(json.loads(data)["choices"][0]["message"]["content"])

    assert say(seed=1) == say(seed=1)
    assert len({say(seed=seed) for seed in range(4)}) > 1


def test_the_models_list_names_the_one_served(server: Server) -> None:
    found = json.loads(send(server, "/v1/models")[1])
    assert [model["id"] for model in found["data"]] == ["run/sft"]
    assert found["data"][0]["object"] == "model"


def test_the_page_loads_nothing_and_may_run_only_its_own_script(server: Server) -> None:
    answer, data = send(server, "/")
    text = data.decode()
    policy = answer.getheader("Content-Security-Policy") or ""
    [nonce] = set(re.findall(r"'nonce-([^']+)'", policy))
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert text.count(f'nonce="{nonce}"') == 2
    assert nonce not in send(server, "/")[1].decode()
    assert not re.search(r"https?:|src=|href=|@import|url\(|innerHTML", text)
    assert "run/sft" in text
    assert answer.getheader("X-Content-Type-Options") == "nosniff"


@pytest.mark.parametrize(
    ("path", "method", "headers", "body", "status", "message"),
    [
        ("/", "GET", {"Host": "evil.example"}, None, 403, "its own address only"),
        (COMPLETIONS, "POST", {"Origin": "http://evil.example"}, ASK, 403, "from elsewhere"),
        (COMPLETIONS, "POST", {"Origin": "null"}, ASK, 403, "from elsewhere"),
        (COMPLETIONS, "POST", {"Content_Type": "text/plain"}, ASK, 415, "application/json"),
        ("/etc/passwd", "GET", {}, None, 404, "no such address; there are /, /v1/models"),
        ("/../run.json", "GET", {}, None, 404, "no such address"),
        ("/?x=1", "GET", {}, None, 404, "no such address"),
        (COMPLETIONS, "GET", {}, None, 405, "takes POST"),
        ("/", "POST", {}, ASK, 405, "takes GET"),
        (COMPLETIONS, "POST", {}, b"{", 400, "not JSON"),
        (COMPLETIONS, "POST", {}, b"[" * 100_000, 400, "not JSON"),
        (COMPLETIONS, "POST", {"Content_Length": "1000001"}, b"", 413, "at most 1,000,000 bytes"),
        (COMPLETIONS, "POST", {"Content_Length": "-1"}, b"", 411, "Content-Length"),
        (COMPLETIONS, "POST", {"Transfer_Encoding": "chunked"}, b"", 411, "Content-Length"),
    ],
)
def test_what_may_not_be_asked_is_refused(
    server: Server,
    path: str,
    method: str,
    headers: dict[str, str],
    body: Any,
    status: int,
    message: str,
) -> None:
    answer, data = send(server, path, body, method, **headers)
    assert answer.status == status
    assert message in error_of(data)["message"]
    assert sorted(PATHS) == ["/", COMPLETIONS, "/v1/models"]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"messages": []}, 400, "'messages': expected 1 to 200 messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "'messages.0.role'"),
        ({"messages": [{"role": "user", "content": 1}]}, 400, "'messages.0.content'"),
        ({"messages": [{"role": "user", "content": "word " * 90}]}, 400, "leaves no room"),
        ({"max_tokens": 0}, 400, "'max_tokens': expected 1 to 2048"),
        ({"max_tokens": 1.5}, 400, "'max_tokens': expected a whole number"),
        ({"max_tokens": 10**9}, 400, "'max_tokens': expected 1 to 2048"),
        ({"temperature": 3}, 400, "'temperature': expected a number from 0 to 2"),
        ({"temperature": float("nan")}, 400, "'temperature': expected a number"),
        ({"top_p": 0}, 400, "'top_p': expected a number"),
        ({"seed": -1}, 400, "'seed': expected"),
        ({"stream": "yes"}, 400, "'stream': expected true or false"),
        ({"n": 2}, 400, "'n': one answer"),
        ({"tools": [{}]}, 400, "'tools' is not supported here"),
        ({"model": "gpt"}, 404, "the model served here is 'run/sft'"),
    ],
)
def test_a_wrong_wish_is_refused_with_its_field(
    server: Server, change: dict[str, Any], status: int, message: str
) -> None:
    for stream in ({}, {"stream": True}):
        answer, data = send(server, COMPLETIONS, {**ASK, **stream, **change})
        assert answer.status == status
        found = error_of(data)
        assert message in found["message"]
        assert found["type"] == "invalid_request_error"


def test_a_conversation_that_the_template_refuses_is_asked_wrongly(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*anything: Any) -> None:
        raise BadDataError("roles must alternate")

    monkeypatch.setattr(completions.generation, "chat_prompts", refuse)
    answer, data = send(server, COMPLETIONS, ASK)
    assert (answer.status, error_of(data)["message"]) == (400, "'messages': roles must alternate")


def test_what_clients_send_along_is_taken(speaker: Speaker) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    asked = {
        "model": "run/sft",
        "messages": [{"role": "user", "content": parts}],
        "max_completion_tokens": 7,
        "user": "me",
        "frequency_penalty": 0,
        "tools": None,
    }
    wish = read_wish(asked, "run/sft")
    assert (wish.messages[0]["content"], wish.max_tokens) == ("Hello", 7)
    with pytest.raises(AskedWronglyError, match="must be a JSON object"):
        read_wish([], "run/sft")


def test_one_answers_a_few_wait_and_more_are_sent_away(
    server: Server, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on, at_once, most = threading.Event(), [0], [0]

    def slow(self: Speaker, wish: Any, say: Any) -> completions.Said:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        assert going_on.wait(30)
        at_once[0] -= 1
        return completions.Said(text="", finish_reason="stop", num_prompt_tokens=1, num_tokens=1)

    monkeypatch.setattr(Speaker, "_speak", slow)
    statuses: list[int] = []
    places = 1 + completions.MAX_WAITING

    def ask() -> None:
        statuses.append(send(server, COMPLETIONS, ASK)[0].status)
        if len(statuses) == 2:  # those beyond the places, which are answered at once
            going_on.set()

    threads = [threading.Thread(target=ask) for _ in range(places + 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * places + [429, 429]
    assert most == [1]


def test_a_client_that_goes_away_frees_its_place(server: Server, speaker: Speaker) -> None:
    for _ in range(completions.MAX_WAITING + 2):
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            body = json.dumps({**ASK, "stream": True}).encode()
            head = f"Host: 127.0.0.1:{server.server_port}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\n{head}".encode() + body)
    for _ in range(100):
        if send(server, COMPLETIONS, ASK)[0].status == 200:
            break
    else:
        pytest.fail("no place came free")


@pytest.mark.parametrize("stream", [False, True])
def test_out_of_memory_is_an_error_and_no_end(
    server: Server, speaker: Speaker, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def full(**anything: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(speaker._model, "generate", full)
        answer, data = send(server, COMPLETIONS, {**ASK, "stream": stream})
    assert answer.status == 503
    assert error_of(data)["type"] == "server_error"
    assert send(server, COMPLETIONS, ASK)[0].status == 200


def test_it_is_bound_to_this_machine_only_and_says_when_a_port_is_taken(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(UsageError, match=r"--port \d+: Address already in use; choose another"):
        open_server(server.speaker, server.server_port)
    with pytest.raises(UsageError, match=r"--port 70000: .*choose another, or 0 for any"):
        open_server(server.speaker, 70000)


def test_the_verb_serves_until_interrupted(
    talking_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Server) -> None:
        assert self.speaker.name == "run/sft"
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    assert cli.execute(["serve", str(talking_run.folder), "--port", "0"]) == 0
    assert re.search(r"run/sft at http://127\.0\.0\.1:\d+/ \(page\)", capsys.readouterr().out)
