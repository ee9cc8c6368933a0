"""Everybody can use the page: names for screen readers, contrast in both themes, the keyboard alone, reduced motion."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs the extra `dev`")

from browsing import SLOW_MACHINE, opened, says
from legibility import TABS, UNNAMED, contrasts, open_tab
from playwright.sync_api import Browser, Page, expect


@pytest.fixture(scope="module", params=["light", "dark"])
def visit(request: pytest.FixtureRequest, browser: Browser, page: str) -> Any:
    with opened(browser, page, color_scheme=request.param) as tab:
        yield tab


@pytest.mark.parametrize("name", TABS)
def test_every_control_has_a_name_and_every_text_contrast(visit: Page, name: str) -> None:
    open_tab(visit, name)
    assert visit.evaluate(UNNAMED) == []
    measured = contrasts(visit)
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
