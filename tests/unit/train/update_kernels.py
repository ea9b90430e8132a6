"""What kernels of our own are held to: the functions that run on CPUs.

By Triton's interpreter where there is no GPU: ``TRITON_INTERPRET=1 python update_kernels.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sevenfold.model import low_rank, many_tensors
from sevenfold.model.float8_linear import E4M3
from sevenfold.train import adamw_8bit
from sevenfold.train.adamw_8bit import BLOCK, MOMENTS, _codes_of

CPU = torch.device("cpu")
EPSILON = 1e-8
FACTORS = torch.tensor([0.9999, 3e-3, 1.7, 0.5])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def updated(
    tensors: list[Tensor], seed: int, betas: tuple[float, float], device: str | None
) -> list[Tensor]:
    """Return all tensors after an update, by the kernel or, without a device, as written down."""
    from sevenfold.train import adamw_8bit_triton

    in_blocks = len(tensors) == 6
    there = torch.device(device or CPU)
    placed = [tensor.clone().to(there) for tensor in tensors]
    kinds = [_codes_of(moment, there) for moment in MOMENTS if in_blocks]
    number = torch.tensor([0, seed], dtype=torch.int32, device=there)[1]
    if device is None:
        update = adamw_8bit._update_blocks if in_blocks else adamw_8bit._update
    else:
        update = adamw_8bit_triton.update_blocks if in_blocks else adamw_8bit_triton.update
    update(*placed, *kinds, FACTORS.to(there), number, *betas, EPSILON)
    return [tensor.cpu() for tensor in placed]


def check_blocks(device: str, *, num_blocks: int, dtype: torch.dtype) -> None:
    """From nothing, gradient by gradient of unlike sizes, one block of zeros among them."""
    weights, shape = drawn(num_blocks, BLOCK).to(dtype), (num_blocks, BLOCK)
    codes = [torch.zeros(shape, dtype=torch.uint8) for _ in MOMENTS]
    scales = [torch.zeros(num_blocks, 1) for _ in MOMENTS]
    for step in range(4):
        gradient = drawn(*shape, seed=step + 1).to(dtype) * 10.0 ** (-3 * step)
        gradient[0] = 0
        tensors = [weights, gradient, *codes, *scales]
        found = updated(tensors, 12345 + step, (0.9, 0.95), device)
        expected = updated(tensors, 12345 + step, (0.9, 0.95), None)
        check_weights(found[0], expected[0], weights)
        for code, wanted in zip(found[2:4], expected[2:4], strict=True):
            differing = (code.int() - wanted.int()).abs()
            assert int(differing.max()) <= 1
            # Where a number lies between two values, to the last bit, either is as near.
            assert float(differing.float().mean()) < 1e-4
        for scale, wanted in zip(found[4:], expected[4:], strict=True):
            torch.testing.assert_close(scale, wanted, rtol=1e-6, atol=0)
        weights, codes, scales = expected[0], expected[2:4], expected[4:]


def check_weights(found: Tensor, expected: Tensor, before: Tensor) -> None:
    """Equal; in bf16 chance may decide otherwise where sums differ in fp32's last bit."""
    assert found.dtype == before.dtype
    assert not torch.equal(found, before)
    if before.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    else:
        assert float((found != expected).float().mean()) < 5e-4
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


def check_vectors(device: str, *, length: int, dtype: torch.dtype) -> None:
    """Twice, with moments in fp32."""
    tensors = [drawn(length).to(dtype), *(torch.zeros(length) for _ in MOMENTS)]
    for step in range(2):
        tensors.insert(1, drawn(length, seed=step + 1).to(dtype))
        found = updated(tensors, step, (0.9, 0.4), device)
        expected = updated(tensors, step, (0.9, 0.4), None)
        check_weights(found[0], expected[0], tensors[0])
        torch.testing.assert_close(found[2:], expected[2:], rtol=1e-6, atol=1e-7)
        tensors = [expected[0], *expected[2:]]


