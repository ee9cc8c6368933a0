"""What the page's controls and texts look like to those who see them badly, or not at all: read by scripts in the page."""

from __future__ import annotations

from typing import Any

from browsing import SLOW_MACHINE
from playwright.sync_api import Page

TABS = {
    "Watch": None,
    "Compare": "#pg-compared .pg-card",
    "Gradient": "#pg-gradient .pg-cell",
    "Nearby": "#pg-nearby .pg-cell",
    "Python": None,
}
"""The tabs, and what each shows once it has been computed."""
UNNAMED = """() => [...document.querySelectorAll('button, input, select, textarea, a[href], [role=img], canvas, img')]
    .filter((each) => each.checkVisibility() && !each.closest('[aria-hidden=true]'))
    .filter((each) => !(each.getAttribute('aria-label') || each.getAttribute('aria-labelledby') || each.getAttribute('alt')
        || each.getAttribute('title') || each.textContent.trim() || [...(each.labels ?? [])].some((label) => label.textContent.trim())))
    .map((each) => each.outerHTML.slice(0, 200))"""
"""Controls and pictures without a name for a screen reader."""
_CONTRASTS = """() => {
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
"""Of every visible text: the contrast of its colour with what lies behind it, by the WCAG; the lowest first."""


def open_tab(tab: Page, name: str) -> None:
    """One of the page's tabs, with its results."""
    tab.get_by_role("tab", name=name).click()
    place = TABS[name]
    if place is not None:
        tab.locator(place).first.wait_for(timeout=SLOW_MACHINE)
    tab.mouse.move(0, 0)
    tab.wait_for_timeout(300)  # Gradio fades colours


def contrasts(tab: Page) -> list[tuple[float, str, str]]:
    """Contrast, text and class of every visible text, the lowest contrast first."""
    measured: list[Any] = tab.evaluate(_CONTRASTS)
    return [(ratio, text, name) for ratio, text, name in measured]
