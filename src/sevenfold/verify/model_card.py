"""``README.md`` of a model: a card in Hugging Face's layout, written from the run's own record.

The card lies beside the files that a model is fingerprinted by and is none of them, so that it can
tell the verdict that came after them. Nothing reads it back.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sevenfold.base import storage
from sevenfold.base.records import STAGES, Run
from sevenfold.verify import data_card, lineage, report_text, standing
from sevenfold.verify.data_card import DataSource

TITLES = {
    "init": "initial model, untrained",
    "pretrain": "pretrained on text",
    "sft": "fine-tuned on conversations",
    "dpo": "tuned on preferences",
    "lora": "adapted with LoRA, merged",
}
VILLAGE = "village"
# The names that Hugging Face has for licences, by what publishers write.
LICENCES = {
    "apache-2.0": "apache-2.0",
    "bsd-3-clause": "bsd-3-clause",
    "cc-by-3.0": "cc-by-3.0",
    "cc-by-4.0": "cc-by-4.0",
    "cc-by-nc-4.0": "cc-by-nc-4.0",
    "cc-by-sa-3.0": "cc-by-sa-3.0",
    "cc-by-sa-4.0": "cc-by-sa-4.0",
    "cc0-1.0": "cc0-1.0",
    "mit": "mit",
    "odc-by": "odc-by",
    "odc-by-1.0": "odc-by",
    "pddl": "pddl",
}
MAX_HEADER_BYTES = 100_000_000
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MARKED = re.compile(r"([\\`*_\[\]<>|#!])")


def write_card(run: Run, stage: str, folder: Path, *, gguf_file: str | None = None) -> Path:
    """Write the card of the model of ``stage`` into ``folder``, which holds it or a copy of it.

    ``gguf_file``: the name of the one file that the copy is.

    Errors:
        UsageError: the stage has not finished.
        BadDataError: a record, verdict, evaluation or manifest cannot be read.
    """
    path = folder / storage.CARD
    storage.write_sealed_text(path, card(run, stage, gguf_file=gguf_file))
    return path


def card(run: Run, stage: str, *, gguf_file: str | None = None) -> str:
    """Return the card of the model of ``stage``, in Markdown."""
    record = run.record(stage)
    evaluation, verdict = (_read(run.stage(stage) / f"{n}.json") for n in ("evaluation", "verdict"))
    held = standing.judge(run, stage, record=record, verdict=verdict, started=True)
    artifacts = _ancestors(lineage.trace(run), stage)
    made_from = {artifact.name for artifact in artifacts}
    sources = [s for s in data_card.sources(run) if _label_is_used(s.used_as, made_from)]
    name = f"{run.folder.resolve().name} / {stage}"
    parts = [
        _header(stage, held, sources),
        f"# {_plain(name)}",
        _standing(stage, held, record),
        _what_it_is(run, stage, record),
        _loading(stage, gguf_file),
        _made(run, record, artifacts),
        _data(sources),
        _measured(evaluation if evaluation.get("fingerprint") == _bytes(run, stage) else {}),
        _gate(verdict if held.word in ("pass", "fail", "inconclusive") else {}),
        _limits(sources),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(stage: str, held: standing.Standing, sources: Sequence[DataSource]) -> str:
    """Return the YAML block that Hugging Face reads; nothing is guessed that is not recorded."""
    licences = {source.licence.lower() for source in sources}
    known = {LICENCES.get(licence, "other") for licence in licences - {""}}
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not sources or "" in licences:
        values["license"] = "unknown"
    elif known == {"other"} or len(known) > 1:
        words = re.findall(r"[a-z0-9.]+", " ".join(licences) if len(licences) == 1 else "")
        name = "-".join(words) or "those-of-the-data-sources-below"
        values |= {"license": "other", "license_name": name}
    else:
        values["license"] = known.pop()
    if sources and all(source.name == VILLAGE for source in sources):
        values["language"] = ["en"]
    hub = [s.location or s.name for s in sources if _HUB_NAME.fullmatch(s.location or s.name)]
    if hub:
        values["datasets"] = sorted(set(hub))
    promoted = "promoted" if held.word == "pass" else "not-promoted"
    values["tags"] = ["sevenfold", "llama", stage, promoted]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _standing(stage: str, held: standing.Standing, record: Mapping[str, Any]) -> str:
    """Return what the gates said, first of all what was gone past."""
    lines = []
    if held.word == "pass":
        lines.append(f"> **Promoted by its gate**: {held.why}.")
    elif stage != STAGES[0]:
        why = f" ({_plain(held.why)})" if held.why else ""
        lines.append(f"> **Not promoted by its gate**: {held.word}{why}.")
    if held.forced:
        lines.append(f"> **Gone past by force**: {_plain(held.forced)}")
    for passed in record.get("forced_promotions") or ():
        reason = _plain(str(passed.get("reason")))
        lines.append(
            f"> **Rests on {_plain(str(passed.get('stage')))}, whose gate was gone past by "
            f"force**: {reason}"
        )
    return "\n>\n".join(lines)


def _what_it_is(run: Run, stage: str, record: Mapping[str, Any]) -> str:
    config = _read(run.model(stage) / "config.json")
    number = num_parameters(run.model(stage))
    facts = [
        ("architecture", ", ".join(map(str, config.get("architectures") or ())) or "unknown"),
        ("parameters", report_text.size(number) if number else "unknown"),
        ("context", f"{config['max_position_embeddings']:,} tokens")
        if isinstance(config.get("max_position_embeddings"), int)
        else ("context", "unknown"),
        ("vocabulary", f"{config.get('vocab_size', 'unknown')}"),
        ("weights", str(config.get("dtype") or config.get("torch_dtype") or "unknown")),
        ("made by", f"Sevenfold {record.get('code') or run.facts.get('code') or 'unknown'}"),
    ]
    start = " It started from a model from outside this run." if record.get("external") else ""
    return f"A language model, {TITLES[stage]}.{start}\n\n" + _table(("", ""), facts)


def _loading(stage: str, gguf_file: str | None) -> str:
    place = f"folder, gguf_file={json.dumps(gguf_file)}" if gguf_file else "folder"
    with_llama = f"llama.cpp: `llama-cli -m {gguf_file}`. Transformers:\n\n" if gguf_file else ""
    if stage in STAGES[2:]:
        ask = (
            'messages = [{"role": "user", "content": "Who are you?"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    else:
        ask = 'inputs = tokenizer("The", return_tensors="pt")'
    return (
        f"## How to load it\n\n{with_llama}```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # where this file lies\n'
        f"tokenizer = AutoTokenizer.from_pretrained({place})\n"
        f"model = AutoModelForCausalLM.from_pretrained({place})\n"
        f"{ask}\n"
        "output = model.generate(**inputs, max_new_tokens=100)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))\n```'
    )


def _made(run: Run, record: Mapping[str, Any], artifacts: Sequence[lineage.Artifact]) -> str:
    rows = [
        (
            artifact.label,
            f"`{artifact.fingerprint[:16]}`",
            ", ".join(f"{p.label} `{p.fingerprint[:16]}` ({p.state})" for p in artifact.parents),
        )
        for artifact in artifacts
    ]
    device = report_text.device(record.get("gpu"), record.get("num_gpus"))
    spent = report_text.duration(record.get("elapsed_s"))
    facts = [
        f"Recipe `{str(run.facts.get('fingerprint', 'unknown'))[:16]}`",
        *([f"last stage trained in {spent} on {device}"] if device and spent else []),
        *([f"seed {record['seed']}"] if isinstance(record.get("seed"), int) else []),
    ]
    return (
        "## How it was made\n\n"
        + _table(("artifact", "fingerprint", "made from"), rows, escaped=True)
        + f"\n\n{', '.join(facts)}. Fingerprints are SHA-256 over the files' SHA-256, their first "
        "16 digits; `here`: the run still holds exactly these bytes."
    )


def _data(sources: Sequence[DataSource]) -> str:
    rows = [
        (
            source.name,
            source.used_as,
            "" if source.amount is None else f"{report_text.count(source.amount)} {source.unit}",
            source.licence or "unknown",
        )
        for source in sources
    ]
    table = _table(("source", "used as", "amount", "licence"), rows)
    return f"## Data\n\n{table if rows else 'No source is recorded.'}"


def _measured(evaluation: Mapping[str, Any]) -> str:
    metrics = evaluation.get("metrics")
    if not isinstance(metrics, Mapping) or not metrics:
        return "## Measured\n\nThis model has not been measured."
    rows = [
        (name, *(report_text.number(m.get(key)) for key in ("value", "low", "high", "n")))
        for name, m in metrics.items()
        if isinstance(m, Mapping)
    ]
    confidence = next(iter(metrics.values())).get("confidence")
    said = f"Intervals at {confidence:.0%}, over items" if isinstance(confidence, float) else ""
    return (
        "## Measured\n\n"
        + _table(("metric", "value", "low", "high", "n"), rows)
        + (f"\n\n{said}; another training would differ by more." if said else "")
    )


def _gate(verdict: Mapping[str, Any]) -> str:
    checks = [c for c in verdict.get("checks") or () if isinstance(c, Mapping)]
    if not checks:
        return "## Gate\n\nNo verdict holds for these bytes."
    rows = [
        (
            str(check.get("metric")),
            str(check.get("direction", "")).partition(":")[0],
            report_text.number(check.get("threshold")),
            str(check.get("result")),
            str(check.get("why") or ""),
        )
        for check in checks
    ]
    return "## Gate\n\n" + _table(("metric", "bound", "threshold", "result", "why"), rows)


def _limits(sources: Sequence[DataSource]) -> str:
    village = sources and all(source.name == VILLAGE for source in sources)
    own = (
        "It knows nothing but a generated village of a few people, and no fact about the world. "
        if village
        else ""
    )
    return (
        f"## Limits\n\n{own}What is not in the tables above was not measured: other languages, "
        "bias, memorised training text, advice on health, law or money. Refusals were counted on "
        "the prompts of the evaluation only, and a model that refuses those can be led to answer "
        "others. Look at its answers before you rely on them."
    )


def num_parameters(folder: Path) -> int:
    """Return the number of values that the headers of a folder's safetensors files announce."""
    return sum(_num_values(path) for path in sorted(folder.glob("*.safetensors")))


