"""The transpose of an FP8 matrix, tile by tile, by a kernel of its own.

FP8 products sum over rows of both matrices, so that every backward pass transposes. torch.compile
would fuse that with whatever computes the values; where that goes along rows, as a norm does, a
fused kernel writes single bytes far apart, at a quarter of the memory's speed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

TILE = 128


@torch.library.custom_op(
    "sevenfold::transpose", mutates_args=(), schema="(Tensor values) -> Tensor"
)
def transpose(values: Tensor) -> Tensor:
    """Return the transpose of a matrix of bytes [rows, columns], its rows contiguous.

    An operator that torch.compile does not look into.
    """
    if not values.is_cuda:
        return values.t().contiguous()
    rows, columns = values.shape
    turned = values.new_empty(columns, rows)
    grid = (-(-columns // TILE), -(-rows // TILE))
    source, target = values.contiguous().view(torch.uint8), turned.view(torch.uint8)
    _kernel()[grid](source, target, rows, columns, tile=TILE)
    return turned


@transpose.register_fake
def _(values: Tensor) -> Tensor:
    return values.new_empty(values.shape[1], values.shape[0])


@functools.cache
def _kernel() -> Any:
    import triton
    from triton import language as tl

    # Triton takes every name in a signature for one that its kernel uses.
    @triton.jit  # type: ignore[untyped-decorator]
    def turn(source, target, rows, columns, tile: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(1).to(tl.int64) * tile + tl.arange(0, tile)
        column = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        bytes_of_tile = tl.load(source + row[:, None] * columns + column[None, :], mask=inside)
        place = target + column[:, None] * rows + row[None, :]
        tl.store(place, tl.trans(bytes_of_tile), mask=tl.trans(inside))

    return turn
