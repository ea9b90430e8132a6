"""Clean shards as ids: the same from any number of processes, and kept where they are right."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevenfold.base import storage
from sevenfold.data import clean, shards, token_files
from sevenfold.data.clean import DocumentWriter
from sevenfold.data.shards import PackConfig, write_rows
from sevenfold.data.token_files import Encoding, encode_shards
from sevenfold.data.tokenizer import TokenizerConfig, encode_texts, train_tokenizer

ROW_LENGTH, PAD = 32, 2


@pytest.fixture(scope="module")
def made() -> Any:
    config = TokenizerConfig(vocab_size=300, path=None, max_digits=1, sample_characters=10**6)
    return train_tokenizer(["Tom has a red hat."] * 50, config)


def encoding(made: Any, **changes: Any) -> Encoding:
    settings: dict[str, Any] = {
        "backend_json": made.backend_tokenizer.to_str(),
        "engine": "tokenizers",
        "version": "1",
        "bos_id": made.bos_token_id,
        "eos_id": made.eos_token_id,
        "vocab_size": len(made),
    }
    return Encoding(**settings | changes)


def texts() -> list[str]:
    return [f"Tom {n} has {'a red hat ' * (n % 9)}and {n + 7} cats." for n in range(90)]


@pytest.fixture
def clean_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, str]:
    monkeypatch.setattr(clean, "SHARD_BYTES", 2_000)
    folder = tmp_path / "clean"
    folder.mkdir()
    with DocumentWriter(folder, "train") as writer:
        for number, text in enumerate(texts()):
            writer.write({"id": str(number), "text": text, "source": "ab"[number % 3 == 0]})
    found = {path: storage.sha256_file(path) for path in sorted(folder.glob("*.zst"))}
    assert len(found) > 4
    return found


def files(folder: Path) -> dict[str, str]:
    return {path.name: storage.sha256_file(path) for path in sorted(folder.iterdir())}


def test_ids_are_those_of_the_documents_between_bos_and_eos(
    tmp_path: Path, made: Any, clean_shards: dict[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "_BATCH_DOCUMENTS", 7)
    found = list(encode_shards(tmp_path / "a", clean_shards, encoding(made), num_workers=1))
    monkeypatch.setattr(token_files, "_BATCH_DOCUMENTS", 512)
    monkeypatch.setattr(token_files, "_BATCH_CHARACTERS", 300)
    again = list(encode_shards(tmp_path / "c", clean_shards, encoding(made), num_workers=1))
    assert files(tmp_path / "c") == files(tmp_path / "a")
    assert len(again) == len(found)
    expected = [[0, *ids, 1] for ids in encode_texts(made, texts())]
    ids = np.concatenate([np.load(part.path) for part in found])
    assert ids.dtype == np.uint16
    assert ids.tolist() == [token for document in expected for token in document]
    assert sum(part.documents for part in found) == 90
    assert sum(part.tokens for part in found) == len(ids)
    by_source = [sum(part.tokens_by_source.get(source, 0) for part in found) for source in "ab"]
    assert by_source[1] == sum(len(document) for document in expected[::3])
    assert sum(by_source) == len(ids)
    wide = encode_shards(
        tmp_path / "b", clean_shards, encoding(made, vocab_size=70_000), num_workers=1
    )
    assert np.load(next(wide).path).dtype == np.uint32


@pytest.mark.parametrize("row_length", [None, ROW_LENGTH])
def test_one_process_and_three_make_the_same_files(
    tmp_path: Path, made: Any, clean_shards: dict[Path, str], row_length: int | None
) -> None:
    how = encoding(made, row_length=row_length, pad_id=row_length and PAD)
    found = {}
    for count in (1, 3):
        folder, packed = tmp_path / f"tokens-{count}", tmp_path / f"packed-{count}"
        packed.mkdir()
        parts = list(encode_shards(folder, clean_shards, how, num_workers=count))
        config = PackConfig(row_length=ROW_LENGTH, dtype="uint16", strategy="concatenate")
        write_rows(packed, "train", [part.path for part in parts], config, num_workers=count)
        found[count] = files(folder) | files(packed)
    assert found[1] == found[3]


def test_only_what_is_missing_changed_or_made_otherwise_is_made_again(
    tmp_path: Path, made: Any, clean_shards: dict[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tokens"
    done: list[str] = []
    read = token_files.read_documents
    monkeypatch.setattr(token_files, "read_documents", lambda p: done.append(p.name) or read(p))  # type: ignore[func-returns-value]

    def again(shards: dict[Path, str] = clean_shards, **changes: Any) -> int:
        done.clear()
        list(encode_shards(folder, shards, encoding(made, **changes), num_workers=1))
        return len(done)

    count = len(clean_shards)
    assert again() == count
    made_first = files(folder)
    assert again() == 0
    path = folder / "train-00001.npy"
    for damage in (b"", path.read_bytes()[:-2] + b"zz"):
        path.write_bytes(damage)
        assert again() == 1
        assert done == ["train-00001.jsonl.zst"]
    for damage in (
        b"",
        b"[]",
        b"{}",
        path.with_suffix(".json").read_bytes().replace(b'"cut"', b'"x"'),
    ):
        path.with_suffix(".json").write_bytes(damage)
        assert again() == 1
    (folder / "train-00003.npy").unlink()
    (folder / ".train-00003.npy.partial-1").write_bytes(b"left by a killed process")
    assert again() == 1
    assert files(folder) == made_first
    first = next(iter(clean_shards))
    assert again({**clean_shards, first: "another"}) == 1
    assert again(bos_id=5) == count
    assert again(version="2") == count


def test_best_fit_loses_nothing_and_cuts_only_what_is_longer_than_a_row(
    tmp_path: Path, made: Any, clean_shards: dict[Path, str]
) -> None:
    how = encoding(made, row_length=ROW_LENGTH, pad_id=PAD)
    found = list(encode_shards(tmp_path / "tokens", clean_shards, how, num_workers=1))
    rows = np.concatenate([np.load(part.path).reshape(-1, ROW_LENGTH) for part in found])
    pieces = []
    for row in rows.tolist():
        assert row[0] == made.bos_token_id
        kept = row[: row.index(PAD)] if PAD in row else row
        assert set(row[len(kept) :]) <= {PAD}
        starts = [at for at, token in enumerate(kept) if token == made.bos_token_id]
        pieces += [kept[a:b] for a, b in zip(starts, [*starts[1:], len(kept)], strict=True)]
    documents = [[0, *ids, 1] for ids in encode_texts(made, texts())]
    cut = [document for document in documents if len(document) > ROW_LENGTH]
    whole = [document for document in documents if len(document) <= ROW_LENGTH]
    assert 0 < len(cut) < 90
    assert sum(part.cut for part in found) == len(cut)
    for document in whole:
        pieces.remove(document)
    for document in cut:  # every later piece has a BOS of its own
        pieces.remove(document[:ROW_LENGTH])
        rest = document[ROW_LENGTH:]
        while rest:
            pieces.remove([0, *rest[: ROW_LENGTH - 1]])
            rest = rest[ROW_LENGTH - 1 :]
    assert pieces == []


def test_what_was_counted_stands_beside_the_ids(
    tmp_path: Path, made: Any, clean_shards: dict[Path, str]
) -> None:
    part = next(encode_shards(tmp_path / "tokens", clean_shards, encoding(made), num_workers=1))
    facts = storage.read_json(part.path.with_suffix(".json"))
    assert facts.pop("sha256") == storage.sha256_file(part.path)
    assert facts.pop("made_from")
    assert facts == {k: v for k, v in dataclasses.asdict(part).items() if k != "path"}


def test_a_row_that_lies_in_two_files_is_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 20)
    sizes = [3, 0, 50, 1, 27, 2]
    stream, at, paths = np.arange(sum(sizes)), 0, []
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"ids-{number}.npy")
        np.save(paths[-1], stream[at : at + size].astype(np.uint16))
        at += size
    folder = tmp_path / "packed"
    folder.mkdir()
    config = PackConfig(row_length=8, dtype="int64", strategy="concatenate")
    assert write_rows(folder, "train", paths, config, num_workers=1) == 10
    rows = [np.load(path) for path in sorted(folder.iterdir())]
    assert [len(part) for part in rows] == [2] * 5
    assert np.concatenate(rows).reshape(-1).tolist() == stream[:80].tolist()


def test_what_is_encoded_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(token_files, "_BATCH_CHARACTERS", 10)
    sizes = [1, 1, 1, 1, 9, 20, 4, 4]
    batches = token_files._batches({"text": "a" * size} for size in sizes)
    found = [[len(document["text"]) for document in batch] for batch in batches]
    assert found == [[1, 1, 1], [1, 9], [20], [4, 4]]
