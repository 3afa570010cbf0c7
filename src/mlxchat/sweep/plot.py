"""The plot of a sweep: its metric against the settings that vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlxchat.report.plots import COLOURS, label_log_axis, make_panels, name_axes, one_line, render_png, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_CURVES = 6
# Values with a larger ratio get a logarithmic axis.
_WIDE = 20.0


def draw_sweep(rows: Sequence[Mapping[str, Any]], settings: Sequence[str], metric: str) -> bytes | None:
    """Return a PNG with a point for each row, against the setting of numbers with the most values.

    If only one other setting varies and has few values, a curve joins the points of each of its values.

    Args:
        rows: setting → value, metric → value.
        settings: that differ.
        metric: what to draw; fewer than two rows with it give no picture.
    """
    rows = [row for row in rows if row.get(metric) is not None]
    columns = {key: [row.get(key, "") for row in rows] for key in settings}
    columns = {key: column for key, column in columns.items() if len(set(map(str, column))) > 1}
    if len(rows) < 2 or not columns:
        return None
    x, *others = sorted(columns, key=lambda key: (not is_numeric(columns[key]), -len(set(map(str, columns[key])))))
    by = others[0] if len(others) == 1 and len(set(map(str, columns[others[0]]))) <= _MOST_CURVES else None
    curves: dict[str, list[tuple[float, float]]] = {}
    with styled():
        figure, (panel,) = make_panels(1, height=4.2)
        for place, row in zip(_place(panel, columns[x]), rows, strict=True):
            curves.setdefault(metric if by is None else str(row.get(by)), []).append((place, row[metric]))
        name_axes(panel, f"{metric} by {x}", x, metric)
        is_curve = is_numeric(columns[x]) and (by is not None or not others)
        for colour, (label, points) in zip(COLOURS, curves.items(), strict=False):
            xs, ys = zip(*sorted(points), strict=True)
            panel.plot(xs, ys, "-o" if is_curve else "o", color=colour, ms=4, label=one_line(label))
        if by is not None:
            panel.legend(title=one_line(by), title_fontsize=9, fontsize=9)
        return render_png(figure)


def is_numeric(column: Sequence[Any]) -> bool:
    """Return True if all values of a setting are numbers."""
    return all(isinstance(value, int | float) for value in column)


def _place(panel: Axes, column: Sequence[Any]) -> list[float]:
    """Prepare the x axis and return the values' places on it; words stand in order of appearance."""
    if is_numeric(column):
        if min(column) > 0 and max(column) / min(column) > _WIDE:
            panel.set_xscale("log")
            label_log_axis(panel.xaxis)
        return list(column)
    names = list(dict.fromkeys(map(str, column)))
    labels = [one_line(name) for name in names]
    is_long = sum(map(len, labels)) > 50
    panel.set_xticks(range(len(names)), labels, rotation=30 * is_long, ha="right" if is_long else "center")
    panel.set_xlim(-0.5, len(names) - 0.5)
    return [names.index(str(value)) for value in column]
