"""Step 03's second half: how a run's clean texts become ids, and the ids rows."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sevenfold.base.errors import UsageError
from sevenfold.data import encoders, shards, token_files, tokenizer
from sevenfold.data.clean import SPLITS, read_documents
from sevenfold.data.encoders import Tokeniser
from sevenfold.data.shards import PackConfig
from sevenfold.data.token_files import Encoding, TokenFile

log = logging.getLogger(__name__)

# Less text than this (compressed) tokenizers encodes in a few seconds; then nothing is compared.
WORTH_COMPARING_BYTES = 4 * 2**20
SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 2_000, 2_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is encoded, how, and by how many processes; ``shards`` are files and their SHA-256."""

    shards: Mapping[str, dict[Path, str]]
    encoding: Encoding
    tokeniser: Tokeniser
    config: PackConfig
    num_workers: int


def plan(
    folder: Path, cleaned: Mapping[str, Any], made: Any, config: PackConfig, num_workers: int
) -> Plan:
    """Choose the engine and the processes for the clean texts in ``folder``.

    ``cleaned`` is their manifest, ``made`` the tokenizer. There is one process for each shard to
    train on at most: a text that fits into one shard is done before a second one has started.

    Errors:
        UsageError: rows would have to be padded, and every token may stand in a text.
    """
    files = {file["path"]: file for file in cleaned["files"]}
    found = {
        split: {
            folder / name: str(file["sha256"])
            for name, file in sorted(files.items())
            if name.startswith(f"{split}-") and name.endswith(token_files.SUFFIX)
        }
        for split in SPLITS
    }
    # What a model folder holds is what its tokenizer was loaded from: the same ids.
    backend_json = made.backend_tokenizer.to_str()
    if sum(int(file["bytes"]) for file in files.values()) < WORTH_COMPARING_BYTES:
        tokeniser = encoders.slow()
    else:
        tokeniser = encoders.choose(backend_json, _sample(list(found["train"])))
    if tokeniser.why is not None:
        log.warning("%s; tokenizers %s is used instead", tokeniser.why, tokeniser.version)
    best_fit = config.strategy == "best_fit"
    return Plan(
        shards=found,
        encoding=Encoding(
            backend_json=backend_json,
            engine=tokeniser.engine,
            version=tokeniser.version,
            bos_id=made.bos_token_id,
            eos_id=made.eos_token_id,
            vocab_size=len(made),
            row_length=config.row_length if best_fit else None,
            pad_id=padding_id(made) if best_fit else None,
        ),
        tokeniser=tokeniser,
        config=config,
        num_workers=min(num_workers, len(found["train"])),
    )


def _sample(files: Sequence[Path]) -> Iterator[str]:
    """Yield the first documents of every file, a bounded number in all."""
    left = SAMPLE_CHARACTERS
    for path in files:
        for document in itertools.islice(
            read_documents(path), max(1, SAMPLE_DOCUMENTS // len(files))
        ):
            if len(document["text"]) <= left:
                left -= len(document["text"])
                yield document["text"]


def padding_id(made: Any) -> int:
    """Return the id of a token that no text holds and that neither begins nor ends one.

    Errors:
        UsageError: there is none.
    """
    candidates = [made.pad_token_id, *tokenizer.reserved_ids(made)]
    for candidate in candidates:
        if candidate is not None and candidate not in (made.bos_token_id, made.eos_token_id):
            return int(candidate)
    raise UsageError(
        "pack.strategy: best_fit pads rows, but the tokenizer has no token to pad with that is not "
        "its BOS or EOS; raise tokenizer.vocab_size and the model's by 64, or set pack.strategy to "
        "concatenate"
    )


def encode(folder: Path, plan: Plan, split: str) -> list[TokenFile]:
    """Return the ids of all clean shards of a split, as files in ``folder``; see token_files."""
    return list(
        token_files.encode_shards(
            folder, plan.shards[split], plan.encoding, num_workers=plan.num_workers
        )
    )


def pack(folder: Path, plan: Plan, split: str, found: Sequence[TokenFile]) -> dict[str, int]:
    """Write the rows of a split into ``folder`` and return what was counted."""
    num_rows = shards.write_rows(
        folder, split, [part.path for part in found], plan.config, num_workers=plan.num_workers
    )
    counts = {"rows": num_rows, "tokens": sum(part.tokens for part in found)}
    if plan.encoding.row_length is not None:
        counts["documents"] = sum(part.documents for part in found)
        counts["documents_cut"] = sum(part.cut for part in found)
    return counts


def tokens_by_source(found: Mapping[str, Sequence[TokenFile]]) -> dict[str, dict[str, int]]:
    """Return the tokens of every source by split; a source is what its documents say."""
    counted: dict[str, dict[str, int]] = {}
    for split, parts in found.items():
        for part in parts:
            for source, tokens in part.tokens_by_source.items():
                by_split = counted.setdefault(source, dict.fromkeys(found, 0))
                by_split[split] += tokens
    return {source: counted[source] for source in sorted(counted)}
