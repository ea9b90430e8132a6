from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.errors import BadDataError
from sevenfold.data.pairs import read_pair
from sevenfold.data.sources import SourceConfig, read_rows

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


GOOD: dict[str, dict[str, Any]] = {
    "strings": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "turns": {"prompt": [USER], "chosen": [says("Yes")], "rejected": [says("No")]},
    "whole": {"chosen": [USER, says("Yes")], "rejected": [USER, says("No")]},
    "whole_with_prompt": {"prompt": "Hi", "chosen": [USER, says("Yes")],
                          "rejected": [USER, says("No")]},
    "completions": {"prompt": "Hi", "chosen": [says("Yes")], "rejected": [says("No")]},
    "dialogue": {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes",
                 "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    "dialogue_prompt": {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Yes",
                        "rejected": "No"},
    "llama_factory": {"conversations": [{"from": "human", "value": "Hi"}],
                      "chosen": {"from": "gpt", "value": "Yes"},
                      "rejected": {"from": "gpt", "value": "No"}},
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_every_shape_becomes_the_same_pair(name: str) -> None:
    pair = read_pair(GOOD[name], "f:1", "s")
    assert (list(pair.prompt), pair.chosen, pair.rejected) == ([USER], "Yes", "No")


def test_longer_dialogues_keep_their_turns() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hm.\n\nOr so.\n\nHuman: Go on\n\nAssistant: "
    pair = read_pair({"chosen": start + "Yes", "rejected": start + "No"}, "f:1", "s")
    assert [m["content"] for m in pair.prompt] == ["Hi", "Hm.\n\nOr so.", "Go on"]
    values = {"system": "Be brief", "conversations": [{"from": "human", "value": "Hi"}],
              "chosen": "Yes", "rejected": "No"}  # fmt: skip
    assert list(read_pair(values, "f:1", "s").prompt) == [SYSTEM, USER]


def test_a_single_answer_is_let_through_where_it_is_expected() -> None:
    values = {"prompt": "Hi", "chosen": "Yes"}
    pair = read_pair(values, "f:1", "s", single=True)
    assert (pair.chosen, pair.rejected) == ("Yes", None)
    with pytest.raises(BadDataError, match=r"f:1:rejected: missing; .*'prompt', 'chosen'"):
        read_pair(values, "f:1", "s")


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no_chosen": ({"prompt": "a", "rejected": "b"}, "f:7:chosen: missing", "rename with columns"),
    "no_prompt": ({"chosen": "a", "rejected": "b"}, "f:7:prompt: missing", "add it, or give"),
    "equal": ({"prompt": "a", "chosen": "b ", "rejected": "b"},
              "f:7:rejected: equal to 'chosen'", "remove the row"),
    "empty": ({"prompt": "a", "chosen": " ", "rejected": "b"}, "f:7:chosen: empty", "remove"),
    "empty_rejected": ({"prompt": "a", "chosen": "b", "rejected": ""},
                       "f:7:rejected: empty", "remove the row"),
    "null": ({"prompt": "a", "chosen": "b", "rejected": None},
             "f:7:rejected: found null", "mend the row"),
    "empty_prompt": ({"prompt": "", "chosen": "b", "rejected": "c"},
                     "f:7:prompt: empty", "fill or remove the row"),
    "swapped_types": ({"prompt": "a", "chosen": [says("b")], "rejected": 3},
                      "f:7:rejected: found a number", "mend the row"),
    "other_prompt": ({"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: c\n\nAssistant: d"},
                     "f:7:rejected: its prompt is not that of 'chosen'", "remove the row"),
    "no_answer": ({"chosen": "Human: a", "rejected": "Human: a\n\nAssistant: d"},
                  "f:7:chosen: does not end with the assistant's answer", "add it or remove"),
    "empty_list": ({"chosen": [], "rejected": []},
                   "f:7:chosen: does not end with the assistant's answer", "add it or remove"),
    "no_question": ({"chosen": [says("a")], "rejected": [says("b")]},
                    "f:7:chosen: empty, expected at least one turn", "remove the row"),
    "prompt_ends_with_answer": ({"prompt": [USER, says("a")], "chosen": "b", "rejected": "c"},
                                "f:7:prompt[1].role: the prompt ends with the assistant",
                                "remove that turn"),
    "silent_answer": ({"chosen": "Human: a\n\nAssistant:", "rejected": "Human: a\n\nAssistant: b"},
                      "f:7:chosen: empty, expected an answer", "remove the row"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_every_mistake_has_its_own_message(name: str) -> None:
    values, place, advice = BAD[name]
    with pytest.raises(BadDataError) as caught:
        read_pair(values, "f:7", "s")
    assert str(caught.value).startswith(place)
    assert advice in str(caught.value)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets do not lie beside the project")
@pytest.mark.parametrize(
    ("name", "num_rows", "num_bad"),
    [("hh_harmless_2000.jsonl.gz", 2000, 12), ("llamafactory_dpo_en_demo.json", 300, 0)],
)
def test_real_preferences_are_understood(name: str, num_rows: int, num_bad: int) -> None:
    complaints = []
    for row in read_rows(SourceConfig(name="s", path=str(SHARED / "dpo" / name))):
        try:
            assert read_pair(row.values, row.where, "s").prompt[-1]["role"] == "user"
        except BadDataError as error:
            complaints.append(str(error).startswith(row.where))
    assert complaints == [True] * num_bad
    assert row.where.endswith(f":{num_rows}") or name.endswith(".json")
