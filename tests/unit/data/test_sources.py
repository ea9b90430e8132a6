from __future__ import annotations

import gzip
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from sevenfold.base.config import build, read_yaml
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.data import row_files
from sevenfold.data.pairs import read_pair
from sevenfold.data.rows import read_examples
from sevenfold.data.sources import (
    SourceConfig,
    list_files,
    read_documents,
    read_rows,
    refuse_repeated,
    require_licences,
    source_from_path,
    sources_from_paths,
)

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
ROWS = [{"text": f"Row {n}: grüß\u2028dich."} for n in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def source(path: Path, **facts: Any) -> SourceConfig:
    return SourceConfig(name="s", path=str(path), **facts)


def texts(path: Path, **facts: Any) -> list[str]:
    return [document["text"] for document in read_documents(source(path, **facts))]


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def write_arrow(path: Path) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as file:
        file.write_table(table, max_chunksize=2)


def write_arrow_stream(path: Path) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as s:
        s.write_table(table, max_chunksize=2)


def write_csv(path: Path) -> None:
    lines = "".join(f'{n},"{row["text"]}"\n' for n, row in enumerate(ROWS))
    path.write_text("n,text\n" + lines, encoding="utf-8")


WRITERS: dict[str, Callable[[Path], object]] = {
    ".jsonl": lambda path: path.write_bytes(LINES),
    ".json": lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8"),
    ".parquet": write_parquet,
    ".arrow": write_arrow,
    "-stream.arrow": write_arrow_stream,
    ".csv": write_csv,
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    if compression:
        data = path.read_bytes()
        path.unlink()
        path = path.with_name(path.name + compression)
        pack = gzip.compress if compression == ".gz" else zstandard.compress
        path.write_bytes(pack(data))
    assert texts(path) == [row["text"] for row in ROWS]
    assert texts(tmp_path) == texts(path) == texts(tmp_path / "r*")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo.\n")
    assert list(read_documents(source(tmp_path / "book.txt"))) == [
        {"id": "s/book.txt", "text": "One.\r\n\r\nTwo.\n", "source": "s"}
    ]


def test_several_zstandard_frames_are_read_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    half = LINES.index(b"\n") + 1
    path.write_bytes(zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]))
    assert len(texts(path)) == len(ROWS)


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    parts = datasets.DatasetDict({"train": data.select([0, 1]), "test": data.select([2])})
    parts.save_to_disk(str(tmp_path / "several"))
    assert texts(tmp_path / "one") == [row["text"] for row in ROWS]
    assert len(texts(tmp_path / "several")) == 2
    assert len(texts(tmp_path / "several", split="test")) == 1
    with pytest.raises(UsageError, match=r"no split 'dev'; it has train, test"):
        texts(tmp_path / "several", split="dev")
    (tmp_path / "one" / "dataset_info.json").write_text("{", encoding="utf-8")
    with pytest.raises(BadDataError, match=r"not readable as a saved data set .*save_to_disk"):
        texts(tmp_path / "one")


@pytest.mark.fault("L05")
@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "link.arrow"])
def test_a_saved_data_set_that_leads_out_of_its_folder_is_refused(
    tmp_path: Path, name: str
) -> None:
    import datasets

    folder = tmp_path / "set"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    (file,) = folder.glob("*.arrow")
    shutil.copy(file, tmp_path / "outside.arrow")
    if name == "link.arrow":
        (folder / name).symlink_to(tmp_path / "outside.arrow")
        with pytest.raises(BadDataError, match=r"link\.arrow: a link out of .*; copy it into the"):
            texts(folder)
        return
    state = folder / "state.json"
    state.write_text(state.read_text().replace(file.name, name))
    with pytest.raises(
        BadDataError, match=rf"state\.json:_data_files\[0\]\.filename: '{name}' lies outside"
    ):
        texts(folder)


def test_a_hub_name_is_streamed_with_its_columns_renamed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00001.parquet")
    config = SourceConfig(
        name="hub",
        dataset=str(tmp_path),
        revision="main",
        split="train",
        columns={"content": "text", "text": "text"},
        max_rows=3,
        licence="CC0-1.0",
    )
    rows = list(read_rows(config))
    assert [row.values["content"] for row in rows] == [row["text"] for row in ROWS[:3]]
    assert rows[2].where == f"{tmp_path}:3"


