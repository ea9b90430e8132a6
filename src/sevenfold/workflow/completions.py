"""What an OpenAI-compatible client may ask for, and one model that answers one at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sevenfold.base.errors import SevenfoldError
from sevenfold.verify import generation
from sevenfold.workflow.chat import Message, TextStream

MAX_TOKENS = 2048
DEFAULT_TOKENS = 256
MAX_WAITING = 4
MAX_MESSAGES = 200
ROLES = ("system", "user", "assistant")
# What clients send along and what changes nothing here.
_WITHOUT_EFFECT = ("metadata", "store", "stream_options", "user")
_UNDERSTOOD = (
    "model",
    "messages",
    "stream",
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "seed",
    "n",
)


class AskedWronglyError(Exception):
    """A request that cannot be answered, as OpenAI's API reports it."""

    def __init__(self, message: str, *, status: int = 400, param: str = "", code: str = ""):
        """Keep the HTTP status, the field concerned, and OpenAI's code."""
        super().__init__(message)
        self.status = status
        self.param = param or None
        self.code = code or None


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A request that has been checked."""

    messages: list[Message]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stream: bool


@dataclass(frozen=True, kw_only=True)
class Said:
    """An answer: its text, why it ended (stop or length), and how many tokens it took."""

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int


def read_wish(asked: Any, model_name: str) -> Wish:
    """Check a request's body.

    Errors:
        AskedWronglyError: a field is missing, wrong, or asks for what is not done here.
    """
    if not isinstance(asked, dict):
        raise AskedWronglyError("the body must be a JSON object")
    for name, value in asked.items():
        if name not in (*_UNDERSTOOD, *_WITHOUT_EFFECT) and value not in (None, 0, False, [], {}):
            raise AskedWronglyError(f"'{name}' is not supported here", param=name)
    if asked.get("model") not in (None, "", model_name):
        raise AskedWronglyError(
            f"the model served here is '{model_name}'",
            status=404,
            param="model",
            code="model_not_found",
        )
    if asked.get("n") not in (None, 1):
        raise AskedWronglyError("'n': one answer at a time is given here", param="n")
    limits = [asked.get(name) for name in ("max_completion_tokens", "max_tokens")]
    max_tokens = next((limit for limit in limits if limit is not None), DEFAULT_TOKENS)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise AskedWronglyError("'max_tokens': expected a whole number", param="max_tokens")
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise AskedWronglyError(f"'max_tokens': expected 1 to {MAX_TOKENS}", param="max_tokens")
    seed, stream = asked.get("seed"), asked.get("stream")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise AskedWronglyError("'seed': expected a whole number from 0 on", param="seed")
    if stream not in (None, True, False):
        raise AskedWronglyError("'stream': expected true or false", param="stream")
    return Wish(
        messages=_messages(asked.get("messages")),
        max_tokens=max_tokens,
        temperature=_number(asked, "temperature", default=0.0, low=0.0, high=2.0),
        top_p=_number(asked, "top_p", default=1.0, low=1e-6, high=1.0),
        seed=seed,
        stream=bool(stream),
    )


def _messages(given: Any) -> list[Message]:
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_MESSAGES:
        raise AskedWronglyError(
            f"'messages': expected 1 to {MAX_MESSAGES} messages", param="messages"
        )
    found = []
    for index, message in enumerate(given):
        where = f"messages.{index}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise AskedWronglyError(
                f"'{where}.role': expected one of {', '.join(ROLES)}", param=f"{where}.role"
            )
        content = message.get("content")
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            known = [text for text in texts if isinstance(text, str)]
            content = "".join(known) if len(known) == len(texts) else None
        if not isinstance(content, str):
            raise AskedWronglyError(f"'{where}.content': expected text", param=f"{where}.content")
        found.append({"role": role, "content": content})
    return found


def _number(
    asked: Mapping[str, Any], name: str, *, default: float, low: float, high: float
) -> float:
    value = asked.get(name)
    value = default if value is None else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise AskedWronglyError(f"'{name}': expected a number from {low:g} to {high:g}", param=name)
    return float(value)


class Speaker:
    """A model that answers one request at a time; a few may wait, more are sent away."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str):
        """Answer with ``model``, known to clients as ``name``."""
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._speaking = threading.Lock()
        self._places = threading.BoundedSemaphore(1 + MAX_WAITING)

    def answer(self, wish: Wish, say: Callable[[str], None]) -> Said:
        """Answer ``wish``, giving ``say`` each piece of text as it comes.

        Errors:
            AskedWronglyError: too many wait, the template does not take this conversation, or it
                is longer than the context.
        """
        if not self._places.acquire(blocking=False):
            raise AskedWronglyError(
                f"{MAX_WAITING} requests wait already; try again in a moment",
                status=429,
                code="rate_limit_exceeded",
            )
        try:
            with self._speaking:
                return self._speak(wish, say)
        finally:
            self._places.release()

    def _speak(self, wish: Wish, say: Callable[[str], None]) -> Said:
        try:
            ids = generation.chat_prompts(self._tokenizer, [wish.messages])[0]
        except SevenfoldError as error:
            raise AskedWronglyError(f"'messages': {error}", param="messages") from None
        room = self._context() - len(ids)
        if room < 1:
            raise AskedWronglyError(
                f"'messages': {len(ids)} tokens; the context of {len(ids) + room} leaves no room "
                "for an answer",
                param="messages",
                code="context_length_exceeded",
            )
        ends = generation.end_token_ids(self._tokenizer)
        stream = TextStream(self._tokenizer, ends, say)
        self._generate(ids, wish, min(wish.max_tokens, room), ends, stream)
        return Said(
            text=stream.text,
            finish_reason="stop" if stream.ended else "length",
            num_prompt_tokens=len(ids),
            num_tokens=stream.num_tokens,
        )

    def _context(self) -> int:
        return int(self._model.config.max_position_embeddings)

    @torch.inference_mode()
    def _generate(
        self, ids: list[int], wish: Wish, max_tokens: int, ends: list[int], stream: TextStream
    ) -> None:
        """Give ``stream`` the prompt, then every token of the answer as it comes."""
        input_ids = torch.tensor([ids], device=self._model.get_input_embeddings().weight.device)
        if wish.seed is not None:
            torch.manual_seed(wish.seed)
        sampling: dict[str, Any] = {"do_sample": False}
        if wish.temperature > 0:
            sampling = {"do_sample": True, "temperature": wish.temperature}
            sampling |= {"top_p": wish.top_p, "top_k": 0}
        self._model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
            streamer=stream,
            **sampling,
        )
