"""What the browser tests share: how to open a page, and what is read from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SLOW_MACHINE = 20_000
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's browser, without a window."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """The page, once it shows an answer; whatever was done on it, only its own host was asked, and no script failed."""
    context = browser.new_context(**{"viewport": WIDE, **options})
    tab = context.new_page()
    tab.set_default_timeout(SLOW_MACHINE)
    asked: list[str] = []
    failed: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: failed.append(str(error)))
    tab.goto(address)
    tab.locator("#pg-answer .pg-bars li").first.wait_for()
    yield tab
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    context.close()
    assert hosts == {urlsplit(address).netloc}
    assert failed == []


def told(tab: Page) -> str:
    """The sentence above the bars."""
    return tab.locator("#pg-answer .pg-sentence").inner_text()


def says(tab: Page, text: str) -> None:
    """Wait for the sentence to contain a text."""
    expect(tab.locator("#pg-answer .pg-sentence")).to_contain_text(text, timeout=SLOW_MACHINE)


def upload(tab: Page, path: Path) -> None:
    """Clear the photo and choose a file in its place."""
    clear = tab.locator("#pg-photo").get_by_role("button", name="Remove Image")
    if clear.count():
        clear.first.click()
    tab.locator("#pg-photo input[type=file]").first.set_input_files(str(path))
