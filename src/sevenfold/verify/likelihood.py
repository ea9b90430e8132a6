"""Log-likelihoods of token sequences under a causal language model, in batches.

Rows are padded on the right and need no mask: a causal model's earlier positions never see the
padding. Only the hidden states of scored tokens go through the head.

Shapes: b rows, t tokens, s scored tokens, d hidden size, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

CPU_BATCH_TOKENS = 8_192
GPU_BATCH_TOKENS = 65_536
# Logits in fp32 are the largest tensor here: 2**27 entries are 512 MiB.
_MAX_LOGIT_ENTRIES = 1 << 27
_MAX_COUNTED_TOKENS = 100_000_000
# Settings with which a model changes the logits after its head; such a model is run whole.
_HEAD_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class Row:
    """Token ids, of which those from position ``start`` (at least 1) on are scored."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Score:
    """Negative log-probability in nats, summed; whether greedy decoding gives these tokens."""

    nats: float
    num_tokens: int
    is_greedy: bool


def default_batch_tokens(device: torch.device) -> int:
    """Return how many tokens one forward pass may hold where the recipe does not say."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS


@torch.inference_mode()
def score_rows(
    model: Any, rows: Sequence[Row], *, batch_tokens: int, suppressed: Sequence[int] = ()
) -> list[Score]:
    """Score every row, in the order given; ``suppressed`` ids are never the greedy choice."""
    # Rows that differ in their last id only (A, B, C, D after one question) share a forward pass.
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        sharing.setdefault(row.ids[:-1], []).append(index)
    inputs = list(sharing)
    scores: dict[int, Score] = {}
    for batch in _length_buckets([len(ids) for ids in inputs], batch_tokens):
        members = [index for at in batch for index in sharing[inputs[at]]]
        input_of = [place for place, at in enumerate(batch) for _ in sharing[inputs[at]]]
        found = _score_batch(
            model, [inputs[at] for at in batch], [rows[i] for i in members], input_of, suppressed
        )
        scores |= dict(zip(members, found, strict=True))
    return [scores[index] for index in range(len(rows))]


def _length_buckets(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of rows of similar length, longest first, within ``batch_tokens``."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _score_batch(
    model: Any,
    inputs: Sequence[tuple[int, ...]],
    rows: Sequence[Row],
    input_of: Sequence[int],
    suppressed: Sequence[int],
) -> list[Score]:
    """Score ``rows``; ``input_of`` says which of ``inputs`` each of them reads."""
    device = model.get_input_embeddings().weight.device
    ids_bt = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.long)
    for index, ids in enumerate(inputs):
        ids_bt[index, : len(ids)] = torch.tensor(ids)
    counts = [len(row.ids) - row.start for row in rows]
    row_of_s = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
    input_of_s = torch.tensor(input_of)[row_of_s]
    position_s = torch.cat([torch.arange(row.start - 1, len(row.ids) - 1) for row in rows])
    target_s = torch.tensor([token for row in rows for token in row.ids[row.start :]])

    nats_s, greedy_s = [], []
    for logits_sv, chunk in _logits(model, ids_bt.to(device), input_of_s, position_s):
        target = target_s[chunk].to(device)
        nats_s.append(functional.cross_entropy(logits_sv, target, reduction="none"))
        if suppressed:
            columns = torch.tensor(suppressed, device=device)
            logits_sv = logits_sv.index_fill(1, columns, -math.inf)
        greedy_s.append(logits_sv.argmax(dim=-1) == target)
    nats_b = torch.zeros(len(rows), dtype=torch.float64)
    nats_b.index_add_(0, row_of_s, torch.cat(nats_s).double().cpu())
    misses_b = torch.zeros(len(rows), dtype=torch.long)
    misses_b.index_add_(0, row_of_s, (~torch.cat(greedy_s)).long().cpu())
    return [
        Score(nats=nats, num_tokens=count, is_greedy=misses == 0)
        for nats, count, misses in zip(nats_b.tolist(), counts, misses_b.tolist(), strict=True)
    ]


def _logits(
    model: Any, ids_bt: torch.Tensor, input_of_s: torch.Tensor, position_s: torch.Tensor
) -> Iterator[tuple[torch.Tensor, slice]]:
    """Yield fp32 logits [s, v] of the scored positions, in chunks that fit into memory."""
    head = model.get_output_embeddings()
    input_of_s, position_s = input_of_s.to(ids_bt.device), position_s.to(ids_bt.device)
    changed = [getattr(model.config, name, None) for name in _HEAD_SETTINGS]
    is_plain = all(value in (None, 1, 1.0) for value in changed)
    if is_plain:
        hidden_btd = model.get_decoder()(input_ids=ids_bt, use_cache=False).last_hidden_state
        states_s = hidden_btd[input_of_s, position_s]
    else:
        states_s = model(ids_bt, use_cache=False).logits[input_of_s, position_s]
    chunk = max(1, _MAX_LOGIT_ENTRIES // head.weight.shape[0])
    for start in range(0, len(states_s), chunk):
        part = slice(start, start + chunk)
        logits_sv = head(states_s[part]) if is_plain else states_s[part]
        yield logits_sv.float(), part


def document_rows(ids: Sequence[int], context: int) -> list[Row]:
    """Cut a document (its first id is no target) into windows that score each token once.

    Every token after the first window is predicted from at least half a context.
    """
    longest = context + 1  # the last id of a row is a target only, never an input
    rows = [Row(ids=tuple(ids[:longest]), start=1)]
    end = longest
    while end < len(ids):
        step = min(max(1, context // 2), len(ids) - end)
        end += step
        rows.append(Row(ids=tuple(ids[end - longest : end]), start=longest - step))
    return rows


def token_counts(files: Sequence[Path], vocab_size: int) -> NDArray[np.int64]:
    """Count the tokens of packed ``.npy`` files, of at most 100 million rows' tokens evenly."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in files]
    total = sum(array.size for array in arrays)
    every = max(1, -(-total // _MAX_COUNTED_TOKENS))
    for array in arrays:
        for start in range(0, len(array), 4096 * every):
            rows = np.asarray(array[start : start + 4096 * every : every]).ravel()
            counts += np.bincount(rows.astype(np.int64), minlength=vocab_size)[:vocab_size]
    return counts


def unigram_nats(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the nats of every token [v] under the frequencies ``counts``, each raised by one."""
    return -np.log((counts + 1) / (int(counts.sum()) + len(counts)))
