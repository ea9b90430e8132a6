"""A run's model on this machine: an OpenAI-compatible endpoint and a page to chat on.

Bound to 127.0.0.1 and meant for one person. Requests that a page from elsewhere makes a browser
send are refused by their Host, Origin and content type. Nothing in a request names a file.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import http.server
import importlib.resources
import json
import logging
import secrets
import time
from http import HTTPStatus
from typing import Any

import torch

from sevenfold.base import console
from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import training_device
from sevenfold.base.records import Run, open_run
from sevenfold.workflow import vllm_engine
from sevenfold.workflow.chat import latest_stage, open_model
from sevenfold.workflow.completions import (
    MAX_TOKENS,
    AskedWronglyError,
    Said,
    Speaker,
    Wish,
    read_wish,
)

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
MAX_BODY_BYTES = 1_000_000
SOCKET_TIMEOUT_S = 60.0
PATHS = {"/": "GET", "/v1/models": "GET", "/v1/chat/completions": "POST"}


def serve(options: argparse.Namespace) -> None:
    """Serve a stage's model until interrupted.

    Errors:
        UsageError: there is no finished stage, or the port is taken.
    """
    run = open_run(options.run)
    stage = options.stage or latest_stage(run)
    speaker = _open_speaker(run, stage, options.engine)
    with open_server(speaker, options.port) as server:
        console.print_line(
            f"{speaker.name} at {server.url}/ (page) and {server.url}/v1; Ctrl-C ends"
        )
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _open_speaker(run: Run, stage: str, engine: str) -> Speaker:
    """Return what answers: vLLM where it is installed and a GPU is there, or transformers."""
    name = f"{run.folder.resolve().name}/{stage}"
    if engine == "auto":
        fast = vllm_engine.is_installed() and training_device().type == "cuda"
        engine = "vllm" if fast else "transformers"
    if engine == "vllm":
        run.record(stage)
        return vllm_engine.VllmSpeaker(run.model(stage), name=name)
    return Speaker(*open_model(run, stage), name=name)


def open_server(speaker: Speaker, port: int) -> Server:
    """Return a server that is bound but does not answer yet; port 0 is any free one.

    Errors:
        UsageError: the port is taken or not allowed.
    """
    try:
        return Server(speaker, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--port {port}: {reason}; choose another, or 0 for any") from None


class Server(http.server.ThreadingHTTPServer):
    """The server, with the one model that answers."""

    daemon_threads = True

    def __init__(self, speaker: Speaker, port: int):
        """Bind to ``port`` of this machine only."""
        super().__init__((ADDRESS, port), Handler)
        self.speaker = speaker
        self.started_at_s = int(time.time())

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{ADDRESS}:{self.server_port}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """What a request's Host may be: anything else comes through somebody's name server."""
        return (f"{ADDRESS}:{self.server_port}", f"localhost:{self.server_port}")


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = SOCKET_TIMEOUT_S
    server_version = "sevenfold"
    sys_version = ""

    def do_GET(self) -> None:
        """Give the page or the list of models."""
        self._guarded("GET")

    def do_POST(self) -> None:
        """Answer a conversation."""
        self._guarded("POST")

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log what the base class would print."""
        log.debug(format, *arguments)

    def _guarded(self, method: str) -> None:
        try:
            self._refuse_others(method)
            if self.path == "/":
                self._send_page()
            elif self.path == "/v1/models":
                self._send_json(HTTPStatus.OK, {"object": "list", "data": [self._model()]})
            else:
                self._complete(read_wish(self._body(), self.server.speaker.name))
        except AskedWronglyError as error:
            self._send_json(error.status, _told(error))
        except (ConnectionError, TimeoutError) as error:
            log.debug("the client went away: %s", error)

    def _refuse_others(self, method: str) -> None:
        """Refuse unknown paths, and requests that do not come from this machine's own pages."""
        if self.headers.get("Host") not in self.server.hosts:
            raise AskedWronglyError("this server answers to its own address only", status=403)
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{host}" for host in self.server.hosts]:
            raise AskedWronglyError("pages from elsewhere may not ask here", status=403)
        if self.path not in PATHS:
            raise AskedWronglyError(f"no such address; there are {', '.join(PATHS)}", status=404)
        if PATHS[self.path] != method:
            raise AskedWronglyError(f"{self.path} takes {PATHS[self.path]}", status=405)

    def _body(self) -> Any:
        if self.headers.get_content_type() != "application/json":
            raise AskedWronglyError("the content type must be application/json", status=415)
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or "Transfer-Encoding" in self.headers:
            raise AskedWronglyError("a Content-Length is needed", status=411)
        if int(length) > MAX_BODY_BYTES:
            raise AskedWronglyError(f"at most {MAX_BODY_BYTES:,} bytes are read", status=413)
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise AskedWronglyError("the body is not JSON") from None

    def _complete(self, wish: Wish) -> None:
        frame = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.server.speaker.name,
        }
        try:
            if wish.stream:
                self._stream(wish, {**frame, "object": "chat.completion.chunk"})
                return
            said = self.server.speaker.answer(wish, lambda text: None)
        except torch.OutOfMemoryError:
            raise AskedWronglyError("out of memory; ask for fewer tokens", status=503) from None
        message = {"role": "assistant", "content": said.text}
        choice = {"index": 0, "message": message, "finish_reason": said.finish_reason}
        answer = {**frame, "object": "chat.completion", "choices": [choice], "usage": _usage(said)}
        self._send_json(HTTPStatus.OK, answer)

    def _stream(self, wish: Wish, frame: dict[str, Any]) -> None:
        """Send the answer piece by piece; a refusal before the first piece is an ordinary one."""
        begun = False

        def say(text: str) -> None:
            nonlocal begun
            if not begun:
                begun = True
                self._begin(HTTPStatus.OK, "text/event-stream")
                send({"role": "assistant", "content": ""})
            if text:
                send({"content": text})

        def send(delta: dict[str, str], finish_reason: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            self._event(json.dumps({**frame, "choices": [choice]}))

        try:
            said = self.server.speaker.answer(wish, say)
        except torch.OutOfMemoryError:
            error = AskedWronglyError("out of memory; ask for fewer tokens", status=503)
            if not begun:
                raise error from None
            self._event(json.dumps(_told(error)))
            return
        say("")
        send({}, said.finish_reason)
        self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _model(self) -> dict[str, Any]:
        made = {"created": self.server.started_at_s, "owned_by": "sevenfold"}
        return {"id": self.server.speaker.name, "object": "model", **made}

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        page = importlib.resources.files("sevenfold.workflow").joinpath("serve_page.html")
        text = page.read_text("utf-8").replace("NONCE", nonce)
        text = text.replace("MAX_TOKENS", str(MAX_TOKENS))
        text = text.replace("MODEL", html.escape(self.server.speaker.name))
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        data = text.encode()
        self._begin(HTTPStatus.OK, "text/html; charset=utf-8", len(data), policy)
        self.wfile.write(data)

    def _send_json(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self._begin(status, "application/json", len(data))
        self.wfile.write(data)

    def _begin(
        self,
        status: int,
        content_type: str,
        length: int | None = None,
        policy: str = "default-src 'none'; frame-ancestors 'none'",
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()


def _told(error: AskedWronglyError) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    told = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    return {"error": told}


def _usage(said: Said) -> dict[str, int]:
    return {
        "prompt_tokens": said.num_prompt_tokens,
        "completion_tokens": said.num_tokens,
        "total_tokens": said.num_prompt_tokens + said.num_tokens,
    }
