"""Greedy answers in batches, through the chat template, and what can be wrong with an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sevenfold.base.errors import UsageError
from sevenfold.data.chat import render_answer, render_prompt
from sevenfold.data.tokenizer import stop_ids
from sevenfold.model.attention import kernels_for_changing_lengths
from sevenfold.verify.tasks import Message

# Tokens that end a turn in the templates of models that people start from.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
MAX_ROWS = 1024  # a step of generation takes as long for one row as for hundreds
_LOOP_REPEATS = 4
_LOOP_MIN_TOKENS = 8
_LOOP_MAX_PERIOD = 32


@dataclass(frozen=True)
class Answer:
    """What a model said; ``ended`` is False where the limit stopped it instead of an end token."""

    text: str
    ids: tuple[int, ...]
    ended: bool


def end_token_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end an assistant's answer.

    Errors:
        UsageError: the tokenizer has none, so no answer could ever end.
    """
    known = tokenizer.get_vocab()
    ids = {known[token] for token in END_OF_TURN if token in known}
    ids |= {token for token in stop_ids(tokenizer) if token is not None}
    if not ids:
        raise UsageError(
            "the tokenizer has no end token; set eos_token in its tokenizer_config.json"
        )
    return sorted(ids)


def chat_prompts(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Return the token ids of each conversation up to where the assistant's answer starts."""
    return [render_prompt(tokenizer, conversation) for conversation in conversations]


def chat_answers(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], answers: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt, answer) token ids, as in training; the answer ends with an end token."""
    ends = end_token_ids(tokenizer)
    pairs = []
    for conversation, answer in zip(conversations, answers, strict=True):
        prompt_ids, answer_ids = render_answer(tokenizer, conversation, answer)
        has_end = bool(answer_ids) and answer_ids[-1] in ends
        pairs.append((prompt_ids, answer_ids if has_end else [*answer_ids, ends[0]]))
    return pairs


@torch.inference_mode()
@kernels_for_changing_lengths()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int,
) -> list[Answer]:
    """Continue every prompt greedily, padded on the left, until its end token or the limit."""
    ends = end_token_ids(tokenizer)
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    start = 0
    while start < len(order):
        longest = len(prompts[order[start]]) + max_new_tokens
        batch = order[start : start + max(1, min(MAX_ROWS, 2 * batch_tokens // longest))]
        start += len(batch)
        said = _generate_batch(model, [prompts[i] for i in batch], ends, max_new_tokens)
        for index, ids in zip(batch, said, strict=True):
            ended = bool(ids) and ids[-1] in ends
            text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
            answers[index] = Answer(text=text, ids=tuple(ids), ended=ended)
    return [answers[index] for index in range(len(prompts))]


def _generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], ends: list[int], max_new_tokens: int
) -> list[list[int]]:
    device = model.get_input_embeddings().weight.device
    longest = max(map(len, prompts))
    ids_bt = torch.full((len(prompts), longest), ends[0], dtype=torch.long)
    mask_bt = torch.zeros_like(ids_bt)
    for index, prompt in enumerate(prompts):
        ids_bt[index, longest - len(prompt) :] = torch.tensor(prompt)
        mask_bt[index, longest - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids_bt.to(device),
        attention_mask=mask_bt.to(device),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # a model's own settings for chatting do not belong here
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    said = []
    for row in output[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        said.append(row if end is None else row[: end + 1])
    return said


def has_loop(ids: Sequence[int]) -> bool:
    """True if some piece of at most 32 tokens follows itself four times, over 8 tokens or more."""
    for period in range(1, min(_LOOP_MAX_PERIOD, len(ids) // _LOOP_REPEATS) + 1):
        needed = max(period * (_LOOP_REPEATS - 1), _LOOP_MIN_TOKENS - period)
        same = 0
        for index in range(period, len(ids)):
            same = same + 1 if ids[index] == ids[index - period] else 0
            if same >= needed:
                return True
    return False