@pytest.mark.fault("L08")
@pytest.mark.parametrize("licence", [None, "", " "])
def test_a_source_without_a_licence_is_refused(tmp_path: Path, licence: str | None) -> None:
    known = source(tmp_path / "a.jsonl", licence="unknown")
    require_licences([known, source_from_path(tmp_path / "b.jsonl")], "data.sources")
    message = (
        rf"data\.sources: source 's' \({tmp_path}/c\.jsonl\) states no licence; add licence: .*"
        "or licence: unknown"
    )
    with pytest.raises(UsageError, match=message):
        require_licences([known, source(tmp_path / "c.jsonl", licence=licence)], "data.sources")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_unreachable_hub_set_says_what_to_check() -> None:
    config = SourceConfig(name="hub", dataset="no/such-set", revision="v1", split="train")
    with pytest.raises(UsageError, match=r"no/such-set: could not be read from the Hub .*HF_TOKEN"):
        next(read_rows(config))


def test_limits_end_a_source(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)
    assert len(texts(path, max_rows=2)) == 2
    assert len(texts(path, max_characters=len(ROWS[0]["text"]) + 1)) == 2
    assert texts(path, max_rows=99) == texts(path)
    path.write_text('{"messages": [{"content": "abc"}], "n": 3}\n' * 5, encoding="utf-8")
    assert len(list(read_rows(source(path, max_characters=7)))) == 3


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        ({}, "name exactly one of 'path' (local) and 'dataset' (Hugging Face Hub)"),
        ({"path": "a", "dataset": "b"}, "name exactly one of 'path'"),
        ({"dataset": "b", "split": "train"}, "needs 'revision' (a commit or tag) and 'split'"),
        ({"dataset": "b", "revision": "1"}, "needs 'revision' (a commit or tag) and 'split'"),
        ({"path": "a", "revision": "1"}, "belong to a 'dataset', not to a 'path'"),
        ({"path": "a", "max_rows": 0}, "are at least 1"),
    ],
)
def test_a_source_is_checked_where_it_is_configured(facts: dict[str, Any], advice: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(SourceConfig, {"name": "s", **facts})
    assert advice in str(caught.value)


@pytest.mark.fault("G07")
def test_nothing_there_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_bytes(b"x")
    (tmp_path / ".hidden.txt").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"gone: no such file or folder; check the path"):
        texts(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"no \.txt, \.jsonl, .*name an existing file, folder"):
        texts(tmp_path)
    with pytest.raises(UsageError, match=r"\*\.jsonl: no \.txt"):
        texts(tmp_path / "*.jsonl")
    with pytest.raises(UsageError, match=r"notes\.docx: files of this kind are not read; give"):
        texts(tmp_path / "notes.docx")
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"'split' means nothing for plain files; remove it"):
        texts(tmp_path / "a.txt", split="train")


@pytest.mark.fault("G07", "L05")
def test_links_out_of_the_folder_and_repeated_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("s")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").symlink_to(folder / "a.txt")
    with pytest.raises(BadDataError, match=r"b\.txt: the same file as .*a\.txt; keep one"):
        list_files(source(folder))
    (folder / "b.txt").unlink()
    (folder / "c.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(BadDataError, match=r"c\.txt: a link to .*outside .*copy the file into"):
        list_files(source(folder))


def test_the_same_source_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    assert source_from_path(path).name == "a"
    refuse_repeated([source(path), source_from_path(tmp_path / "b")])
    with pytest.raises(UsageError, match=r"given twice as a source; name it once"):
        refuse_repeated([source(path), source(tmp_path / "x" / ".." / "a.jsonl.gz")])


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    one, other = (source_from_path(tmp_path / folder / "rows.jsonl") for folder in "ab")
    with pytest.raises(UsageError, match=r"b/rows.* 'rows' has the name of .*a/rows.*; give each"):
        refuse_repeated([one, other])


def test_files_of_one_name_become_sources_of_their_own_names() -> None:
    paths = ["a/rows.jsonl", "rows-2.csv", "b/rows.jsonl.gz", "c/rows.txt"]
    found = sources_from_paths([Path(path) for path in paths])
    assert [source.name for source in found] == ["rows", "rows-2", "rows-3", "rows-4"]
    refuse_repeated(found)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(LINES * 50)[:-30]),
        ("a.jsonl.gz", b"plain text"),
        ("a.jsonl.zst", b"plain text, not zstandard"),
    ],
)
def test_damaged_compression_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadDataError, match=r"damaged or cut off .*fetch or compress the file"):
        texts(tmp_path / name)


