"""Weights that were stored in 16 bits, about to be trained in 32 and computed with in 8.

One in sixteen bf16 numbers lies just between two of e4m3. However little training moves such a
weight in fp32, its cast jumps the whole way to the neighbour that the gradient asks for; all of
them together change a model more in its first step than a run should.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# The bits of an fp32 number that a bf16 and an fp16 one leave zero.
UNUSED_BITS = (16, 13)


@torch.no_grad()
def spread(weights: Iterable[Tensor], seed: int) -> int:
    """Draw fp32 weights from the numbers that would have been stored as them; return how many.

    Drawn by ``seed``, in place, where all of a tensor is in fewer bits than it has; stored again
    in those bits, the weights are what they were. Zeros stay.
    """
    generator = torch.Generator().manual_seed(seed)
    return sum(_spread(weight, generator) for weight in weights)


def _spread(weight: Tensor, generator: torch.Generator) -> int:
    if weight.dtype is not torch.float32:
        return 0
    bits = weight.view(torch.int32)
    unused = next((n for n in UNUSED_BITS if not (bits & ((1 << n) - 1)).any()), None)
    if unused is None:
        return 0
    half = 1 << (unused - 1)
    moved = torch.randint(1 - half, half, bits.shape, generator=generator, dtype=torch.int32)
    is_other_than_0 = weight != 0
    bits.add_(moved.to(bits.device).where(is_other_than_0, 0))
    return int(is_other_than_0.sum())
