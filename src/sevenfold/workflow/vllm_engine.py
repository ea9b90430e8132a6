"""Answers from vLLM where it is installed: the same server, the same limits, another engine."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import torch

from sevenfold.base import storage
from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import training_device
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.workflow.chat import TextStream
from sevenfold.workflow.completions import Speaker, Wish

INSTALL = "pip install vllm"
MEMORY_SHARE = 0.8  # of a GPU, for weights and cached keys and values


def is_installed() -> bool:
    """Return whether there is a vLLM to answer with."""
    return importlib.util.find_spec("vllm") is not None


class VllmSpeaker(Speaker):
    """A model folder served by vLLM's engine, one request at a time."""

    def __init__(self, folder: Path, *, name: str):
        """Load the model in ``folder``.

        Errors:
            UsageError: vLLM is not installed, or refuses the model or this machine.
        """
        if not is_installed():
            raise UsageError(f"--engine vllm needs vLLM; {INSTALL}, or take --engine transformers")
        from vllm import EngineArgs, LLMEngine

        tokenizer = load_tokenizer(folder)
        config = storage.read_json(folder / "config.json")
        super().__init__(config, tokenizer, name=name)
        self._numbers = itertools.count()
        suppressed = set(_suppressed(folder))
        # Reserved tokens are never trained; transformers is told by generation_config.json.
        self._allowed = [i for i in range(len(tokenizer)) if i not in suppressed]
        arguments = EngineArgs(
            model=str(folder),
            # As transformers would load it here; left alone, vLLM takes fp16 for stored fp32.
            dtype="bfloat16" if training_device().type == "cuda" else "float32",
            max_model_len=config["max_position_embeddings"],
            max_num_seqs=1,
            gpu_memory_utilization=MEMORY_SHARE,
            generation_config="vllm",
            trust_remote_code=False,
            disable_log_stats=True,
        )
        try:
            self._engine: Any = LLMEngine.from_engine_args(arguments)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{folder}: vLLM does not open it ({reason}); take --engine transformers"
            ) from error

    def _context(self) -> int:
        return int(self._model["max_position_embeddings"])

    def _generate(
        self, ids: list[int], wish: Wish, max_tokens: int, ends: list[int], stream: TextStream
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=wish.temperature,
            top_p=wish.top_p,
            max_tokens=max_tokens,
            seed=wish.seed,
            stop_token_ids=ends,
            allowed_token_ids=self._allowed,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        request = str(next(self._numbers))
        self._engine.add_request(request, {"prompt_token_ids": ids}, sampling)
        stream.put(torch.tensor(ids))
        try:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    for token in output.outputs[0].token_ids:
                        stream.put(torch.tensor([token]))
        finally:
            # Of a client that went away the engine knows nothing.
            self._engine.abort_request([request])


def _suppressed(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    return (storage.read_json(path).get("suppress_tokens") or []) if path.is_file() else []
