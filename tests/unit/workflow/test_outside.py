"""A model from outside takes a stage's place, is judged there first, and trains with its tokenizer.

The whole way, from a folder as people download it to an adapter, with commands as people give them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline import miniature

from sevenfold.base import records, storage
from sevenfold.base.errors import BadDataError, GateRefusedError, UsageError
from sevenfold.base.records import Run
from sevenfold.verify import lineage
from sevenfold.workflow import cli, outside
from sevenfold.workflow import recipe as recipes

ROWS, PADDING = 320, 7
# As SmolLM2's: no generation markers, a system turn of its own where there is none.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|bos|>system\nBe kind.<|eos|>\n' }}{% endif %}"
    "{{ '<|bos|>' + message['role'] + '\n' + message['content'] + '<|eos|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant\n' }}{% endif %}"
)


def write_model(folder: Path, *, template: str | None = TEMPLATE, **settings: Any) -> Path:
    """Write a Mistral as people publish it: bf16, sharded, more rows than tokens, tied or not."""
    from transformers import MistralConfig, MistralForCausalLM

    from sevenfold.data.tokenizer import TokenizerConfig, train_tokenizer

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": ROWS + PADDING,
        "hidden_size": 32,
        "intermediate_size": 480,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    }
    model = MistralForCausalLM(MistralConfig(**{**sizes, **settings})).bfloat16()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    config = TokenizerConfig(vocab_size=ROWS, path=None, max_digits=1, sample_characters=10_000)
    tokenizer = train_tokenizer(["Tom has a red hat. The cat sat on the mat."] * 9, config)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "mistral")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with rows and items of its own, and a gate that lets everything pass."""
    documents = [{"id": f"d{i}", "text": f"Tom has {i} hats on the mat."} for i in range(24)]
    lines = "".join(json.dumps(row) + "\n" for row in documents)
    (tmp_path / "text.jsonl").write_text(lines)
    asked = [
        {"prompt": f"How many hats has Tom, {i}?", "response": f"{i} hats."} for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    source = {"name": "hats", "path": str(tmp_path / "rows.jsonl"), "licence": "cc0-1.0"}
    whole = miniature.recipe()
    for stage in ("sft", "lora"):
        whole[stage]["data"] = {**whole[stage]["data"], "sources": [source]}
        whole[stage]["train"]["duration"] = {"steps": 3}
    task = {"name": "hats", "kind": "text", "path": str(tmp_path / "text.jsonl")}
    whole["evaluate"]["tasks"] = [task]
    set_gates(tmp_path, monkeypatch, limit=50.0)
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(whole))
    return path


def set_gates(folder: Path, monkeypatch: pytest.MonkeyPatch, *, limit: float) -> None:
    check = {"metric": "hats_bits_per_byte", "max": limit, "min_samples": 20}
    later = {"metric": "hats_bits_per_byte", "not_worse_than": "sft", "margin": 9.0}
    sections = {stage: [check] for stage in ("pretrain", "sft", "lora")}
    dpo = [{**later, "min_samples": 20}]
    gates = {"confidence": 0.95, "custom": {**sections, "dpo": dpo}}
    (folder / "gates.yaml").write_text(json.dumps(gates))
    for module in (recipes, outside):
        monkeypatch.setattr(module, "gates_file", lambda: folder / "gates.yaml")


