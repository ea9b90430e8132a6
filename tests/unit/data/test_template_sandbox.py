"""A chat template from outside gets its answer written, and nothing else done."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.errors import UsageError
from sevenfold.data import template_sandbox
from sevenfold.data.chat import render, render_prompt
from sevenfold.data.template_sandbox import (
    TemplateForbiddenError,
    TemplateRefusedError,
    render_template,
)

ASK = [{"role": "user", "content": "Tom?"}]
TOKENS = {"bos_token": "<s>"}


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    """Start the process, which takes a while and is done once."""
    assert render_template("{{ bos_token }}", ASK, TOKENS, prompt=False) == "<s>"


HOSTILE: dict[str, tuple[str, str]] = {
    "escape": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "access to attribute '__class__' of 'str' object is unsafe",
    ),
    "escape_by_filter": (
        "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
        "attribute '__class__' of 'str' object is unsafe",
    ),
    "escape_by_format": ("{{ '{0.__class__.__mro__}'.format('') }}", "'__class__' of 'str'"),
    "mutation": ("{{ messages.append(1) }}", "not safely callable|is unsafe"),
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        r"still rendering after 1\.5 s",
    ),
    "endless_power": ("{{ 10 ** (10 ** 10) }}", r"still rendering after 1\.5 s|fills the memory"),
    "huge_range": ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange too big"),
    "huge": ("{{ 'x' * 2000000 }}", "writes 2000000 characters for 4"),
    "huge_loop": (
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "writes 99999000 characters for 4|fills the memory|still rendering",
    ),
    "memory": ("{{ ('x' * 10 ** 10) | length }}", "fills the memory"),
}


@pytest.mark.fault("L04")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped_within_two_seconds(name: str) -> None:
    template, reason = HOSTILE[name]
    started = time.monotonic()
    with pytest.raises(TemplateForbiddenError, match=reason):
        render_template(template, ASK, TOKENS, prompt=True)
    assert time.monotonic() - started < 2.0
    assert render_template("{{ bos_token }}", ASK, TOKENS, prompt=False) == "<s>"


@pytest.mark.fault("L04")
def test_nothing_of_ours_is_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even for a template that got out of the sandbox: no secret, no file."""
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    template_sandbox._renderers[0].close()
    render_template("", ASK, TOKENS, prompt=True)
    process = template_sandbox._renderers[0].process.pid
    assert b"planted-secret" not in Path(f"/proc/{process}/environ").read_bytes()
    limits = Path(f"/proc/{process}/limits").read_text().splitlines()
    assert [line.split()[3] for line in limits if line.startswith("Max file size")] == ["0"]


@pytest.mark.fault("L04")
def test_what_went_wrong_names_the_tokenizer(tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages.append(1) }}"
    with pytest.raises(UsageError, match=r"the chat template was stopped .*mend chat_template\.j"):
        render(other, ASK)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages[3].content }}", "has no element 3"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if %}", "[Ee]xpected"),
    ],
)
def test_a_template_may_refuse_a_conversation(template: str, reason: str) -> None:
    with pytest.raises(TemplateRefusedError, match=reason):
        render_template(template, ASK, TOKENS, prompt=True)


def test_a_template_from_outside_writes_what_transformers_writes(tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}\n"
        "  {{ m | tojson }}{{ m.content | trim }}\u2028é<|end|>{% endfor %}"
        "{% set ns = namespace(n=1) %}{{ ns.n }}{% if add_generation_prompt %}<|assistant|>"
        "{% endif %}"
    )
    expected = other.apply_chat_template(
        ASK, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert render_prompt(other, ASK) == expected["input_ids"]


def test_a_process_that_was_killed_is_started_again() -> None:
    template_sandbox._renderers[0].process.kill()
    with pytest.raises(TemplateForbiddenError, match="it ended the process that rendered it"):
        render_template("", ASK, TOKENS, prompt=True)
    assert render_template("a", ASK, TOKENS, prompt=True) == "a"


def test_a_fork_starts_a_process_of_its_own() -> None:
    ours = template_sandbox._renderers[0]
    template_sandbox._renderers[0].owner = os.getpid() + 1
    assert render_template("a", ASK, TOKENS, prompt=True) == "a"
    assert template_sandbox._renderers[0] is not ours
    ours.close()
