"""Sources mixed by weights: exact shares, the same order every time, from any point on."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.config import build
from sevenfold.base.errors import UsageError
from sevenfold.data.mixture import DocumentMixture, MixtureConfig
from sevenfold.data.sources import SourceConfig


def write(path: Path, count: int, *, length: int = 10) -> SourceConfig:
    rows = [{"text": f"{path.stem}{n}".ljust(length, ".")} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(name=path.stem, path=str(path), licence="cc0")


@pytest.fixture
def sources(tmp_path: Path) -> list[SourceConfig]:
    return [
        write(tmp_path / "web.jsonl", 90, length=20),
        write(tmp_path / "code.jsonl", 90),
        write(tmp_path / "maths.jsonl", 7),
    ]


def mixture(**weights: float) -> MixtureConfig:
    return MixtureConfig(weights=weights, characters=1000)


MIXED = mixture(web=5, code=3, maths=2)


def drawn(sources: Sequence[SourceConfig], config: MixtureConfig | None) -> list[str]:
    return [document["id"] for document in DocumentMixture(sources, config)]


def test_each_source_gives_its_share_of_the_characters(sources: list[SourceConfig]) -> None:
    taken = DocumentMixture(sources, MIXED)
    order = [document["source"] for document in taken]
    assert Counter(order) == {"web": 25, "code": 30, "maths": 7}
    facts = {fact["name"]: fact for fact in taken.facts()}
    assert (facts["web"]["characters"], facts["web"]["wanted_characters"]) == (500, 500)
    # It ended before its share, and nobody else got what was left.
    assert (facts["maths"]["characters"], facts["maths"]["wanted_characters"]) == (70, 200)
    # They come mixed, not one after the other.
    assert Counter(order[:20]) == {"web": 8, "code": 8, "maths": 4} or order[:4].count("web") < 4
    assert set(order[:6]) == {"web", "code", "maths"}


def test_without_a_mixture_sources_come_one_after_the_other(sources: list[SourceConfig]) -> None:
    names = [name.partition("/")[0] for name in drawn(sources, None)]
    assert names == ["web"] * 90 + ["code"] * 90 + ["maths"] * 7
    assert "wanted_characters" not in DocumentMixture(sources, None).facts()[0]


@pytest.mark.parametrize("config", [MIXED, None])
def test_a_draw_goes_on_from_any_point(
    sources: list[SourceConfig], config: MixtureConfig | None
) -> None:
    whole = drawn(sources, config)
    for stop in range(0, len(whole), 7):
        first = DocumentMixture(sources, config)
        begun = [document["id"] for document, _ in zip(first, range(stop), strict=False)][:stop]
        # zip takes one more document than it gives; what counts is the state after ``stop``.
        again = DocumentMixture(sources, config)
        stream = iter(again)
        assert [next(stream)["id"] for _ in range(stop)] == begun
        state = json.loads(json.dumps(again.state()))
        rest = DocumentMixture(sources, config, state)
        assert begun + [document["id"] for document in rest] == whole
        assert rest.num_documents == len(whole)


def test_a_hub_set_goes_on_without_reading_what_was_read(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for part in range(3):
        rows = [{"text": f"Text {part}-{n}", "metadata": {"license": "mit"}} for n in range(5)]
        with gzip.open(folder / f"part-{part}.json.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(name="hub", dataset=str(folder), revision="main", split="train")
    whole = drawn([source], None)
    assert whole[6] == "hub/train:7"
    for stop in range(1, 15):
        first = DocumentMixture([source], None)
        stream = iter(first)
        begun = [next(stream)["id"] for _ in range(stop)]
        state = json.loads(json.dumps(first.state()))
        assert state[0]["position"]["hub"] is not None
        rest = DocumentMixture([source], None, state)
        documents = list(rest)
        assert begun + [document["id"] for document in documents] == whole
        assert [d["text"] for d in documents][-1] == "Text 2-4"


def test_limits_of_a_source_hold_where_it_goes_on(tmp_path: Path) -> None:
    source = write(tmp_path / "web.jsonl", 30)
    limited = [build(SourceConfig, {**vars_of(source), "max_rows": 12})]
    first = DocumentMixture(limited, None)
    stream = iter(first)
    for _ in range(9):
        next(stream)
    assert len(list(DocumentMixture(limited, None, first.state()))) == 3


def vars_of(source: SourceConfig) -> dict[str, Any]:
    return {"name": source.name, "path": source.path, "licence": source.licence}


def test_tokens_are_a_budget_too() -> None:
    config = MixtureConfig(weights={"a": 1, "b": 3}, tokens=1e6, characters_per_token=4.5)
    assert config.budget == 4_500_000
    assert (config.share("a"), config.share("b")) == (1_125_000, 3_375_000)


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({}, "give exactly one of 'characters' and 'tokens'"),
        ({"characters": 5, "tokens": 5}, "give exactly one of 'characters' and 'tokens'"),
        ({"tokens": 5}, "'tokens' and 'characters_per_token' belong together"),
        ({"characters": 5, "weights": {"a": 0}}, "greater than 0"),
    ],
)
def test_a_mixture_is_checked_where_it_is_configured(values: dict[str, Any], advice: str) -> None:
    with pytest.raises(UsageError, match=advice):
        build(MixtureConfig, {"weights": {"a": 1.0}, **values})
