from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.errors import BadDataError
from sevenfold.data.chat import ChatDataConfig, PreferenceDataConfig
from sevenfold.data.saved_rows import REJECTED_FILE
from sevenfold.data.sources import SourceConfig
from sevenfold.data.tables import write_conversations, write_preferences


def source(path: Path, rows: list[Any], name: str = "s") -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SourceConfig(name=name, path=str(path), licence="CC0-1.0")


def config(*sources: SourceConfig, **facts: Any) -> ChatDataConfig:
    values = {"max_length": 64, "validation_fraction": 0.1} | facts
    return ChatDataConfig(sources=sources, **values)


def pairs_config(*sources: SourceConfig, **facts: Any) -> PreferenceDataConfig:
    values = {"max_length": 64, "validation_fraction": 0.1} | facts
    return PreferenceDataConfig(sources=sources, **values)


def questions(count: int) -> list[dict[str, str]]:
    return [{"question": f"Number {n}?", "answer": f"It is {n}."} for n in range(count)]


def preferences(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Number {n}?", "chosen": f"{n}.", "rejected": "No."} for n in range(count)]


def load(folder: Path) -> Any:
    import datasets

    return datasets.load_from_disk(str(folder))


def test_conversations_are_written_with_their_masks(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*questions(50), {"text": "Tom has a red hat."}]
    facts = write_conversations(tmp_path, tokenizer, config(source(tmp_path / "a.jsonl", rows)))
    train, held_out = load(tmp_path / "rows"), load(tmp_path / "validation")
    assert facts["rows"] == len(train)
    assert facts["validation_rows"] == len(held_out) > 0
    assert len(train) + len(held_out) == 51
    assert train.column_names == ["input_ids", "loss_mask", "source"]
    assert str(train.features["loss_mask"].feature.dtype) == "int8"
    for row in [*train, *held_out]:
        learnt = [i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
        text = tokenizer.decode(learnt)
        assert (text.startswith(" It is ") and text.endswith(".<|end|>")) or text.endswith(
            "<|eos|>"
        )
    assert facts["sources"] == [
        {"name": "s", "location": str(tmp_path / "a.jsonl"), "licence": "CC0-1.0", "rows": 51}
    ]


def test_rows_with_one_question_are_held_out_together(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*questions(60), *({**row, "answer": "Other."} for row in questions(60))]
    write_conversations(tmp_path, tokenizer, config(source(tmp_path / "a.jsonl", rows)))
    parts = []
    for name in ("rows", "validation"):
        texts = [tokenizer.decode(ids) for ids in load(tmp_path / name)["input_ids"]]
        parts.append({text.split("<|assistant|>")[0] for text in texts})
    assert parts[0].isdisjoint(parts[1])
    assert len(parts[0] | parts[1]) == 60


def test_equal_input_gives_equal_bytes(tmp_path: Path, tokenizer: Any) -> None:
    given = config(source(tmp_path / "a.jsonl", questions(30)))
    hashes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_conversations(tmp_path / name, tokenizer, given)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        hashes.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 6


def test_weights_repeat_rows_and_their_parts(tmp_path: Path, tokenizer: Any) -> None:
    often = source(tmp_path / "a.jsonl", questions(200), "often")
    rare = source(tmp_path / "b.jsonl", [{"text": f"Tom {n}."} for n in range(200)], "rare")
    given = config(often, rare, weights=(2.5, 0.5), validation_fraction=0.02)
    write_conversations(tmp_path, tokenizer, given)
    names = load(tmp_path / "rows")["source"]
    assert 440 <= names.count("often") <= 540
    assert 70 <= names.count("rare") <= 130
    tiny = config(source(tmp_path / "c.jsonl", questions(3)), weights=(1e-9,))
    with pytest.raises(BadDataError, match=r"weights leave none to train on; raise them"):
        write_conversations(tmp_path, tokenizer, tiny)


@pytest.mark.fault("H05")
def test_long_rows_are_shortened_and_silent_ones_dropped(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*questions(20), {"question": "Tom " * 100, "answer": "Yes."},
            {"question": "Tell.", "answer": "Tom " * 100}]  # fmt: skip
    facts = write_conversations(tmp_path, tokenizer, config(source(tmp_path / "a.jsonl", rows)))
    assert facts["counts"]["truncated"] == 2
    assert facts["counts"]["dropped"] == {"no_answer_within_max_length": 1}
    assert facts["rows"] + facts["validation_rows"] == 21
    ids = [*load(tmp_path / "rows")["input_ids"], *load(tmp_path / "validation")["input_ids"]]
    assert facts["tokens"] == sum(map(len, ids))
    every = [*load(tmp_path / "rows")["input_ids"], *load(tmp_path / "validation")["input_ids"]]
    assert max(map(len, every)) == 64


def test_nothing_left_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    silent = [{"question": f"Tom {n} " * 100, "answer": "Yes."} for n in range(5)]
    with pytest.raises(
        BadDataError, match=r"0 rows are left of 5 \(dropped: 5 no_answer_.*raise max_length"
    ):
        write_conversations(tmp_path, tokenizer, config(source(tmp_path / "a.jsonl", silent)))
    same = questions(1) * 4
    with pytest.raises(BadDataError, match=r"4 rows are left of 4 .*at least two different ones"):
        write_conversations(tmp_path, tokenizer, config(source(tmp_path / "a.jsonl", same)))


@pytest.mark.fault("H03")
def test_bad_rows_stop_or_are_listed(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*questions(10), {"question": "a"}, {"messages": []}, *questions(12)[10:]]
    path = tmp_path / "a.jsonl"
    with pytest.raises(
        BadDataError, match=r"a\.jsonl:11:answer: missing.* or allow some bad rows with max_"
    ):
        write_conversations(tmp_path, tokenizer, config(source(path, rows)))
    with pytest.raises(BadDataError, match=r"a\.jsonl:12:messages: empty.*bad row 2, and max_bad"):
        write_conversations(tmp_path, tokenizer, config(source(path, rows), max_bad_rows=1))
    facts = write_conversations(tmp_path, tokenizer, config(source(path, rows), max_bad_rows=2))
    assert facts["counts"]["rejected"] == 2
    lines = (tmp_path / REJECTED_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["where"] for line in lines] == [f"{path}:11", f"{path}:12"]


def test_what_the_template_refuses_is_located(tmp_path: Path, tokenizer: Any) -> None:
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(BadDataError, match=r"a\.jsonl:1: the chat template refuses .*no system"):
        write_conversations(tmp_path, strict, config(source(tmp_path / "a.jsonl", questions(2))))


def test_placeholders_are_counted_and_warned_about(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*questions(5), {"question": "Who?", "answer": "I am {{name}} by {{author}}."}]
    with caplog.at_level(logging.WARNING):
        facts = write_conversations(tmp_path, tokenizer, config(source(tmp_path / "a.jsonl", rows)))
    assert facts["counts"]["placeholders"] == 2
    assert caplog.text.count("\n") == 1
    assert "a.jsonl:6: {{name}}; 2 placeholders such as this were not filled in" in caplog.text


def test_pairs_are_written_beside_replayed_answers(tmp_path: Path, tokenizer: Any) -> None:
    given = pairs_config(
        source(tmp_path / "a.jsonl", preferences(40)),
        replay=(source(tmp_path / "b.jsonl", questions(20), "replay"),),
    )
    facts = write_preferences(tmp_path, tokenizer, given)
    every = [*load(tmp_path / "rows"), *load(tmp_path / "validation")]
    assert facts["rows"] + facts["validation_rows"] == len(every) == 60
    assert sum(row["rejected_ids"] == [] for row in every) == 20
    for row in every:
        assert tokenizer.decode(row["prompt_ids"]).endswith("<|end|><|assistant|>")
        assert tokenizer.decode(row["chosen_ids"]).endswith(".<|end|>")
    assert [s["rows"] for s in facts["sources"]] == [40, 20]


def test_single_answers_stand_among_pairs_where_they_are_expected(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [*preferences(10), {"prompt": "Tom?", "chosen": "Yes."}]
    given = pairs_config(source(tmp_path / "a.jsonl", rows))
    with pytest.raises(BadDataError, match=r"a\.jsonl:11:rejected: missing"):
        write_preferences(tmp_path, tokenizer, given)
    write_preferences(tmp_path, tokenizer, given, single=True)
    every = [*load(tmp_path / "rows"), *load(tmp_path / "validation")]
    assert sum(row["rejected_ids"] == [] for row in every) == 1


@pytest.mark.fault("I04")
def test_what_shortening_ruins_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        *preferences(10),
        {"prompt": "Tom " * 100, "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Tell.", "chosen": "Tom " * 100 + "a", "rejected": "Tom " * 100 + "b"},
    ]
    facts = write_preferences(tmp_path, tokenizer, pairs_config(source(tmp_path / "a.jsonl", rows)))
    assert facts["counts"]["dropped"] == {
        "no_answer_within_max_length": 1,
        "equal_within_max_length": 1,
    }
    for row in [*load(tmp_path / "rows"), *load(tmp_path / "validation")]:
        assert row["chosen_ids"] != row["rejected_ids"] != []


def test_both_documents_of_a_pair_fit_into_one_row(tmp_path: Path, tokenizer: Any) -> None:
    """However long the answers are; a short one leaves its room to the other."""
    long, short = "Tom has " * 40, "Yes."
    rows = [
        *preferences(10),
        {"prompt": "Which?", "chosen": long, "rejected": short},
        {"prompt": "What?", "chosen": long + "a", "rejected": "Who " + long},
    ]
    write_preferences(tmp_path, tokenizer, pairs_config(source(tmp_path / "a.jsonl", rows)))
    every = [*load(tmp_path / "rows"), *load(tmp_path / "validation")]
    assert len(every) == 12
    sizes = [
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in every
    ]
    assert max(sizes) == 64
    whole = [row for row in every if tokenizer.decode(row["rejected_ids"]) == " Yes.<|end|>"]
    assert len(whole) == 1


def test_each_answer_with_its_prompt_is_what_the_model_reads_at_most(
    tmp_path: Path, tokenizer: Any
) -> None:
    """In a row that holds two of them; a short answer leaves no more room than that."""
    long, short = "Tom has " * 60, "Yes."
    rows = [
        *preferences(10),
        {"prompt": "Which?", "chosen": long, "rejected": short},
        {"prompt": "What?", "chosen": long + "a", "rejected": "Who " + long},
    ]
    given = pairs_config(source(tmp_path / "a.jsonl", rows), max_length=100)
    write_preferences(tmp_path, tokenizer, given, context=50)
    every = [*load(tmp_path / "rows"), *load(tmp_path / "validation")]
    sizes = [
        (len(row["prompt_ids"]) + len(row["chosen_ids"]), len(row["rejected_ids"])) for row in every
    ]
    assert len(sizes) == 12
    assert sorted(side for side, _ in sizes)[-2:] == [50, 50]
    assert max(rejected for _, rejected in sizes) > 40


def test_a_replayed_row_must_end_with_an_answer(tmp_path: Path, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}]  # fmt: skip
    for row in ({"messages": messages}, {"text": "Tom."}):
        given = pairs_config(
            source(tmp_path / "a.jsonl", preferences(5)),
            replay=(source(tmp_path / "b.jsonl", [row], "replay"),),
        )
        with pytest.raises(BadDataError, match=r"b\.jsonl:1: replay rows are conversations that"):
            write_preferences(tmp_path, tokenizer, given)


@pytest.mark.parametrize("write", [write_conversations, write_preferences])
def test_an_empty_source_is_named_also_beside_others(
    tmp_path: Path, tokenizer: Any, write: Any
) -> None:
    rows = [{**q, **p} for q, p in zip(questions(9), preferences(9), strict=True)]
    full = source(tmp_path / "full.jsonl", rows)
    empty = source(tmp_path / "empty.jsonl", [], name="empty")
    with pytest.raises(BadDataError, match=r"empty\.jsonl: not one row; .* leave the source out"):
        write(tmp_path, tokenizer, pairs_config(full, empty))
