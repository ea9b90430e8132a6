"""Batched greedy answers against one at a time, end tokens, and the look of a loop."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sevenfold.base.errors import UsageError
from sevenfold.verify.generation import (
    chat_answers,
    chat_prompts,
    end_token_ids,
    generate,
    has_loop,
)


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@torch.inference_mode()
def alone(model: Any, prompt: list[int], ends: list[int], limit: int) -> list[int]:
    """Greedy decoding by hand: no padding, no cache."""
    ids = list(prompt)
    for _ in range(limit):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def test_left_padded_batches_equal_one_by_one(model: Any, tokenizer: Any) -> None:
    texts = ["Who has a hat?", "Tom", "The red lamp is on the table. Who has a red hat?", "a b"]
    prompts = chat_prompts(tokenizer, [asked(text) for text in texts])
    assert len({len(prompt) for prompt in prompts}) > 2
    ends = end_token_ids(tokenizer)
    for batch_tokens in (1, 10_000):
        answers = generate(model, tokenizer, prompts, max_new_tokens=12, batch_tokens=batch_tokens)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert list(answer.ids) == alone(model, prompt, ends, 12)
            assert answer.ended == (answer.ids[-1] in ends)


@pytest.mark.usefixtures("backends_of_hopper")
def test_answers_use_kernels_that_need_no_plan_for_each_length(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training chose, cuDNN alone, holds again afterwards."""
    cuda, seen, make = torch.backends.cuda, [], model.generate

    def watched(**asked_for: Any) -> Any:
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()))
        return make(**asked_for)

    monkeypatch.setattr(model, "generate", watched)
    prompts = chat_prompts(tokenizer, [asked("Who is Tom?")])
    generate(model, tokenizer, prompts, max_new_tokens=2, batch_tokens=64)
    assert seen == [(False, True)]
    assert (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()) == (True, False)


def test_an_answer_ends_at_its_end_token_and_says_so(model: Any, tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    prompts = chat_prompts(tokenizer, [asked("Tom"), asked("Who?")])
    babble = generate(model, tokenizer, prompts, max_new_tokens=6, batch_tokens=999)
    assert [(answer.ended, len(answer.ids)) for answer in babble] == [(False, 6)] * 2
    quiet = copy.deepcopy(model)
    # A model that always ends: its last hidden state is the end token's embedding.
    with torch.no_grad():
        quiet.get_decoder().norm.weight.zero_()
        quiet.lm_head = torch.nn.Linear(32, 320)
        quiet.lm_head.weight.zero_()
        quiet.lm_head.bias.zero_()
        quiet.lm_head.bias[end] = 1.0
    for answer in generate(quiet, tokenizer, prompts, max_new_tokens=6, batch_tokens=999):
        assert (answer.text, answer.ids, answer.ended) == ("", (end,), True)


def test_answers_are_encoded_as_in_training(tokenizer: Any) -> None:
    from sevenfold.data.chat import render

    ((prompt, answer),) = chat_answers(tokenizer, [asked("Who?")], ["Tom."])
    said = [*asked("Who?"), {"role": "assistant", "content": "Tom."}]
    ids, mask = render(tokenizer, said)
    assert prompt + answer == ids
    assert mask == [0] * len(prompt) + [1] * len(answer)
    assert answer[-1] in end_token_ids(tokenizer)
    assert chat_prompts(tokenizer, [asked("Who?")]) == [prompt]


def test_control_tokens_that_are_typed_end_nothing(tokenizer: Any) -> None:
    ((_, answer),) = chat_answers(tokenizer, [asked("Who?")], ["Tom<|end|> and Ann."])
    ends = end_token_ids(tokenizer)
    assert [token in ends for token in answer].count(True) == 1
    assert answer[-1] in ends


def test_a_tokenizer_without_end_token_is_refused() -> None:
    nothing = SimpleNamespace(
        get_vocab=dict, eos_token_id=None, convert_tokens_to_ids=lambda token: None
    )
    with pytest.raises(UsageError, match="no end token; set eos_token in its tokenizer_config"):
        end_token_ids(nothing)


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([], False),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], False),
        ([1] * 7, False),
        ([1] * 8, True),
        ([9, 9, 1, 2, 1, 2, 1, 2, 1, 2, 7, 5], True),
        ([1, 2, 1, 2, 1, 2, 3, 4], False),
        ([1, 2, 3, 4, 5] * 3, False),
        ([1, 2, 3, 4, 5] * 4, True),
        (list(range(32)) * 4, True),
    ],
)
def test_loops(ids: list[int], loops: bool) -> None:
    assert has_loop(ids) is loops
