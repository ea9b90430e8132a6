"""torchtitan's pretraining beside ours, on as many GPUs: the same sizes, length and micro-batch.

    torchrun --nproc-per-node N bench/peers/torchtitan_peer.py pretrain [--preset 7b] [--set a.b=c]
        [--steps N] [--micro-batch N] [--fp8]

Two JSON lines of the first process: torchtitan's, and the ratio with ours, which is read from the
file that OURS names and `sevenfold bench pretrain > FILE` wrote: torchtitan starts with torchrun,
ours by itself. Random tokens, fp32 weights and AdamW, as its own configurations have them; FP8 as
its documentation advises, weights gathered in FP8 with scales computed once a step, without the
head. Its attention is causal over the row, where ours by default keeps packed documents apart:
`--set pretrain.mask_documents=false` makes ours the same. Written for torchtitan 0.2.2, whose
settings are a JobConfig.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import beside
import torch
import torchtitan.protocols.train_spec as specs
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import ConfigManager
from torchtitan.models import llama3
from torchtitan.train import Trainer

FP8 = "--fp8" in sys.argv
FLOAT8 = (
    "enable_fsdp_float8_all_gather",
    "precompute_float8_dynamic_scale_for_fsdp",
    "filter_fqns=output",
)


class RandomTokens(BaseDataLoader):
    """Rows of random tokens, other ones in every process."""

    def __init__(self, rows: int, length: int, vocab_size: int, rank: int):
        """Begin with the rank as seed."""
        self.shape = (rows, length + 1)
        self.vocab_size = vocab_size
        self.generator = torch.Generator().manual_seed(rank)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield inputs and labels for ever."""
        while True:
            ids = torch.randint(0, self.vocab_size, self.shape, generator=self.generator)
            yield {"input": ids[:, :-1].contiguous()}, ids[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: no checkpoint is written."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


def register(asked: beside.Asked) -> None:
    """Make the recipe's model known to torchtitan as model sevenfold, flavour asked."""
    model = asked.recipe.model
    # torchtitan rounds 8/3 of the width times the multiplier up to a multiple.
    width = model.intermediate_size
    spec = llama3.get_train_spec()
    spec.model_args = {
        "asked": llama3.TransformerModelArgs(
            dim=model.hidden_size,
            n_layers=model.num_layers,
            n_heads=model.num_heads,
            n_kv_heads=model.num_kv_heads,
            ffn_dim_multiplier=width / int(8 * model.hidden_size / 3) * 0.999,
            multiple_of=256,
            rope_theta=model.rope_theta,
            vocab_size=model.vocab_size,
        )
    }
    spec.build_tokenizer_fn = spec.build_validator_fn = None
    spec.build_dataloader_fn = lambda dp_world_size, dp_rank, tokenizer, job_config: RandomTokens(
        job_config.training.local_batch_size,
        job_config.training.seq_len,
        model.vocab_size,
        dp_rank,
    )
    specs._extra_train_specs["sevenfold"] = spec


def job(asked: beside.Asked) -> Any:
    """Return torchtitan's settings."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = asked.config
    batch = max(1, config.tokens_per_batch // config.longest_context)
    batch = max(batch // (asked.micro_batch * world), 1) * asked.micro_batch * world
    told = [
        *("--model.name=sevenfold", "--model.flavor=asked"),
        f"--training.local_batch_size={asked.micro_batch}",
        f"--training.global_batch_size={batch}",
        f"--training.seq_len={config.longest_context}",
        f"--training.steps={beside.WARM_UP + asked.options.steps}",
        # Its log resets the peak of memory; the first step's is the only one.
        "--metrics.log_freq=1000000",
        f"--job.dump_folder={tempfile.mkdtemp()}",
        "--compile.enable",
        f"--activation_checkpoint.mode={'full' if asked.options.recompute else 'none'}",
    ]
    if FP8:
        told += ["--model.converters", "quantize.linear.float8"]
        told += [f"--quantize.linear.float8.{setting}" for setting in FLOAT8]
    return ConfigManager().parse_args(told)


def main() -> None:
    """Train, timing every step from outside."""
    if FP8:
        sys.argv.remove("--fp8")
    asked = beside.ask(__doc__.splitlines()[0], ("pretrain",))
    register(asked)
    trainer, timer = Trainer(job(asked)), beside.Timer()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    inner = trainer.train_step
    tokens = trainer.job_config.training.global_batch_size * asked.config.longest_context / world

    def timed(batches: Any) -> None:
        with timer.step():
            inner(batches)
            timer.count(tokens_s_per_gpu=tokens)

    trainer.train_step = timed
    trainer.train()
    if os.environ.get("RANK", "0") == "0":
        if "OURS" in os.environ:
            beside.OURS.update(json.loads(Path(os.environ["OURS"]).read_text().splitlines()[-1]))
        asked.options.alone = not beside.OURS
        num_parameters = sum(p.numel() for part in trainer.model_parts for p in part.parameters())
        facts = {"precision": "fp8" if FP8 else "bf16", "weights": "fp32", "compile": True}
        facts |= {"processes": world, "tokens_per_batch": int(tokens * world)}
        facts |= {
            "parameters": num_parameters,
            "parameters_of_ours": asked.recipe.model.num_parameters,
        }
        beside.finish(asked, "torchtitan", timer.rates(), "tokens_s_per_gpu", **facts)
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
