"""Figures are well-formed, say in words what they show, keep inside their frame and have enough contrast."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

import phantomgrad_demo.figures
from phantomgrad_demo.answer import Answer, Curve
from phantomgrad_demo.figures import HEIGHT, WIDTH, answer_bars, probability_curves, residual_curve

ANSWER = Answer(
    probabilities=(("goldfish", 0.63), ("Bits & <b>pieces</b>", 0.2), ("lemon", 0.1), ("bus", 0.05), ("cat", 0.02)),
    steps=4,
    residual=8.1e-3,
    settled=True,
    tolerance=1e-2,
    checked=(1, 2, 3, 4),
    residuals=(1.0, 0.2, 0.05, 8.1e-3),
    leading=(
        Curve(label="goldfish", probabilities=(0.1, 0.4, 0.6, 0.63)),
        Curve(label="Bits & <b>pieces</b>", probabilities=(0.3, 0.25, 0.2, 0.2)),
    ),
)
SINGLE = replace(
    ANSWER,
    steps=1,
    settled=False,
    residual=1.0,
    checked=(1,),
    residuals=(1.0,),
    leading=(Curve(label="goldfish", probabilities=(0.63,)),),
)
EXACT = replace(ANSWER, residuals=(1.0, 0.2, 1e-3, 0.0), residual=0.0)
LONG = replace(
    ANSWER,
    steps=48,
    checked=tuple(range(1, 49)),
    residuals=tuple(0.8**step for step in range(1, 49)),
    leading=(Curve(label="goldfish", probabilities=tuple(step / 50 for step in range(1, 49))),),
)
CSS = Path(phantomgrad_demo.figures.__file__).with_name("page.css").read_text(encoding="utf-8")


@pytest.mark.parametrize("figure", [residual_curve, probability_curves])
@pytest.mark.parametrize("answer", [ANSWER, SINGLE, EXACT, LONG], ids=["settled", "one step", "exact", "long"])
def test_figures_are_accessible_and_keep_inside_their_frame(figure: Callable[[Answer], str], answer: Answer) -> None:
    root = ElementTree.fromstring(figure(answer))
    svg = next(child for child in root if child.get("role") == "img")
    ids = {element.get("id"): element for element in svg.iter() if element.get("id")}
    named = [ids[name] for name in (svg.get("aria-labelledby") or "").split()]
    assert [element.tag for element in named] == ["title", "desc"]
    assert all(element.text for element in named)
    for line in svg.iter("polyline"):
        for point in (line.get("points") or "").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT


def test_the_residual_falls_on_a_log_axis_towards_the_tolerance() -> None:
    root = ElementTree.fromstring(residual_curve(ANSWER))
    [line] = root.iter("polyline")
    heights = [float(point.split(",")[1]) for point in (line.get("points") or "").split()]
    assert heights == sorted(heights)
    [tolerance] = [element for element in root.iter("line") if element.get("class") == "pg-tolerance"]
    assert heights[-2] < float(tolerance.get("y1") or 0) < heights[-1]
    equal_factors = ElementTree.fromstring(residual_curve(replace(ANSWER, residuals=(1.0, 0.1, 0.01, 0.001))))
    [line] = equal_factors.iter("polyline")
    first, second, third, fourth = (float(point.split(",")[1]) for point in (line.get("points") or "").split())
    assert second - first == pytest.approx(third - second, abs=0.2)
    assert third - second == pytest.approx(fourth - third, abs=0.2)


def test_the_description_tells_the_numbers() -> None:
    text = "".join(ElementTree.fromstring(residual_curve(ANSWER)).itertext())
    assert "From 1.0e0 after step 1 to 8.1e-3 after 4 steps: settled." in text
    assert "goldfish: 10 % after step 1, 63 % after 4 steps." in probability_curves(ANSWER)


def test_bars_name_the_best_classes_and_escape_them() -> None:
    html = answer_bars(ANSWER, top=5)
    assert "<b>" not in html
    root = ElementTree.fromstring(f"<div>{html}</div>")
    rows = ["".join(row.itertext()) for row in root.iter("li")]
    assert rows == ["goldfish63 %", "Bits & <b>pieces</b>20 %", "lemon10 %", "bus5 %", "cat2 %"]
    [sentence] = root.iter("p")
    assert "".join(sentence.itertext()) == "After 4 steps: goldfish 63 %, relative residual 8.1e-3 (settled)"


@pytest.mark.parametrize(("theme", "background"), [(":root", "#ffffff"), (".dark", "#27272a")])
def test_colours_have_contrast(theme: str, background: str) -> None:
    rule = re.search(rf"^{re.escape(theme)} {{(.*?)^}}", CSS, re.MULTILINE | re.DOTALL)
    assert rule is not None
    colours = dict(re.findall(r"--pg-(\w+): (#[0-9a-f]{6});", rule[1]))
    page = _luminance(background)
    for name in ("a", "b", "c", "muted"):
        low, high = sorted((_luminance(colours[name]), page))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
