"""Charts as SVG: curves over an axis, and bars with their errors.

A chart names roles of colours, not colours: the page that it stands in says what they are, for light and dark screens
and for paper. So a picture is drawn once, stays sharp, and has words for those who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from mlxchat.errors import visible
from mlxchat.report.axes import Scale, span, tick_labels, ticks
from mlxchat.report.smoothing import smooth, thin

Points = tuple[list[float], list[float]]

WIDTH = 430.0
CURVE_HEIGHT = 262.0
# Width of a letter of size 12; wide enough for the usual sans-serif fonts.
LETTER = 6.7
BOLD_LETTER = 7.7
NAME_LETTER = 6.6
# Below this a curve is short enough to be shown as it is.
SMOOTH_FROM_POINTS = 30
LABEL_LETTERS = 34
COLOURS = 6


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line through points, or points alone."""

    points: Points
    label: str = ""
    colour: int = 0
    """One of COLOURS."""
    is_smoothed: bool = False
    has_line: bool = True
    has_dots: bool = True
    """Whether its points are marked where they are few."""
    end: str = ""
    """Words at its last point; empty: none."""
    names: list[str] = field(default_factory=list)
    """Words at each point; none if empty."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over one axis."""

    name: str
    """Of the file, without suffix."""
    title: str
    alt: str
    """For those who cannot see it."""
    y: str
    """What is measured, with its unit."""
    curves: list[Curve]
    x: str = "iteration"
    levels: list[tuple[str, float]] = field(default_factory=list)
    """Horizontal lines to compare with, and what they are."""
    is_x_log: bool = False
    is_y_log: bool = False
    from_zero: bool = False

    def draw(self) -> str:
        """Return the chart as an SVG element."""
        return _draw_chart(self)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: how long, and its standard error."""

    value: float
    error: float = 0.0
    colour: int = 0


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Rows of horizontal bars."""

    name: str
    title: str
    alt: str
    x: str
    rows: list[tuple[str, list[Bar | None], list[float]]]
    """What a row is called, its bars, and values that are marked across it."""
    labels: list[str]
    """What the bars of a row are; empty: each row has one."""
    mark: str = ""
    """What the marks are."""
    has_values: bool = False
    """Whether the value stands beside each bar."""

    def draw(self) -> str:
        """Return the chart as an SVG element."""
        return _draw_bars(self)


Drawing = Chart | Bars


def words(value: str, letters: int = LABEL_LETTERS) -> str:
    """Return a name as it may stand in a picture: escaped, on one line, not too long."""
    plain = " ".join(visible(value).split())
    return escape(plain if len(plain) <= letters else f"{plain[: letters - 1]}…")


def _bold_width(value: str) -> float:
    return BOLD_LETTER * sum(1.5 if letter in "%@MWmw" else 1.0 for letter in value)


def _text(x: float, y: float, value: str, kind: str, letters: int = 70) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{words(value, letters)}</text>'


def _frame(title: str, alt: str, height: float, parts: list[str]) -> str:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(visible(alt))}">'
    return "\n".join([head, _text(0, 14, title, "title", 60), *parts, "</svg>"])


def _legend(entries: list[tuple[str, str]], top: float) -> tuple[list[str], float]:
    """Return (marks and words of (class, label) in rows, the y below them)."""
    parts, x, y = [], 0.0, top
    for kind, label in entries:
        wide = 24 + LETTER * min(len(label), LABEL_LETTERS) + 12
        if x and x + wide > WIDTH:
            x, y = 0.0, y + 16
        parts.append(f'<path class="{kind}" d="M{x:.1f} {y:.1f}h16"/>' + _text(x + 21, y + 4, label, "key"))
        x += wide
    return parts, y + 12 if entries else top - 8


