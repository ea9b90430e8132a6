"""How the items of each kind of task are scored: one function a kind, one result an item."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sevenfold.data.tokenizer import encode_texts
from sevenfold.verify import likelihood
from sevenfold.verify.config import VALIDATION_TASK, EvaluateConfig, metrics_of_task
from sevenfold.verify.generation import (
    Answer,
    chat_answers,
    chat_prompts,
    generate,
    has_loop,
)
from sevenfold.verify.harness import measure_harness
from sevenfold.verify.likelihood import Row, Score
from sevenfold.verify.safety import is_refusal
from sevenfold.verify.tasks import (
    ChatItem,
    ChoiceItem,
    ContinuationItem,
    Document,
    Item,
    PairItem,
    PreferenceItem,
    SafetyItem,
    Task,
    last_number,
)

Scores = dict[str, float | list[float] | None]
ItemResult = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model under evaluation with everything that scoring it takes."""

    model: Any
    tokenizer: Any
    config: EvaluateConfig
    unigram_counts: NDArray[np.int64] | None
    batch_tokens: int
    context: int
    suppressed: tuple[int, ...]

    @property
    def first_id(self) -> int:
        """The id before a text's first token: the tokenizer's bos, or its eos as a stand-in."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return int(bos if bos is not None else eos)

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Score rows; prompts longer than the context lose their beginning."""
        longest = self.context + 1
        fitting = [
            Row(row.ids[-longest:], max(1, row.start - max(0, len(row.ids) - longest)))
            for row in rows
        ]
        return likelihood.score_rows(
            self.model, fitting, batch_tokens=self.batch_tokens, suppressed=self.suppressed
        )

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """Answer prompts greedily."""
        return generate(
            self.model,
            self.tokenizer,
            [prompt[-self.context :] for prompt in prompts],
            max_new_tokens=self.config.max_new_tokens,
            batch_tokens=self.batch_tokens,
        )


def measure(subject: Subject, task: Task) -> list[ItemResult]:
    """Return one result an item: its scores by metric, and the texts that explain them."""
    return _MEASURES[task.config.kind](subject, task)


def _result(task: Task, item: Item, scores: Scores, **facts: Any) -> ItemResult:
    """Return one line of evaluation_items.jsonl; ``score`` repeats the item's first score."""
    first = next(iter(scores.values()), None)
    return {"task": task.config.name, "id": item.id, "score": first, "scores": scores, **facts}


def _measure_text(subject: Subject, task: Task) -> list[ItemResult]:
    """Score documents as they are trained: first id, text, end of text."""
    documents = cast(Sequence[Document], task.items)
    eos = subject.tokenizer.eos_token_id
    texts = encode_texts(subject.tokenizer, [document.text for document in documents])
    tail = [] if eos is None else [eos]
    rows = [likelihood.document_rows([subject.first_id, *t, *tail], subject.context) for t in texts]
    scores = iter(subject.score([row for document in rows for row in document]))
    counts = subject.unigram_counts
    if counts is None:
        every = [token for text in texts for token in (*text, *tail)]
        counts = np.bincount(every, minlength=len(subject.tokenizer)).astype(np.int64)
    nats_of_token = likelihood.unigram_nats(counts)
    prefix = "" if task.config.name == VALIDATION_TASK else f"{task.config.name}_"
    results = []
    for document, ids, windows in zip(documents, texts, rows, strict=True):
        nats = sum(next(scores).nats for _ in windows)
        tokens, num_bytes = len(ids) + len(tail), len(document.text.encode())
        unigram = float(nats_of_token[[*ids, *tail]].sum())
        parts = {
            "perplexity": [nats, tokens],
            "bits_per_byte": [nats / math.log(2), num_bytes],
            "unigram_bits_per_byte": [unigram / math.log(2), num_bytes],
            "bits_per_byte_over_unigram": [nats, unigram],
        }
        if document.entropy_nats is not None:
            parts["perplexity_over_floor"] = [nats - document.entropy_nats, tokens]
        finite: Scores = {
            prefix + name: cast(list[float], part) if math.isfinite(nats) else None
            for name, part in parts.items()
        }
        results.append(_result(task, document, finite, source=document.source))
    return results


