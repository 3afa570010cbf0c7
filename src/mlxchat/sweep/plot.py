"""Plots of metrics against the settings that vary, for sweeps and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxchat.report.plots import COLOURS, INK, label_log_axis, make_panels, name_axes, one_line, render_png, styled
from mlxchat.sweep.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_PANELS = 4
_MOST_CURVES = 6
# Values with a larger ratio get a logarithmic axis.
_WIDE = 20.0


def draw_sweep(rows: Sequence[Row], keys: Sequence[str], metric: str, *, less_is_better: bool) -> bytes | None:
    """Return a PNG of a metric against the varying keys; None if fewer than two rows have the metric or no key varies.

    One key: a curve over numbers, points over words. Two keys, one of them numbers and the other with few values: a
    curve for each of these. Otherwise a panel of points for each key.

    Args:
        rows: those with the metric are drawn.
        keys: settings that differ.
        metric: step.metric.
        less_is_better: whether the smallest value is marked as the best.
    """
    rows = [row for row in rows if row["metrics"].get(metric) is not None]
    columns = {key: [row["overrides"].get(key, "") for row in rows] for key in keys}
    columns = {key: column for key, column in columns.items() if len(set(map(str, column))) > 1}
    if len(rows) < 2 or not columns:
        return None
    values = [float(row["metrics"][metric]) for row in rows]
    best = (min if less_is_better else max)(range(len(rows)), key=values.__getitem__)
    # Numbers first, and among these the setting with the most values.
    order = sorted(columns, key=lambda key: (not is_numeric(columns[key]), -len(set(map(str, columns[key])))))
    with styled():
        if len(columns) == 2 and is_numeric(columns[order[0]]) and len(_names(columns[order[1]])) <= _MOST_CURVES:
            figure, (panel,) = make_panels(1, height=4.2)
            draw_curves(panel, order[0], columns[order[0]], values, metric, by=(order[1], columns[order[1]]))
            panel.plot(
                [columns[order[0]][best]], [values[best]], "o", ms=10, mfc="none", mec=INK, mew=1.5, label="best"
            )
            panel.legend(title=one_line(order[1]), title_fontsize=9, fontsize=9)
            return render_png(figure)
        shown = list(columns)[:_MOST_PANELS]
        figure, panels = make_panels(len(shown))
        for panel, key in zip(panels, shown, strict=True):
            at = draw_points(panel, key, columns[key], values, metric, has_line=len(columns) == 1)
            panel.plot([at[best]], [values[best]], "o", ms=10, mfc="none", mec=COLOURS[1], mew=1.8, label="best")
            panel.legend(fontsize=9)
        return render_png(figure)


def is_numeric(column: Sequence[Any]) -> bool:
    """Return True if all values of a setting are numbers."""
    return all(isinstance(value, int | float) for value in column)


def draw_points(
    panel: Axes, key: str, column: Sequence[Any], values: Sequence[float], metric: str, *, has_line: bool = False
) -> list[float]:
    """Draw a metric against one setting, words in order of appearance; return the points' places on the x axis."""
    name_axes(panel, f"{metric} by {key}", key, metric)
    at: list[float] = list(column)
    if is_numeric(column):
        _scale(panel, at)
    else:
        names = _names(column)
        at = [names.index(str(value)) for value in column]
        labels = [one_line(name) for name in names]
        is_long = sum(map(len, labels)) > 50
        panel.set_xticks(range(len(names)), labels, rotation=30 * is_long, ha="right" if is_long else "center")
        panel.set_xlim(-0.5, len(names) - 0.5)
    points = sorted(zip(at, values, strict=True))
    line = "-" if has_line and is_numeric(column) else "none"
    panel.plot([x for x, _ in points], [y for _, y in points], linestyle=line, marker="o", color=COLOURS[0], ms=5)
    return at


def draw_curves(
    panel: Axes, key: str, column: Sequence[float], values: Sequence[float], metric: str, *, by: tuple[str, list[Any]]
) -> None:
    """Draw a metric against one setting of numbers, a curve for each value of another setting."""
    name_axes(panel, f"{metric} by {key}", key, metric)
    _scale(panel, column)
    for colour, name in zip(COLOURS, _names(by[1]), strict=False):
        points = sorted((x, y) for x, word, y in zip(column, by[1], values, strict=True) if str(word) == name)
        panel.plot([x for x, _ in points], [y for _, y in points], "-o", color=colour, ms=4, label=one_line(name))


def _names(column: Sequence[Any]) -> list[str]:
    """Return the distinct values as text: numbers sorted, words in order of appearance."""
    if is_numeric(column):
        return [str(value) for value in sorted(set(column))]
    return list(dict.fromkeys(str(value) for value in column))


def _scale(panel: Axes, column: Sequence[float]) -> None:
    if min(column) > 0 and max(column) / min(column) > _WIDE:
        panel.set_xscale("log")
        label_log_axis(panel.xaxis)
