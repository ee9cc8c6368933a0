"""The page in a real browser: it answers, takes examples and uploads, and asks no other host for anything."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("playwright", reason="needs the extra `dev`")

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
SLOW_MACHINE = 60_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def visit(browser: Browser, page: str) -> Iterator[Page]:
    """The opened page; afterwards, whatever was done on it, only its own host was asked."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(SLOW_MACHINE)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page)
    tab.locator("#pg-answer .pg-sentence").wait_for()
    yield tab
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    tab.close()
    assert hosts == {urlsplit(page).netloc}


def told(tab: Page) -> str:
    return tab.locator("#pg-answer .pg-sentence").inner_text()


def test_opens_on_a_solved_photo(visit: Page) -> None:
    assert re.fullmatch(r"After \d+ steps?: .+ %, relative residual \d\.\de-?\d+ \(.+\)", told(visit))
    assert visit.locator("#pg-answer .pg-bars li").count() == 5
    assert visit.locator("#pg-photo img").count() >= 1
    figures = visit.locator("#pg-figures svg[role=img]")
    assert figures.count() == 2
    assert visit.get_by_role("img", name="Relative residual after each solver step").is_visible()


def test_the_answer_is_above_the_fold(visit: Page) -> None:
    for width, height in ((1280, 900), (390, 844)):
        visit.set_viewport_size({"width": width, "height": height})
        visit.evaluate("window.scrollTo(0, 0)")
        box = visit.locator("#pg-answer .pg-bars").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= height, (width, box)
        assert visit.evaluate("document.documentElement.scrollWidth") <= width
        assert "·" not in visit.locator("footer").inner_text()
    visit.set_viewport_size({"width": 1280, "height": 900})


def test_picking_an_example_answers_for_it(visit: Page) -> None:
    before = told(visit)
    visit.get_by_role("button", name="Chelsea the cat").click()
    expect(visit.locator("#pg-credit")).to_contain_text("Stefan van der Walt", timeout=SLOW_MACHINE)
    expect(visit.locator("#pg-answer .pg-sentence")).not_to_have_text(before)
    assert visit.locator("#pg-answer .pg-bars li").count() == 5


def test_fewer_steps_stop_the_solver_earlier(visit: Page) -> None:
    visit.get_by_role("slider").first.focus()
    field = visit.locator("#pg-steps input[type=number]")
    field.fill("2")
    field.press("Enter")
    expect(visit.locator("#pg-answer .pg-sentence")).to_contain_text("After 2 steps", timeout=SLOW_MACHINE)
    assert "stopped before its tolerance" in told(visit)
    slider = visit.locator("#pg-steps input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    expect(visit.locator("#pg-answer .pg-sentence")).to_contain_text("After 3 steps", timeout=SLOW_MACHINE)
    for typed, taken in (("0", "1"), ("2.6", "3"), ("-1e9", "1")):
        field.fill(typed)
        steps = "After 1 step:" if taken == "1" else f"After {taken} steps:"
        expect(visit.locator("#pg-answer .pg-sentence")).to_contain_text(steps, timeout=SLOW_MACHINE)
        expect(field).to_have_value(taken)
        assert slider.input_value() == taken
    field.fill("")
    field.fill("99")
    expect(field).to_have_value(slider.get_attribute("max") or "", timeout=SLOW_MACHINE)
    expect(visit.locator("#pg-answer .pg-sentence")).to_contain_text("(settled)", timeout=SLOW_MACHINE)


def test_classes_can_be_searched(visit: Page) -> None:
    visit.get_by_text("classes this model knows").click()
    visit.get_by_role("searchbox", name="Search").fill("cat")
    listed = visit.locator("#pg-classes li:visible")
    expect(listed).to_have_count(1)
    assert listed.inner_text() == "tabby cat"


def test_a_text_file_named_jpg_gets_a_message(visit: Page, tmp_path: Path) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_text("just some text")
    _upload(visit, path)
    expect(visit.locator("#pg-answer .pg-sentence")).to_contain_text("not a photo in a known", timeout=SLOW_MACHINE)
    assert str(tmp_path) not in visit.content()
    assert visit.locator("#pg-photo img").count() == 0
    field = visit.locator("#pg-steps input[type=number]")
    field.fill("5")
    visit.wait_for_timeout(1000)
    assert "not a photo in a known format" in told(visit)


def test_without_a_photo_there_is_no_answer(visit: Page) -> None:
    visit.get_by_role("button", name="Chelsea the cat").click()
    expect(visit.locator("#pg-answer .pg-sentence")).to_contain_text("After", timeout=SLOW_MACHINE)
    visit.locator("#pg-photo").get_by_role("button", name="Remove Image").click()
    expect(visit.locator("#pg-answer .pg-sentence")).to_contain_text("Choose, drop", timeout=SLOW_MACHINE)
    expect(visit.locator("#pg-figures svg")).to_have_count(0)


def test_an_uploaded_photo_is_answered(visit: Page, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "photo.png"
    Image.effect_noise((300, 200), 80).save(path)
    _upload(visit, path)
    expect(visit.locator("#pg-answer .pg-sentence")).to_contain_text("After", timeout=SLOW_MACHINE)
    expect(visit.locator("#pg-credit")).to_be_empty()


def _upload(tab: Page, path: Path) -> None:
    """Clear the photo and choose a file in its place."""
    clear = tab.locator("#pg-photo").get_by_role("button", name="Remove Image")
    if clear.count():
        clear.first.click()
    tab.locator("#pg-photo input[type=file]").first.set_input_files(str(path))
