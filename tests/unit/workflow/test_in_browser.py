"""The pages as Chromium shows them: the chat page answers, the report fits, neither loads a thing.

It takes a Chromium on this machine and the package playwright (extra dev).
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sevenfold.base import storage
from sevenfold.base.records import Run
from sevenfold.verify.report import write_report
from sevenfold.workflow import chat
from sevenfold.workflow.completions import Speaker, read_wish
from sevenfold.workflow.serve import Server, open_server

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUESTION = "The <b>cat</b>"
PHONE, DESK = {"width": 390, "height": 800}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with contextlib.closing(opened):
            yield opened


@pytest.fixture
def server(talking_run: Run) -> Iterator[Server]:
    speaker = Speaker(*chat.open_model(talking_run, "sft"), name="run/sft")
    with open_server(speaker, 0) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def opened(browser: Any, address: str, **context: Any) -> tuple[Any, list[str], list[str]]:
    """A page, the addresses that it asked for, and what its console complained about."""
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(20_000)
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    return page, asked, complaints


def fits(page: Any) -> bool:
    return bool(page.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth"))


def test_the_chat_page_talks(browser: Any, server: Server) -> None:
    page, asked, complaints = opened(browser, f"{server.url}/", viewport=PHONE)
    assert page.locator("h1").inner_text() == "run/sft"
    page.fill("#tokens", "40")
    page.fill("#text", QUESTION)
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    lines = page.locator("#talk li")
    assert lines.nth(0).inner_text() == QUESTION  # as text
    assert lines.nth(1).get_attribute("class") == "assistant"
    asked_for = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 40}
    said = server.speaker.answer(read_wish(asked_for, "run/sft"), lambda text: None).text
    assert lines.nth(1).text_content() == said
    assert len(said) > 3
    assert fits(page)
    # What the server refuses is said on the page, and the talk goes on.
    page.fill("#text", "word " * 500)
    page.click("#send")
    page.wait_for_selector("#talk li.error")
    assert "leaves no room" in page.locator("#talk li.error").inner_text()
    page.click("#again")
    assert lines.count() == 0
    assert {address.removeprefix(server.url) for address in asked} == {"/", "/v1/chat/completions"}
    assert [told for told in complaints if "400" not in told] == []


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desktop"])
def test_the_report_fits_in_light_and_dark_and_loads_nothing(
    browser: Any, talking_run: Run, viewport: dict[str, int]
) -> None:
    lines = storage.JsonLines(talking_run.stage("sft") / "metrics.jsonl")
    for step in range(1, 41):
        lines.append({"step": step, "loss": 4 / step, "lr": 1e-3, "grad_norm": 1.0, "tok_s": 9e3})
    why = "gradient norm 1.285 is beyond 6 sigma of the last 128 steps, and more is said of it here"
    lines.append({"step": 41, "event": "skip", "why": why, "rows": ["a_long_name_of_a_file"] * 9})
    path = write_report(talking_run)
    grounds = []
    for scheme in ("light", "dark"):
        page, asked, complaints = opened(
            browser, path.as_uri(), viewport=viewport, color_scheme=scheme
        )
        assert fits(page)
        assert page.locator("ol.strip li").count() == 5
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert [address for address in asked if not address.startswith(("file:", "data:"))] == []
        assert complaints == []
    assert grounds[0] != grounds[1]
