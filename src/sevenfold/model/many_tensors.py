"""The norms of many tensors, and their casts to FP8: on a GPU in one launch, each read once.

PyTorch's norm of a list is a launch every 42 MB, each of which fills two blocks a processor and
waits for the slowest; a compiled cast is a call from Python a tensor. A 7B has hundreds of both.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

# Programs that share a tensor, and the numbers that one reads at once.
PARTS, TILE = 128, 4096
ALIGNED = 16


def norms(tensors: list[Tensor], order: float) -> Tensor:
    """Return the norms of tensors, of order 2 or infinity, in fp32: [tensors].

    On a GPU the largest magnitude passes over NaN, which the sum of squares shows everywhere.
    """
    if not _fit(tensors):
        return torch.stack(torch._foreach_norm(tensors, order, dtype=torch.float32))
    return norms_in_one_launch(tensors, order)


def norms_in_one_launch(tensors: list[Tensor], order: float) -> Tensor:
    """Return what :func:`norms` does, of tensors of one type on one GPU."""
    largest = math.isinf(order)
    parts = torch.empty(len(tensors), PARTS, dtype=torch.float32, device=tensors[0].device)
    _kernels()["norms"][(PARTS, len(tensors))](
        _table(tensors), parts, len(tensors), kind=_kind(tensors[0]), largest=largest, tile=TILE
    )
    return parts.amax(1) if largest else parts.sum(1).sqrt()


def cast(tensors: list[Tensor], scales: Tensor, targets: list[Tensor]) -> None:
    """Write ``tensors`` times ``scales`` [tensors] into ``targets``, FP8 (E4M3) of their shapes."""
    if _fit(tensors) and _fit(targets):
        cast_in_one_launch(tensors, scales, targets)
        return
    for tensor, scale, target in zip(tensors, scales.unbind(), targets, strict=True):
        target.copy_(tensor * scale)


def cast_in_one_launch(tensors: list[Tensor], scales: Tensor, targets: list[Tensor]) -> None:
    """Do what :func:`cast` does, with tensors of one type on one GPU."""
    _kernels()["cast"][(PARTS, len(tensors))](
        _table(tensors), _table(targets), scales, len(tensors), kind=_kind(tensors[0]), tile=TILE
    )


def _fit(tensors: list[Tensor]) -> bool:
    """Whether a kernel can take them all, 16 bytes at a time."""
    first = tensors[0]
    return first.is_cuda and all(
        tensor.device == first.device
        and tensor.dtype == first.dtype
        and tensor.is_contiguous()
        and tensor.data_ptr() % ALIGNED == 0
        for tensor in tensors
    )


def _table(tensors: list[Tensor]) -> Tensor:
    """Return where tensors lie, and how many numbers they have: int64 [2, tensors]."""
    places = tuple((tensor.data_ptr(), tensor.numel()) for tensor in tensors)
    return _placed(places, tensors[0].device)


@functools.lru_cache(maxsize=8)
def _placed(places: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    # Kept, since to bring it to a GPU is to wait for that; weights stay, gradients often.
    return torch.tensor(places).t().contiguous().to(device)


def _kind(tensor: Tensor) -> Any:
    from triton import language as tl

    kinds = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return kinds[tensor.dtype]


@functools.cache
def _kernels() -> dict[str, Any]:
    import triton
    from triton import language as tl

    # A tile that is whole is read without asking, since to ask is to read number by number.
    @triton.jit(do_not_specialize=["num_tensors"])  # type: ignore[untyped-decorator]
    def norms(  # type: ignore[no-untyped-def]
        table, found, num_tensors, kind: tl.constexpr, largest: tl.constexpr, tile: tl.constexpr
    ):
        values = tl.load(table + tl.program_id(1)).to(tl.pointer_type(kind))
        values = tl.multiple_of(values, 16)
        length = tl.load(table + num_tensors + tl.program_id(1))
        inside = tl.arange(0, tile)
        total = tl.zeros([tile], tl.float32)
        whole = length // tile
        number = tl.program_id(0).to(tl.int64)
        while number < whole:
            some = tl.load(values + number * tile + inside).to(tl.float32)
            total = tl.maximum(total, tl.abs(some)) if largest else total + some * some
            number += tl.num_programs(0)
        if tl.program_id(0) == whole % tl.num_programs(0):
            left = inside < length - whole * tile
            some = tl.load(values + whole * tile + inside, mask=left, other=0.0).to(tl.float32)
            total = tl.maximum(total, tl.abs(some)) if largest else total + some * some
        place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(found + place, tl.max(total) if largest else tl.sum(total))

    @triton.jit(do_not_specialize=["num_tensors"])  # type: ignore[untyped-decorator]
    def cast(  # type: ignore[no-untyped-def]
        table, table8, scales, num_tensors, kind: tl.constexpr, tile: tl.constexpr
    ):
        values = tl.load(table + tl.program_id(1)).to(tl.pointer_type(kind))
        values8 = tl.load(table8 + tl.program_id(1)).to(tl.pointer_type(tl.float8e4nv))
        values, values8 = tl.multiple_of(values, 16), tl.multiple_of(values8, 16)
        length = tl.load(table + num_tensors + tl.program_id(1))
        scale = tl.load(scales + tl.program_id(1))
        inside = tl.arange(0, tile)
        whole = length // tile
        number = tl.program_id(0).to(tl.int64)
        while number < whole:
            some = tl.load(values + number * tile + inside).to(tl.float32) * scale
            tl.store(values8 + number * tile + inside, some.to(tl.float8e4nv))
            number += tl.num_programs(0)
        if tl.program_id(0) == whole % tl.num_programs(0):
            left = inside < length - whole * tile
            some = tl.load(values + whole * tile + inside, mask=left, other=0.0).to(tl.float32)
            tl.store(values8 + whole * tile + inside, (some * scale).to(tl.float8e4nv), mask=left)

    return {"norms": norms, "cast": cast}