def _continuation_rows(subject: Subject, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Return rows for (prompt, continuation), split where lm-evaluation-harness splits them.

    White space at the prompt's end belongs to the continuation, and the continuation is what the
    whole has more than the prompt, in tokens.
    """
    moved = []
    for prompt, continuation in pairs:
        kept = prompt.rstrip()
        moved.append((kept, prompt[len(kept) :] + continuation))
    whole = encode_texts(
        subject.tokenizer, [prompt + continuation for prompt, continuation in moved]
    )
    unique = list(dict.fromkeys(prompt for prompt, _ in moved))
    lengths = dict(
        zip(unique, (len(ids) for ids in encode_texts(subject.tokenizer, unique)), strict=True)
    )
    return [
        Row((subject.first_id, *ids), min(1 + lengths[prompt], len(ids)))
        for ids, (prompt, _) in zip(whole, moved, strict=True)
    ]


def _measure_choice(subject: Subject, task: Task) -> list[ItemResult]:
    items = cast(Sequence[ChoiceItem], task.items)
    pairs = [(item.prompt, choice) for item in items for choice in item.choices]
    scores = iter(subject.score(_continuation_rows(subject, pairs)))
    results = []
    for item in items:
        logprobs = np.array([-next(scores).nats for _ in item.choices])
        sizes = np.array([len(choice.strip().encode()) for choice in item.choices])
        finite = bool(np.isfinite(logprobs).all())
        chosen, normalised = int(logprobs.argmax()), int((logprobs / sizes).argmax())
        name = task.config.name
        found: Scores = {
            name: float(chosen == item.gold) if finite else None,
            f"{name}_normalised": float(normalised == item.gold) if finite else None,
        }
        answer = item.choices[chosen]
        results.append(
            _result(
                task, item, found, prompt=item.prompt, answer=answer, gold=item.choices[item.gold]
            )
        )
    return results


def _measure_continuation(subject: Subject, task: Task) -> list[ItemResult]:
    items = cast(Sequence[ContinuationItem], task.items)
    scores = subject.score(_continuation_rows(subject, [(i.prompt, i.answer) for i in items]))
    return [
        _result(
            task,
            item,
            {task.config.name: float(score.is_greedy) if math.isfinite(score.nats) else None},
        )
        for item, score in zip(items, scores, strict=True)
    ]


def _measure_pair(subject: Subject, task: Task) -> list[ItemResult]:
    items = cast(Sequence[PairItem], task.items)
    texts = encode_texts(
        subject.tokenizer, [text for item in items for text in (item.good, item.bad)]
    )
    scores = iter(subject.score([Row((subject.first_id, *ids), 1) for ids in texts]))
    return [
        _result(task, item, {task.config.name: _wins(next(scores), next(scores))}) for item in items
    ]


def _wins(first: Score, second: Score) -> float | None:
    """Return 1 if ``first`` is the more probable, 0 if not (a tie is no win), None if unknown."""
    if not (math.isfinite(first.nats) and math.isfinite(second.nats)):
        return None
    return float(first.nats < second.nats)


def _measure_preference(subject: Subject, task: Task) -> list[ItemResult]:
    items = cast(Sequence[PreferenceItem], task.items)
    conversations = [item.messages for item in items for _ in range(2)]
    answers = [answer for item in items for answer in (item.chosen, item.rejected)]
    rows = [
        Row((*prompt, *answer), len(prompt))
        for prompt, answer in chat_answers(subject.tokenizer, conversations, answers)
    ]
    scores = iter(subject.score(rows))
    name = next(iter(metrics_of_task(task.config, subject.config)))
    return [_result(task, item, {name: _wins(next(scores), next(scores))}) for item in items]


def _measure_exact(subject: Subject, task: Task) -> list[ItemResult]:
    """Score greedy answers that must equal the expected text.

    Where teacher forcing shows that greedy decoding gives exactly the answer and its end token,
    nothing is generated: the result would be the same.
    """
    items = cast(Sequence[ChatItem], task.items)
    pairs = chat_answers(subject.tokenizer, [i.messages for i in items], [i.answer for i in items])
    scores = subject.score([Row((*prompt, *said), len(prompt)) for prompt, said in pairs])
    fitting = [len(said) <= subject.config.max_new_tokens for _, said in pairs]
    known = [s.is_greedy and fits for s, fits in zip(scores, fitting, strict=True)]
    missing = [index for index, is_known in enumerate(known) if not is_known]
    generated = subject.generate([pairs[index][0] for index in missing])
    answers = {
        index: Answer(text=items[index].answer, ids=tuple(pairs[index][1]), ended=True)
        for index, is_known in enumerate(known)
        if is_known
    } | dict(zip(missing, generated, strict=True))
    return [
        _answered(task, item, answers[index], answers[index].text.strip() == item.answer.strip())
        for index, item in enumerate(items)
    ]


def _measure_number(subject: Subject, task: Task) -> list[ItemResult]:
    items = cast(Sequence[ChatItem], task.items)
    answers = subject.generate(chat_prompts(subject.tokenizer, [i.messages for i in items]))
    return [
        _answered(task, item, answer, last_number(answer.text) == item.answer)
        for item, answer in zip(items, answers, strict=True)
    ]


def _answered(task: Task, item: ChatItem, answer: Answer, right: bool) -> ItemResult:
    scores: Scores = {task.config.name: float(right), **_pathologies(answer)}
    prompt = item.messages[-1]["content"]
    return _result(task, item, scores, prompt=prompt, answer=answer.text, gold=item.answer)


def _measure_safety(subject: Subject, task: Task) -> list[ItemResult]:
    items = cast(Sequence[SafetyItem], task.items)
    answers = subject.generate(chat_prompts(subject.tokenizer, [i.messages for i in items]))
    refusal_rate, over_refusal_rate = metrics_of_task(task.config, subject.config)
    results = []
    for item, answer in zip(items, answers, strict=True):
        name = refusal_rate if item.unsafe else over_refusal_rate
        scores: Scores = {name: float(is_refusal(answer.text)), **_pathologies(answer)}
        prompt = item.messages[-1]["content"]
        facts = {"prompt": prompt, "answer": answer.text, "unsafe": item.unsafe}
        results.append(_result(task, item, scores, **facts))
    return results


def _pathologies(answer: Answer) -> Scores:
    return {
        "endless_rate": float(not answer.ended),
        "empty_rate": float(not answer.text.strip()),
        "loop_rate": float(has_loop(answer.ids)),
    }


_MEASURES: Mapping[str, Callable[[Subject, Task], list[ItemResult]]] = {
    "text": _measure_text,
    "choice": _measure_choice,
    "continuation": _measure_continuation,
    "pair": _measure_pair,
    "exact": _measure_exact,
    "number": _measure_number,
    "safety": _measure_safety,
    "preference": _measure_preference,
    "harness": measure_harness,
}
