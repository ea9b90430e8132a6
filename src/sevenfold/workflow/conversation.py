"""One talk in the terminal: with a stage, or with several that answer the same questions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sevenfold.base import console
from sevenfold.base.errors import UsageError, nearest
from sevenfold.base.records import STAGES, Run
from sevenfold.verify import generation
from sevenfold.workflow.chat import Message, TextStream, open_model

HELP = """\
/stage NAME ...   let that stage answer from now on; of several, each answers (compare sft dpo)
/temperature T    0: always the likeliest token; above, answers are drawn
/top-p P          draw among the likeliest tokens that share P of the probability
/seed N           draw the same answers again; /seed none: others every time
/max-tokens N     longest answer
/new              forget what was said
/quit             end"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn.

    Errors:
        UsageError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no answer could be drawn with."""
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature {self.temperature}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: expected a number above 0, at most 1")
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens}: expected 1 or more")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}: expected a whole number from 0 on")

    def settings(self) -> dict[str, Any]:
        """Return what transformers' ``generate`` is to be told."""
        if self.temperature == 0:
            return {"do_sample": False}
        chosen = {"do_sample": True, "temperature": self.temperature}
        return chosen | {"top_p": self.top_p, "top_k": 0}


class Conversation:
    """What was said so far, to each stage that takes part."""

    def __init__(self, run: Run, stages: Sequence[str], sampling: Sampling):
        """Talk with ``stages`` of ``run``; each model is loaded once."""
        self._run = run
        self._sampling = sampling
        self._models: dict[str, tuple[Any, Any]] = {}
        self._said: dict[str, list[Message]] = {}
        self._stages: tuple[str, ...] = ()
        self._choose(list(stages))

    def describe(self) -> str:
        """Return who answers, and how."""
        drawn = self._sampling
        how = "greedy"
        if drawn.temperature > 0:
            how = f"temperature {drawn.temperature:g}, top-p {drawn.top_p:g}"
            how += "" if drawn.seed is None else f", seed {drawn.seed}"
        return f"{' and '.join(self._stages)}, {how}, at most {drawn.max_tokens} tokens"

    def hear(self, line: str) -> bool:
        """Answer a question or obey a command; False if it says that the talk ends.

        Errors:
            UsageError: there is no such command, its value is wrong, or the question is too long.
        """
        if not line.startswith("/"):
            self._ask(line)
            return True
        name, *words = line[1:].split()
        if name in ("quit", "exit"):
            return False
        commands: dict[str, Callable[[list[str]], None]] = {
            "stage": self._choose,
            "temperature": lambda words: self._set("temperature", _one(float, words)),
            "top-p": lambda words: self._set("top_p", _one(float, words)),
            "seed": lambda words: self._set(
                "seed", None if words == ["none"] else _one(int, words)
            ),
            "max-tokens": lambda words: self._set("max_tokens", _one(int, words)),
            "new": lambda words: self._said.clear(),
            "help": lambda words: console.print_line(HELP, style="dim"),
        }
        if name not in commands:
            raise UsageError(f"'/{name}' does not exist{nearest(name, [*commands, 'quit'])}")
        commands[name](words)
        if name not in ("help", "new"):
            console.print_line(self.describe(), style="dim")
        return True

    def _choose(self, stages: list[str]) -> None:
        for stage in stages or [""]:
            if stage not in STAGES[1:]:
                raise UsageError(f"stage '{stage}' does not exist{nearest(stage, STAGES[1:])}")
            if stage not in self._models:
                self._models[stage] = open_model(self._run, stage)
        self._stages = tuple(dict.fromkeys(stages))

    def _set(self, name: str, value: Any) -> None:
        self._sampling = dataclasses.replace(self._sampling, **{name: value})

    def _ask(self, question: str) -> None:
        for stage in self._stages:
            model, tokenizer = self._models[stage]
            said = [*self._said.get(stage, []), {"role": "user", "content": question}]
            said = _shorten(tokenizer, said, model, self._sampling.max_tokens)
            console.print_raw(f"{stage:<10}" if len(self._stages) > 1 else "model  ")
            answer = _answer(model, tokenizer, said, self._sampling)
            self._said[stage] = [*said, {"role": "assistant", "content": answer}]


def _one(kind: Callable[[str], Any], words: list[str]) -> Any:
    try:
        (word,) = words
        return kind(word)
    except ValueError:
        raise UsageError(f"'{' '.join(words)}': expected one number; /help shows how") from None


def _shorten(tokenizer: Any, said: list[Message], model: Any, max_tokens: int) -> list[Message]:
    """Forget the oldest turns when question and answer would not fit into the context.

    Errors:
        UsageError: the last question alone does not fit.
    """
    room = int(model.config.max_position_embeddings)
    for start in range(0, len(said), 2):
        ids = generation.chat_prompts(tokenizer, [said[start:]])[0]
        if len(ids) + min(max_tokens, room // 2) <= room:
            return said[start:]
    raise UsageError(f"this question has more tokens than the model's context of {room} leaves")


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, said: list[Message], sampling: Sampling) -> str:
    ids = generation.chat_prompts(tokenizer, [said])[0]
    ends = generation.end_token_ids(tokenizer)
    printer = TextStream(tokenizer, ends, console.print_raw)
    input_ids = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    room = int(model.config.max_position_embeddings) - len(ids)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=min(sampling.max_tokens, room),
        eos_token_id=ends,
        pad_token_id=ends[0],
        streamer=printer,
        **sampling.settings(),
    )
    console.print_line()
    return printer.text
