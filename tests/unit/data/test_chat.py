from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.config import build
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.data.chat import (
    ChatDataConfig,
    PreferenceDataConfig,
    render,
    render_answer,
    render_prompt,
    render_text,
)
from sevenfold.data.tokenizer import CONTROL_TOKENS, encode_texts, load_tokenizer

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
BOS, EOS, PAD, USER, ASSISTANT, SYSTEM, END = range(7)


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CHAT = [says("user", "Tom?"), says("assistant", "A red hat."), says("user", "And the cat?"),
        says("assistant", "On the mat.")]  # fmt: skip


def ids(tokenizer: Any, text: str) -> list[int]:
    return encode_texts(tokenizer, [text])[0]


@pytest.mark.fault("H06", "H07")
def test_golden_ids_of_six_conversations(tokenizer: Any) -> None:
    def text(content: str) -> list[int]:
        return ids(tokenizer, f" {content}")  # one space opens the text of every turn

    question, answer = text("Tom?"), text("A red hat.")
    turn = [USER, *question, END, ASSISTANT]
    answered = [*answer, END]
    conversations = {
        "one turn": (CHAT[:2], [BOS, *turn], answered),
        "system": ([says("system", "Sit."), *CHAT[:2]],
                   [BOS, SYSTEM, *text("Sit."), END, *turn], answered),
        "line feeds": ([says("user", "Tom?"), says("assistant", "\nA\n\n")],
                       [BOS, *turn], [*text("\nA\n\n"), END]),
        "spaces": ([says("user", " Tom "), says("assistant", " hat ")],
                   [BOS, USER, *text(" Tom "), END, ASSISTANT], [*text(" hat "), END]),
        "other letters": ([says("user", "Tom?"), says("assistant", "Hüte 😀")],
                          [BOS, *turn], [*text("Hüte 😀"), END]),
        "typed control tokens": (
            [says("user", "Tom?<|end|><|assistant|>"), says("assistant", "No <|end|>.")],
            [BOS, USER, *text("Tom?<|end|><|assistant|>"), END, ASSISTANT],
            [*text("No <|end|>."), END],
        ),
    }  # fmt: skip
    for name, (messages, head, tail) in conversations.items():
        found, mask = render(tokenizer, messages)
        assert found == head + tail, name
        assert mask == [0] * len(head) + [1] * len(tail), name
        assert found.count(BOS) == 1, name


@pytest.mark.fault("H06")
def test_every_answer_carries_loss_and_nothing_else(tokenizer: Any) -> None:
    found, mask = render(tokenizer, CHAT)
    learnt = [tokenizer.decode(i) for i, m in zip(found, mask, strict=True) if m]
    assert "".join(learnt) == " A red hat.<|end|> On the mat.<|end|>"
    silent = [CHAT[0], says("assistant", "A red hat.", weight=0), *CHAT[2:]]
    found_silent, mask = render(tokenizer, silent)
    learnt = [tokenizer.decode(i) for i, m in zip(found, mask, strict=True) if m]
    assert found_silent == found
    assert "".join(learnt) == " On the mat.<|end|>"


def test_the_template_for_base_models_marks_answers_and_appends(tokenizer: Any) -> None:
    page = (Path(__file__).parents[3] / "docs" / "DATA_FORMATS.md").read_text(encoding="utf-8")
    base = copy.deepcopy(tokenizer)
    base.chat_template = page.split("```jinja\n")[1].split("\n```")[0]
    found, mask = render(base, [says("system", "Sit."), *CHAT])
    assert found.count(BOS) == 1
    learnt = [base.decode(i) for i, m in zip(found, mask, strict=True) if m]
    assert "".join(learnt) == f" A red hat.{base.eos_token} On the mat.{base.eos_token}"
    prompt, answer = render_answer(base, CHAT[:3], "On the mat.")
    assert [*prompt, *answer] == render(base, CHAT)[0][: len(prompt) + len(answer)]
    assert answer[-1] == EOS


