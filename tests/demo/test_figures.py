"""Figures are well-formed, say in words what they show, keep inside their frame and have enough contrast."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from samples import EXACT, LABELS, LONG, RUNNING, SETTLED, SINGLE, trajectory

import phantomgrad_demo.figures
from phantomgrad_demo.figures import accuracy_curve, probability_curves, residual_curves, residuals_together
from phantomgrad_demo.plot import BOTTOM, HEIGHT, TOP, WIDTH
from phantomgrad_demo.trajectory import Trajectory

CSS = Path(phantomgrad_demo.figures.__file__).with_name("page.css").read_text(encoding="utf-8")
FIGURES: dict[str, Callable[[Trajectory], str]] = {
    "residual": residual_curves,
    "probability": lambda solve: probability_curves(solve, LABELS),
    "together": lambda solve: residuals_together("together", "Both", {"A": solve, "B & <C>": SINGLE}),
    "accuracy": lambda solve: accuracy_curve({1: 0.02, 4: 0.4, 32: 0.445}, [(len(solve.steps), "A"), (1, "B")]),
}


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in (line.get("points") or "").split())
    return [(float(x), float(y)) for x, y in pairs]


def drawing(figure: str) -> ElementTree.Element:
    return next(child for child in ElementTree.fromstring(figure) if child.get("role") == "img")


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(
    "solve", [SETTLED, SINGLE, EXACT, LONG, RUNNING], ids=["settled", "one step", "exact", "long", "running"]
)
def test_figures_are_accessible_and_keep_inside_their_frame(name: str, solve: Trajectory) -> None:
    svg = drawing(FIGURES[name](solve))
    ids = {element.get("id"): element for element in svg.iter() if element.get("id")}
    named = [ids[each] for each in (svg.get("aria-labelledby") or "").split()]
    assert [element.tag for element in named] == ["title", "desc"]
    assert all(element.text for element in named)
    lines = list(svg.iter("polyline"))
    assert lines
    for line in lines:
        for x, y in points(line):
            assert 0 <= x <= WIDTH
            assert TOP - 6 <= y <= HEIGHT - BOTTOM


def test_every_step_has_its_point_where_the_cursor_will_stand() -> None:
    for figure in (residual_curves(EXACT), probability_curves(EXACT, LABELS)):
        svg = drawing(figure)
        first, per_step = float(svg.get("data-first") or 0), float(svg.get("data-per-step") or 0)
        for line in svg.iter("polyline"):
            expected = [first + index * per_step for index in range(len(EXACT.steps))]
            assert [x for x, _ in points(line)] == pytest.approx(expected, abs=0.11)


def test_residuals_fall_on_a_log_axis_towards_the_tolerance() -> None:
    svg = drawing(residual_curves(SETTLED))
    whole, fine, coarse = (points(line) for line in svg.iter("polyline"))
    assert whole == fine  # of the first resolution, as the samples have it
    heights = [y for _, y in whole]
    assert heights == sorted(heights)
    shifts = {round(low - high, 1) for (_, high), (_, low) in zip(whole, coarse, strict=True)}
    assert max(shifts) - min(shifts) <= 0.2  # half of it everywhere: the same distance on a log axis
    [tolerance] = [element for element in svg.iter("line") if element.get("class") == "pg-level"]
    assert heights[-2] < float(tolerance.get("y1") or 0) < heights[-1]
    equal_factors = drawing(residual_curves(trajectory([1.0, 0.1, 0.01, 0.001])))
    first, second, third, fourth = (y for _, y in points(next(equal_factors.iter("polyline"))))
    assert second - first == pytest.approx(third - second, abs=0.2)
    assert third - second == pytest.approx(fourth - third, abs=0.2)


def test_while_the_solver_runs_the_axis_stands_still() -> None:
    axes = {drawing(residual_curves(trajectory([0.5] * count, None))).get("data-per-step") for count in (3, 7, 10)}
    assert len(axes) == 1


def test_the_descriptions_tell_the_numbers() -> None:
    text = "".join(ElementTree.fromstring(residual_curves(SETTLED)).itertext())
    assert "From 1.0 after step 1 to 8.1e-3 after 4 steps: settled." in text
    assert "still running" in residual_curves(RUNNING)
    assert "stopped before its tolerance of 1e-2" in residual_curves(SINGLE)
    assert "goldfish: 10 % after step 1, 44 % after 4 steps." in probability_curves(SETTLED, LABELS)
    assert "<b>" not in probability_curves(SETTLED, LABELS)
    assert "40 % after 4 steps." in accuracy_curve({1: 0.02, 4: 0.4}, [(4, "A")])


@pytest.mark.parametrize(("theme", "backgrounds"), [(":root", ["#ffffff"]), (".dark", ["#0b0f19", "#27272a"])])
def test_colours_have_contrast(theme: str, backgrounds: list[str]) -> None:
    rule = re.search(rf"^{re.escape(theme)} {{(.*?)^}}", CSS, re.MULTILINE | re.DOTALL)
    assert rule is not None
    colours = dict(re.findall(r"--pg-(\w+): (#[0-9a-f]{6});", rule[1]))
    for background in backgrounds:
        for name in ("a", "b", "c", "d", "e", "muted", "warn"):
            assert contrast(colours[name], background) >= 4.5, name
    assert contrast(colours["button"], "#ffffff") >= 4.5  # the text on it is white in both themes


def contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
