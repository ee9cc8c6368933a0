"""Line plots as inline SVG: they follow the page's theme, read without seeing them, and can be saved.

Colours are CSS variables of `page.css`. Lines differ by dashes too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 40
STYLES = ("a", "b", "c", "d", "e")
"""Names of the lines' colours and dashes in `page.css`."""
SMALLEST = 1e-9
"""What a log axis shows of smaller values."""
_MOST_STEP_LABELS = 8


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line: the values at steps, by its legend's label."""

    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


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


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Lines over solver steps. `render` gives a captioned figure that a screen reader hears as title and description."""

    name: str
    """Unique on the page."""
    title: str
    description: str
    lines: Sequence[Line]
    scale: Literal["log", "share"]
    """`log`: decades; `share`: percent from 0 on."""
    last: int
    """The last step of the horizontal axis."""
    level: tuple[float, str] | None = None
    """A horizontal line with its note."""
    marks: Sequence[tuple[int, str]] = ()
    """Vertical lines at steps, each with its note."""

    def render(self) -> str:
        x = Axis(low=1, high=max(self.last, 2), start=LEFT + 6, end=WIDTH - RIGHT - 6)
        y, ticks = self._vertical()
        parts = [_frame(x, ticks)]
        if self.level is not None and self.level[0] > 0:
            parts.append(_level(y(self._position(self.level[0])), self.level[1]))
        parts += [_mark(x(step), note, row) for row, (step, note) in enumerate(self.marks)]
        for style, line in zip(STYLES, self.lines, strict=False):
            points = [(x(step), y(self._position(value))) for step, value in zip(line.steps, line.values, strict=True)]
            parts.append(_polyline(points, style))
        cursor = f'<line class="pg-cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>'
        legend = _legend(self.lines) if len(self.lines) > 1 else ""
        per_step = x(2) - x(1)
        return (
            f'<figure class="pg-figure"><figcaption>{escape(self.title)}{save_button(self.title)}</figcaption>{legend}'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-name="{self.name}" data-first="{x(1):.1f}" '
            f'data-per-step="{per_step:.3f}" aria-labelledby="pg-{self.name}-title pg-{self.name}-description">'
            f'<title id="pg-{self.name}-title">{escape(self.title)}</title>'
            f'<desc id="pg-{self.name}-description">{escape(self.description)}</desc>'
            f"{''.join(parts)}{cursor}</svg></figure>"
        )

    def _position(self, value: float) -> float:
        return math.log10(max(value, SMALLEST)) if self.scale == "log" else value

    def _vertical(self) -> tuple[Axis, list[tuple[float, str]]]:
        values = [value for line in self.lines for value in line.values]
        if self.scale == "log":
            low, high = _decades([*values, *([self.level[0]] if self.level is not None else [])])
            axis = Axis(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP)
            return axis, [(axis(power), f"1e{power}") for power in range(low, high + 1)]
        top = next((limit for limit in (0.1, 0.2, 0.4, 0.6, 0.8) if max(values, default=0.0) <= limit), 1.0)
        axis = Axis(low=0.0, high=top, start=HEIGHT - BOTTOM, end=TOP)
        return axis, [(axis(top * part / 4), f"{25 * top * part:.3g} %") for part in range(5)]


def save_button(title: str) -> str:
    """The button that saves its figure's SVG."""
    label = f"Save the figure as SVG: {title}"
    return f'<button type="button" class="pg-small" data-save="" aria-label="{escape(label)}">SVG</button>'


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around the values, at least one decade apart."""
    logs = [math.log10(max(value, SMALLEST)) for value in values]
    if not logs:
        return -1, 0
    # A line may reach a little above its frame rather than take a decade for it.
    low, high = math.floor(min(logs)), math.ceil(max(logs) - 0.1)
    return low, max(high, low + 1)


def _step_labels(last: int) -> list[int]:
    """Round steps to write below the axis: 1 and multiples of 1, 2, 5, 10, ..."""
    spacing = next(
        base * 10**power for power in range(6) for base in (1, 2, 5) if last / (base * 10**power) <= _MOST_STEP_LABELS
    )
    return sorted({1, *range(spacing, last + 1, spacing)} - ({2} if spacing == 2 else set()))


def _frame(x: Axis, ticks: Sequence[tuple[float, str]]) -> str:
    """Grid, labels of both axes, and the name of the horizontal one."""
    parts: list[str] = []
    for level, text in ticks:
        parts.append(f'<line class="pg-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{text}</text>')
    for step in _step_labels(int(x.high)):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{step}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 5}" text-anchor="middle">solver step</text>')
    return "".join(parts)


def _level(y: float, note: str) -> str:
    # Its note is on the left, where a falling line is still high; below it if the axis leaves room.
    baseline = y + 15 if y + 24 < HEIGHT - BOTTOM else y - 6
    return (
        f'<line class="pg-level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="pg-note" x="{LEFT + 6}" y="{baseline:.1f}">{escape(note)}</text>'
    )


def _mark(x: float, note: str, row: int) -> str:
    anchor, shift = ("end", -5) if x > WIDTH / 2 else ("start", 5)
    return (
        f'<line class="pg-mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="pg-note" x="{x + shift:.1f}" y="{HEIGHT - BOTTOM - 10 - 16 * row}" text-anchor="{anchor}">'
        f"{escape(note)}</text>"
    )


def _polyline(points: Sequence[tuple[float, float]], style: str) -> str:
    """One line with its last point marked."""
    if not points:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    end_x, end_y = points[-1]
    return (
        f'<polyline class="pg-line pg-{style}" points="{path}"/>'
        f'<circle class="pg-end pg-{style}" cx="{end_x:.1f}" cy="{end_y:.1f}" r="4"/>'
    )


def _legend(lines: Sequence[Line]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">'
        f'<line class="pg-line pg-{style}" x1="0" x2="28" y1="4" y2="4"/></svg>{escape(line.label)}</li>'
        for style, line in zip(STYLES, lines, strict=False)
    )
    return f'<ul class="pg-legend">{items}</ul>'