def check_every_edge(device: str) -> None:
    """Codes at all places where one ends, at both neighbours and in between, are the nearest's.

    With betas of 0 moments are the gradient and its square, and the largest of a block is 1.
    """
    kinds = [_codes_of(moment, CPU) for moment in MOMENTS]
    middles = [kind.next_from[:-1] for kind in kinds]
    places = torch.cat([middles[0], -middles[0], middles[1].sqrt(), torch.tensor([0.0, 1e-30])])
    places = torch.cat([places, torch.rand(4000, generator=torch.Generator().manual_seed(1)) ** 8])
    down, up = (places.nextafter(torch.tensor(to)) for to in (-9.0, 9.0))
    places = torch.cat([places, down, up]).clamp(-1, 1)
    num_blocks = -(-len(places) // (BLOCK - 1))
    padded = torch.cat([places, places.new_zeros(num_blocks * (BLOCK - 1) - len(places))])
    gradient = torch.cat([torch.ones(num_blocks, 1), padded.view(num_blocks, -1)], dim=1)
    codes = [torch.zeros(gradient.shape, dtype=torch.uint8) for _ in MOMENTS]
    scales = [torch.zeros(num_blocks, 1) for _ in MOMENTS]
    tensors = [drawn(*gradient.shape), gradient / FACTORS[3], *codes, *scales]
    found = updated(tensors, 0, (0.0, 0.0), device)
    for code, values, edges in zip(found[2:4], (gradient, gradient.square()), middles, strict=True):
        wanted = torch.bucketize(values, edges, right=True)
        assert torch.equal(code.long(), wanted)


def check_norms_and_casts(device: str) -> None:
    """Of lengths that are no multiples of anything, and longer than all programs' first tiles."""
    lengths = (5, 4096, 10_000, many_tensors.PARTS * many_tensors.TILE * 2 + 17)
    # Triton's interpreter rounds FP8 in its own way (1.99 becomes 1), so it gets what FP8 can hold.
    values = [drawn(length, seed=length).to(E4M3).bfloat16() for length in lengths]
    if device != "cpu":
        values = [drawn(length, seed=length).bfloat16() for length in lengths]
    placed = [value.to(device) for value in values]
    for order in (2.0, math.inf):
        exact = torch.stack([value.double().norm(order) for value in values]).float()
        found = many_tensors.norms_in_one_launch(placed, order)
        torch.testing.assert_close(found.cpu(), exact, rtol=1e-6, atol=0)
    scales = torch.tensor([64.0, 8.0, 32.0, 16.0])
    targets = [torch.zeros_like(value, dtype=E4M3) for value in placed]
    many_tensors.cast_in_one_launch(placed, scales.to(device), targets)
    for value, scale, target in zip(values, scales, targets, strict=True):
        assert torch.equal(target.cpu().float(), (value * scale).to(E4M3).float())


def check_low_rank(device: str) -> None:
    """Sides that are no multiples of a tile; what is added is a slice of something wider."""
    # Triton's interpreter multiplies the bits of bf16 as if they were whole numbers.
    kind = torch.float16 if device == "cpu" else torch.bfloat16
    for rows, columns, rank in ((130, 300, 16), (64, 128, 24), (5, 40, 4)):
        total, up = drawn(rows, columns).to(kind), drawn(columns, rank, seed=1).to(kind)
        inner = drawn(rows, 3 * rank, seed=2).to(kind)[:, rank : 2 * rank]
        exact = total.double() + inner.double() @ up.double().t()
        placed = total.to(device, copy=True)
        low_rank.add_in_one_launch(placed, inner.to(device), up.to(device))
        off = (placed.cpu().double() - exact).abs().max()
        assert float(off) <= 2**-8 * float(exact.abs().max())


def check(device: str) -> None:
    """Compare everything."""
    for dtype in (torch.bfloat16, torch.float32):
        check_blocks(device, num_blocks=21, dtype=dtype)
        check_vectors(device, length=1500, dtype=dtype)
    check_every_edge(device)
    check_norms_and_casts(device)
    check_low_rank(device)


if __name__ == "__main__":
    check("cpu")
