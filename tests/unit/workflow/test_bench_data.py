"""Benchmarks of what turns text into batches, each on a little text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevenfold.data import random_texts
from sevenfold.workflow import bench_data, cli

SETTINGS = ("--set", "pack.row_length=256", "--gigabytes", "0.0003")


def run(
    what: str, folder: Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> list[dict[str, Any]]:
    """Run the verb; every line on standard output must be one JSON object of a case.

    What one that was killed has left is in nobody's way.
    """
    (folder / bench_data.FOLDER / "clean").mkdir(parents=True)
    (folder / bench_data.FOLDER / "clean" / "train-00000.jsonl").write_text("{}")
    code = cli.execute(["bench", what, "--folder", str(folder), *flags])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert list(folder.iterdir()) == []
    cases = [json.loads(line) for line in printed.out.splitlines() if line.startswith("{")]
    assert {case["case"] for case in cases} == {what}
    assert all(case["cores"] >= 1 and case["code"] and case["versions"] for case in cases)
    return cases


def test_tokenize_compares_the_engines_and_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gigatoken")
    pytest.importorskip("datatrove")
    cases = run("tokenize", tmp_path, capsys, *SETTINGS)
    names = ["tokenizers", "gigatoken", "datatrove", "step 03"]
    assert [case["what"] for case in cases] == names
    slow, fast, trove, step = cases
    assert slow["ratio_to_tokenizers"] == 1
    assert fast["tokens"] == slow["tokens"]
    assert trove["tokens"] == slow["tokens"] + slow["documents"]  # an EOS each
    assert step["tokens"] == slow["tokens"] + 2 * slow["documents"]  # BOS and EOS
    assert fast["ratio_to_tokenizers"] == pytest.approx(fast["tokens_s"] / slow["tokens_s"])
    assert slow["bytes_per_token"] == pytest.approx(slow["bytes"] / slow["tokens"])
    assert step["engine"] == "gigatoken"


def test_pack_tells_what_is_cut_and_padded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "texts.jsonl"
    rows = [{"text": f"Tom {n} has {'a red hat ' * (n % 40)}."} for n in range(300)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "bench").mkdir()
    plain, fitted = run("pack", tmp_path / "bench", capsys, *SETTINGS[:2], "--source", str(source))
    assert (plain["strategy"], fitted["strategy"]) == ("concatenate", "best_fit")
    assert plain["tokens"] == fitted["tokens"]
    assert plain["padding_share"] == fitted["documents_cut_share"] == 0
    assert 0 < plain["documents_cut_share"] < 0.5
    assert 0 < fitted["padding_share"] < 0.2
    assert 0.01 < plain["peak_gib"] < 64


def test_documents_that_lie_in_two_rows_are_counted(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([0, 5, 0, 5, 5, 5], np.uint16))
    np.save(tmp_path / "b.npy", np.array([0, 5, 0, 5, 5, 5, 0], np.uint16))
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    assert bench_data._cut_by_rows(files, 0, 4) == 1
    assert bench_data._cut_by_rows(files, 0, 3) == 2


def test_load_reads_every_length_of_the_curriculum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_data, "LOAD_TOKENS", 2**16)
    monkeypatch.setattr(bench_data, "SHARD_TOKENS", 2**15)
    opened, *loaded = run("load", tmp_path, capsys, "--steps", "3")
    assert opened["tokens"] == 2**16
    assert [case["seq_len"] for case in loaded] == [64, 128, 256]
    assert all(case["tokens_s"] > 0 and 0 < case["wait_share"] < 1 for case in loaded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("load", "--gigabytes", "1"), "bench load reads random ids; leave --source and --gigab"),
        (("pack", "--gigabytes", "1", "--source", "."), "leave it or --source out"),
    ],
)
def test_flags_without_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert cli.execute(["bench", *arguments, "--folder", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_random_documents_are_the_same_every_time() -> None:
    documents = list(random_texts.random_documents(200_000, seed=1))
    assert documents == list(random_texts.random_documents(200_000, seed=1))
    assert documents != list(random_texts.random_documents(200_000, seed=2))
    size = sum(len(document["text"]) for document in documents)
    assert 200_000 <= size < 300_000
    words = [word for document in documents for word in document["text"].split()]
    assert 0.1 < len(set(words)) / len(words) < 0.6
