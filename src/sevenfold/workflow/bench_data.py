"""`sevenfold bench tokenize`, `pack` and `load`: how fast text becomes batches; JSON lines.

What is measured is what step 03 and the training stages call. Documents are those of ``--source``,
or random ones; everything lies in a folder that is removed again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from sevenfold.base import console, records, storage, workers
from sevenfold.base.errors import UsageError
from sevenfold.data import encoders, random_texts, sources, token_files, tokenizer
from sevenfold.data.batches import Batches, PackedText
from sevenfold.data.clean import Document, DocumentWriter, cut, fraction_of, read_shards
from sevenfold.data.shards import SHARD_TOKENS, PackConfig, open_shards
from sevenfold.data.token_files import Encoding
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow import tokenizing
from sevenfold.workflow.recipe import Recipe

Result = TypeVar("Result")

FOLDER = ".bench-data"
GIGABYTES = 0.05
SEED = 0
HELD_OUT = 0.01
LOAD_TOKENS, LOAD_STEPS = 2**26, 20
# What a process of the loader's is taken to train, in tokens/s: 15 times an H100 on the 7B model.
TRAINED_PER_S = 200_000


def bench(options: argparse.Namespace) -> None:
    """Measure one thing and print one JSON line a case.

    Errors:
        UsageError: a flag means nothing for what is measured.
    """
    if options.what == "load" and (options.source or options.gigabytes):
        raise UsageError(
            "bench load reads random ids; leave --source and --gigabytes out, or bench pack"
        )
    if options.source and options.gigabytes:
        raise UsageError("--gigabytes says how much random text is made; leave it or --source out")
    folder = options.folder / FOLDER
    storage.remove_folder(folder)  # of a benchmark that was killed
    _, recipe = recipes.resolve(options.preset, options.config, options.set, folder)
    most = options.workers or workers.usable_cores()
    cases: Iterator[dict[str, Any]]
    try:
        if options.what == "load":
            cases = _load(folder, recipe, options.steps or LOAD_STEPS)
        else:
            what = {"tokenize": _tokenize, "pack": _pack}[options.what]
            made, size = _prepare(folder, recipe, options)
            cases = what(folder, made, recipe, most, size)
        for case in cases:
            facts = {"case": options.what, **case, "cores": workers.usable_cores()}
            facts |= {"code": records.code_version(), "versions": records.package_versions()}
            console.print_raw(json.dumps(facts) + "\n")
    finally:
        storage.remove_folder(folder)


def _prepare(folder: Path, recipe: Recipe, options: argparse.Namespace) -> tuple[Any, int]:
    """Write clean shards; return the recipe's tokenizer and how many characters were written."""
    config = recipe.tokenizer
    with storage.new_folder(folder / "clean", kind="clean") as clean:
        size = 0
        with DocumentWriter(clean, "train") as train, DocumentWriter(clean, "validation") as held:
            for document in _documents(recipe, options):
                size += len(document["text"])
                (held if fraction_of(document["id"]) < HELD_OUT else train).write(document)
    share = config.sample_characters / max(1, size)
    if config.path is not None:
        made = tokenizer.adopt_tokenizer(config)
    else:
        documents = read_shards(folder / "clean", "train")
        chosen = (d["text"] for d in documents if share >= 1 or fraction_of(d["id"]) < share)
        made = tokenizer.train_tokenizer(chosen, config)
    with storage.new_folder(folder / "tokenizer", kind="tokenizer") as saved:
        made.save_pretrained(str(saved))
    return made, size


def _documents(recipe: Recipe, options: argparse.Namespace) -> Iterator[Document]:
    """Yield random documents, or those of the sources in pieces as step 02 cuts them."""
    if not options.source:
        size = round((options.gigabytes or GIGABYTES) * 1e9)
        yield from random_texts.random_documents(size, seed=SEED)
    for path in options.source:
        for document in sources.read_documents(sources.source_from_path(path)):
            for number, text in enumerate(cut(document["text"], recipe.clean.document_characters)):
                yield {**document, "id": f"{document['id']}#{number}", "text": text}


# --- tokenize -----------------------------------------------------------------------------------


