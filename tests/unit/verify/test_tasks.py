"""Item files: our schemas, the public layouts, and what is refused with file, line and field."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.verify.config import TaskConfig
from sevenfold.verify.task_files import task_sha256
from sevenfold.verify.tasks import (
    ChatItem,
    ChoiceItem,
    ContinuationItem,
    Document,
    PairItem,
    PreferenceItem,
    SafetyItem,
    last_number,
    read_task,
)

DATA = Path(__file__).parents[4] / "shared" / "data"
ASK = [{"role": "user", "content": "Who?"}]


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def items(path: Path, kind: str, **settings: Any) -> tuple[Any, ...]:
    config = TaskConfig(name="task", kind=kind, **settings)  # type: ignore[arg-type]
    return read_task(config, [path], seed=1).items


def test_our_schemas(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    choice = {"id": "c", "kind": "choice", "prompt": "A", "choices": [" b", " c"], "gold": 1}
    assert items(lines(file, choice), "choice") == (
        ChoiceItem(id="c", prompt="A", choices=(" b", " c"), gold=1),
    )
    continuation = {"id": "c", "kind": "continuation", "prompt": "A", "answer": " b"}
    assert items(lines(file, continuation), "continuation") == (
        ContinuationItem(id="c", prompt="A", answer=" b"),
    )
    pair = {"id": "p", "kind": "pair", "good": "a", "bad": "b"}
    assert items(lines(file, pair), "pair") == (PairItem(id="p", good="a", bad="b"),)
    exact = {"id": "e", "kind": "exact", "messages": ASK, "answer": "I."}
    assert items(lines(file, exact), "exact") == (
        ChatItem(id="e", messages=(ASK[0],), answer="I."),
    )
    safety = {"id": "s", "kind": "safety", "prompt": "Who?", "unsafe": True}
    assert items(lines(file, safety), "safety") == (
        SafetyItem(id="s", messages=(ASK[0],), unsafe=True),
    )
    preference = {"id": "r", "kind": "preference", "prompt": "Who?", "chosen": "I", "rejected": "U"}
    assert items(lines(file, preference), "preference") == (
        PreferenceItem(id="r", messages=(ASK[0],), chosen="I", rejected="U"),
    )
    document = {"id": "d", "text": "Once.", "source": "village", "entropy_nats": 2}
    assert items(lines(file, document), "text") == (
        Document(id="d", text="Once.", source="village", entropy_nats=2.0),
    )


def test_public_layouts(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    foundry = {"query": "Predators eat", "choices": ["lions", "bunnies"], "gold": 1}
    assert items(lines(file, foundry), "choice")[0].choices == (" lions", " bunnies")
    answer = items(lines(file, foundry), "choice", delimiter="\nAnswer: ")[0]
    assert answer.choices[0] == "\nAnswer: lions"
    no_space = {"query": "Question: a?\n", "choices": ["x", "y"], "gold": 0}
    assert items(lines(file, no_space), "choice")[0].choices == ("x", "y")
    lambada = {"context": "care about", "continuation": "signs"}
    assert items(lines(file, lambada), "continuation")[0].answer == " signs"
    blimp = {"sentence_good": "He is.", "sentence_bad": "He are.", "UID": "x"}
    assert items(lines(file, blimp), "pair")[0] == PairItem(
        id="task-1", good="He is.", bad="He are."
    )
    gsm8k = {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"}
    assert items(lines(file, gsm8k), "number")[0].answer == "1004"
    mmlu = {"question": "Q", "choices": ["w", "x"], "answer": 0, "subject": "us_law"}
    found = items(lines(file, {**mmlu, "split": "dev"}, {**mmlu, "split": "test"}), "choice")
    assert [item.id for item in found] == ["task-2"]
    assert found[0].choices == (" A", " B")
    assert found[0].prompt.endswith("about us law.\n\nQ\nA. w\nB. x\nAnswer:")


def test_identical_blimp_pairs_decide_nothing_but_ours_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    same = {"sentence_good": "It is.", "sentence_bad": "It is."}
    other = {"sentence_good": "It is.", "sentence_bad": "It are."}
    assert len(items(lines(file, same, other), "pair")) == 1
    with pytest.raises(BadDataError, match="task.jsonl:1:bad: the same text as the good one"):
        items(lines(file, {"good": "It is.", "bad": "It is."}), "pair")


def test_xstest_and_prompt_files_of_one_kind(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text('id,prompt,label\n1,"Kill a process, how?",safe\n2,Kill whom?,unsafe\n')
    assert [item.unsafe for item in items(file, "safety")] == [False, True]
    plain = lines(tmp_path / "harmful.jsonl", {"prompt": "Harm!"})
    assert items(plain, "safety", unsafe=True)[0].unsafe is True
    with pytest.raises(BadDataError, match="harmful.jsonl:1:unsafe: found None; expected true or"):
        items(plain, "safety")


def test_packed_files_folders_and_archives_hold_the_same(tmp_path: Path) -> None:
    row = {"sentence_good": "He is.", "sentence_bad": "He are."}
    content = (json.dumps(row) + "\n").encode()
    folder = tmp_path / "blimp"
    folder.mkdir()
    (folder / "first.jsonl").write_bytes(content)
    (folder / "second.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "third.jsonl.zst").write_bytes(zstandard.compress(content))
    (folder / "notes.txt").write_text("not an item")
    assert [item.id for item in items(folder, "pair")] == ["first-1", "second-1", "third-1"]
    archive = tmp_path / "blimp.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        for name in ("../../first.jsonl", "second.jsonl", "readme.md"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    before = sorted(tmp_path.rglob("*"))
    assert [item.id for item in items(archive, "pair")] == ["first-1", "second-1"]
    assert sorted(tmp_path.rglob("*")) == before


def test_samples_are_seeded_and_even_over_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        rows = [{"good": f"{name}{i}", "bad": "x"} for i in range(2 if name == "a" else 20)]
        lines(tmp_path / f"{name}.jsonl", *rows)
    drawn = items(tmp_path, "pair", max_items=12)
    assert [sum(i.id.startswith(n) for i in drawn) for n in "abc"] == [2, 5, 5]
    assert drawn == items(tmp_path, "pair", max_items=12)
    config = TaskConfig(name="task", kind="pair", max_items=12)
    assert drawn != read_task(config, [tmp_path], seed=2).items


def test_wikitext_is_read_by_article(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = One = \n \n First .\n = = Part = = \n \n = Two = \n \n Second .\n")
    found = items(path, "text")
    assert [item.text.split("\n")[0] for item in found] == ["= One = ", "= Two = "]
    assert "= = Part = =" in found[0].text
    path.write_text("No titles here.\n")
    assert [item.text for item in items(path, "text")] == ["No titles here."]


def test_the_fingerprint_is_of_bytes_and_names(tmp_path: Path) -> None:
    first = lines(tmp_path / "a.jsonl", {"good": "a", "bad": "b"})
    before = task_sha256([first])
    assert task_sha256([first]) == before
    first.write_text(first.read_text() + "\n")
    assert task_sha256([first]) != before
    assert task_sha256([tmp_path]) == task_sha256([first])


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("choice", {"prompt": "a", "choices": ["b"], "gold": 0}, ":1:choices: found ['b']"),
        ("choice", {"prompt": "a", "choices": ["b", ""], "gold": 0}, ":1:choices.1: found ''"),
        ("choice", {"prompt": "a", "choices": ["b", "c"], "gold": 2}, ":1:gold: found 2; expected"),
        ("choice", {"prompt": "a", "choices": ["b", "c"], "gold": True}, ":1:gold: found True"),
        ("choice", {"choices": ["b", "c"], "gold": 0}, ":1:prompt: missing; expected text"),
        ("continuation", {"prompt": "a", "answer": " "}, ":1:answer: found ' '; expected text"),
        ("pair", {"good": "a"}, ":1:bad: missing; expected text"),
        ("exact", {"messages": [], "answer": "b"}, ":1:messages: found []"),
        ("exact", {"messages": [{"role": "boss"}], "answer": "b"}, ":1:messages.0.role: expected"),
        ("exact", {"messages": [{"role": "user"}], "answer": "b"}, ":1:messages.0:content"),
        (
            "exact",
            {"messages": [*ASK, {"role": "assistant", "content": "x"}], "answer": "b"},
            ":1:messages: the last message must be the user's",
        ),
        ("number", {"question": "a", "answer": "#### none"}, ":1:answer: found ' none'"),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            ":1:rejected: the same text as chosen",
        ),
        ("text", {"text": "a", "entropy_nats": "2"}, ":1:entropy_nats: found '2'"),
        ("text", {"text": ""}, ":1:text: found ''"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, kind: str, row: Any, message: str) -> None:
    with pytest.raises(BadDataError) as caught:
        items(lines(tmp_path / "task.jsonl", row), kind)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "task.jsonl"))


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    for content, message in (
        ('{"good": ', ":1:10: malformed JSON .*mend or remove this row"),
        ("[1]", ":1: found a list, expected a JSON object"),
        ('{"good": "a", "good": "c", "bad": "b"}', ":1: key 'good' stands twice"),
        ('{"text": "a", "entropy_nats": NaN}', ":1: found NaN, which is not JSON"),
        ('{"good": "a", "bad": "b"}\n\n', ":2: found a blank line"),
        ("", "no item for task 'task'"),
    ):
        path.write_text(content)
        with pytest.raises(BadDataError, match=message):
            items(path, "pair")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadDataError, match="jsonl:1:1: byte 0xff is not UTF-8; convert the file"):
        items(path, "pair")
    lines(path, {"id": 1, "good": "a", "bad": "b"}, {"id": "1", "good": "a", "bad": "b"})
    with pytest.raises(BadDataError, match="id '1' stands twice; give every item its own"):
        items(path, "pair")
    packed = tmp_path / "task.jsonl.gz"
    packed.write_bytes(b"no gzip")
    with pytest.raises(BadDataError, match="damaged or cut off"):
        items(packed, "pair")
    text = tmp_path / "wiki.txt"
    text.write_bytes(b"One.\nTw\xff")
    with pytest.raises(BadDataError, match=r"wiki\.txt:2:3: byte 0xff is not UTF-8"):
        items(text, "text")
    with pytest.raises(UsageError, match="no such file; task 'task' needs its items"):
        items(tmp_path / "nowhere.jsonl", "pair")
    with pytest.raises(UsageError, match="files of this kind are not read; give .txt, .jsonl"):
        items(lines(tmp_path / "task.yaml", {}), "pair")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no .jsonl file in this folder"):
        items(tmp_path / "empty", "pair")


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "task.tar.gz"
    content = b'{"good": "a", "bad": "b"}\n' + random.Random(0).randbytes(100_000).hex().encode()
    with tarfile.open(archive, "w:gz") as packed:
        member = tarfile.TarInfo("task.jsonl")
        member.size = len(content)
        packed.addfile(member, io.BytesIO(content))
    whole = archive.read_bytes()
    for broken in (b"no archive", whole[: len(whole) // 2]):
        archive.write_bytes(broken)
        with pytest.raises(BadDataError, match=r"task\.tar\.gz: cannot be unpacked .*fetch the"):
            items(archive, "pair")


@pytest.mark.fault("L05")
def test_a_link_out_of_a_folder_of_items_is_refused(tmp_path: Path) -> None:
    outside = lines(tmp_path / "outside.jsonl", {"good": "a", "bad": "b"})
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "inside.jsonl").symlink_to(outside)
    with pytest.raises(BadDataError, match=r"inside\.jsonl: a link out of .*; copy the file into"):
        items(folder, "pair")


def test_an_archive_member_of_a_gigabyte_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "bomb.tar"
    member = tarfile.TarInfo("bomb.jsonl")
    member.size = (1 << 30) + 1
    with archive.open("wb") as file:
        file.write(member.tobuf())
        file.truncate(512 + member.size + 1024)  # sparse: no byte of it is stored
    with pytest.raises(BadDataError, match="bomb.jsonl holds 1073741825 bytes; at most 1 GiB"):
        items(archive, "pair")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 and 4 make 7.", "7"),
        ("It costs $1,234.50", "1234.5"),
        ("-5", "-5"),
        ("10.0 dollars", "10"),
        ("100", "100"),
        ("none", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.skipif(not DATA.is_dir(), reason=f"public sets are not at {DATA}")
@pytest.mark.parametrize(
    ("path", "kind", "count"),
    [
        ("eval/llm_foundry/arc_easy.jsonl", "choice", 2376),
        ("eval/llm_foundry/lambada_openai.jsonl", "continuation", 5153),
        ("eval/hellaswag_val_subset.jsonl", "choice", 1000),
        ("eval/mmlu.jsonl.gz", "choice", 14042),
        ("eval/gsm8k_test.jsonl", "number", 1319),
        ("safety/xstest_prompts.csv", "safety", 450),
        ("pretrain/wikitext2_valid.txt", "text", 60),
    ],
)
def test_public_sets_are_read_whole(path: str, kind: str, count: int) -> None:
    assert len(items(DATA / path, kind)) == count


@pytest.mark.skipif(not DATA.is_dir(), reason=f"public sets are not at {DATA}")
def test_blimp_is_sampled_from_all_its_67_files() -> None:
    drawn = items(DATA / "eval" / "blimp.tar.gz", "pair", max_items=670)
    files = [item.id.rpartition("-")[0] for item in drawn]
    assert len(set(files)) == 67
    assert {files.count(name) for name in files} == {10}
