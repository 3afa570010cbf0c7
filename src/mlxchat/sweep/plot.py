"""Plots of metrics against the settings that vary, for sweeps and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlxchat.report.plots import COLOURS, INK, label_log_axis, make_panels, name_axes, one_line, render_png, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_PANELS = 4
_MOST_CURVES = 6
# Values with a larger ratio get a logarithmic axis.
_WIDE = 20.0


def draw_sweep(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str, *, less_is_better: bool
) -> bytes | None:
    """Return a PNG of a metric against the varying keys; None if fewer than two rows have the metric or no key varies.

    Two keys, one of them numbers and the other with few values: a curve for each of these. Otherwise a panel of points
    for each key; a single key of numbers gives a curve.

    Args:
        rows: those with the metric are drawn.
        keys: settings that differ.
        metric: STEP.METRIC.
        less_is_better: whether the smallest value is marked as the best.
    """
    rows = [row for row in rows if row["metrics"].get(metric) is not None]
    columns = {key: [row["settings"].get(key, "") for row in rows] for key in keys}
    columns = {key: column for key, column in columns.items() if len(set(map(str, column))) > 1}
    if len(rows) < 2 or not columns:
        return None
    values = [float(row["metrics"][metric]) for row in rows]
    best = (min if less_is_better else max)(range(len(rows)), key=values.__getitem__)
    # Numbers first, and among these the setting with the most values.
    x, *others = sorted(columns, key=lambda key: (not is_numeric(columns[key]), -len(set(map(str, columns[key])))))
    by = columns[others[0]] if len(others) == 1 else []
    has_curves = bool(by) and is_numeric(columns[x]) and len(set(map(str, by))) <= _MOST_CURVES
    with styled():
        if has_curves:
            figure, (panel,) = make_panels(1, height=4.2)
            at = draw_points(panel, x, columns[x], values, metric, by=by)
            _mark(panel, at[best], values[best], title=one_line(others[0]))
            return render_png(figure)
        figure, panels = make_panels(min(len(columns), _MOST_PANELS))
        for panel, (key, column) in zip(panels, columns.items(), strict=False):
            has_line = len(columns) == 1 and is_numeric(column)
            at = draw_points(panel, key, column, values, metric, by=[metric] * len(column) if has_line else ())
            _mark(panel, at[best], values[best])
        return render_png(figure)


def is_numeric(column: Sequence[Any]) -> bool:
    """Return True if all values of a setting are numbers."""
    return all(isinstance(value, int | float) for value in column)


def draw_points(
    panel: Axes, key: str, column: Sequence[Any], values: Sequence[float], metric: str,
    *, by: Sequence[Any] = (),
) -> list[float]:  # fmt: skip
    """Draw a metric against one setting, words in order of appearance; return the points' places on the x axis.

    Args:
        panel: where to draw.
        key: the setting.
        column: its values.
        values: of the metric.
        metric: its name.
        by: a label for each point; a line joins points with the same one. Empty: no lines.
    """
    name_axes(panel, f"{metric} by {key}", key, metric)
    at: list[float] = list(column)
    if not is_numeric(column):
        names = list(dict.fromkeys(map(str, column)))
        at = [names.index(str(value)) for value in column]
        labels = [one_line(name) for name in names]
        is_long = sum(map(len, labels)) > 50
        panel.set_xticks(range(len(names)), labels, rotation=30 * is_long, ha="right" if is_long else "center")
        panel.set_xlim(-0.5, len(names) - 0.5)
    elif min(at) > 0 and max(at) / min(at) > _WIDE:
        panel.set_xscale("log")
        label_log_axis(panel.xaxis)
    if not by:
        panel.plot(at, values, "o", color=COLOURS[0], ms=5)
    for colour, label in zip(COLOURS, sorted(set(by)) if is_numeric(by) else dict.fromkeys(by), strict=False):
        points = sorted((x, y) for x, y, own in zip(at, values, by, strict=True) if own == label)
        panel.plot(*zip(*points, strict=True), "-o", color=colour, ms=4, label=one_line(str(label)))
    return at


def _mark(panel: Axes, x: float, y: float, title: str = "") -> None:
    """Circle the best point."""
    panel.plot([x], [y], "o", ms=10, mfc="none", mec=INK, mew=1.5, label="best")
    panel.legend(title=title, title_fontsize=9, fontsize=9)