def _draw_chart(chart: Chart) -> str:
    legend = [(f"curve c{curve.colour}", curve.label) for curve in chart.curves if curve.label]
    parts, top = _legend(legend, 30)
    height = CURVE_HEIGHT + max(0.0, top - 42)
    every_x = [x for curve in chart.curves for x in curve.points[0]]
    every_y = [y for curve in chart.curves for y in curve.points[1]] + [value for _, value in chart.levels]
    x_low, x_high = (
        span(every_x, is_log=True) if chart.is_x_log else (min(every_x), max(max(every_x), min(every_x) + 1))
    )
    y_low, y_high = span(every_y, is_log=chart.is_y_log, from_zero=chart.from_zero)
    marks = ticks(y_low, y_high, 5, is_log=chart.is_y_log)
    labels = tick_labels(marks)
    left = 22 + LETTER * max(map(len, labels), default=1)
    ends = [curve.end for curve in chart.curves if curve.end]
    right = WIDTH - (10 + max(map(_bold_width, ends)) if ends else 14)
    bottom = height - 38
    across = Scale(low=x_low, high=x_high, start=left, end=right, is_log=chart.is_x_log)
    up = Scale(low=y_low, high=y_high, start=bottom, end=top + 8, is_log=chart.is_y_log)
    for value, label in zip(marks, labels, strict=True):
        y = up(value)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(_text(left - 6, y + 4, label, "tick right"))
    x_marks = ticks(x_low, x_high, 5, is_log=chart.is_x_log, whole=chart.x == "iteration")
    for value, label in zip(x_marks, tick_labels(x_marks), strict=True):
        parts.append(_text(across(value), bottom + 16, label, "tick middle"))
    parts.append(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
    parts.append(_text((left + right) / 2, height - 6, chart.x, "tick middle"))
    turned = f'transform="rotate(-90)" x="{-(top + 8 + bottom) / 2:.1f}" y="11"'
    parts.append(f'<text class="tick middle" {turned}>{words(chart.y)}</text>')
    parts += _levels(chart, up, left, right, (top + 8, bottom))
    for curve in chart.curves:
        parts += _curve(curve, across, up)
    parts += _ends(chart.curves, across, up)
    return _frame(chart.title, chart.alt, height, parts)


def _levels(chart: Chart, up: Scale, left: float, right: float, room: tuple[float, float]) -> list[str]:
    parts, used = [], [math.inf]
    for label, value in sorted(chart.levels, key=lambda level: -level[1]):
        y = up(value)
        parts.append(f'<path class="level" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        # Above its line, or below where another one stands there or the room ends.
        place = y - 4 if y - 15 > room[0] and all(abs(y - 4 - other) > 12 for other in used) else y + 12
        used.append(place)
        parts.append(_text((left + right) / 2, place, f"{label} {value:.4g}", "level-name middle"))
    return parts


def _curve(curve: Curve, across: Scale, up: Scale) -> list[str]:
    xs, ys = curve.points
    parts = []
    if curve.is_smoothed and len(ys) >= SMOOTH_FROM_POINTS:
        parts.append(f'<path class="raw c{curve.colour}" d="{_path(thin((xs, ys)), across, up)}"/>')
        ys = smooth(ys, window_of(len(ys)))
    if curve.has_line:
        parts.append(f'<path class="curve c{curve.colour}" d="{_path(thin((xs, ys)), across, up)}"/>')
    if not curve.has_line or (curve.has_dots and len(xs) < SMOOTH_FROM_POINTS):
        for x, y in zip(xs, ys, strict=True):
            parts.append(f'<circle class="dot c{curve.colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>')
    for x, y, name in zip(xs, ys, curve.names, strict=False):
        # To the side where there is room.
        side, shift = ("name", 6) if across(x) < WIDTH * 0.7 else ("name right", -6)
        parts.append(_text(across(x) + shift, up(y) - 7, name, f"{side} c{curve.colour}", 24))
    return parts


def window_of(count: int) -> int:
    """Return over how many points a curve of so many is smoothed: an odd number."""
    return max(9, count // 20) | 1


def last_value(curve: Curve) -> float:
    """Return where the drawn line ends."""
    ys = curve.points[1]
    if curve.is_smoothed and len(ys) >= SMOOTH_FROM_POINTS:
        return smooth(ys, window_of(len(ys)))[-1]
    return ys[-1]


def _path(points: Points, across: Scale, up: Scale) -> str:
    return "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in zip(*points, strict=True))


def _ends(curves: Sequence[Curve], across: Scale, up: Scale) -> list[str]:
    """Write at the ends of curves what they end at, apart from each other where they would collide."""
    parts, floor = [], math.inf
    for curve in sorted((c for c in curves if c.end), key=lambda c: up(last_value(c)), reverse=True):
        floor = min(up(last_value(curve)), floor - 14)
        parts.append(_text(across(curve.points[0][-1]) + 6, floor + 4, curve.end, f"end c{curve.colour}"))
    return parts


def _draw_bars(bars: Bars) -> str:
    entries = [(f"swatch c{i % COLOURS}", label) for i, label in enumerate(bars.labels)]
    if bars.mark and any(marks for *_, marks in bars.rows):
        entries.append(("mark", bars.mark))
    parts, top = _legend(entries, 30)
    thick = 12.0 if len(bars.rows) < 14 or not bars.labels else 8.0
    widest = max((len(cells) for _, cells, _ in bars.rows), default=1)
    row = max(18.0, widest * (thick + 1) + 6)
    height = top + 10 + row * len(bars.rows) + 38
    left = 12 + NAME_LETTER * min(LABEL_LETTERS, max((len(name) for name, *_ in bars.rows), default=1))
    values = [bar.value + sign * bar.error for _, cells, _ in bars.rows for bar in cells if bar for sign in (-1, 1)]
    low, high = span([0.0, *values, *(mark for *_, marks in bars.rows for mark in marks)], from_zero=True)
    right, bottom = WIDTH - (46 if bars.has_values else 12), height - 36
    across = Scale(low=low, high=high, start=left, end=right)
    marks = ticks(low, high, 5)
    for value, label in zip(marks, tick_labels(marks), strict=True):
        parts.append(f'<path class="grid" d="M{across(value):.1f} {top + 4:.1f}V{bottom:.1f}"/>')
        parts.append(_text(across(value), bottom + 15, label, "tick middle"))
    for position, (name, cells, crossed) in enumerate(bars.rows):
        y = top + 6 + position * row
        parts.append(_text(left - 8, y + row / 2 + 3, name, "tick right", LABEL_LETTERS))
        edge = y + (row - len(cells) * (thick + 1)) / 2
        for bar in cells:
            if bar is not None:
                parts += _bar(bar, across, edge, thick, has_value=bars.has_values)
            edge += thick + 1
        parts += [f'<path class="mark" d="M{across(mark):.1f} {y + 1:.1f}v{row - 2:.1f}"/>' for mark in crossed]
    parts.append(f'<path class="axis" d="M{across(0):.1f} {top + 4:.1f}V{bottom:.1f}"/>')
    parts.append(_text(WIDTH / 2, height - 5, bars.x, "tick middle", 66))
    return _frame(bars.title, bars.alt, height, parts)


def _bar(bar: Bar, across: Scale, y: float, thick: float, *, has_value: bool) -> list[str]:
    begin, end = sorted((across(0), across(bar.value)))
    parts = [
        f'<rect class="bar c{bar.colour}" x="{begin:.1f}" y="{y:.1f}" width="{end - begin:.1f}" height="{thick:g}"/>'
    ]
    middle = y + thick / 2
    if bar.error:
        tips = across(bar.value - bar.error), across(bar.value + bar.error)
        parts.append(f'<path class="error" d="M{tips[0]:.1f} {middle:.1f}H{tips[1]:.1f}"/>')
    if has_value:
        beside = max(end, across(bar.value + bar.error)) + 5
        parts.append(_text(beside, middle + 4, f"{bar.value:.4f}", "tick"))
    return parts