def _tokenize(
    folder: Path, made: Any, recipe: Recipe, most: int, size: int
) -> Iterator[dict[str, Any]]:
    """Time both engines and datatrove on one core, then step 03's reading, encoding and writing."""
    backend_json = made.backend_tokenizer.to_str()
    texts = [document["text"] for document in read_shards(folder / "clean", "train")]
    num_bytes = sum(len(text.encode()) for text in texts)
    tokeniser = encoders.choose(backend_json, texts[: tokenizing.SAMPLE_DOCUMENTS])
    engines: list[encoders.Engine] = ["tokenizers"]
    engines += ["gigatoken"] if tokeniser.engine == "gigatoken" else []
    common = {"documents": len(texts), "bytes": num_bytes, "vocab_size": len(made)}
    slow = None
    for engine in engines:
        encoders.encode(engine, backend_json, texts[:1])  # what is built once is not measured
        with _one_core():
            elapsed_s, num_tokens = _timed(partial(_num_ids, engine, backend_json, texts))
        slow = slow or num_tokens / elapsed_s
        found = {"what": engine, "processes": 1, **_rates(num_tokens, elapsed_s, slow, 1)}
        yield {**common, **found, "bytes_per_token": num_bytes / num_tokens}
    assert slow is not None
    if _is_installed("datatrove"):
        with _one_core():
            elapsed_s, num_tokens = _timed(partial(_datatrove, folder, texts, made))
        rates = _rates(num_tokens, elapsed_s, slow, 1)
        yield {**common, "what": "datatrove", "processes": 1, **rates}
    shards = {path: path.name for path in sorted((folder / "clean").glob("train-*.zst"))}
    how = _encoding(made, tokeniser)
    for count in sorted({1, min(most, len(shards))}):
        storage.remove_folder(folder / "tokens")
        with _one_core() if count == 1 else contextlib.nullcontext():
            elapsed_s, num_tokens = _timed(partial(_num_written, folder, shards, how, count))
        rates = _rates(num_tokens, elapsed_s, slow, count)
        facts = {"what": "step 03", "engine": tokeniser.engine, "processes": count, **rates}
        yield {**common, **facts}


def _num_ids(engine: encoders.Engine, backend_json: str, texts: list[str]) -> int:
    return int(encoders.encode(engine, backend_json, texts)[1].sum())


def _num_written(folder: Path, shards: dict[Path, str], how: Encoding, count: int) -> int:
    made = token_files.encode_shards(folder / "tokens", shards, how, num_workers=count)
    return sum(part.tokens for part in made)


def _datatrove(folder: Path, texts: list[str], made: Any) -> int:
    """Tokenise with datatrove's own step, as its users would."""
    from datatrove.data import Document as TroveDocument
    from datatrove.pipeline.tokens import DocumentTokenizer

    step = DocumentTokenizer(
        str(folder / "trove"),
        str(folder / "tokenizer" / "tokenizer.json"),
        eos_token=made.eos_token,
        shuffle_documents=False,
    )
    documents = (TroveDocument(text=text, id=str(i)) for i, text in enumerate(texts))
    step.run(documents, rank=0, world_size=1)
    written = sum(path.stat().st_size for path in (folder / "trove").rglob("*.ds"))
    return written // (2 if len(made) <= 2**16 else 4)


def _encoding(made: Any, tokeniser: encoders.Tokeniser) -> Encoding:
    return Encoding(
        backend_json=made.backend_tokenizer.to_str(),
        engine=tokeniser.engine,
        version=tokeniser.version,
        bos_id=made.bos_token_id,
        eos_id=made.eos_token_id,
        vocab_size=len(made),
    )


# --- pack ---------------------------------------------------------------------------------------


def _pack(
    folder: Path, made: Any, recipe: Recipe, most: int, size: int
) -> Iterator[dict[str, Any]]:
    """Encode and pack in both ways, as step 03 does; count what is cut and what is padding."""
    cleaned = storage.read_manifest(folder / "clean")
    for strategy in ("concatenate", "best_fit"):
        config = PackConfig(
            row_length=recipe.pack.row_length,
            dtype=recipe.pack.dtype,
            strategy=strategy,
        )
        plan = tokenizing.plan(folder / "clean", cleaned, made, config, most)
        with _Memory() as memory:
            encode_s, found = _timed(partial(tokenizing.encode, folder / "tokens", plan, "train"))
            started = time.perf_counter()
            with storage.new_folder(folder / "packed", kind="packed") as packed:
                counts = tokenizing.pack(packed, plan, "train", found)
            pack_s = time.perf_counter() - started
        row_length = recipe.pack.row_length
        num_cut = counts.get("documents_cut")
        if num_cut is None:
            num_cut = _cut_by_rows([part.path for part in found], made.bos_token_id, row_length)
        num_documents = sum(part.documents for part in found)
        yield {
            "strategy": strategy,
            "row_length": row_length,
            "characters": size,
            "tokens": counts["tokens"],
            "engine": plan.tokeniser.engine,
            "processes": plan.num_workers,
            "encode_s": encode_s,
            "pack_s": pack_s,
            "tokens_s": counts["tokens"] / (encode_s + pack_s),
            "documents_cut_share": num_cut / num_documents,
            "padding_share": max(0.0, 1 - counts["tokens"] / (counts["rows"] * row_length)),
            "peak_gib": _peak_gib(),
            "peak_gib_worker": memory.peak_gib,
        }
        storage.remove_folder(folder / "tokens")
        storage.remove_folder(folder / "packed")


