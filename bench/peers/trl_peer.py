"""TRL's SFT (packed), DPO (precomputed reference) and LoRA beside ours, on the same rows.

    python bench/peers/trl_peer.py sft|dpo|lora [--preset 7b] [--set a.b=c] [--steps N]
        [--micro-batch N] [--peer-tokens N] [--recompute] [--liger] [--compile] [--alone]

Three JSON lines: ours, TRL's, and the ratio. TRL gets ids, so that it tokenises nothing, and as
many rows a step as ours, or --peer-tokens where a step would take too long; what carries loss is
the same. Its first two steps are not measured, nor the reference's log-probabilities, which both
would compute before them. On Hopper preset 7b's SFT and DPO are in FP8, which TRL does not have:
--set dpo.train.precision=bf16 compares like with like.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")

import beside
from datasets import Dataset
from transformers import TrainerCallback

from sevenfold.data.batches import NO_TARGET
from sevenfold.data.packing import PackedConversations, PackedPreferences

LIGER = "--liger" in sys.argv


class Steps(TrainerCallback):
    """Times the optimizer steps."""

    def __init__(self, timer: beside.Timer):
        """Keep the timer."""
        self.timer = timer

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin a step."""
        self.timer.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End a step, with the optimizer's update in it."""
        self.timer.end()


def tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer of as many words; no word is ever read by it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocab_size)}
    made = Tokenizer(models.WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="t0", pad_token="t1", eos_token="t2", bos_token="t3"
    )


def settings(asked: beside.Asked, rows_a_step: float) -> dict[str, Any]:
    """Return what all of TRL's trainers are told."""
    on_gpu = asked.device.type == "cuda"
    # Of packed rows it is the row's length, of pairs a bound for each answer with its prompt.
    length = asked.config.longest_context
    if asked.what == "dpo":
        length = min(length, asked.recipe.model.max_seq_len)
    eight_bits = asked.config.optimizer.kind == "adamw_8bit"
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": asked.micro_batch,
        "gradient_accumulation_steps": max(1, round(rows_a_step / asked.micro_batch)),
        "max_steps": beside.WARM_UP + asked.options.steps,
        "max_length": length,
        "learning_rate": 1e-6,
        "bf16": asked.config.precision != "fp32",
        "use_cpu": not on_gpu,
        "optim": "adamw_torch_8bit" if eight_bits else "adamw_torch",
        "gradient_checkpointing": asked.options.recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_liger_kernel": LIGER,
        "torch_compile": asked.options.compile,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }


def instruction_trainer(asked: beside.Asked, timer: beside.Timer) -> Any:
    """Return TRL's SFT trainer on our conversations; with an adapter for LoRA."""
    from trl import SFTConfig, SFTTrainer

    rows = beside.random_rows(asked)
    assert isinstance(rows, PackedConversations)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for piece in rows.pieces:
        columns["input_ids"].append(list(piece.ids))
        pairs = zip(piece.ids, piece.mask, strict=True)
        columns["labels"].append([i if carries else NO_TARGET for i, carries in pairs])
    adapter = None
    if asked.what == "lora":
        from peft import LoraConfig

        shape = asked.recipe.lora.adapter
        targets = shape.targets if isinstance(shape.targets, str) else list(shape.targets)
        adapter = LoraConfig(
            r=shape.r,
            lora_alpha=shape.alpha,
            lora_dropout=shape.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
    return SFTTrainer(
        model=beside.llama(asked),
        args=SFTConfig(packing=True, **settings(asked, asked.rows_a_step)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(asked.recipe.model.vocab_size),
        peft_config=adapter,
        callbacks=[Steps(timer)],
    )


def preference_trainer(asked: beside.Asked, timer: beside.Timer) -> Any:
    """Return TRL's DPO trainer on our pairs."""
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import dpo_trainer

    class Ready(DPOTrainer):
        """The rows are ids already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
            zeros = [0.0] * len(dataset)  # as ours: they are read, but decide nothing about speed
            for name in ("ref_chosen_logps", "ref_rejected_logps"):
                dataset = dataset.add_column(name, zeros)
            return dataset

    rows = beside.random_rows(asked)
    assert isinstance(rows, PackedPreferences)
    # It would key the reference's scores by a hash of all weights: a minute.
    dpo_trainer.hash_module = lambda _: "random weights"
    columns = {
        "prompt_ids": [list(pair.prompt) for pair in rows.preferences],
        "chosen_ids": [list(pair.chosen) for pair in rows.preferences],
        "rejected_ids": [list(pair.rejected) for pair in rows.preferences],
    }
    told = settings(asked, asked.rows_a_step * len(rows.preferences) / rows.num_rows)
    needed = told["max_steps"] * told["gradient_accumulation_steps"] * asked.micro_batch
    args = DPOConfig(precompute_ref_log_probs=True, beta=asked.recipe.dpo.beta, **told)
    return Ready(
        model=beside.llama(asked),
        args=args,
        train_dataset=Dataset.from_dict({k: v[:needed] for k, v in columns.items()}),
        processing_class=tokenizer(asked.recipe.model.vocab_size),
        callbacks=[Steps(timer)],
    )


def count(trainer: Any, timer: beside.Timer, *, pairs: bool) -> None:
    """Let every forward pass add its rows and tokens to the step's counts."""
    inner = trainer.compute_loss

    def counting(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        timer.count(non_padding_tokens_s_per_gpu=ids.numel() if mask is None else int(mask.sum()))
        if pairs:
            timer.count(pairs_s_per_gpu=len(ids) / 2)
        return inner(model, inputs, *rest, **more)

    trainer.compute_loss = counting


def main() -> None:
    """Measure ours, then TRL's, and print the ratio."""
    if LIGER:
        sys.argv.remove("--liger")
    asked = beside.ask(__doc__.splitlines()[0], ("sft", "dpo", "lora"))
    beside.measure_ours(asked)
    timer = beside.Timer()
    is_dpo = asked.what == "dpo"
    trainer = (preference_trainer if is_dpo else instruction_trainer)(asked, timer)
    count(trainer, timer, pairs=is_dpo)
    trainer.train()
    import trl

    key = "pairs_s_per_gpu" if is_dpo else "non_padding_tokens_s_per_gpu"
    facts = {"seq_len": trainer.args.max_length, "liger": LIGER, "version": trl.__version__}
    beside.finish(asked, "trl", timer.rates(), key, **facts)


if __name__ == "__main__":
    main()
