"""The page's pictures: curves as inline SVG and bars as HTML, readable without seeing them.

Colours are CSS variables of `page.css`, so that both follow the light and the dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from .answer import Answer
from .wording import percent, scientific, sentence, standing, step_count

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 14, 40
_MOST_X_LABELS = 8
_SERIES = ("a", "b", "c")
"""Names of the series' colours and dashes in `page.css`."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def answer_bars(answer: Answer, top: int = 5) -> str:
    """The sentence that says where the solver stands, and the best classes as a list with bars."""
    rows = "".join(
        f'<li><span class="pg-label">{escape(label)}</span><span class="pg-percent">{percent(probability)}</span>'
        f'<span class="pg-track" aria-hidden="true"><span style="width:{100 * probability:.1f}%"></span></span></li>'
        for label, probability in answer.probabilities[:top]
    )
    best = escape(answer.probabilities[0][0])
    told = escape(sentence(answer)).replace(f": {best} ", f": <strong>{best}</strong> ", 1)
    return f'<p class="pg-sentence">{told}</p><ol class="pg-bars" aria-label="Most likely classes">{rows}</ol>'


def curves(answer: Answer) -> str:
    """Both curves, side by side where there is room."""
    return f'<div class="pg-figures">{residual_curve(answer)}{probability_curves(answer)}</div>'


def residual_curve(answer: Answer) -> str:
    """The relative residual after each solver step on a log axis, with the tolerance as a line."""
    points = [(step, value) for step, value in zip(answer.checked, answer.residuals, strict=True) if value > 0]
    values = [value for _, value in points] + [answer.tolerance] * (answer.tolerance > 0)
    low, high = _decades(values)
    x, y = _steps_axis(answer), Axis(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP)
    ticks = [(y(power), f"1e{power}") for power in range(low, high + 1)]
    parts = [_frame(x, answer, ticks)]
    if answer.tolerance > 0:
        level = y(math.log10(answer.tolerance))
        parts.append(f'<line class="pg-tolerance" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        # On the left, where the curve is still high; below the line if the axis leaves room.
        baseline = level + 15 if level + 24 < HEIGHT - BOTTOM else level - 6
        parts.append(
            f'<text class="pg-note" x="{LEFT + 6}" y="{baseline:.1f}">tolerance {scientific(answer.tolerance)}</text>'
        )
    parts.append(_series([(x(step), y(math.log10(value))) for step, value in points], "a"))
    first, last = answer.residuals[0], answer.residuals[-1]
    description = (
        f"From {scientific(first)} after step {answer.checked[0]} to {scientific(last)} after "
        f"{step_count(answer.checked[-1])}: {standing(answer)}. Logarithmic axis."
    )
    return _figure("residual", "Relative residual after each solver step", description, parts)


def probability_curves(answer: Answer) -> str:
    """The leading classes' probability had the solver been stopped after each step."""
    highest = max(value for curve in answer.leading for value in curve.probabilities)
    top = next((limit for limit in (0.1, 0.2, 0.4, 0.6, 0.8) if highest <= limit), 1.0)
    x, y = _steps_axis(answer), Axis(low=0.0, high=top, start=HEIGHT - BOTTOM, end=TOP)
    ticks = [(y(share), f"{100 * share:.3g} %") for share in (0.0, top / 4, top / 2, 3 * top / 4, top)]
    parts = [_frame(x, answer, ticks)]
    for name, curve in zip(_SERIES, answer.leading, strict=False):
        points = zip(answer.checked, curve.probabilities, strict=True)
        parts.append(_series([(x(step), y(value)) for step, value in points], name))
    description = " ".join(
        f"{curve.label}: {percent(curve.probabilities[0])} after step {answer.checked[0]}, "
        f"{percent(curve.probabilities[-1])} after {step_count(answer.checked[-1])}."
        for curve in answer.leading
    )
    legend = "".join(
        f'<li><svg viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">'
        f'<line class="pg-line pg-{name}" x1="0" x2="28" y1="4" y2="4"/></svg>{escape(curve.label)}</li>'
        for name, curve in zip(_SERIES, answer.leading, strict=False)
    )
    title = "Probability of the leading classes after each step"
    return _figure("probability", title, description, parts, legend=f'<ul class="pg-legend">{legend}</ul>')


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """Powers of ten around the values, at least one decade apart."""
    logs = [math.log10(value) for value in values]
    if not logs:
        return -1, 0
    # A curve may reach a little above its frame rather than take a decade for it.
    low, high = math.floor(min(logs)), math.ceil(max(logs) - 0.1)
    return low, max(high, low + 1)


def _steps_axis(answer: Answer) -> Axis:
    last = max(answer.checked[-1], 2)
    return Axis(low=1, high=last, start=LEFT + 6, end=WIDTH - RIGHT - 6)


def _step_labels(last: int) -> list[int]:
    """Round steps to write below the axis: 1 and multiples of 1, 2, 5, 10, ..."""
    spacing = next(
        base * 10**power for power in range(6) for base in (1, 2, 5) if last / (base * 10**power) <= _MOST_X_LABELS
    )
    return sorted({1, *range(spacing, last + 1, spacing)} - ({2} if spacing == 2 else set()))


def _frame(x: Axis, answer: Answer, ticks: Sequence[tuple[float, str]]) -> str:
    """Grid, labels of both axes, and the name of the horizontal one."""
    bottom = HEIGHT - BOTTOM
    parts = []
    for level, text in ticks:
        parts.append(f'<line class="pg-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{text}</text>')
    for step in _step_labels(max(answer.checked[-1], 2)):
        parts.append(f'<text x="{x(step):.1f}" y="{bottom + 17}" text-anchor="middle">{step}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 5}" text-anchor="middle">solver step</text>')
    return "".join(parts)


def _series(points: Sequence[tuple[float, float]], name: str) -> str:
    """One line with its last point marked."""
    if not points:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    end_x, end_y = points[-1]
    return (
        f'<polyline class="pg-line pg-{name}" points="{path}"/>'
        f'<circle class="pg-end pg-{name}" cx="{end_x:.1f}" cy="{end_y:.1f}" r="4"/>'
    )


def _figure(name: str, title: str, description: str, parts: Sequence[str], legend: str = "") -> str:
    """A captioned SVG that a screen reader hears as its title and description."""
    return (
        f'<figure class="pg-figure"><figcaption>{escape(title)}</figcaption>{legend}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="pg-{name}-title pg-{name}-description">'
        f'<title id="pg-{name}-title">{escape(title)}</title>'
        f'<desc id="pg-{name}-description">{escape(description)}</desc>{"".join(parts)}</svg></figure>'
    )
