"""What a step trains on: a pure function of the seed and the step number.

Nothing has to be remembered to go on after a stop: the rows of step n are rows n*R to (n+1)*R of
an endless sequence in which every epoch is shuffled by (seed, epoch). A curriculum only cuts the
same rows shorter, so every step has the same number of tokens.

Shapes: b rows, t tokens, s examples in a row.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sevenfold.base.errors import UsageError

NO_TARGET = -100
# What an example of a preference row is: a pair of answers, or a single one.
PAIR, ANSWER = 1, 2
# Positions that carry loss are taken together in multiples of this, so that there are few sizes.
SCORED_TOGETHER = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of packed documents.

    ``targets_bt`` holds the token to predict at each position, or -100; ``documents_bt`` is None
    where rows are plain causal text; ``branches_bt`` is 0 for what a whole document sees, n for its
    nth branch, None where documents do not branch. For preferences, ``answers_bt`` numbers the
    answers within their row (-1 elsewhere), ``examples_bs`` says what example s of a row is (0
    nothing, 1 a pair made of answers 2s and 2s+1, 2 a single answer 2s), ``reference_bs2`` holds
    the reference model's log-probabilities of the two. ``scored_n``, where it is known, are the
    places in ``targets_bt.flatten()`` whose loss is to be computed, all that have a target among
    them.
    """

    inputs_bt: Tensor
    targets_bt: Tensor
    positions_bt: Tensor
    documents_bt: Tensor | None
    branches_bt: Tensor | None = None
    answers_bt: Tensor | None = None
    examples_bs: Tensor | None = None
    reference_bs2: Tensor | None = None
    scored_n: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.inputs_bt.shape[0]

    def rows(self, start: int, stop: int, step: int = 1) -> Batch:
        """Return rows ``start:stop:step``."""
        whole = dataclasses.replace(self, scored_n=None)
        return whole._map(lambda tensor: tensor[start:stop:step])

    def to(self, device: torch.device) -> Batch:
        """Copy to ``device``; for a GPU with the places that are to be scored."""
        if device.type == "cpu":
            return self
        known = self.with_scored_places()
        return known._map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))

    def with_scored_places(self) -> Batch:
        """Return the same with ``scored_n``, if that leaves anything out.

        It is found here, before the rows are on a GPU, which would have to be waited for. Places
        without a target fill it up to whole multiples.
        """
        targets_n = self.targets_bt.flatten()
        wanted = int((targets_n != NO_TARGET).sum())
        count = max(1, -(-wanted // SCORED_TOGETHER)) * SCORED_TOGETHER
        if count >= len(targets_n):
            return self
        order_n = torch.argsort((targets_n == NO_TARGET).to(torch.uint8), stable=True)
        return dataclasses.replace(self, scored_n=order_n[:count].sort().values)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        present = {name: change(value) for name, value in values.items() if value is not None}
        return dataclasses.replace(self, **present)

    def split(self, num_rows: int) -> Iterator[Batch]:
        """Yield micro-batches of at most ``num_rows`` rows."""
        for start in range(0, self.num_rows, num_rows):
            yield self.rows(start, start + num_rows)


class Phase(Protocol):
    """Part of a curriculum: rows of ``length`` tokens until this fraction of the steps is done."""

    @property
    def length(self) -> int:
        """Tokens in a row."""

    @property
    def until(self) -> float:
        """Fraction of the steps at which the phase ends."""


class RowSource(Protocol):
    """Numbered rows that can be made into a batch of any of the curriculum's lengths."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""

    @property
    def row_length(self) -> int:
        """Tokens in a row."""

    def batch(self, indices: NDArray[np.int64], length: int) -> Batch:
        """Return these rows, cut into pieces of ``length`` tokens."""


class TokenTable(Protocol):
    """Rows of token ids on disk (``data.token_rows.TokenShards``)."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""

    @property
    def row_length(self) -> int:
        """Tokens in a row."""

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return [n, row_length] ids."""


class PackedText:
    """Pretraining rows; with a ``bos_id``, documents cannot see each other."""

    def __init__(self, table: TokenTable, *, bos_id: int | None, pad_id: int | None = None):
        """Read rows from ``table``.

        Documents start at ``bos_id``, None for plain causal rows; ``pad_id`` fills the ends of
        rows and is never predicted, None where rows are full.
        """
        self.table = table
        self.bos_id = bos_id
        self.pad_id = pad_id

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.table.num_rows

    @property
    def row_length(self) -> int:
        """Tokens in a row."""
        return self.table.row_length

    def batch(self, indices: NDArray[np.int64], length: int) -> Batch:
        """Return the rows, cut into pieces of ``length`` tokens."""
        ids = self.table.rows(indices).reshape(-1, length)
        targets = np.full_like(ids, NO_TARGET)
        targets[:, :-1] = ids[:, 1:]
        if self.pad_id is not None:
            targets[targets == self.pad_id] = NO_TARGET
        positions = np.tile(np.arange(length), (len(ids), 1))
        documents = None
        if self.bos_id is not None:
            starts = ids == self.bos_id
            documents = np.cumsum(starts, axis=1)
            targets[:, :-1][starts[:, 1:]] = NO_TARGET
            positions = document_positions(documents)
        return Batch(
            inputs_bt=torch.from_numpy(ids),
            targets_bt=torch.from_numpy(targets),
            positions_bt=torch.from_numpy(positions),
            documents_bt=None if documents is None else torch.from_numpy(documents),
        )


def document_positions(documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each token's position within its document; documents are contiguous in a row."""
    index = np.broadcast_to(np.arange(documents.shape[1]), documents.shape)
    first = np.ones_like(documents, dtype=bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - np.maximum.accumulate(np.where(first, index, 0), axis=1)


def require_even_shares(
    tokens_per_batch: int, row_length: int, world: int, *, setting: str = "tokens_per_batch"
) -> None:
    """Refuse a batch of which ``world`` processes would get different numbers of rows.

    Errors:
        UsageError: with the ``setting`` and the size to take.
    """
    rows = tokens_per_batch // row_length
    if rows % world:
        raise UsageError(
            f"{setting}: {rows} rows of {row_length} tokens cannot be shared evenly by {world} "
            f"processes; take a multiple of {world * row_length}"
        )


class Batches:
    """The batch of every step, for one of ``world`` processes."""

    def __init__(
        self,
        source: RowSource,
        *,
        tokens_per_batch: int,
        contexts: Sequence[Phase],
        num_steps: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        place: Callable[[int], int] | None = None,
    ):
        """Check that rows, contexts and processes divide each other, then serve batches.

        ``place`` maps a step to its place in the sequence, where data were passed over.
        """
        longest = source.row_length
        if source.num_rows == 0:
            raise UsageError("there is not one row to train on; prepare more data")
        if tokens_per_batch % longest:
            raise UsageError(
                f"tokens_per_batch: {tokens_per_batch} is not a multiple of the rows' "
                f"{longest} tokens; take {max(1, tokens_per_batch // longest) * longest}"
            )
        for phase in contexts:
            if longest % phase.length:
                raise UsageError(
                    f"contexts: length {phase.length} does not divide the rows' {longest} tokens"
                )
        if not contexts or contexts[-1].until != 1.0:
            raise UsageError("contexts: the last phase must have until: 1.0")
        if [p.until for p in contexts] != sorted({p.until for p in contexts}):
            raise UsageError("contexts: 'until' must rise from phase to phase")
        self.rows_per_batch = tokens_per_batch // longest
        require_even_shares(tokens_per_batch, longest, world)
        self.source = source
        self.contexts = tuple(contexts)
        self.num_steps = num_steps
        self.seed = seed
        self.rank = rank
        self.world = world
        self._place = place
        self._permutations: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._lock = threading.Lock()

    def length(self, step: int) -> int:
        """Context length of ``step``, counted from 0."""
        fraction = step / self.num_steps
        return next(
            (p.length for p in self.contexts if fraction < p.until), self.contexts[-1].length
        )

    def indices(self, step: int) -> NDArray[np.int64]:
        """Rows of ``step`` over all processes."""
        first = (step if self._place is None else self._place(step)) * self.rows_per_batch
        places = np.arange(first, first + self.rows_per_batch)
        epochs, offsets = np.divmod(places, self.source.num_rows)
        parts = [self._permutation(int(e))[offsets[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        with self._lock:
            if epoch not in self._permutations:
                generator = np.random.default_rng([self.seed, epoch])
                self._permutations[epoch] = generator.permutation(self.source.num_rows)
                while len(self._permutations) > 2:
                    self._permutations.popitem(last=False)
            return self._permutations[epoch]

    def batch(self, step: int) -> Batch:
        """Return this process's rows of ``step``."""
        whole = self.source.batch(self.indices(step), self.length(step))
        return whole if self.world == 1 else whole.rows(self.rank, whole.num_rows, self.world)

    def prefetch(self, start: int, *, depth: int = 2) -> Generator[Batch, None, None]:
        """Yield the batches of steps ``start``, ``start`` + 1, ..., made ahead in one thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            steps = range(start, self.num_steps)
            waiting = [pool.submit(self.batch, step) for step in steps[:depth]]
            for step in steps:
                batch = waiting.pop(0).result()
                if step + depth < self.num_steps:
                    waiting.append(pool.submit(self.batch, step + depth))
                yield batch
