"""What the page of the embedded checkpoint does, measured in a browser: times, contrast, odd uploads, hosts asked for.

`python tests/demo/page_tables.py` writes `benchmarks/results/demo_page.json` and the tables of `docs/demo.md`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from browsing import NARROW, WIDE, chromium, opened, told, upload
from conftest import serve
from legibility import TABS, contrasts, open_tab
from odd_photos import ANSWERED, REFUSED
from playwright.sync_api import Browser, Page

from phantomgrad_demo.markup import NO_PHOTO

ROOT = Path(__file__).parents[2]
STARTS, VISITS, ROUNDS = 3, 8, 6
TOO_LONG = ("21 MB", ("long.jpg", lambda: bytes(21 * 2**20)))
FIRST_LOOK = """
new MutationObserver((_, observer) => {
    if (!document.querySelector('#pg-answer .pg-bars li')) return;
    observer.disconnect();
    requestAnimationFrame(() => { window.answered = performance.now(); });
}).observe(document, { childList: true, subtree: true });
"""
PICK = """(name) => new Promise((resolve) => {
    const sentence = document.querySelector('#pg-answer .pg-sentence'), before = sentence.textContent;
    const began = performance.now();
    let first = null;
    new MutationObserver((_, observer) => {
        if (sentence.textContent === before) return;
        const ended = document.querySelector('#pg-answer [data-running]').dataset.running === 'false';
        if (ended) observer.disconnect();
        requestAnimationFrame(() => {
            first ??= performance.now() - began;
            if (ended) resolve([first, performance.now() - began]);
        });
    }).observe(document.querySelector('#pg-answer'), { childList: true, subtree: true, attributes: true });
    document.querySelector(`#pg-examples button[title="${name}"]`).click();
})"""
"""Milliseconds from the click on an example to the first step that is drawn, and to the answer."""


ANSWERED_OR_TOLD = """(nothing) => document.querySelector('.toast-body')
    || (document.querySelector('#pg-answer .pg-sentence').textContent !== nothing
        && document.querySelector('#pg-answer [data-running]').dataset.running === 'false')"""


def seconds_to_answer(folder: Path) -> float:
    """From the start of the server's process to a page that answers."""
    began = time.perf_counter()
    with serve(Path("embedded"), folder) as address, urllib.request.urlopen(address) as response:
        assert response.status == 200
        return time.perf_counter() - began


def times(browser: Browser, address: str) -> dict[str, dict[str, float]]:
    """Seconds of a first look and of a click on an example."""
    painted, answered, first, ended = [], [], [], []
    for _ in range(VISITS):
        tab = browser.new_context(viewport=WIDE).new_page()  # pyright: ignore[reportArgumentType]
        tab.add_init_script(FIRST_LOOK)
        tab.goto(address)
        answered.append(tab.wait_for_function("window.answered").json_value())
        painted.append(tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        tab.context.close()
    with opened(browser, address) as tab:
        names = tab.evaluate("[...document.querySelectorAll('#pg-examples [data-example]')].map((each) => each.title)")
        for name in [*names[1:], names[0]] * ROUNDS:
            one, other = tab.evaluate(PICK, name)
            first.append(one)
            ended.append(other)
    found = {"first paint": painted, "first answer": answered, "first step": first, "prediction": ended}
    return {name: _spread([each / 1000 for each in values]) for name, values in found.items()}


def lowest_contrasts(browser: Browser, address: str) -> list[dict[str, Any]]:
    """The least legible text of every tab, in both themes and at both sizes."""
    found = []
    for theme in ("light", "dark"):
        for size in (WIDE, NARROW):
            with opened(browser, address, color_scheme=theme, viewport=size) as tab:
                for name in TABS:
                    open_tab(tab, name)
                    measured = contrasts(tab)
                    ratio, text, _ = measured[0]
                    width = size["width"]
                    found.append(
                        {"theme": theme, "width": width, "tab": name, "texts": len(measured), "lowest": round(ratio, 2)}
                        | {"text": text}
                    )
    return found


def answers_to_uploads(browser: Browser, address: str, folder: Path) -> dict[str, str]:
    """What the page says to each odd file."""
    sent: Iterable[tuple[str, tuple[str, Callable[[], bytes]]]] = [
        *ANSWERED.items(),
        *((kind, (name, content)) for kind, (name, content, _) in REFUSED.items()),
        TOO_LONG,
    ]
    said = {}
    for kind, (name, content) in sent:
        (folder / name).write_bytes(content())
        with opened(browser, address) as tab:
            said[kind] = _answer(tab, folder / name)
    return said


def _answer(tab: Page, path: Path) -> str:
    sentence = tab.locator("#pg-answer .pg-sentence")
    tab.locator("#pg-photo").get_by_role("button", name="Remove Image").first.click()
    sentence.filter(has_text=NO_PHOTO).wait_for()
    upload(tab, path)
    tab.wait_for_function(ANSWERED_OR_TOLD, arg=NO_PHOTO)
    toast = tab.locator(".toast-body")
    return " ".join(toast.first.inner_text().split()) if toast.count() else told(tab)


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at_95 = ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]
    return {
        "median": round(statistics.median(ordered), 3),
        "p95": round(at_95, 3),
        "largest": round(ordered[-1], 3),
        "count": len(ordered),
    }


