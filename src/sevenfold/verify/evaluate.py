"""Measure a model on tasks: per-item scores first, then every metric from its items."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sevenfold.data.tokenizer import encode_texts
from sevenfold.model.attention import kernels_for_changing_lengths
from sevenfold.verify import likelihood
from sevenfold.verify.config import (
    GENERATING_KINDS,
    PATHOLOGY_METRICS,
    EvaluateConfig,
    TaskConfig,
    metrics_of_task,
)
from sevenfold.verify.generation import chat_prompts
from sevenfold.verify.measures import ItemResult, Subject, measure
from sevenfold.verify.statistics import Kind, estimate, metric_seed
from sevenfold.verify.tasks import Document, Task

__all__ = ["EvaluateConfig", "Evaluation", "TaskConfig", "evaluate_model"]

log = logging.getLogger(__name__)

_TEXT_KINDS: dict[str, Kind] = {
    "perplexity": "exp_ratio",
    "bits_per_byte": "ratio",
    "unigram_bits_per_byte": "ratio",
    "bits_per_byte_over_unigram": "ratio",
    "perplexity_over_floor": "exp_ratio",
}
_SAMPLES_PER_TASK = 2
_SAMPLE_PROMPT_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """``metrics`` by name, per-item results, and a few answers to look at."""

    metrics: dict[str, dict[str, Any]]
    items: list[ItemResult]
    samples: list[dict[str, Any]]


@kernels_for_changing_lengths()
def evaluate_model(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    config: EvaluateConfig,
    *,
    unigram_counts: NDArray[np.int64] | None,
) -> Evaluation:
    """Measure ``model`` on ``tasks``.

    ``unigram_counts`` [v] are the training text's token counts; without them the unigram model is
    fitted to the very text it is measured on, which favours it.
    """
    model.eval()
    device = model.get_input_embeddings().weight.device
    generation = getattr(model, "generation_config", None)
    subject = Subject(
        model=model,
        tokenizer=tokenizer,
        config=config,
        unigram_counts=unigram_counts,
        batch_tokens=config.batch_tokens or likelihood.default_batch_tokens(device),
        context=int(model.config.max_position_embeddings),
        suppressed=tuple(getattr(generation, "suppress_tokens", None) or ()),
    )
    metrics: dict[str, dict[str, Any]] = {}
    items: list[ItemResult] = []
    for task in tasks:
        started_at_s = time.monotonic()
        results = measure(subject, task)
        seconds = round(time.monotonic() - started_at_s, 3)
        names = metrics_of_task(task.config, config)
        metrics |= _summarised(results, names, task.config.name, config, seconds)
        items += results
        log.debug("%s: %d items in %.1f s", task.config.name, len(task.items), seconds)
    if any(task.config.kind in GENERATING_KINDS for task in tasks):
        metrics |= _summarised(items, PATHOLOGY_METRICS, None, config, 0.0)
    return Evaluation(metrics=metrics, items=items, samples=_samples(subject, tasks, items))


def _summarised(
    results: Sequence[ItemResult],
    names: Mapping[str, str],
    task: str | None,
    config: EvaluateConfig,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """Return each metric that some item has a score for, with its interval."""
    metrics = {}
    for name, better in names.items():
        scores = [_as_numbers(r["scores"][name]) for r in results if name in r["scores"]]
        if not scores:
            continue
        kind: Kind = next(
            (k for n, k in _TEXT_KINDS.items() if len(scores[0]) == 2 and name.endswith(n)),
            "proportion",
        )
        found = estimate(kind, scores, confidence=config.confidence, seed=metric_seed(name))
        metrics[name] = {
            **dataclasses.asdict(found),
            "kind": kind,
            "confidence": config.confidence,
            "better": better,
            "task": task,
            "seconds": seconds,
        }
    return metrics


def _as_numbers(score: float | list[float] | None) -> list[float]:
    if score is None:
        return [math.nan]
    return score if isinstance(score, list) else [score]


def _samples(
    subject: Subject, tasks: Sequence[Task], items: Sequence[ItemResult]
) -> list[dict[str, Any]]:
    """Return answers to look at: the recipe's prompts, and the first items that were answered."""
    samples: list[dict[str, Any]] = []
    answered = [task.config.name for task in tasks if task.config.kind in GENERATING_KINDS]
    for name in answered:
        own = [item for item in items if item["task"] == name]
        picked = own[:_SAMPLES_PER_TASK] + own[-_SAMPLES_PER_TASK:]
        for item in {item["id"]: item for item in picked}.values():
            fields = {"task": name, "prompt": item["prompt"], "answer": item["answer"]}
            samples.append({**fields, "expected": item.get("gold")})
    if answered:
        asked = subject.config.sample_prompts
        prompts = [({"role": "user", "content": prompt},) for prompt in asked]
        ids = chat_prompts(subject.tokenizer, prompts)
        continued = zip(asked, subject.generate(ids), strict=True)
        return [{"task": None, "prompt": p, "answer": a.text} for p, a in continued] + samples
    texts = [item.text for task in tasks for item in task.items[:3] if isinstance(item, Document)]
    if not texts:
        return []
    starts = [ids[:_SAMPLE_PROMPT_TOKENS] for ids in encode_texts(subject.tokenizer, texts)]
    begun = zip(starts, subject.generate([[subject.first_id, *s] for s in starts]), strict=True)
    return [
        {"task": "text", "prompt": subject.tokenizer.decode(start), "answer": answer.text}
        for start, answer in begun
    ]
