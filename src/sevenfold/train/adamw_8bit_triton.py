"""The updates of :mod:`sevenfold.train.adamw_8bit` as kernels that read and write everything once.

What they compute is written down there, in the functions that run on CPUs and that these are
tested against. To be imported on a machine with a GPU only, since Triton comes with PyTorch there.

torch.compile's kernel spent its time in tables: six lookups a value, each at 32 places of the L1
cache at once. Here tables lie in shared memory, there are four lookups, and a code is guessed by
arithmetic, so that one comparison makes it exact.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton import language as tl

from sevenfold.train.adamw_8bit import BLOCK, SMALLEST_SCALE, Codes

# Blocks of 256 that a program updates, and its warps: 16 values for each thread. Fastest on an H100
# of the five that bench/optimizer_kernels.py tries.
BLOCKS, WARPS = 8, 4
# 1.5 * 2**23: a small number added to it is rounded, and lies in its lowest bits.
ROUNDING = tl.constexpr(12_582_912.0)

# Triton takes every name in a signature for one that its kernel uses, and passes untyped ones.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


def update_blocks(
    weights: Tensor,
    gradient: Tensor,
    codes: Tensor,
    codes_sq: Tensor,
    scale: Tensor,
    scale_sq: Tensor,
    kind: Codes,
    kind_sq: Codes,
    factors: Tensor,
    seed: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    blocks: int = BLOCKS,
    num_warps: int = WARPS,
) -> None:
    """Update blocks of weights, [blocks, 256], with a scale each, [blocks, 1].

    Places are counted in 64 bits: a tensor may be of any size.
    """
    tables = (kind.values, kind.next_from, kind_sq.values, kind_sq.next_from)
    tensors = (weights, gradient, codes, codes_sq, scale, scale_sq, *tables, factors, seed)
    constants: Any = {"weight1": 1 - beta1, "weight2": 1 - beta2, "epsilon": epsilon}
    constants |= {"smallest": SMALLEST_SCALE, "blocks": blocks, "size": BLOCK}
    grid = (-(-len(weights) // blocks),)
    _update_blocks[grid](*tensors, len(weights), **constants, num_warps=num_warps)


def update(
    weights: Tensor,
    gradient: Tensor,
    moment: Tensor,
    moment_sq: Tensor,
    factors: Tensor,
    seed: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """Update weights, [n], whose moments are kept in fp32."""
    constants: Any = {"weight1": 1 - beta1, "weight2": 1 - beta2, "epsilon": epsilon}
    tensors = (weights, gradient, moment, moment_sq, factors, seed)
    _update[(-(-len(weights) // 1024),)](*tensors, len(weights), **constants, size=1024)


@triton.jit(do_not_specialize=["seed", "num_blocks"])
def _update_blocks(
    weights,
    gradient,
    codes,
    codes_sq,
    scale,
    scale_sq,
    values,
    next_from,
    values_sq,
    next_from_sq,
    factors,
    seed,
    num_blocks,
    weight1: tl.constexpr,
    weight2: tl.constexpr,
    epsilon: tl.constexpr,
    smallest: tl.constexpr,
    blocks: tl.constexpr,
    size: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * blocks
    left = tl.minimum(num_blocks - first, blocks).to(tl.int32)
    block = tl.arange(0, blocks)
    place = tl.arange(0, blocks * size)
    inside = place < left * size
    weights += first * size + place
    codes += first * size + place
    codes_sq += first * size + place
    scale += first + block
    scale_sq += first + block
    old = tl.load(weights, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(gradient + first * size + place, mask=inside, other=0.0).to(tl.float32)
    moment = _decoded(codes, values, inside) * _spread(scale, block < left, blocks, size)
    square = _decoded(codes_sq, values_sq, inside) * _spread(scale_sq, block < left, blocks, size)
    new, moment, square = _adamw(old, change, moment, square, factors, weight1, weight2, epsilon)
    kind: tl.constexpr = weights.dtype.element_ty
    new = _rounded(new, (first * size).to(tl.int32) + place, seed, kind)
    tl.store(weights, new, mask=inside)
    largest = _largest(moment, smallest, blocks, size)
    tl.store(scale, largest, mask=block < left)
    tl.store(codes, _encoded(moment, largest, next_from, 1, blocks, size), mask=inside)
    largest = _largest(square, smallest, blocks, size)
    tl.store(scale_sq, largest, mask=block < left)
    tl.store(codes_sq, _encoded(square, largest, next_from_sq, 2, blocks, size), mask=inside)


@triton.jit(do_not_specialize=["seed", "length"])
def _update(
    weights,
    gradient,
    moments,
    squares,
    factors,
    seed,
    length,
    weight1: tl.constexpr,
    weight2: tl.constexpr,
    epsilon: tl.constexpr,
    size: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < length
    old = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    moment = tl.load(moments + place, mask=inside, other=0.0)
    square = tl.load(squares + place, mask=inside, other=0.0)
    new, moment, square = _adamw(old, change, moment, square, factors, weight1, weight2, epsilon)
    kind: tl.constexpr = weights.dtype.element_ty
    tl.store(weights + place, _rounded(new, place.to(tl.int32), seed, kind), mask=inside)
    tl.store(moments + place, moment, mask=inside)
    tl.store(squares + place, square, mask=inside)


@triton.jit
def _adamw(
    old,
    gradient,
    moment,
    square,
    factors,
    weight1: tl.constexpr,
    weight2: tl.constexpr,
    epsilon: tl.constexpr,
):
    """Return new weights and moments."""
    gradient = gradient * tl.load(factors + 3)
    moment = _between(moment, gradient, weight1)
    square = _between(square, gradient * gradient, weight2)
    # A division minds the largest and smallest numbers, in eight instructions; these are three.
    inverse = tl.rsqrt(tl.sqrt(square) * tl.load(factors + 2) + epsilon)
    change = tl.load(factors + 1) * moment * inverse * inverse
    return old * tl.load(factors) - change, moment, square


@triton.jit
def _between(start, end, weight: tl.constexpr):
    """Return what PyTorch's lerp does."""
    away = end - start
    return start + weight * away if weight < 0.5 else end - away * (1 - weight)


