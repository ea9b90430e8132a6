"""Serving with vLLM: what the engine is told, and what comes of it. With the engine itself where
it is installed; its part in the other tests is played by one that says fixed tokens.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from sevenfold.base.errors import UsageError
from sevenfold.base.records import Run
from sevenfold.data.tokenizer import END, load_tokenizer
from sevenfold.model.config import InitConfig, ModelConfig
from sevenfold.model.llama import initialize, load_model, save_model
from sevenfold.workflow import cli, serve, vllm_engine
from sevenfold.workflow.completions import AskedWronglyError, Speaker, read_wish

ASK = {"messages": [{"role": "user", "content": "The cat"}], "max_tokens": 9}
HAS_VLLM = importlib.util.find_spec("vllm") is not None


class Engine:
    """Says the tokens of ``says`` one a step, as vLLM's engine does."""

    says: tuple[int, ...] = ()

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.asked: list[tuple[str, Any, Any]] = []
        self.aborted: list[str] = []
        self.left: list[int] = []

    @classmethod
    def from_engine_args(cls, arguments: Any) -> Engine:
        if arguments.gpu_memory_utilization > 1:
            raise ValueError("more memory\nthan there is")
        return cls(arguments)

    def add_request(self, request: str, prompt: Any, sampling: Any) -> None:
        self.asked.append((request, prompt, sampling))
        self.left = list(self.says)

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        said = types.SimpleNamespace(token_ids=[self.left.pop(0)])
        return [types.SimpleNamespace(outputs=[said])]

    def abort_request(self, requests: list[str]) -> None:
        self.aborted += requests
        self.left = []


@pytest.fixture
def speaker(talking_run: Run, monkeypatch: pytest.MonkeyPatch) -> Any:
    engine: Any = types.ModuleType("vllm")
    engine.EngineArgs = engine.SamplingParams = types.SimpleNamespace
    engine.LLMEngine = Engine
    sampling: Any = types.ModuleType("vllm.sampling_params")
    sampling.RequestOutputKind = types.SimpleNamespace(DELTA="delta")
    monkeypatch.setitem(sys.modules, "vllm", engine)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    monkeypatch.setattr(vllm_engine, "is_installed", lambda: True)
    folder = talking_run.model("sft")
    tokenizer = load_tokenizer(folder)
    end = tokenizer.convert_tokens_to_ids(END)
    monkeypatch.setattr(Engine, "says", (*tokenizer(" cat mat")["input_ids"][1:], end))
    return vllm_engine.VllmSpeaker(folder, name="run/sft")


def test_the_engine_is_told_what_transformers_is_told(speaker: Any) -> None:
    pieces: list[str] = []
    wish = read_wish({**ASK, "temperature": 0.5, "seed": 3}, "run/sft")
    said = speaker.answer(wish, pieces.append)
    assert (said.text, said.finish_reason) == ("cat mat", "stop")
    assert said.num_tokens == len(Engine.says)
    assert "".join(pieces) == "cat mat"
    (request, prompt, sampling) = speaker._engine.asked[0]
    assert speaker._engine.arguments.dtype == "float32"
    assert speaker._engine.arguments.trust_remote_code is False
    tokenizer = speaker._tokenizer
    assert prompt["prompt_token_ids"][0] == tokenizer.bos_token_id
    assert len(prompt["prompt_token_ids"]) == said.num_prompt_tokens
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.5, 3, 9)
    reserved = [i for i, t in tokenizer.added_tokens_decoder.items() if "reserved" in t.content]
    assert reserved
    assert not set(reserved) & set(sampling.allowed_token_ids)
    assert len(sampling.allowed_token_ids) + len(reserved) == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(END) in sampling.stop_token_ids
    assert speaker._engine.aborted == [request]


def test_a_client_that_goes_away_ends_its_request(speaker: Any) -> None:
    def gone(text: str) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        speaker.answer(read_wish(ASK, "run/sft"), gone)
    assert speaker._engine.aborted == ["0"]
    assert speaker.answer(read_wish(ASK, "run/sft"), lambda text: None).text == "cat mat"


def test_its_limits_are_the_servers(speaker: Any) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 200}]}
    with pytest.raises(AskedWronglyError, match="leaves no room for an answer"):
        speaker.answer(read_wish(long, "run/sft"), lambda text: None)


def test_what_it_refuses_is_one_line(
    speaker: Any, talking_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "MEMORY_SHARE", 2.0)
    refused = r"vLLM does not open it \(more memory than there is\); take --engine transformers"
    with pytest.raises(UsageError, match=refused):
        vllm_engine.VllmSpeaker(talking_run.model("sft"), name="x")


@pytest.mark.fault("K12")
def test_without_it_transformers_answers(
    talking_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_engine, "is_installed", lambda: False)
    assert type(serve._open_speaker(talking_run, "sft", "auto")) is Speaker
    assert cli.execute(["serve", str(talking_run.folder), "--engine", "vllm"]) == 2
    assert "--engine vllm needs vLLM; pip install vllm, or take" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_vllm_itself_says_what_transformers_says(talking_run: Run, tmp_path: Path) -> None:
    sizes = ModelConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=64, max_seq_len=64, rope_theta=1e4, norm_eps=1e-5,
        tie_embeddings=True,
    )  # fmt: skip
    init = InitConfig(std=0.2, scale_residual=False, dtype="float32")
    save_model(initialize(sizes, init, 1), talking_run.tokenizer, tmp_path / "m", torch.float32)
    fast = vllm_engine.VllmSpeaker(tmp_path / "m", name="m")
    model = load_model(tmp_path / "m").eval()
    plain = Speaker(model, load_tokenizer(tmp_path / "m"), name="m")
    wish = read_wish(ASK, "m")
    assert fast.answer(wish, lambda text: None) == plain.answer(wish, lambda text: None)
