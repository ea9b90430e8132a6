"""Does it work? SmolLM2-135M-Instruct through SFT, DPO and LoRA, judged before and after each.

    PYTHONPATH=src python bench/smollm2/run.py MODEL DATA FOLDER [FLAGS...]

MODEL: its Hugging Face folder (convert.py makes one of a GGUF). DATA: a folder with pretrain/,
sft/, eval/ and safety/ as configs/smollm2.yaml names them. FOLDER is made for the run; table.md
there grows with each stage, and is printed at the end. FLAGS, such as
--set sft.train.duration='{steps: 2}', go to every command. Gates that refuse are gone past, and the
records say so: the table shows what each stage gained and what it cost. All in one process, since
starting one takes longer than some of the commands; called again, it goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import preferences
import table
import torch

from sevenfold.base import storage
from sevenfold.base.errors import GateRefusedError
from sevenfold.base.hardware import release_memory
from sevenfold.workflow import cli

FORCE = ["--force", "the table shows what each stage gained and what it cost"]
TRAINING = [*FORCE, "--enable-oom-recovery"]
RUN = ["--run", "run"]


def main() -> None:
    """Do it all, and print the table."""
    model, data, folder, *flags = sys.argv[1:]
    begin(model, data, folder, flags)
    show("sft", flags)
    for stage in ("dpo", "lora"):
        do(stage, *TRAINING, *RUN, *flags)
        show(stage, flags)
    do("report", "run")
    sys.stdout.write(Path("table.md").read_text(encoding="utf-8"))


def begin(model: str, data: str, folder: str, flags: list[str]) -> None:
    """Go into the folder, write the pairs, and train the first stage."""
    start_from, source = Path(model).resolve(), Path(data).resolve()
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if not Path("data").exists():
        Path("data").symlink_to(source)
    pairs = [json.dumps(row, ensure_ascii=False) for row in preferences.shuffled(source)]
    storage.write_text(Path("preferences.jsonl"), "\n".join([*pairs, ""]))
    preset = [] if Path("run/run.json").exists() else ["--preset", "smollm2"]
    do("sft", "--start-from", str(start_from), *TRAINING, *RUN, *preset, *flags)


def do(*command: str, refusal: bool = False) -> None:
    """Do one command; end with its exit code if it fails, unless that is a gate's ``refusal``."""
    started = time.monotonic()
    release_memory()
    # Without compiled layers FlexAttention is compiled alone, for eight kinds of rows at most.
    torch.compiler.reset()
    code = cli.execute(list(command))
    sys.stderr.write(f"== {command[0]}: exit {code}, {time.monotonic() - started:.0f} s\n")
    if code and not (refusal and code == GateRefusedError.exit_code):
        sys.exit(code)


def show(stage: str, flags: list[str]) -> None:
    """Measure and judge a stage, and write the table as far as it is known."""
    do("evaluate", stage, *RUN, *flags)
    do("check", stage, *RUN, *flags, refusal=True)
    storage.write_text(Path("table.md"), table.table(Path("run")))


if __name__ == "__main__":
    main()
