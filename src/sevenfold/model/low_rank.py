"""Adding a product of low rank to a large matrix, which is read and written once.

There is next to nothing to multiply, so that it should take no longer than reading and writing.
What a BLAS does with it is made for large products, where the sum's memory hardly counts.

Shapes: n tokens, o outputs, r the rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

TILE = 64, 128
# The smallest rank that tensor cores take, and the largest that leaves registers for the sums.
RANKS = 16, 64


@torch.library.custom_op(
    "sevenfold::add_low_rank",
    mutates_args=("total",),
    schema="(Tensor(a!) total, Tensor inner, Tensor up) -> ()",
)
def add_low_rank(total: Tensor, inner: Tensor, up: Tensor) -> None:
    """Add ``inner @ up.T`` to ``total``: [n, r] and [o, r] to [n, o].

    An operator that torch.compile does not look into: it would compute the product into memory of
    its own.
    """
    kinds = {total.dtype, inner.dtype, up.dtype}
    fits = kinds == {torch.bfloat16} and inner.shape[1] <= RANKS[1] and total.is_contiguous()
    if total.is_cuda and fits:
        add_in_one_launch(total, inner, up)
    else:
        total.addmm_(inner, up.t())


@add_low_rank.register_fake
def _(total: Tensor, inner: Tensor, up: Tensor) -> None:
    return None


def add_in_one_launch(total: Tensor, inner: Tensor, up: Tensor) -> None:
    """Do what :func:`add_low_rank` does, with matrices of one type and few columns."""
    rows, columns = total.shape
    rank = inner.shape[1]
    width = max(RANKS[0], 1 << (rank - 1).bit_length())
    grid = (-(-columns // TILE[1]), -(-rows // TILE[0]))
    sizes = (rows, columns, rank, *inner.stride(), *up.stride())
    constants = {"width": width, "tile_rows": TILE[0], "tile_columns": TILE[1]}
    _kernel()[grid](total, inner, up, *sizes, **constants)


@functools.cache
def _kernel() -> Any:
    import triton
    from triton import language as tl

    # Triton takes every name in a signature for one that its kernel uses.
    @triton.jit  # type: ignore[untyped-decorator]
    def add(  # type: ignore[no-untyped-def]
        total,
        inner,
        up,
        rows,
        columns,
        rank,
        inner_row,
        inner_rank,
        up_row,
        up_rank,
        width: tl.constexpr,
        tile_rows: tl.constexpr,
        tile_columns: tl.constexpr,
    ):
        row = tl.program_id(1).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
        column = tl.program_id(0).to(tl.int64) * tile_columns + tl.arange(0, tile_columns)
        number = tl.arange(0, width)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        place = total + row[:, None] * columns + column[None, :]
        before = tl.load(place, mask=inside).to(tl.float32)
        left = tl.load(
            inner + row[:, None] * inner_row + number[None, :] * inner_rank,
            mask=(row[:, None] < rows) & (number[None, :] < rank),
            other=0.0,
        )
        right = tl.load(
            up + column[None, :] * up_row + number[:, None] * up_rank,
            mask=(column[None, :] < columns) & (number[:, None] < rank),
            other=0.0,
        )
        after = before + tl.dot(left, right)
        tl.store(place, after.to(total.dtype.element_ty), mask=inside)

    return add
