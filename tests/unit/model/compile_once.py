"""Compiles one FP8 layer, whose products are autograd functions of our own, in two processes."""

from __future__ import annotations

import json
import os

from sevenfold.base.console import keep_compiled_code

keep_compiled_code()

import torch  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from sevenfold.model.float8 import convert_to_float8  # noqa: E402


class Decoder(torch.nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 16, bias=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(values)
        return found


def compile_layer() -> dict[str, list[int]]:
    """Compile forward and backward; return what the caches lacked or took in, and had."""
    torch.set_num_threads(1)
    model = Decoder()
    convert_to_float8(model, emulate=True)
    model.layer.compile(dynamic=False)
    model(torch.ones(4, 16)).sum().backward()
    kernels, layers = counters["inductor"], counters["aot_autograd"]
    return {
        "kernels": [kernels["fxgraph_cache_miss"], kernels["fxgraph_cache_hit"]],
        "layers": [layers["autograd_cache_saved"], layers["autograd_cache_hit"]],
    }


def main() -> None:
    """Compile in two processes, one after the other, that share nothing but what is on the disk."""
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os.write(1, (json.dumps(compile_layer()) + "\n").encode())
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
