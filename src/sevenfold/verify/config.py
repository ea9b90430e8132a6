"""What an evaluation measures, and the names of its metrics, known before anything is measured."""

from __future__ import annotations

import urllib.parse
from typing import Annotated, Literal

from pydantic import Field

from sevenfold.base.config import configuration

TaskKind = Literal[
    "text", "choice", "continuation", "pair", "exact", "number", "safety", "preference", "harness"
]
Stage = Literal["pretrain", "sft", "dpo", "lora"]
Better = Literal["higher", "lower"]

STAGES: tuple[Stage, ...] = ("pretrain", "sft", "dpo", "lora")
# These go through the chat template, which a pretrained model has not seen yet.
CHAT_KINDS = frozenset({"exact", "number", "safety", "preference"})
GENERATING_KINDS = frozenset({"exact", "number", "safety"})
VALIDATION_TASK = "validation"

TEXT_METRICS: dict[str, Better] = {
    "perplexity": "lower",
    "bits_per_byte": "lower",
    "unigram_bits_per_byte": "lower",
    "bits_per_byte_over_unigram": "lower",
    "perplexity_over_floor": "lower",
}
SAFETY_METRICS: dict[str, Better] = {"refusal_rate": "higher", "over_refusal_rate": "lower"}
PATHOLOGY_METRICS: dict[str, Better] = {
    "endless_rate": "lower",
    "empty_rate": "lower",
    "loop_rate": "lower",
}
# What lm-evaluation-harness scores item by item, so that a gate can judge it.
HARNESS_METRICS: dict[str, Better] = {
    "acc": "higher",
    "acc_norm": "higher",
    "exact_match": "higher",
    "perplexity": "lower",
    "word_perplexity": "lower",
    "byte_perplexity": "lower",
    "bits_per_byte": "lower",
}
ADAPTER_METRICS: dict[str, Better] = {
    "adapter_off_change": "lower",
    "merge_error": "lower",
    "merge_kl": "lower",
}


@configuration
class TaskConfig:
    """One task: its name, the kind of its items, and the file they stand in.

    Without ``path`` a task is the run's own: its validation documents for the text task named
    ``validation``, otherwise ``data/raw/evaluation/<name>.jsonl``. ``max_items`` draws a seeded
    sample. ``stages`` defaults to all stages, and to those after pretraining for kinds that go
    through the chat template. ``delimiter`` joins prompt and choice of layouts that say nothing
    about it; ``unsafe`` labels prompt files that hold one kind of prompt only.

    Kind ``harness`` is a task of lm-evaluation-harness: ``path`` is its name there (``name`` if
    there is no path), or a YAML file of a task with its items beside it.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    kind: TaskKind
    path: str | None = None
    max_items: Annotated[int, Field(ge=1)] | None = None
    stages: tuple[Stage, ...] | None = None
    delimiter: str = " "
    unsafe: bool | None = None

    @property
    def file(self) -> str | None:
        """The file of the task's items, or the YAML file of a task of the harness."""
        is_name = self.kind == "harness" and not (self.path or "").endswith((".yaml", ".yml"))
        return None if is_name else self.path

    def is_measured_at(self, stage: str) -> bool:
        """True if the task belongs to the evaluation of ``stage``."""
        if self.stages is not None:
            return stage in self.stages
        return stage != "pretrain" or self.kind not in CHAT_KINDS


@configuration
class JudgeConfig:
    """A judge model for the answers of safety tasks, at an OpenAI-compatible ``address``.

    ``address`` ends where ``/chat/completions`` follows, as in ``https://host/v1``.
    ``key_variable`` names the environment variable that holds the key, null if none is sent; a key
    itself is never a setting. An answer is asked about ``attempts`` times at most, each time for
    ``timeout_s``. ``allow_cleartext`` lets answers and key go over http to other machines.
    """

    address: str
    model: Annotated[str, Field(min_length=1)]
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None
    timeout_s: Annotated[float, Field(gt=0, le=600)]
    attempts: Annotated[int, Field(ge=1, le=10)]
    allow_cleartext: bool

    def __post_init__(self) -> None:
        """Refuse an address that holds secrets, is none, or would be spoken to in cleartext."""
        try:
            parts = urllib.parse.urlsplit(self.address)
            host, _ = parts.hostname, parts.port
        except ValueError:
            parts, host = urllib.parse.urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host or not self.address.isprintable():
            raise ValueError("'address' is an http or https address, such as https://host/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(
                "'address' holds a user, query or fragment; secrets go into the environment, and "
                "'key_variable' names the variable"
            )
        is_local = host in ("localhost", "127.0.0.1", "::1")
        if parts.scheme == "http" and not is_local and not self.allow_cleartext:
            raise ValueError(
                "'address' would send answers and key in cleartext to another machine; use https, "
                "or set 'allow_cleartext'"
            )


@configuration
class EvaluateConfig:
    """What is measured after every stage.

    ``confidence`` is that of the intervals in ``evaluation.json`` (a gate uses its own file's);
    ``max_new_tokens`` ends a generation that does not end itself; ``batch_tokens`` bounds one
    forward pass and changes speed only. ``judge`` is asked apart from all that a gate reads.
    """

    tasks: Annotated[tuple[TaskConfig, ...], Field(min_length=1)]
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    seed: int
    max_new_tokens: Annotated[int, Field(ge=1)]
    sample_prompts: tuple[str, ...] = ()
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    judge: JudgeConfig | None = None

    def __post_init__(self) -> None:
        """Refuse two tasks of one name."""
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"task '{twice[0]}' stands twice")

    def tasks_of(self, stage: str) -> tuple[TaskConfig, ...]:
        """Return the tasks measured after ``stage``."""
        return tuple(task for task in self.tasks if task.is_measured_at(stage))


def metrics_of_task(task: TaskConfig, config: EvaluateConfig) -> dict[str, Better]:
    """Return the metrics of one task, each with whether higher or lower is better.

    Safety and preference metrics carry the task's name only where there are several such tasks.
    """
    alone = sum(other.kind == task.kind for other in config.tasks) == 1
    prefix = "" if alone else f"{task.name}_"
    if task.kind == "text":
        prefix = "" if task.name == VALIDATION_TASK else f"{task.name}_"
        return {prefix + name: better for name, better in TEXT_METRICS.items()}
    if task.kind == "safety":
        return {prefix + name: better for name, better in SAFETY_METRICS.items()}
    if task.kind == "preference":
        return {prefix + "preference_accuracy": "higher"}
    if task.kind == "harness":
        return {f"{task.name}_{name}": better for name, better in HARNESS_METRICS.items()}
    if task.kind == "choice":
        return {task.name: "higher", f"{task.name}_normalised": "higher"}
    return {task.name: "higher"}


def metrics_of_stage(config: EvaluateConfig, stage: str) -> dict[str, Better]:
    """Return every metric that the evaluation of ``stage`` may hold."""
    metrics: dict[str, Better] = {}
    for task in config.tasks_of(stage):
        metrics |= metrics_of_task(task, config)
        if task.kind in GENERATING_KINDS:
            metrics |= PATHOLOGY_METRICS
    return metrics | ADAPTER_METRICS if stage == "lora" else metrics


def known_metrics(config: EvaluateConfig) -> set[str]:
    """Return the names of all metrics of all stages, from the recipe alone."""
    return {name for stage in STAGES for name in metrics_of_stage(config, stage)}
