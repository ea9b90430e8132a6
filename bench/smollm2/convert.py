"""A Hugging Face folder of a Llama in GGUF, for which transformers has no save_pretrained.

    python bench/smollm2/convert.py FILE.gguf TOKENIZER_FOLDER TARGET

Needs the package gguf. Weights are what the file says after dequantising, in bf16: those of a 4-bit
file carry its rounding.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Read, convert and write."""
    file, tokenizer, target = map(Path, sys.argv[1:4])
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    left_out = ("quantization_config", "architectures", "dtype", "transformers_version")
    values = {k: v for k, v in read.config.to_dict().items() if k not in left_out and k[0] != "_"}
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(read.state_dict())
    model.bfloat16().save_pretrained(target)
    for path in tokenizer.iterdir():
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            shutil.copyfile(path, target / path.name)


if __name__ == "__main__":
    main()
