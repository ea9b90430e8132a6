"""Step 01 stopped anywhere goes on after what is on the disk, and ends with the same bytes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.workflow.forked import was_killed
from tests.unit.workflow.test_prepare import make_recipe

from sevenfold.base import disk, storage
from sevenfold.base.errors import BadDataError, SevenfoldError, UsageError
from sevenfold.base.records import Run
from sevenfold.data import clean, mixture
from sevenfold.data.clean import read_shards
from sevenfold.data.mixture import MixtureConfig
from sevenfold.data.sources import SourceConfig
from sevenfold.workflow import raw_data


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(folder=tmp_path / "run", facts={})


@pytest.fixture(autouse=True)
def tiny_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "SHARD_BYTES", 900)


def write(path: Path, count: int) -> SourceConfig:
    rows = [{"text": f"{path.stem} says {n} and {n * 7}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(name=path.stem, path=str(path), licence="cc0")


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    chosen = tuple(write(tmp_path / f"{name}.jsonl", 60) for name in ("web", "code"))
    mixed = MixtureConfig(weights={"web": 2, "code": 1}, characters=900)
    return make_recipe(sources=chosen, mixture=mixed, village=None)


def leftover(run: Run) -> Path:
    return run.folder / "data" / ".raw.unfinished"


def texts(run: Run) -> list[str]:
    return [document["text"] for document in read_shards(run.data("raw"), "documents")]


def test_shares_are_written_down(run: Run, recipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    raw_data.download(run, recipe)
    manifest = storage.verify_folder(run.data("raw"))
    facts = {source["name"]: source for source in manifest["sources"]}
    counts = Counter(text.split()[0] for text in texts(run))
    for name, share in (("web", 600), ("code", 300)):
        assert facts[name]["wanted_characters"] == share
        assert share <= facts[name]["characters"] < share + 25
        assert facts[name]["documents"] == counts[name]
    assert len(manifest["files"]) == 4
    assert not leftover(run).exists()
    recipe.data.mixture = MixtureConfig(weights={"web": 2, "code": 1}, characters=9000)
    raw_data.download(run, recipe)
    assert "web ended after 1," in caplog.text
    assert "of the 6,000 characters that data.mixture wants of it" in caplog.text


def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(
    run: Run, recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Run(folder=tmp_path / "whole", facts={})
    raw_data.download(whole, recipe)
    wanted = storage.read_manifest(whole.data("raw"))
    num_killed, gone_on = 0, set()
    while True:
        target = Run(folder=tmp_path / f"run-{num_killed}", facts={})
        if not was_killed(lambda run=target: raw_data.download(run, recipe), at=num_killed + 1):
            break
        num_killed += 1
        capsys.readouterr()
        raw_data.download(target, recipe)
        gone_on.add(capsys.readouterr().out.partition("going on after ")[2].partition(" ")[0])
        assert storage.verify_folder(target.data("raw")) == wanted
        assert not leftover(target).exists()
    assert num_killed > 20
    # From the beginning, and after every shard.
    assert len(gone_on) == 5


def test_what_is_on_the_disk_is_not_read_again_but_skipped(
    run: Run, recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, num_left = mixture.read_documents, [37]

    def breaking(*arguments: Any) -> Iterator[Any]:
        for document in real(*arguments):
            num_left[0] -= 1
            if num_left[0] < 0:
                raise UsageError("the network is gone")
            yield document

    monkeypatch.setattr(mixture, "read_documents", breaking)
    with pytest.raises(UsageError, match="the network is gone"):
        raw_data.download(run, recipe)
    kept = sorted(path.name for path in leftover(run).iterdir())
    assert kept == ["documents-00000.jsonl.zst", "documents-00001.jsonl.zst", "state.json"]
    # The shard that was not full is gone.
    num_left[0] = 1000
    raw_data.download(run, recipe)
    told = capsys.readouterr().out
    taken = int(told.partition("going on after ")[2].partition(" ")[0])
    assert taken == 26
    assert 1000 - num_left[0] == len(texts(run)) - taken


def test_other_sources_or_settings_begin_anew(
    run: Run, recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert was_killed(lambda: raw_data.download(run, recipe), at=20)
    assert (leftover(run) / "state.json").is_file()
    write(tmp_path / "web.jsonl", 59)
    raw_data.download(run, recipe)
    assert "going on" not in capsys.readouterr().out
    assert not leftover(run).exists()


def test_a_source_that_vanishes_half_way_is_named_and_leaves_nothing_half_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b"):
        write(folder / f"{name}.jsonl", 30)
    recipe = make_recipe(
        sources=(SourceConfig(name="t", path=str(folder), licence="cc0"),), village=None
    )
    real = clean.DocumentWriter.write

    def write_and_lose(writer: clean.DocumentWriter, document: Any) -> None:
        (folder / "b.jsonl").unlink(missing_ok=True)
        real(writer, document)

    monkeypatch.setattr(clean.DocumentWriter, "write", write_and_lose)
    with pytest.raises(BadDataError, match=r"b\.jsonl: could not be read .*run the same command"):
        raw_data.download(run, recipe)
    assert not run.data("raw").exists()
    assert all(path.suffix in (".zst", ".json") for path in leftover(run).iterdir())


def test_a_bad_row_leaves_nothing_behind(run: Run, recipe: Any, tmp_path: Path) -> None:
    with (tmp_path / "code.jsonl").open("a") as file:
        file.write('{"text": 7}\n')
    recipe.data.mixture = None
    with pytest.raises(BadDataError, match=r"code\.jsonl:61:text: found a number"):
        raw_data.download(run, recipe)
    assert not run.data("raw").exists()
    assert not leftover(run).exists()


def test_a_full_disk_is_said_and_keeps_whole_shards(
    run: Run, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = disk.sync_file

    def full(path: Path) -> None:
        if path.name == "documents-00002.jsonl.zst":
            raise OSError(28, "No space left on device", str(path))
        real(path)

    monkeypatch.setattr(disk, "sync_file", full)
    with pytest.raises(SevenfoldError, match=r"data/raw: could not be written \(No space left"):
        raw_data.download(run, recipe)
    names = sorted(path.name for path in leftover(run).iterdir())
    assert names == ["documents-00000.jsonl.zst", "documents-00001.jsonl.zst", "state.json"]
    monkeypatch.setattr(disk, "sync_file", real)
    raw_data.download(run, recipe)
    assert storage.verify_folder(run.data("raw"))


def test_where_the_disk_knows_no_links_files_are_copied(
    run: Run, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    raw_data.download(run, recipe)
    assert storage.verify_folder(run.data("raw"))["documents"] == len(texts(run))


def test_an_empty_source_beside_others_is_named(run: Run, recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "code.jsonl").write_text("")
    with pytest.raises(BadDataError, match=r"code\.jsonl: not one document; .* leave the source"):
        raw_data.download(run, recipe)
    assert not leftover(run).exists()


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        ("Grüße".encode("latin-1"), r"a\.txt:1:3: byte 0xfc is not UTF-8; convert the file"),
        ("One\nTwo".encode("utf-16"), r"a\.txt:1:1: byte 0xff is not UTF-8; convert the file"),
        (b"One\nT\0wo", r"a\.txt:2:2: found a NUL byte; remove it"),
    ],
)
def test_another_encoding_is_named_with_line_and_byte(
    run: Run, tmp_path: Path, data: bytes, advice: str
) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    source = SourceConfig(name="a", path=str(tmp_path / "a.txt"), licence="cc0")
    with pytest.raises(BadDataError, match=advice):
        raw_data.download(run, make_recipe(sources=(source,), village=None))
    assert not run.data("raw").exists()