@pytest.mark.fault("H11")
def test_a_row_of_50_mb_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(LINES + b'{"text": "')
        for _ in range(50):
            file.write(b"x" * 10**6)
        file.write(b'"}\n')
    tracemalloc.start()
    try:
        with pytest.raises(BadDataError, match=r"gz:6: the line is longer than 33554432 bytes"):
            texts(path)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.fault("H11")
@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet", ".txt"])
def test_a_packed_file_that_grows_beyond_bounds_is_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "MAX_WHOLE_BYTES", 10**6)
    path = tmp_path / f"a{suffix}.gz"
    path.write_bytes(gzip.compress(bytes(10**7)))
    with pytest.raises(BadDataError, match=r"gz: holds more than 1000000 bytes; cut it into sev"):
        texts(path)


@pytest.mark.parametrize("write", [write_arrow, write_arrow_stream])
def test_an_arrow_file_cut_anywhere_is_named(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "rows.arrow"
    write(path)
    whole = path.read_bytes()
    for length in (*range(0, len(whole) - 1, 97), len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadDataError, match=r"rows\.arrow: not .*fetch it again"):
            texts(path)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BadDataError, match=r"a\.parquet: not readable as Parquet .*fetch it again"):
        texts(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"text\na,b\n", r"a\.csv:2: 2 fields, but the header has 1; mend the row or its quotes"),
        (b'text\n"a\nb"\n"c" d\n', r"a\.csv:4: not CSV .*mend the row"),
        (b"text,text\na,b\n", r"a\.csv:1: the first line must name the columns, each once"),
        (b"", r"a\.csv:1: the first line must name the columns"),
        (b"text\n\xff\n", r"a\.csv:2:1: byte 0xff is not UTF-8"),
    ],
)
def test_a_bad_csv_is_named_with_its_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(BadDataError, match=message):
        texts(tmp_path / "a.csv")


