"""Everybody can use the page: names for screen readers, contrast in both themes, the keyboard alone, reduced motion."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs the extra `dev`")

from browsing import SLOW_MACHINE, opened, says
from playwright.sync_api import Browser, Page, expect

TABS = {
    "Watch": None,
    "Compare": "#pg-compared .pg-card",
    "Gradient": "#pg-gradient .pg-cell",
    "Nearby": "#pg-nearby .pg-cell",
    "Python": None,
}
UNNAMED = """() => [...document.querySelectorAll('button, input, select, textarea, a[href], [role=img], canvas, img')]
    .filter((each) => each.checkVisibility() && !each.closest('[aria-hidden=true]'))
    .filter((each) => !(each.getAttribute('aria-label') || each.getAttribute('aria-labelledby') || each.getAttribute('alt')
        || each.getAttribute('title') || each.textContent.trim() || [...(each.labels ?? [])].some((label) => label.textContent.trim())))
    .map((each) => each.outerHTML.slice(0, 200))"""
LOW_CONTRAST = """() => {
    const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const pixel = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const over = ([r, g, b, a], under) => [r, g, b].map((value, index) => value * a / 255 + under[index] * (1 - a / 255));
    const behind = (element) => {
        if (!element) return [255, 255, 255];
        return over(pixel(getComputedStyle(element).backgroundColor), behind(element.parentElement));
    };
    const luminance = (colour) => {
        const [r, g, b] = colour.map((value) => value / 255).map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const element = node.parentElement;
        if (!node.textContent.trim() || !element.checkVisibility({ visibilityProperty: true }) || element.closest('button:disabled')) continue;
        if (element.closest('[aria-hidden=true], script, style, title, desc') || !element.getClientRects().length) continue;
        const style = getComputedStyle(element), ground = behind(element);
        const ink = over(pixel(element.closest('svg') ? style.fill : style.color), ground);
        const [low, high] = [luminance(ink), luminance(ground)].sort((one, other) => one - other);
        found.push([(high + 0.05) / (low + 0.05), node.textContent.trim().slice(0, 40), element.className?.baseVal ?? element.className]);
    }
    return found.sort((one, other) => one[0] - other[0]);
}"""


@pytest.fixture(scope="module", params=["light", "dark"])
def visit(request: pytest.FixtureRequest, browser: Browser, page: str) -> Any:
    with opened(browser, page, color_scheme=request.param) as tab:
        yield tab


@pytest.mark.parametrize("name", TABS)
def test_every_control_has_a_name_and_every_text_contrast(visit: Page, name: str) -> None:
    visit.get_by_role("tab", name=name).click()
    place = TABS[name]
    if place is not None:
        visit.locator(place).first.wait_for(timeout=SLOW_MACHINE)
    visit.mouse.move(0, 0)
    visit.wait_for_timeout(300)  # Gradio fades colours
    assert visit.evaluate(UNNAMED) == []
    measured = visit.evaluate(LOW_CONTRAST)
    assert len(measured) > 20
    assert [each for each in measured if each[0] < 4.5] == []


def test_the_page_works_by_keyboard_alone(browser: Browser, page: str) -> None:
    with opened(browser, page) as tab:
        reached: list[str] = []
        for _ in range(40):
            tab.keyboard.press("Tab")
            reached.append(
                tab.evaluate(
                    "(({ ariaLabel, textContent, title, type }) => ariaLabel || textContent.trim() || title || type)"
                    "(document.activeElement)"
                )
            )
            if reached[-1] == "Play":
                break
        assert "Coffee cup" in reached
        assert reached[-1] == "Play"
        outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"
        tab.keyboard.press("Tab")
        tab.keyboard.press("Home")
        says(tab, "Step 1:")
        for _ in range(3):  # both copy buttons, then the tabs
            tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.getAttribute('role')") == "tab"
        tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")
        expect(tab.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true", timeout=SLOW_MACHINE)


def test_reduced_motion_is_respected(browser: Browser, page: str) -> None:
    moving = """() => [...document.querySelectorAll('.gradio-container *')].filter((each) => {
        const style = getComputedStyle(each);
        return each.checkVisibility() && (parseFloat(style.transitionDuration) > 0 || style.animationName !== 'none');
    }).map((each) => each.outerHTML.slice(0, 120))"""
    with opened(browser, page, reduced_motion="reduce") as tab:
        assert tab.evaluate(moving) == []


def test_the_theme_follows_the_system(browser: Browser, page: str) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with opened(browser, page, color_scheme=scheme) as tab:
            grounds.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]
