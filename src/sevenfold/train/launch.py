"""Starting one process per GPU on this host, and watching over them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from sevenfold.base import faults
from sevenfold.base.errors import SevenfoldError, StoppedError
from sevenfold.train.parallel import PATIENCE_VARIABLE, Processes, patience_of_user

log = logging.getLogger(__name__)

# How long the other processes have to save or give up after one has failed. Those that are to
# start again wait in an exchange: only a checkpoint can be under way.
GRACE_S = 45.0
START_AGAIN_S = 30.0
# Where a process writes what it is doing.
HEARTBEAT_VARIABLE = "SEVENFOLD_HEARTBEAT"
STARTING = "starting"


class StartAgainError(StoppedError):
    """All processes have to start again together, from the last checkpoint."""

    exit_code = 76


def start_again_if_several(processes: Processes, micro_batch: int) -> None:
    """End this process if it is one of several, which cannot do a step again on its own.

    The others wait in the middle of an exchange that this one has left. Each starts again from
    the last checkpoint and finds the smaller micro-batch, and from which step on, in
    ``recovery.json``.

    Errors:
        StartAgainError: there are several processes.
    """
    if processes.world > 1:
        raise StartAgainError(
            f"process {processes.rank} of {processes.world} ran out of memory; all start again "
            f"from the last checkpoint, from this step on with micro-batch {micro_batch}: under "
            "torchrun, run the same command again (without --no-resume)"
        )


def at_phase(step: int, phase: str) -> set[str]:
    """Tell whoever started this process what it does; return the faults asked for here.

    ``step`` counts from 1; phases and faults as in ``base/faults.py``. Where the one who started
    it is gone, and with it the lock of the run, this process asks itself to stop.
    """
    if HEARTBEAT_VARIABLE in os.environ:
        word = f"step {step}, {phase}\n".encode()
        try:
            # Where nobody reads at the moment, the next word will do.
            with contextlib.suppress(BlockingIOError):
                os.write(int(os.environ[HEARTBEAT_VARIABLE]), word)
        except BrokenPipeError:
            os.kill(os.getpid(), signal.SIGTERM)
    return faults.at_step(step, phase)


def run_out_of_memory_if(asked: set[str]) -> None:
    """Raise what PyTorch would, where "oom" is among the faults ``asked`` for."""
    if "oom" in asked:
        raise torch.OutOfMemoryError("injected")


def num_processes_to_start() -> int:
    """Processes a training script should start: one per visible GPU, unless started already."""
    if "WORLD_SIZE" in os.environ or not torch.cuda.is_available():
        return 1
    return torch.cuda.device_count()


def launch(arguments: list[str], num_processes: int) -> int:
    """Run ``python arguments`` once per process on this host; return 0 or the first bad exit code.

    When one process fails, the others are asked to stop, and ended after a grace. SIGTERM and
    Ctrl-C are passed on to all of them. They are started anew as often as one asks for that, unless
    they are to stop.

    Errors:
        UsageError: SEVENFOLD_PATIENCE_S is not a number of seconds.
        SevenfoldError: for so long none of them has begun anything new; the message has what each
            did last.
    """
    patience_s = patience_of_user()
    while (code := _launch_once(arguments, num_processes, patience_s)) == StartAgainError.exit_code:
        log.warning("starting all %d processes again", num_processes)
        # They have to find what was decided; the first start has set the old stage aside already.
        arguments = [argument for argument in arguments if argument != "--no-resume"]
    return code


class _Child:
    """A process, and the last thing it was heard of."""

    def __init__(self, arguments: list[str], rank: int, environment: dict[str, str]):
        self.rank = rank
        self._reading, writing = os.pipe()
        os.set_blocking(self._reading, False)
        os.set_blocking(writing, False)
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), HEARTBEAT_VARIABLE: str(writing)}
        self.process = subprocess.Popen(
            [sys.executable, *arguments], env={**environment, **own}, pass_fds=(writing,)
        )
        os.close(writing)
        self.doing = STARTING
        self.heard_at_s = time.monotonic()

    def listen(self) -> None:
        """Take in what the process has told since the last time."""
        try:
            words = os.read(self._reading, 1 << 16).decode().split("\n")
        except BlockingIOError:
            return
        if told := [word for word in words if word]:
            self.doing = told[-1]
            self.heard_at_s = time.monotonic()

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        os.close(self._reading)


def _launch_once(arguments: list[str], num_processes: int, patience_s: float) -> int:
    # The processes meet here, as torchrun's do. A port looked for and let go for the first of them
    # to take could be another program's by then.
    meeting_place = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(meeting_place.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    children: list[_Child] = []
    previous: dict[signal.Signals, Any] = {}
    passed_on: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        for child in children:
            child.process.send_signal(number)

    try:
        # Ctrl-C too: to be interrupted here would end the processes in the middle of saving.
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, pass_on)
        for rank in range(num_processes):
            children.append(_Child(arguments, rank, environment))
            if passed_on:  # it may have come before this one was there to be told
                children[-1].process.send_signal(passed_on[-1])
                break
        code = _first_failure(children, patience_s)
        # Those that start again would not know of the signal; those that Python ends while they
        # start, by the signal or with 1, had not begun to listen for it.
        unheard = [child.process.returncode for child in children if child.doing == STARTING]
        early = code in unheard and (code == 1 or -code in passed_on)
        stopped = early or code == StartAgainError.exit_code
        return StoppedError.exit_code if passed_on and stopped else code
    finally:
        for child in children:
            child.end()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _first_failure(children: list[_Child], patience_s: float) -> int:
    """Wait for all processes, or for one to fail and then for the others as long as is fair."""
    failure, deadline_s = 0, math.inf
    while time.monotonic() < deadline_s:
        codes = [child.process.poll() for child in children]
        if None not in codes:
            break
        if any(codes) and not failure:
            failed = next(child for child, code in zip(children, codes, strict=True) if code)
            failure = failed.process.returncode
            failed.listen()
            log.warning(
                "process %d of %d %s after %s; the others are asked to stop",
                failed.rank,
                len(children),
                f"was ended by {signal.Signals(-failure).name}"
                if failure < 0
                else f"ended with exit code {failure}",
                failed.doing,
            )
            again = failure == StartAgainError.exit_code
            deadline_s = time.monotonic() + (START_AGAIN_S if again else GRACE_S)
            for child in children:
                child.process.terminate()
        if not failure:  # else it is what the others wait for, until the grace is over
            _require_progress(children, patience_s)
        time.sleep(0.1)
    ended = [child.process.returncode for child in children if child.process.returncode]
    if StartAgainError.exit_code in ended:
        return StartAgainError.exit_code
    return failure or next(iter(ended), 0)


def _require_progress(children: list[_Child], patience_s: float) -> None:
    for child in children:
        child.listen()
    if time.monotonic() - max(child.heard_at_s for child in children) > patience_s:
        doing = "; ".join(f"process {child.rank}: {child.doing}" for child in children)
        raise SevenfoldError(
            f"nothing has moved for {patience_s:.0f} s, all {len(children)} processes are ended. "
            f"Last heard of: {doing}. The one that is behind is the one to look at; the same "
            f"command goes on from the last checkpoint ({PATIENCE_VARIABLE} sets the patience)"
        )