def test_from_a_published_folder_to_a_trained_model(
    model: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    command = ["sft", "--config", str(config), "--run", str(tmp_path / "run")]
    assert cli.execute([*command, "--start-from", str(model), "--dry-run"]) == 0
    assert "0.11 M" in capsys.readouterr().out  # the recipe's model has 0.03 M
    assert not (tmp_path / "run").exists()
    assert cli.execute([*command, "--start-from", str(model)]) == 0
    run = records.open_run(tmp_path / "run")
    verdict = storage.read_json(run.stage("pretrain") / "verdict.json")
    assert verdict["promoted"]
    assert verdict["decontamination"]["unknown_before"] == ["pretrain"]
    taken = run.record("pretrain")
    assert (taken["external"], taken["outside"]["name"]) == (True, "mistral")
    trained = run.record("sft")
    assert trained["external"]
    assert trained["inputs"]["model"] == taken["fingerprint"]
    assert trained["forced_promotions"] == []
    artifacts = {artifact.name: artifact for artifact in lineage.trace(run)}
    (start,) = artifacts["pretrain"].parents
    assert (start.label, start.state) == ("starting model", "outside")
    assert [parent.state for parent in artifacts["sft"].parents] == ["here", "here"]
    # Its own tokenizer and template made the rows; answers were found without markers.
    manifest = storage.read_manifest(run.data("sft"))
    assert manifest["counts"]["dropped"] == {}
    written = AutoModelForCausalLM.from_pretrained(run.model("sft"))
    assert written.config.model_type == "mistral"
    assert written.config.vocab_size == ROWS + PADDING
    text = (run.model("sft") / "chat_template.jinja").read_text()
    assert text == TEMPLATE
    capsys.readouterr()
    # Again, with and without the flag: nothing to do. Another model in that place: refused.
    assert cli.execute([*command, "--start-from", str(model)]) == 0
    assert cli.execute(command) == 0
    assert "taken in" not in capsys.readouterr().out
    other = write_model(tmp_path / "other", sliding_window=None)
    assert cli.execute([*command, "--start-from", str(other)]) == 2
    assert "has another pretrain model than" in capsys.readouterr().err


def test_a_gate_refuses_it_first_and_force_is_recorded(
    model: Path,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_gates(tmp_path, monkeypatch, limit=0.001)
    command = ["sft", "--config", str(config), "--run", str(tmp_path / "run")]
    command += ["--start-from", str(model)]
    assert cli.execute(command) == 3
    assert "was not promoted (hats_bits_per_byte fail); to go on all the same, add --force" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "sft").exists()
    assert cli.execute([*command, "--force", "a trial"]) == 0
    record = records.open_run(tmp_path / "run").record("sft")
    assert record["forced_promotions"] == [{"stage": "pretrain", "reason": "a trial"}]


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own, about optional kernels
def test_an_adapter_trained_on_four_bits_is_merged_into_the_weights_as_they_were(
    model: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["lora", "--config", str(config), "--run", str(run), "--start-from", str(model)]
    command += ["--set", "lora.base=nf4"]
    # dpo's only check compares with sft, and there is none.
    assert cli.execute(command) == 3
    assert "from outside, and every check of custom.dpo compares" in capsys.readouterr().err
    assert cli.execute([*command, "--force", "no check can be made"]) == 0
    record = records.open_run(run).record("lora")
    assert record["config"]["base"] == "nf4"
    losses = record["four_bits"]
    assert losses["validation_loss"] == pytest.approx(record["metrics"]["validation_loss"], abs=1)
    assert losses["merged"] == pytest.approx(losses["validation_loss"], abs=0.1)
    assert losses["merged"] != losses["validation_loss"]
    adapter = storage.read_json(run / "lora" / "adapter" / "adapter_config.json")
    assert adapter["base_model_name_or_path"] == "dpo/model"
    assert cli.execute(["evaluate", "lora", "--run", str(run)]) == 0
    metrics = storage.read_json(run / "lora" / "evaluation.json")["metrics"]
    assert metrics["adapter_off_change"]["value"] == 0
    assert metrics["merge_error"]["value"] < 1


def refusal(folder: Path, config: Path, stage: str = "sft") -> str:
    run = Run(folder=folder.parent / "run", facts={"preset": "custom"})
    found, recipe = recipes.resolve(None, config, [], run.folder)
    with pytest.raises((UsageError, BadDataError, GateRefusedError)) as caught:
        outside.take_in(found, recipe, stage, folder, None)
    assert not run.folder.exists()
    return str(caught.value)


def test_folders_that_cannot_be_started_from_are_refused(
    model: Path, config: Path, tmp_path: Path
) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(model, tmp_path / name))

    assert "no config.json; name a Hugging Face model folder" in refusal(tmp_path, config)
    pickled = broken("pickled")
    for path in pickled.glob("*.safetensors"):
        path.unlink()
    (pickled / "pytest_model.bin").write_bytes(b"\x80")
    assert "other weight files are not read; convert the model with save_p" in refusal(
        pickled, config
    )
    halved, cut = broken("halved"), broken("cut")
    (halved / "model-00002-of-00008.safetensors").unlink()
    assert "00002-of-00008.safetensors: not whole (No such file" in refusal(halved, config)
    shard = cut / "model-00002-of-00008.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "not fully covered); download the model again" in refusal(cut, config)
    silent = broken("silent")
    (silent / "tokenizer.json").unlink()
    assert "no tokenizer.json here; name a folder that holds a fast tok" in refusal(silent, config)
    small = write_model(tmp_path / "small", vocab_size=ROWS - 1)
    assert "every row needs a token" in refusal(small, config)
    short = write_model(tmp_path / "short", max_position_embeddings=64)
    assert "reads 64 tokens, but sft.data.max_length is 128; lower it to that" in refusal(
        short, config
    )
    strange = broken("strange")
    (strange / "config.json").write_text('{"model_type": "no_such"}')
    assert "not one that transformers knows" in refusal(strange, config)
    assert "name the folder of a causal language model" in refusal(strange, config)