@triton.jit
def _rounded(new, place, seed, kind: tl.constexpr):
    """Return weights as they are kept, bf16 ones rounded stochastically."""
    if kind == tl.bfloat16:
        mixed = ((place >> 1) ^ tl.load(seed)) * -1_640_531_535
        mixed = (mixed ^ ((mixed >> 16) & 0xFFFF)) * 2_146_121_005
        mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * -2_073_254_261
        mixed = mixed ^ ((mixed >> 16) & 0xFFFF)
        noise = (mixed >> ((place & 1) * 16)) & 0xFFFF
        bits = (new.to(tl.int32, bitcast=True) + noise) & -65_536
        new = bits.to(tl.float32, bitcast=True)
    return new.to(kind)


@triton.jit
def _spread(scale, inside, blocks: tl.constexpr, size: tl.constexpr):
    """Return the scale of each value."""
    scales = tl.load(scale, mask=inside, other=0.0)
    return tl.reshape(tl.broadcast_to(scales[:, None], [blocks, size]), [blocks * size])


@triton.jit
def _largest(values, smallest: tl.constexpr, blocks: tl.constexpr, size: tl.constexpr):
    largest = tl.max(tl.reshape(tl.abs(values), [blocks, size]), axis=1)
    return tl.maximum(largest, smallest)


@triton.jit
def _decoded(codes, values, inside):
    """Return what codes stand for."""
    table = tl.load(values + tl.arange(0, 256))
    return tl.gather(table, tl.load(codes, mask=inside, other=0).to(tl.int32), 0)


@triton.jit
def _encoded(
    values, largest, next_from, first: tl.constexpr, blocks: tl.constexpr, size: tl.constexpr
):
    """Return the codes of the nearest values; ``first``: values in the table's lowest decade.

    In each decade values lie evenly, so that how many of them are below a number is a line of it.
    Where decades meet, it goes on at a fifth of the slope: it is the smallest of seven lines.
    Taken half a value low, where no code ends, it is the code or one less, whatever the rounding.
    """
    inverse = tl.broadcast_to((1.0 / largest)[:, None], [blocks, size])
    values = values * tl.reshape(inverse, [blocks * size])
    below = tl.abs(values) * (first * 1e6 / 0.9) + first * (8 / 9 - 1)
    for decade in tl.static_range(1, 7):
        slope = first * 1e6 / 0.9 * 0.2**decade
        below = tl.minimum(below, tl.abs(values) * slope + first * (2**decade * 8 / 9 - 1))
    code = (below + ROUNDING).to(tl.int32, bitcast=True) & 0xFF
    if first == 1:  # of a number below 0: counted down from the middle, and from one lower
        negative = values.to(tl.int32, bitcast=True) >> 31
        code = tl.maximum(127 + ((code & 0x7F) ^ negative), 0)
    is_next = values >= tl.gather(tl.load(next_from + tl.arange(0, 256)), code, 0)
    return (code + is_next.to(tl.int32)).to(tl.uint8)