def measure() -> dict[str, Any]:
    """Everything, with the server's starts first."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        starts = [round(seconds_to_answer(folder / f"start{number}"), 2) for number in range(STARTS)]
        asked: set[str] = set()
        with serve(Path("embedded"), folder / "page") as address, chromium() as browser:
            version = browser.version
            found = {"seconds": times(browser, address), "contrast": lowest_contrasts(browser, address)}
            with opened(browser, address) as tab:
                tab.on("request", lambda request: asked.add(urlsplit(request.url).hostname or "none: data or blob"))
                for name in TABS:
                    open_tab(tab, name)
            uploads = answers_to_uploads(browser, address, folder)
        server = {json.loads(line) for line in (folder / "page/hosts.txt").read_text().splitlines()}
    return {
        "command": "python tests/demo/page_tables.py",
        "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}, {platform.system()} {platform.machine()}, Chromium {version}",
        "load_average_before": round(os.getloadavg()[0], 1),
        "seconds_from_start_to_answer": starts,
        **found,
        "uploads": uploads,
        "hosts": {"asked_by_page": sorted(asked), "asked_by_server": sorted(server)},
    }


def write_tables(found: dict[str, Any], page: Path) -> None:
    """Put the tables between their marks in a page of the docs."""
    times = [
        f"| {name} | {each['median']:.2f} | {each['p95']:.2f} | {each['count']} |"
        for name, each in found["seconds"].items()
    ]
    contrast = [
        f"| {tab} | " + " | ".join(_lowest(found["contrast"], tab, theme) for theme in ("light", "dark")) + " |"
        for tab in TABS
    ]
    uploads = [f"| {kind} | {said} |" for kind, said in found["uploads"].items()]
    tables = {
        "times": ["| seconds to | median | 95 % within | of |", "| --- | --- | --- | --- |", *times],
        "contrast": ["| tab | light | dark |", "| --- | --- | --- |", *contrast],
        "uploads": ["| sent | the page says |", "| --- | --- |", *uploads],
    }
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        begin, end = f"<!-- {name}: python tests/demo/page_tables.py -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def _lowest(rows: list[dict[str, Any]], tab: str, theme: str) -> str:
    least = min((row for row in rows if (row["tab"], row["theme"]) == (tab, theme)), key=lambda row: row["lowest"])
    return f"{least['lowest']:.2f} ({least['text']})"


def main() -> None:
    """Measure, write, print."""
    found = measure()
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (ROOT / "benchmarks/results/demo_page.json").write_text(text + "\n", encoding="utf-8")
    write_tables(found, ROOT / "docs/demo.md")
    print(text)


if __name__ == "__main__":
    main()
