"""Verbs in processes that need not import anything: forks of one that has done so, and no more.

A process that trains a miniature imports for five seconds and works for two. Each fork is a process
of its own, with an environment, a folder and an output of its own; it is killed, stops and ends as
any other, from the command line's first word to what is left to do at the interpreter's end.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.pipeline.miniature import REPOSITORY, environment

MODULES = (
    *(f"sevenfold.workflow.{name}" for name in ("evaluation", "outside", "pipeline", "planning")),
    *(f"sevenfold.workflow.{name}" for name in ("prepare", "steps", "workbench")),
    *(f"sevenfold.workflow.{name}" for name in ("pretrain", "sft", "dpo", "lora")),
    *("sevenfold.verify.report", "datasets", "peft", "torch._dynamo"),
    "transformers.models.llama.modeling_llama",
)


def forked(
    *arguments: str | Path, faults: str = "", timeout_s: int = 300, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run a verb as `miniature.sevenfold` does, in a fork of the warm process."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        asked = {
            "arguments": [*map(str, arguments)],
            "environment": environment(faults),
            "files": [*map(str, files)],
            "cwd": str(cwd),
            "timeout_s": timeout_s,
        }
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Start the warm process of this one, which ends with it."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.warm"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env=environment(""),
    )  # fmt: skip
    atexit.register(server.communicate)
    return server


def serve() -> None:
    """Import; then fork for each line of standard input and answer with the exit code."""
    from sevenfold.base import console
    from sevenfold.workflow import cli

    console.silence_libraries()
    console.share_cores()
    console.keep_compiled_code()
    console.setup_logging()
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()  # or the first collection in a fork copies all of it
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            become(**json.loads(line))
            cli.main()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


def become(
    arguments: list[str], environment: dict[str, str], files: list[str], cwd: str, timeout_s: int
) -> None:
    """Be the process that was asked for; past its time the system ends it."""
    signal.alarm(timeout_s)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    os.chdir(cwd)
    for number, path in enumerate([os.devnull, *files]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv[1:] = arguments


if __name__ == "__main__":
    serve()