def _num_values(path: Path) -> int:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size < MAX_HEADER_BYTES else b"{}"
    try:
        tensors = json.loads(header)
        return sum(math.prod(t["shape"]) for k, t in tensors.items() if k != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError):
        return 0


def _ancestors(artifacts: Sequence[lineage.Artifact], stage: str) -> list[lineage.Artifact]:
    wanted = {stage}
    for artifact in reversed(artifacts):
        if artifact.name in wanted:
            wanted |= {parent.name for parent in artifact.parents}
    return [artifact for artifact in artifacts if artifact.name in wanted]


def _label_is_used(label: str, made_from: set[str]) -> bool:
    return any(
        used == label and f"data/{folder}" in made_from
        for folder, used in lineage.DATA_FOLDERS.items()
    )


def _bytes(run: Run, stage: str) -> str | None:
    manifest = lineage.read_manifest_if_there(run.model(stage))
    return None if manifest is None else str(manifest["fingerprint"])


def _read(path: Path) -> dict[str, Any]:
    value = storage.read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def _plain(text: str) -> str:
    """Return people's text as one line that Markdown shows as it is."""
    return _MARKED.sub(r"\\\1", " ".join(text.split()))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, escaped: bool = False) -> str:
    def lines() -> Iterator[str]:
        yield f"| {' | '.join(head)} |"
        yield f"|{' --- |' * len(head)}"
        for row in rows:
            yield f"| {' | '.join(row if escaped else map(_plain, row))} |"

    return "\n".join(lines())
