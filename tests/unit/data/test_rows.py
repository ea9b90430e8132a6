from __future__ import annotations

from typing import Any

import pytest

from sevenfold.base.errors import BadDataError
from sevenfold.data.rows import placeholders, read_examples, strip_alpaca

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief"}
FRAME = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)

GOOD: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "messages": ({"messages": [USER, ANSWER], "id": 3}, [USER, ANSWER]),
    "system": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]},
        [USER, ANSWER],
    ),
    "values": (
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "Hi"}]},
                      {**ANSWER, "loss_weight": 1.0}]},
        [USER, ANSWER],
    ),
    "weight": (
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]},
        [USER, {**ANSWER, "weight": 0}, USER, ANSWER],
    ),
    "conversations": (
        {"system": "Be brief",
         "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        [SYSTEM, USER, ANSWER],
    ),
    "prompt": ({"prompt": "Hi", "response": "Hello"}, [USER, ANSWER]),
    "alpaca_frame": ({"prompt": FRAME.format("Hi"), "response": "Hello"}, [USER, ANSWER]),
    "completion": ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, [USER, ANSWER]),
    "alpaca_input": (
        {"instruction": "Add", "input": "1 2", "output": "3", "system": None},
        [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    "dolly": ({"instruction": "Hi", "context": "", "response": "Hello"}, [USER, ANSWER]),
    "question": ({"question": "Hi", "answer": "Hello"}, [USER, ANSWER]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_every_shape_becomes_the_same_messages(name: str) -> None:
    values, messages = GOOD[name]
    (example,) = read_examples(values, "f:1", "s")
    assert list(example.messages) == messages
    assert (example.where, example.source) == ("f:1", "s")


def test_instances_become_examples_and_text_stays_text() -> None:
    values = {"instruction": "Add", "instances": [{"input": "1 2", "output": "3"},
                                                  {"input": "", "output": "0"}]}  # fmt: skip
    contents = [e.messages[0]["content"] for e in read_examples(values, "f:1", "s")]
    assert contents == ["Add\n\n1 2", "Add"]
    assert read_examples({"text": "Once."}, "f:1", "s")[0].text == "Once."


def test_the_alpaca_frame_is_taken_off_with_its_input() -> None:
    frame = FRAME.format("Add\n\n### Input:\n1 2")
    assert strip_alpaca(frame) == "Add\n\n1 2"
    assert strip_alpaca("Hi ### Response:") == "Hi ### Response:"


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no_shape": ({"query": "a", "reply": "b"}, "f:7:messages: missing; the columns are 'query'",
                 "rename with columns: {ours: theirs}"),
    "half_a_shape": ({"prompt": "a"}, "f:7:response: missing", "expected one of: messages;"),
    "null": ({"prompt": None, "response": "b"}, "f:7:prompt: found null", "mend the row"),
    "wrong_type": ({"prompt": "a", "response": 3}, "f:7:response: found a number", "mend the row"),
    "empty_answer": ({"question": "a", "answer": " \n"}, "f:7:answer: empty", "fill or remove"),
    "bad_context": ({"instruction": "a", "input": [], "output": "b"},
                    "f:7:input: found a list", "mend the row"),
    "no_output": ({"instruction": "a", "instances": [{"input": "b"}]},
                  "f:7:instances[0]:output: missing; the columns are 'input'", "add it"),
    "instances_empty": ({"instruction": "a", "instances": []}, "f:7:instances: found a list",
                        "mend the row"),
    "instance_text": ({"instruction": "a", "instances": ["b"]},
                      "f:7:instances[0]: found a string", "mend the row"),
    "messages_text": ({"messages": "Hi"}, "f:7:messages: found a string", "mend the row"),
    "messages_null": ({"messages": None}, "f:7:messages: found null", "mend the row"),
    "messages_empty": ({"messages": []}, "f:7:messages: empty", "remove the row"),
    "turn_text": ({"messages": ["Hi"]}, "f:7:messages[0]: found a string", "mend the row"),
    "turn_without_content": ({"messages": [{"role": "user", "text": "a"}]},
                             "f:7:messages[0].content: missing; the keys are 'role', 'text'",
                             "add 'content'"),
    "unknown_role": ({"messages": [{"role": "robot", "content": "a"}]},
                     "f:7:messages[0].role: unknown role 'robot'", "rename the role"),
    "list_role": ({"messages": [{"role": ["user"], "content": "a"}]},
                  "f:7:messages[0].role: unknown role", "rename the role"),
    "unknown_speaker": ({"conversations": [{"from": "tool", "value": "a"}]},
                        "f:7:conversations[0].from: unknown role 'tool'", "rename the role"),
    "empty_content": ({"messages": [USER, {**ANSWER, "content": " "}]},
                      "f:7:messages[1].content: empty", "remove the row"),
    "null_content": ({"messages": [USER, {**ANSWER, "content": None}]},
                     "f:7:messages[1].content: found null", "mend the row"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]},
              "f:7:messages[0].content[0]: found another kind", "reads text only"),
    "half_weight": ({"messages": [USER, {**ANSWER, "weight": 0.5}]},
                    "f:7:messages[1].weight: found 0.5", "expected 0 or 1"),
    "no_answer": ({"messages": [USER]}, "f:7:messages: no assistant turn", "add an answer"),
    "answer_first": ({"messages": [SYSTEM, ANSWER, USER]},
                     "f:7:messages[1].role: starts with the assistant", "add one or remove"),
    "two_users": ({"messages": [USER, USER, ANSWER]},
                  "f:7:messages[1].role: two user turns in a row", "join them"),
    "two_answers": ({"messages": [USER, ANSWER, ANSWER]},
                    "f:7:messages[2].role: two assistant turns in a row", "join them"),
    "late_system": ({"messages": [USER, SYSTEM, ANSWER]},
                    "f:7:messages[1].role: a system turn after the first", "move it to the front"),
    "only_system": ({"messages": [SYSTEM]}, "f:7:messages: no user turn", "says nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_every_mistake_has_its_own_message(name: str) -> None:
    values, place, advice = BAD[name]
    with pytest.raises(BadDataError) as caught:
        read_examples(values, "f:7", "s")
    assert str(caught.value).startswith(place)
    assert advice in str(caught.value)


def test_placeholders_are_found() -> None:
    assert placeholders("I am {{name}} by {{ author }}, {not} {{this one}}") == [
        "{{name}}",
        "{{ author }}",
    ]