def test_a_column_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"content": "b", "n": 1}\n')
    with pytest.raises(
        BadDataError, match=r"a\.jsonl:2:text: missing; the columns are 'content', 'n'; name the"
    ):
        texts(path)
    with pytest.raises(BadDataError, match=r"a\.jsonl:1:body: missing; the columns are 'text'"):
        texts(path, columns={"text": "body"})
    path.write_bytes(b'{"text": null}\n')
    with pytest.raises(BadDataError, match=r"a\.jsonl:1:text: found null, expected a string"):
        texts(path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets do not lie beside the project")
class TestRealFiles:
    @pytest.mark.parametrize(
        ("name", "num_examples"),
        [
            ("dolly_hhrlhf_train_small.jsonl", 1000),
            ("gsm8k_train.jsonl", 7473),
            ("llamafactory_alpaca_en_demo.json", 999),
            ("llamafactory_v1_sft_demo.jsonl", 500),
            ("self_instruct_seed_tasks.jsonl", 175),
        ],
    )
    def test_instruction_sets_are_understood(self, name: str, num_examples: int) -> None:
        rows = read_rows(source(SHARED / "sft" / name))
        examples = [e for row in rows for e in read_examples(row.values, row.where, "s")]
        assert len(examples) == num_examples
        assert not any("### Instruction" in str(e.messages) for e in examples)
        assert all(e.messages[-1]["role"] == "assistant" for e in examples)

    def test_texts_are_read(self) -> None:
        assert len(texts(SHARED / "pretrain" / "c4_demo.jsonl")) == 300
        books = texts(SHARED / "pretrain" / "books")
        assert len(books) == 20
        assert sum(map(len, books)) > 45_000_000


# ---- the sets that the recipes name, by their published columns ----------------------------------

WEB = {"id": "<urn:uuid:1>", "dump": "CC-MAIN-2024-10", "url": "https://a.example", "score": 3.1}
WEB |= {"file_path": "s3://a", "language": "en", "language_score": 0.9, "token_count": 4}
CODE = {"id": "a1", "source": "stackv2", "added": "2024-11-20", "created": "2020-01-01"}
CODE |= {"metadata": {"license": "MIT", "path": "/a.py", "detected_licenses": ["MIT"]}}
MATHS = {"url": "https://a.example", "fetch_time": 1, "content_mime_type": "text/html"}
MATHS |= {"warc_filename": "crawl-data/a", "warc_record_offset": 1, "warc_record_length": 2}
MATHS |= {"token_count": 4, "char_count": 9, "metadata": "{}", "score": 4.2, "int_score": 4}
MATHS |= {"crawl": "CC-MAIN-2024-10", "snapshot_type": "latest", "language": "en"}
ANSWERED = [{"content": "Why?", "role": "user"}, {"content": "So.", "role": "assistant"}]
OTHER = [ANSWERED[0], {"content": "Nobody knows.", "role": "assistant"}]
PAIR = {"prompt": "Why?", "prompt_id": "p", "chosen": ANSWERED, "rejected": OTHER}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "HuggingFaceFW/fineweb-edu": ("parquet", {"text": "Words.", **WEB, "int_score": 3}),
    "common-pile/stackv2_edu_filtered": ("json.gz", {"text": "print(1)", **CODE}),
    "HuggingFaceTB/finemath": ("parquet", {"text": "1 + 1 = 2", **MATHS}),
    "HuggingFaceH4/ultrachat_200k": (
        "parquet",
        {"prompt": "Why?", "prompt_id": "p", "messages": ANSWERED},
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "parquet",
        {**PAIR, "messages": ANSWERED, "score_chosen": 8.0, "score_rejected": 5.5},
    ),
}


def named_sources() -> list[tuple[str, str, dict[str, Any]]]:
    """Return every Hub source of the recipes, with the section that names it."""
    found = []
    for preset in ("7b", "small"):
        values = read_yaml(Path(__file__).parents[3] / "configs" / f"{preset}.yaml")
        sections = {"data": values["data"]}
        sections |= {stage: values[stage]["data"] for stage in ("sft", "dpo", "lora")}
        for section, data in sections.items():
            found += [(f"{preset}.{section}", section, source) for source in data["sources"]]
    return found


@pytest.mark.parametrize(
    ("section", "values"),
    [pytest.param(s, v, id=f"{name}.{v['name']}") for name, s, v in named_sources()],
)
def test_the_recipes_sets_are_read_in_their_published_form(
    tmp_path: Path, section: str, values: dict[str, Any]
) -> None:
    import pyarrow
    import pyarrow.parquet

    suffix, row = PUBLISHED[values["dataset"]]
    path = tmp_path / f"{values['split']}-00000-of-00001.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), path)
    else:
        path.write_bytes(gzip.compress((json.dumps(row) + "\n").encode() * 3))
    # Where splits are named otherwise than their files, the set's card says so.
    files = f"- split: {values['split']}\n    path: {path.name}\n"
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  {files}---\n"
    (tmp_path / "README.md").write_text(card)
    assert re.fullmatch("[0-9a-f]{40}", values["revision"])
    local = build(SourceConfig, {**values, "dataset": str(tmp_path), "subset": None})
    rows = list(read_rows(local))
    assert len(rows) == 3
    if section == "data":
        assert [d["text"] for d in read_documents(local)] == [row["text"]] * 3
    elif section == "dpo":
        pair = read_pair(rows[0].values, rows[0].where, "s")
        assert (pair.chosen, pair.rejected) == ("So.", "Nobody knows.")
    else:
        [example] = read_examples(rows[0].values, rows[0].where, "s")
        assert [message["content"] for message in example.messages] == ["Why?", "So."]
