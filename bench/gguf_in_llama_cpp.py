"""Does llama.cpp itself say what transformers says, of a GGUF file that `sevenfold export` made?

Ids of texts, ids of conversations, and greedy continuations token by token. llama.cpp comes ready
built with the Node package node-llama-cpp.

    npm install --prefix NODE --ignore-scripts node-llama-cpp
    python bench/gguf_in_llama_cpp.py NODE MODEL_FOLDER FILE.gguf PROMPTS.jsonl   # some 20 s

A line of PROMPTS holds "prompt", or "messages" as in a run's data/raw/evaluation.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sevenfold.base import console
from sevenfold.model.gguf_check import PROBE_TEXTS
from sevenfold.model.llama import load_model, load_tokenizer
from sevenfold.verify import generation

NUM_PROMPTS = 100
NEW_TOKENS = 48


@torch.inference_mode()
def continuation(model: Any, ids: list[int], ends: list[int]) -> list[int]:
    """Return the most likely next tokens, one after another, from transformers."""
    given = torch.tensor([ids])
    made = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=min(ends),
    )
    said: list[int] = made[0, len(ids) :].tolist()
    return said


def main() -> None:
    """Print how many texts, conversations and continuations are the same."""
    node, folder, file, prompts = map(Path, sys.argv[1:])
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    ends = generation.end_token_ids(tokenizer)
    rows = [json.loads(line) for line in prompts.read_text("utf-8").splitlines()[:NUM_PROMPTS]]
    chats = [row.get("messages") or [{"role": "user", "content": row["prompt"]}] for row in rows]
    texts = [*PROBE_TEXTS, *(chat[-1]["content"] for chat in chats)]
    ids = generation.chat_prompts(tokenizer, chats)
    asked = {
        "file": str(file.resolve()),
        "context": model.config.max_position_embeddings,
        "texts": texts,
        "chats": [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in chats
        ],
        "prompts": ids,
        "ends": ends,
        "newTokens": NEW_TOKENS,
    }
    script = node / Path(__file__).with_suffix(".mjs").name  # beside the package that it imports
    shutil.copyfile(Path(__file__).with_suffix(".mjs"), script)
    done = subprocess.run(
        ["node", script], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    ours = {
        "texts": tokenizer(texts)["input_ids"],
        "chats": ids,
        "continuations": [continuation(model, prompt, ends) for prompt in ids],
    }
    same = {
        name: f"{sum(map(lambda a, b: a == b, found[name], values))} of {len(values)}"
        for name, values in ours.items()
    }
    console.print_line(json.dumps({"file": file.name, "same": same}))


if __name__ == "__main__":
    main()
