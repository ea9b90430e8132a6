"""Chat templates from outside are programs: they are rendered in a process of their own.

That process sees no environment of ours, writes no file, and is ended when it takes too long; the
template runs in transformers' sandbox there. Run as a module this file is that process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 1.5
START_LIMIT_S = 120.0
MEMORY_LIMIT_BYTES = 512 * 2**20  # beyond what the process holds when it has started
MAX_ADDED_CHARACTERS = 1_000_000
MAX_REPEATS = 4  # how often a template may write what it was given


class TemplateRefusedError(Exception):
    """The template does not take this conversation; the message says why."""


class TemplateForbiddenError(Exception):
    """The template does what templates may not do, or does not end; the message says what."""


class _Renderer:
    """The process, and the pipe to it."""

    def __init__(self) -> None:
        """Start the process and wait until it is ready."""
        self.owner = os.getpid()
        self.pipe, theirs = Pipe()
        search = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if "LD_LIBRARY_PATH" in os.environ:  # some installations find their libraries by it
            search["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sevenfold.data.template_sandbox", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**search, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )
        theirs.close()
        self.receive(START_LIMIT_S)

    def receive(self, limit_s: float) -> dict[str, Any]:
        """Return the next answer; end the process where there is none in time."""
        try:
            if self.pipe.poll(limit_s):
                answer: dict[str, Any] = json.loads(self.pipe.recv_bytes())
                return answer
            problem = f"still rendering after {limit_s} s"
        except (EOFError, OSError):
            problem = "it ended the process that rendered it"
        self.close()
        raise TemplateForbiddenError(problem)

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()


_lock = threading.Lock()
_renderers: list[_Renderer] = []


def render_template(
    template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str], *, prompt: bool
) -> str:
    """Return what ``template`` writes for ``messages``; ``tokens`` are the special ones by name.

    Errors:
        TemplateRefusedError: it does not take this conversation.
        TemplateForbiddenError: it tried to break out, or went beyond the limits.
    """
    request = {
        "conversations": [list(messages)],
        "chat_template": template,
        "add_generation_prompt": prompt,
        **tokens,
    }
    data = json.dumps(request).encode()
    with _lock:
        renderer = _renderer()
        with contextlib.suppress(OSError):
            renderer.pipe.send_bytes(data)
        answer = renderer.receive(TIME_LIMIT_S)
    if "refused" in answer:
        raise TemplateRefusedError(answer["refused"])
    if "forbidden" in answer:
        raise TemplateForbiddenError(answer["forbidden"])
    return str(answer["text"])


def _renderer() -> _Renderer:
    """Return the running process; a fork of ours must not share it."""
    for known in _renderers:
        if known.owner == os.getpid() and not known.pipe.closed:
            return known
    _renderers[:] = [_Renderer()]
    atexit.register(_close, _renderers[0])
    return _renderers[0]


def _close(renderer: _Renderer) -> None:
    if renderer.owner == os.getpid() and not renderer.pipe.closed:
        renderer.close()


# --- in the process of its own ------------------------------------------------------------------


def serve(pipe: Connection) -> None:
    """Answer requests until the other side is gone."""
    # Before the limits are set, since imports need room.
    from transformers.utils import chat_template_utils  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    pipe.send_bytes(b"{}")
    with contextlib.suppress(EOFError):
        while True:
            request = json.loads(pipe.recv_bytes())
            # Nobody may be left to end it.
            signal.setitimer(signal.ITIMER_REAL, 2 * TIME_LIMIT_S)
            pipe.send_bytes(json.dumps(answer_to(request)).encode())
            signal.setitimer(signal.ITIMER_REAL, 0)


def answer_to(request: dict[str, Any]) -> dict[str, str]:
    """Render one request; the answer holds ``text``, or why there is none."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    given = sum(len(message["content"]) for message in request["conversations"][0])
    try:
        text = render_jinja_template(**request)[0][0]
    except (jinja2.exceptions.SecurityError, OverflowError, RecursionError) as error:
        return {"forbidden": " ".join(str(error).split())[:200]}
    except MemoryError:
        return {"forbidden": "it fills the memory"}
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        return {"refused": " ".join(str(error).split())[:200]}
    if len(text) > MAX_ADDED_CHARACTERS + MAX_REPEATS * given:
        return {"forbidden": f"it writes {len(text)} characters for {given}"}
    return {"text": text}


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
