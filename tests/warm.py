"""Processes that need not import anything: forks of one that has done so, and nothing more.

What trains a tiny model imports for five seconds and works for one. Each fork is a process of its
own, with an environment, a folder and an output of its own; it is killed, stops and ends as any
other does, to what is left to do at the interpreter's end.
"""

from __future__ import annotations

import atexit
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

REPOSITORY = Path(__file__).parents[1]


def forks_work() -> bool:
    """Say whether to call :class:`Warm`: not where there are GPUs.

    Libraries may ask the driver about them when they are imported, after which a fork has none.
    """
    import torch

    return not torch.cuda.device_count()


class Warm:
    """A process that imports ``modules`` when it is first asked for a fork."""

    def __init__(self, *modules: str):
        self._modules = modules
        self._process: subprocess.Popen[str] | None = None

    def call(
        self,
        function: str,
        *arguments: str | Path,
        environment: dict[str, str],
        timeout_s: int = 300,
        cwd: Path = REPOSITORY,
    ) -> subprocess.CompletedProcess[str]:
        """Call ``module:function`` in a fork with these arguments as its command line."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            asked = {
                "function": function,
                "arguments": [*map(str, arguments)],
                "environment": environment,
                "files": [*map(str, files)],
                "cwd": str(cwd),
                "timeout_s": timeout_s,
            }
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, *(f.read_text() for f in files))

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join((str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")))
        started = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", *self._modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )  # fmt: skip
        atexit.register(started.communicate)
        return started


def serve(modules: list[str]) -> None:
    """Import; then fork for each line of standard input and answer with the exit code."""
    from sevenfold.base import console

    console.silence_libraries()
    console.share_cores()
    console.keep_compiled_code()
    console.setup_logging()
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # or the first collection in a fork copies all of it
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            become(**json.loads(line))
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


def become(
    function: str,
    arguments: list[str],
    environment: dict[str, str],
    files: list[str],
    cwd: str,
    timeout_s: int,
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
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)()


if __name__ == "__main__":
    serve(sys.argv[1:])
