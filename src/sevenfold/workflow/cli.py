"""The command line: one door for the scripts and for ``sevenfold VERB``.

Every mistake ends here as one line on standard error and an exit code. Whatever is slow to import
(torch, transformers, peft) is imported by the verb that needs it, so that help and complaints come
at once.
"""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from sevenfold.base import console
from sevenfold.base.errors import SevenfoldError, StoppedError
from sevenfold.base.records import require_packages
from sevenfold.workflow import flags


def main(verb: str | None = None, *, deprecated: str | None = None) -> None:
    """Run ``verb``, or the verb on the command line, and end the process with its exit code.

    ``deprecated`` is the old name under which a script was called; it is warned about.
    """
    if deprecated is not None:
        message = f"{deprecated} is deprecated; call scripts/05_pretrain.py"
        console.print_error(message, kind="warning")
    program = "sevenfold" if verb is None else Path(sys.argv[0]).name
    code = execute(sys.argv[1:], verb=verb, program=program)
    console.detach_output()
    sys.exit(code)


def execute(arguments: list[str], *, verb: str | None = None, program: str = "sevenfold") -> int:
    """Do what ``arguments`` ask for and return the exit code."""
    debug = "--debug" in arguments
    console.silence_libraries()
    console.share_cores()
    console.keep_compiled_code()
    console.setup_logging(debug=debug)
    previous = _stop_on_terminate()
    try:
        chosen, options = flags.parse(arguments, verb=verb, program=program)
        if chosen.name != "doctor":
            require_packages()
        module, _, function = chosen.perform.partition(":")
        getattr(importlib.import_module(module), function)(options)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    except KeyboardInterrupt:
        console.print_error("stopped; nothing is half-written, run the same command again to go on")
        return StoppedError.exit_code
    except Exception as error:
        if debug:
            console.print_traceback()
        if isinstance(error, SevenfoldError):
            console.print_error(str(error))
            return error.exit_code
        console.print_error(
            f"{type(error).__name__}: {error} (this is a mistake of Sevenfold's, not yours; "
            "the same command with --debug shows where)"
        )
        return SevenfoldError.exit_code
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
    return 0


def _stop_on_terminate() -> Any:
    """End with exit code 75 on SIGTERM wherever training does not handle it; return what was."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError(
            "stopped by SIGTERM; nothing is half-written, run the same command again to go on"
        )

    return signal.signal(signal.SIGTERM, stop)


if __name__ == "__main__":
    main()
