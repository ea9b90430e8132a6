"""Talk to a run's model in the terminal, through the chat template it was trained with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sevenfold.base import console, storage
from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import training_device
from sevenfold.base.records import STAGES, Run, open_run
from sevenfold.model.llama import load_model, load_tokenizer
from sevenfold.verify import generation

FALLBACK_PROMPTS = ("Who are you?", "What is two plus three?", "Tell me something short.")
CONVERSE_TOKENS = 96
BATCH_TOKENS = 4096
Message = dict[str, str]


def chat(options: argparse.Namespace) -> None:
    """Read questions and commands from standard input; answer each question as the tokens come.

    Errors:
        UsageError: there is no run or no finished stage, or a flag or a command is wrong.
    """
    # It imports what is below; both are one verb's.
    from sevenfold.workflow.conversation import Conversation, Sampling

    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    if sampling.temperature == 0 and (sampling.top_p != 1 or sampling.seed is not None):
        raise UsageError("--top-p and --seed have no effect without --temperature; give one")
    run = open_run(options.run)
    interactive = sys.stdin.isatty()
    talk = Conversation(run, options.stage or [latest_stage(run)], sampling)
    if interactive:
        console.print_line(f"{run.folder}: {talk.describe()}", style="dim")
        console.print_line("/help lists what else may be said, /quit ends", style="dim")
    for line in _lines(interactive=interactive):
        try:
            if not talk.hear(line):
                return
        except UsageError as error:
            if not interactive:
                raise
            console.print_error(str(error))


def latest_stage(run: Run) -> str:
    """Return the last stage that has finished and can converse.

    Errors:
        UsageError: none has.
    """
    for stage in reversed(STAGES[1:]):
        if (run.stage(stage) / "record.json").is_file():
            return str(stage)
    raise UsageError(f"{run.folder}: no trained model yet; run scripts/run_full_pipeline.sh first")


def open_model(run: Run, stage: str) -> tuple[Any, Any]:
    """Load the model and the tokenizer of a stage, ready to answer."""
    run.record(stage)
    device = training_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(run.model(stage), dtype, device)
    model.eval()
    return model, load_tokenizer(run.model(stage))


def converse(run: Run, stage: str, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Return each prompt with the model's greedy answer, each in a conversation of its own."""
    model, tokenizer = open_model(run, stage)
    questions = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = generation.generate(
        model,
        tokenizer,
        generation.chat_prompts(tokenizer, questions),
        max_new_tokens=CONVERSE_TOKENS,
        batch_tokens=BATCH_TOKENS,
    )
    return [(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]


def closing_prompts(run: Run) -> list[str]:
    """Choose three prompts: a question, an unsafe and a harmless request of the run's own tasks."""
    found: dict[str, str] = {}
    for path in sorted((run.data("raw") / "evaluation").glob("*.jsonl")):
        for item in storage.JsonLines(path).read():
            kind, prompt = _prompt_of(item)
            if prompt:
                found.setdefault(kind, prompt)
    chosen = [found[kind] for kind in ("question", "unsafe", "safe") if kind in found]
    return [*chosen, *FALLBACK_PROMPTS][:3]


def _prompt_of(item: dict[str, Any]) -> tuple[str, str | None]:
    if item.get("kind") in ("exact", "number") and len(item.get("messages", [])) == 1:
        return "question", str(item["messages"][0]["content"])
    if item.get("kind") == "safety":
        return ("unsafe" if item.get("unsafe") else "safe"), str(item.get("prompt"))
    return "other", None


def _lines(*, interactive: bool) -> Iterator[str]:
    while True:
        try:
            if interactive:
                line = input("you    ")
            else:
                line = sys.stdin.readline()
                if not line:
                    return
        except (EOFError, KeyboardInterrupt):
            console.print_line()
            return
        if text := line.strip():
            yield text


class TextStream:
    """Says an answer as its tokens come; whole characters only."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], say: Callable[[str], None]):
        """Give the pieces of the answer to ``say``; ``ends`` are the tokens that end it."""
        self._tokenizer = tokenizer
        self._ends = set(ends)
        self._say = say
        self._ids: list[int] = []
        self._is_prompt = True
        self.text = ""
        self.num_tokens = 0
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then one token at a time."""
        if self._is_prompt:
            self._is_prompt = False
            return
        tokens = value.flatten().tolist()
        self.num_tokens += len(tokens)
        self.ended = bool(tokens) and tokens[-1] in self._ends
        self._ids += [token for token in tokens if token not in self._ends]
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True).lstrip()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._say(text[len(self.text) :])
            self.text = text

    def end(self) -> None:
        """Nothing is left to say: what is not a whole character stays unsaid."""
