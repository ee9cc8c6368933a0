"""Whatever a visitor does while a solve runs, the page ends on what was asked for last, and shows one solve at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs the extra `dev`")

from browsing import opened, says, upload
from conftest import serve
from odd_photos import encoded
from PIL import Image
from playwright.sync_api import Browser, Page, expect

NOTE = """() => {
    const sentence = document.querySelector('#pg-answer .pg-sentence');
    let text = sentence.textContent;
    window.said = [];
    new MutationObserver(() => { if (sentence.textContent !== text) window.said.push(text = sentence.textContent); })
        .observe(sentence, { childList: true, subtree: true, characterData: true });
}"""
PLACES = {"rocket": "SpaceX", "china": "danielbuechele", "own": ""}


@pytest.fixture(scope="module")
def slow_page(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page whose every solver step takes a quarter of a second more."""
    with serve(checkpoint, tmp_path_factory.mktemp("turns") / "page", seconds_per_step=0.25) as address:
        yield address


@pytest.fixture
def tab(browser: Browser, slow_page: str) -> Iterator[Page]:
    with opened(browser, slow_page) as tab:
        tab.evaluate(NOTE)
        yield tab


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """A photo of a visitor's own."""
    path = tmp_path / "noise.png"
    path.write_bytes(encoded(Image.effect_noise((64, 64), 50)))
    return path


def do(tab: Page, what: str, noise: Path) -> None:
    if what == "own":
        tab.locator("#pg-photo input[type=file]").first.set_input_files(str(noise))
    else:
        # Without waiting until the page stands still, which it does not while steps arrive.
        place = "#pg-solver input[value=Broyden]" if what == "Broyden" else f"#pg-examples [data-example={what}]"
        tab.locator(place).evaluate("(element) => element.click()")


def runs(said: list[str]) -> list[list[int]]:
    """The numbers of the steps that were shown, one list for each time that they began anew."""
    found: list[list[int]] = []
    for number in [int(step[1]) for text in said if (step := re.match(r"Step (\d+):", text))]:
        if number == 1 or not found:
            found.append([])
        found[-1].append(number)
    return found


@pytest.mark.parametrize("first", ["rocket", "own"])
@pytest.mark.parametrize("second", ["china", "own", "Broyden"])
def test_the_last_wish_counts(tab: Page, noise: Path, first: str, second: str) -> None:
    do(tab, first, noise)
    tab.wait_for_function("document.querySelector('[data-running=true]') && window.said.length > 2")
    do(tab, second, noise)
    tab.wait_for_function("document.querySelector('[data-running=false]') && window.said.at(-1).startsWith('Settled')")
    tab.wait_for_timeout(400)
    said = tab.evaluate("window.said")
    assert [text for text in said if text.startswith("Settled")] == [said[-1]], "the first solve was waited for"
    before, after = runs(said)
    assert before == sorted(before)
    assert after == sorted(after)
    author = PLACES[first if second == "Broyden" else second]
    expect(tab.locator("#pg-credit")).to_contain_text(author)
    assert bool(author) == tab.get_by_role("button", name="Copy a link to this").is_visible()
    assert tab.locator("#pg-photo img").count() == 1
    assert ("Broyden" in tab.evaluate("document.documentElement.dataset.python")) == (second == "Broyden")


def test_of_quick_clicks_the_last_counts(tab: Page) -> None:
    for example in ("coffee", "rocket", "flower", "china") * 2:
        tab.locator(f"#pg-examples [data-example={example}]").click()
    expect(tab.locator("#pg-credit")).to_contain_text("danielbuechele", timeout=20_000)
    says(tab, "Settled after")
    assert "china" in tab.evaluate("document.documentElement.dataset.link")


def test_removing_the_photo_ends_its_solve(tab: Page, noise: Path) -> None:
    do(tab, "rocket", noise)
    tab.wait_for_function("document.querySelector('[data-running=true]') && window.said.length > 1")
    tab.locator("#pg-photo").get_by_role("button", name="Remove Image").first.click()
    says(tab, "Choose, drop")
    tab.wait_for_timeout(600)
    assert tab.evaluate("window.said.at(-1)").startswith("Choose, drop")
    expect(tab.locator("#pg-credit")).to_have_text("")


def test_another_photo_leaves_no_old_result_in_a_tab(tab: Page, noise: Path) -> None:
    tab.get_by_role("tab", name="Nearby").click()
    expect(tab.locator(".pg-takeaway:visible")).to_have_text("Computing ...")
    do(tab, "rocket", noise)
    says(tab, "Settled after")
    tab.wait_for_timeout(3000)  # the old photo's result would be here by now
    expect(tab.locator("#pg-nearby .pg-cell").first).to_be_hidden()
    expect(tab.locator(".pg-takeaway:visible")).to_contain_text("A good start saves steps")
    tab.get_by_role("button", name="Solve from both").click()
    expect(tab.locator("#pg-nearby .pg-cell").first).to_be_visible(timeout=20_000)


def test_the_photo_on_which_the_page_opens_can_be_removed(browser: Browser, page: str) -> None:
    with opened(browser, page) as tab:
        tab.locator("#pg-photo").get_by_role("button", name="Remove Image").first.click()
        says(tab, "Choose, drop")
        expect(tab.locator("#pg-answer .pg-bars")).to_be_hidden()
        expect(tab.locator(".pg-takeaway")).to_be_hidden()


def test_a_file_that_is_too_large_leaves_no_answer(browser: Browser, page: str, tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    path.write_bytes(bytes(21 * 2**20))
    with opened(browser, page) as tab:
        upload(tab, path)
        expect(tab.locator(".toast-body")).to_contain_text("20")
        says(tab, "Choose, drop")


def test_without_a_server_nothing_old_is_shown_as_new(browser: Browser, page: str) -> None:
    with opened(browser, page) as tab:
        tab.route("**/queue/join**", lambda route: route.fulfill(status=503, json={"detail": "Queue is full."}))
        tab.locator("#pg-examples [data-example=rocket]").click()
        says(tab, "There is no answer")
        expect(tab.locator("#pg-answer .pg-bars")).to_be_hidden()
        tab.unroute("**/queue/join**")
        tab.locator("#pg-examples [data-example=rocket]").click()
        says(tab, "Settled after")
