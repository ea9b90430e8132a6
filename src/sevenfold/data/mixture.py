"""Documents of several sources, one after the other or mixed by weights, always the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from sevenfold.base.config import configuration
from sevenfold.data.sources import Position, SourceConfig, read_documents
from sevenfold.data.strict_json import Values


@configuration
class MixtureConfig:
    """How much of each source is taken: ``weights`` by its name are shares of the characters.

    ``characters`` in all, or ``tokens`` at ``characters_per_token``: tokens are counted when they
    are packed, and the tokenizer is made from these very documents. A source that ends before its
    share leaves it to nobody; the manifest says so.
    """

    weights: dict[str, Annotated[float, Field(gt=0)]]
    characters: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[float, Field(ge=1)] | None = None
    characters_per_token: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        """Check that there is one budget."""
        if (self.characters is None) == (self.tokens is None):
            raise ValueError("give exactly one of 'characters' and 'tokens'")
        if (self.tokens is None) != (self.characters_per_token is None):
            raise ValueError("'tokens' and 'characters_per_token' belong together")

    @property
    def budget(self) -> int:
        """Characters in all."""
        return self.characters or round((self.tokens or 0.0) * (self.characters_per_token or 0.0))

    def share(self, name: str) -> int:
        """Characters that are wanted of one source."""
        return round(self.budget * self.weights[name] / sum(self.weights.values()))


@dataclass
class _Drawn:
    """One source, and what has been taken of it."""

    config: SourceConfig
    position: Position
    share: int | None
    documents: int = 0
    characters: int = 0
    ended: bool = False

    @property
    def wants_more(self) -> bool:
        return not self.ended and (self.share is None or self.characters < self.share)

    @property
    def part_done(self) -> float:
        """Part of its share that has been taken; without shares sources come in their order."""
        return self.characters / self.share if self.share else 0.0


class DocumentMixture:
    """The documents of all sources; of those that want more, the one furthest behind is next.

    The order depends on nothing but the documents, so that a draw can go on from its ``state``.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        config: MixtureConfig | None,
        state: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Begin, or go on after ``state``."""
        self._drawn = [
            _Drawn(source, Position(), None if config is None else config.share(source.name))
            for source in sources
        ]
        for drawn, known in zip(self._drawn, state or (), strict=state is not None):
            drawn.position = Position(**known["position"])
            drawn.documents, drawn.characters = known["documents"], known["characters"]

    def __iter__(self) -> Iterator[Values]:
        """Yield the documents that are still to be drawn."""
        streams = [read_documents(drawn.config, drawn.position) for drawn in self._drawn]
        while wanting := [n for n, drawn in enumerate(self._drawn) if drawn.wants_more]:
            number = min(wanting, key=lambda n: (self._drawn[n].part_done, n))
            drawn = self._drawn[number]
            document = next(streams[number], None)
            if document is None:
                drawn.ended = True
                continue
            drawn.documents += 1
            drawn.characters += len(document["text"])
            yield document

    @property
    def num_documents(self) -> int:
        """Documents that have been drawn."""
        return sum(drawn.documents for drawn in self._drawn)

    def state(self) -> list[dict[str, Any]]:
        """Return what a later process needs to draw the documents after these, fit for JSON."""
        return [
            {
                "position": drawn.position.state(),
                "documents": drawn.documents,
                "characters": drawn.characters,
            }
            for drawn in self._drawn
        ]

    def facts(self) -> list[dict[str, Any]]:
        """Return what a manifest says about every source."""
        return [
            {
                "name": drawn.config.name,
                "location": drawn.config.location,
                "licence": drawn.config.licence,
                "documents": drawn.documents,
                "characters": drawn.characters,
                **({} if drawn.share is None else {"wanted_characters": drawn.share}),
            }
            for drawn in self._drawn
        ]
