"""What cleaning read, kept, masked and dropped: by source, and of each reason a few examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NUM_EXAMPLES = 3


@dataclass
class SourceCounts:
    """One source: documents read, and of their pieces the kept, by split, and the dropped.

    ``pii`` counts what was masked in kept pieces, by kind.
    """

    documents_read: int = 0
    documents: Counter[str] = field(default_factory=Counter)
    characters: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    pii: Counter[str] = field(default_factory=Counter)

    def facts(self) -> dict[str, Any]:
        """Return the counts for a manifest."""
        return {name: dict(v) if isinstance(v, Counter) else v for name, v in vars(self).items()}

    def add(self, facts: Mapping[str, Any]) -> None:
        """Add what another one's :meth:`facts` say."""
        self.documents_read += facts["documents_read"]
        for name, counted in facts.items():
            if name != "documents_read":
                getattr(self, name).update(counted)


@dataclass
class CleaningCounts:
    """The counts of all sources, and the first dropped pieces of each reason."""

    by_source: dict[str, SourceCounts] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def read(self, document: Mapping[str, Any]) -> None:
        """Count one document that came in."""
        self._of(document).documents_read += 1

    def drop(self, document: Mapping[str, Any], reason: str) -> None:
        """Count one dropped piece."""
        self._of(document).dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append({"id": document["id"], "begins": document["text"][:80]})

    def keep(
        self, document: Mapping[str, Any], split: str, masked: Mapping[str, int] | None = None
    ) -> None:
        """Count one kept piece and what was masked in it."""
        counts = self._of(document)
        counts.documents[split] += 1
        counts.characters[split] += len(document["text"])
        counts.bytes[split] += len(document["text"].encode())
        counts.pii.update(masked or {})

    def _of(self, document: Mapping[str, Any]) -> SourceCounts:
        return self.by_source.setdefault(str(document.get("source", "unnamed")), SourceCounts())

    def total(self) -> SourceCounts:
        """Return the counts of all sources together."""
        total = SourceCounts()
        for counts in self.by_source.values():
            total.add(counts.facts())
        return total

    def add(self, facts: Mapping[str, Any]) -> None:
        """Add the :meth:`facts` of documents that come later."""
        for source, counts in facts["by_source"].items():
            self.by_source.setdefault(source, SourceCounts()).add(counts)
        for reason, examples in facts["dropped_examples"].items():
            known = self.examples.setdefault(reason, [])
            known += examples[: NUM_EXAMPLES - len(known)]

    def facts(self) -> dict[str, Any]:
        """Return the counts for a manifest: the totals, each source's, and the examples."""
        return {
            **self.total().facts(),
            "by_source": {name: counts.facts() for name, counts in self.by_source.items()},
            "dropped_examples": self.examples,
        }