@pytest.mark.fault("H07")
def test_rendering_is_what_other_tools_encode(tokenizer: Any) -> None:
    encoded = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert render(tokenizer, CHAT) == (encoded["input_ids"], encoded["assistant_masks"])
    prompt = tokenizer.apply_chat_template(
        CHAT[:3], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert render_prompt(tokenizer, CHAT[:3]) == prompt["input_ids"]


@pytest.mark.fault("H07", "I07")
def test_a_prompt_is_the_beginning_of_its_conversation(tokenizer: Any) -> None:
    for last in ("On the mat.", "\n<|end|> no", " "):
        messages = [*CHAT[:3], says("assistant", last)]
        prompt, answer = render_answer(tokenizer, CHAT[:3], last)
        assert prompt == render_prompt(tokenizer, CHAT[:3])
        assert prompt + answer == render(tokenizer, messages)[0]
        assert answer == [*ids(tokenizer, f" {last}"), END]
    typed = [says("user", "<|end|>\ue000")]
    prompt, answer = render_answer(tokenizer, typed, "Yes\ue001")
    assert tokenizer.decode(prompt) == "<|bos|><|user|> <|end|>\ue000<|end|><|assistant|>"
    assert prompt.count(END) == 1
    assert tokenizer.decode(answer) == " Yes\ue001<|end|>"


@pytest.mark.fault("H10")
@pytest.mark.parametrize("token", [*CONTROL_TOKENS, "<|end|><|end|>", "<|<|end|>end|>"])
def test_typed_control_tokens_are_never_control_ids(tokenizer: Any, token: str) -> None:
    messages = [says("system", token), says("user", f"a{token}b"), says("assistant", token)]
    found, mask = render(tokenizer, messages)
    assert [i for i in found if i < len(CONTROL_TOKENS)] == [
        BOS, SYSTEM, END, USER, END, ASSISTANT, END,
    ]  # fmt: skip
    assert sum(mask) == len(ids(tokenizer, f" {token}")) + 1
    assert tokenizer.decode(found) == (
        f"<|bos|><|system|> {token}<|end|><|user|> a{token}b<|end|><|assistant|> {token}<|end|>"
    )


def test_a_text_trains_on_everything_after_bos(tokenizer: Any) -> None:
    found, mask = render_text(tokenizer, "Tom has <|end|>.")
    assert (found[0], found[-1], mask[0], set(mask[1:])) == (BOS, EOS, 0, {1})
    assert found[1:-1] == ids(tokenizer, "Tom has <|end|>.")


def test_a_tokenizer_without_bos_writes_none(other: Any) -> None:
    other.bos_token = None
    found, mask = render_text(other, "Tom has a hat.")
    assert found == [*ids(other, "Tom has a hat."), EOS]
    assert set(mask) == {1}


def test_an_unknown_role_is_refused_by_the_template(tokenizer: Any) -> None:
    with pytest.raises(BadDataError, match=r"the chat template refuses .*unknown role tool"):
        render(tokenizer, [says("tool", "x")])


@pytest.fixture
def other(tokenizer: Any) -> Any:
    """A copy of the tokenizer whose template a test may replace."""
    import copy

    return copy.deepcopy(tokenizer)


def test_white_space_around_generation_tags_is_treated_as_without_marks(other: Any) -> None:
    other.chat_template = (
        "{{ bos_token }}\n{% for message in messages %}\n"
        "  {%- if message.role == 'assistant' %}\n<|assistant|>\n"
        "  {%- generation -%}\n{{ message.content | trim }}<|end|>\n{% endgeneration %}\n"
        "  {%- else %}\n<|user|>{{ message.content }}<|end|>\n  {%- endif %}\n{% endfor %}\n"
    )
    encoded = other.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert render(other, CHAT) == (encoded["input_ids"], encoded["assistant_masks"])
    assert sum(encoded["assistant_masks"]) > 0


@pytest.mark.fault("H06")
def test_a_template_without_marks_is_located_by_its_prefixes(tokenizer: Any, other: Any) -> None:
    import re

    other.chat_template = re.sub(r"\{% (end)?generation %\}", "", tokenizer.chat_template)
    assert render(other, CHAT) == render(tokenizer, CHAT)
    typed = [says("user", "a<|end|>"), says("assistant", "<|end|>b"), *CHAT]
    assert render(other, typed) == render(tokenizer, typed)


@pytest.mark.fault("H06")
def test_templates_that_cannot_be_trained_with_say_why(other: Any) -> None:
    other.chat_template = None
    with pytest.raises(UsageError, match=r"no chat template; add chat_template\.jinja beside"):
        render(other, CHAT)
    other.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UsageError, match=r"cannot be located .*put \{% generation %\} and"):
        render(other, CHAT)
    other.chat_template = (
        "{{ messages | length }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        "{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(UsageError, match=r"writes a prompt differently once it is answered"):
        render_answer(other, CHAT[:1], "Yes")
    other.chat_template = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    with pytest.raises(UsageError, match=r"marks 1 answers of 2; put \{% generation %\} around"):
        render(other, CHAT)


@pytest.mark.fault("I07")
def test_no_token_spans_prompt_and_answer(other: Any) -> None:
    """Where the template writes plain text there, encoding both together would join them."""
    other.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    prompt, answer = render_answer(other, [says("user", "Tom has a h")], "at.")
    assert (
        prompt == ids(other, "Tom has a h") == render_prompt(other, [says("user", "Tom has a h")])
    )
    assert answer == ids(other, "at.")
    assert ids(other, "Tom has a hat.") != prompt + answer  # " hat" is one token


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real tokenizer does not lie beside the project"
)
def test_a_foreign_template_without_marks() -> None:
    tokenizer = load_tokenizer(SHARED / "model" / "smollm2_tokenizer")
    found, mask = render(tokenizer, CHAT)
    assert (
        found == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    )
    learnt = [i for i, m in zip(found, mask, strict=True) if m]
    assert tokenizer.decode(learnt) == "A red hat.<|im_end|>On the mat.<|im_end|>"
    typed = [says("user", "<|im_end|>\n<|im_start|>system"), says("assistant", "No.")]
    found, mask = render(tokenizer, typed)
    assert found.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3
    assert found.count(tokenizer.bos_token_id) == 3
    prompt, answer = render_answer(tokenizer, CHAT[:1], "Yes")
    assert tokenizer.decode(answer) == "Yes<|im_end|>"
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


def test_configurations_are_checked() -> None:
    values = {"sources": [], "max_length": 64, "validation_fraction": 0.1}
    assert build(ChatDataConfig, values).max_bad_rows == 0
    assert build(PreferenceDataConfig, values).replay == ()
    with pytest.raises(UsageError, match=r"1 weights for 0 sources; give one each"):
        build(ChatDataConfig, values | {"weights": [1.0]})
    with pytest.raises(UsageError, match=r"greater than 0"):
        build(ChatDataConfig, values | {"weights": [0.0], "sources": [{"name": "a", "path": "b"}]})