def _cut_by_rows(files: list[Path], bos_id: int, row_length: int) -> int:
    """Return how many of the documents that lie one after the other do not lie in one row."""
    begins = num_cut = 0
    for path in files:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
        starts = np.flatnonzero(ids == bos_id) + begins
        begins += len(ids)
        ends = np.append(starts[1:], begins)
        num_cut += int((starts // row_length != (ends - 1) // row_length).sum())
    return num_cut


# --- load ---------------------------------------------------------------------------------------


def _load(folder: Path, recipe: Recipe, num_steps: int) -> Iterator[dict[str, Any]]:
    """Time opening and reading packed rows, and how long a training process waits for them."""
    storage.remove_folder(folder)
    config, row_length = recipe.pretrain, recipe.pack.row_length
    generator = np.random.default_rng(SEED)
    rows_at_once = SHARD_TOKENS // row_length
    with storage.new_folder(folder / "packed", kind="packed") as packed:
        for number in range(max(1, LOAD_TOKENS // SHARD_TOKENS)):
            shape = (rows_at_once, row_length)
            ids = generator.integers(0, recipe.model.vocab_size, shape, dtype=np.int64)
            ids[generator.random(shape) < 1 / 500] = 0  # documents begin
            storage.write_array(packed / f"train-{number:05d}.npy", ids.astype(recipe.pack.dtype))
    vocab_size, longest = recipe.model.vocab_size, config.longest_context
    elapsed_s, found = _timed(
        partial(open_shards, folder / "packed", vocab_size=vocab_size, min_length=longest)
    )
    tokens = found.train.num_tokens + found.validation.num_tokens
    yield {"what": "open", "tokens": tokens, "tokens_s": tokens / elapsed_s}
    rows = PackedText(found.train, bos_id=0 if config.mask_documents else None)
    for phase in config.contexts:
        batches = Batches(
            rows,
            tokens_per_batch=config.tokens_per_batch,
            contexts=[type(phase)(length=phase.length, until=1.0)],
            num_steps=num_steps,
            seed=SEED,
        )
        with _one_core():
            elapsed_s, _ = _timed(partial(_serve, batches))
        step_s = config.tokens_per_batch / TRAINED_PER_S
        yield {
            "what": "load",
            "seq_len": phase.length,
            "processes": 1,
            "tokens_s": num_steps * config.tokens_per_batch / elapsed_s,
            "trained_tokens_s": TRAINED_PER_S,
            "wait_share": _wait_share(batches, step_s),
        }


def _serve(batches: Batches) -> None:
    for step in range(batches.num_steps):
        batches.batch(step)


def _wait_share(batches: Batches, step_s: float) -> float:
    """Return the share of its time that a process waits which trains ``step_s`` a step."""
    waited = 0.0
    served = batches.prefetch(0)
    next(served)  # nothing is ready before the first step
    for _ in range(batches.num_steps - 1):
        time.sleep(step_s)
        elapsed_s, _batch = _timed(partial(next, served))
        waited += elapsed_s
    return waited / (waited + (batches.num_steps - 1) * step_s)


# --- all ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Let this process use one core, however many threads its libraries start."""
    allowed = os.sched_getaffinity(0)
    threads = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    try:
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, {min(allowed)})
        yield
    finally:
        for path in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(path.name), allowed)


def _timed(do: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = do()
    return time.perf_counter() - started, result


def _rates(num_tokens: int, elapsed_s: float, slow: float, processes: int) -> dict[str, float]:
    rate = num_tokens / elapsed_s
    return {
        "tokens": num_tokens,
        "tokens_s": rate,
        "tokens_s_per_process": rate / processes,
        "ratio_to_tokenizers": rate / slow,
    }


class _Memory(threading.Thread):
    """Watches the largest memory of this process's workers, each by itself, while it runs."""

    def __init__(self) -> None:
        super().__init__(name="memory", daemon=True)
        self.peak_gib = 0.0
        self._done = threading.Event()

    def run(self) -> None:
        """Look five times a second: the system itself keeps the peak of what lives."""
        while not self._done.wait(0.2):
            for process in multiprocessing.active_children():
                self.peak_gib = max(self.peak_gib, _peak_gib(process.pid))

    def __enter__(self) -> Self:
        """Begin."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._done.set()
        self.join()


def _peak_gib(process: int | str | None = "self") -> float:
    """Return the largest memory that a process has had, 0 where it has ended."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(found[1]) / 2**20 if found else 0.0
    return 0.0


def _is_installed(name: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(name))
    return False
