"""Plot of a sweep: its metric against the settings that vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxchat.report.plots import COLOURS, INK, label_log_axis, make_panels, name_axes, one_line, render_png, styled
from mlxchat.sweep.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_PANELS = 4
_MOST_CURVES = 6
_MOST_CELLS = 150
_MOST_WORDS = 40
# Values with a larger ratio get a logarithmic axis.
_WIDE = 20.0


def draw_sweep(rows: Sequence[Row], keys: Sequence[str], metric: str, *, less_is_better: bool) -> bytes | None:
    """Return a PNG of a metric against the varying keys; None if fewer than two rows have the metric or no key varies.

    One key: a curve over numbers, points over words. Two keys: a curve for each value of the one with few, a map of
    cells for a whole grid of numbers, coloured points otherwise. More: a panel of points for each.

    Args:
        rows: those with the metric are drawn.
        keys: settings that differ.
        metric: step.metric.
        less_is_better: whether the smallest value is marked as the best.
    """
    rows = [row for row in rows if row["metrics"].get(metric) is not None]
    keys = [key for key in keys if len({str(row["overrides"].get(key)) for row in rows}) > 1]
    if len(rows) < 2 or not keys:
        return None
    values = [float(row["metrics"][metric]) for row in rows]
    columns = {key: [row["overrides"].get(key, "") for row in rows] for key in keys}
    best = (min if less_is_better else max)(range(len(rows)), key=values.__getitem__)
    with styled():
        if len(keys) == 2:
            return _draw_two(columns, values, metric, best)
        shown = keys[:_MOST_PANELS]
        figure, panels = make_panels(len(shown))
        for panel, key in zip(panels, shown, strict=True):
            _draw_one(panel, key, columns[key], values, metric, best, is_curve=len(keys) == 1)
        return render_png(figure)


def is_numeric(column: Sequence[Any]) -> bool:
    """Return True if all values of a setting are numbers."""
    return all(isinstance(value, int | float) for value in column)


def _draw_one(
    panel: Axes, key: str, column: list[Any], values: list[float], metric: str, best: int, *, is_curve: bool
) -> None:
    name_axes(panel, f"{metric} by {key}", key, metric)
    if is_numeric(column):
        order = sorted(range(len(column)), key=column.__getitem__)
        line = "-" if is_curve else "none"
        across, up = [column[i] for i in order], [values[i] for i in order]
        panel.plot(across, up, linestyle=line, marker="o", color=COLOURS[0], ms=4)
        _scale(panel, column, "x")
        place = column[best]
    else:
        names = _names(column)
        at = [names.index(str(value)) for value in column]
        panel.plot(at, values, "o", color=COLOURS[0], ms=5)
        _name_ticks(panel, names, "x")
        place = at[best]
    panel.plot([place], [values[best]], "o", ms=10, mfc="none", mec=COLOURS[1], mew=1.8, label="best")
    panel.legend(fontsize=9)


def _draw_two(columns: dict[str, list[Any]], values: list[float], metric: str, best: int) -> bytes:
    """Plot a metric against two settings."""
    first, second = sorted(columns, key=lambda key: (not is_numeric(columns[key]), -len(set(map(str, columns[key])))))
    across, other = columns[first], columns[second]
    figure, (panel,) = make_panels(1, height=4.2)
    cells = len(set(map(str, across))) * len(set(map(str, other)))
    if is_numeric(across) and len(set(map(str, other))) <= _MOST_CURVES:
        for colour, name in zip(COLOURS, _names(other), strict=False):
            points = sorted((x, y) for x, o, y in zip(across, other, values, strict=True) if str(o) == name)
            panel.plot([x for x, _ in points], [y for _, y in points], "-o", color=colour, ms=4, label=one_line(name))
        panel.plot([across[best]], [values[best]], "o", ms=10, mfc="none", mec=INK, mew=1.5, label="best")
        _scale(panel, across, "x")
        name_axes(panel, f"{metric} by {first}", first, metric)
        panel.legend(title=one_line(second), title_fontsize=9, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return render_png(figure)
    if cells <= min(_MOST_CELLS, 2 * len(values)) or not (is_numeric(across) and is_numeric(other)):
        _draw_cells(panel, across, other, values, best)
    else:
        dots: Any = panel.scatter(across, other, c=values, cmap="viridis", s=45)
        _scale(panel, across, "x")
        _scale(panel, other, "y")
        panel.plot([across[best]], [other[best]], "o", ms=12, mfc="none", mec=INK, mew=1.5, label="best")
        figure.colorbar(dots, ax=panel, label=one_line(metric))
        panel.legend(fontsize=9)
    name_axes(panel, metric, first, second)
    return render_png(figure)


def _draw_cells(panel: Axes, across: list[Any], up: list[Any], values: list[float], best: int) -> None:
    """Draw one labelled cell per combination; several results of a combination are averaged."""
    columns, lines = _names(across), _names(up)
    sums: dict[tuple[int, int], list[float]] = {}
    for x, y, value in zip(across, up, values, strict=True):
        sums.setdefault((lines.index(str(y)), columns.index(str(x))), []).append(value)
    means = {place: sum(found) / len(found) for place, found in sums.items()}
    grid = [[means.get((line, column), float("nan")) for column in range(len(columns))] for line in range(len(lines))]
    panel.grid(visible=False)
    panel.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
    low, high = min(means.values()), max(means.values())
    marked = lines.index(str(up[best])), columns.index(str(across[best]))
    for place, mean in means.items() if len(means) <= _MOST_WORDS else ():
        colour = "black" if high > low and (mean - low) / (high - low) > 0.5 else "white"
        weight = "bold" if place == marked else "normal"
        panel.text(place[1], place[0], f"{mean:.4g}", ha="center", va="center", color=colour, weight=weight)
    _name_ticks(panel, columns, "x")
    _name_ticks(panel, lines, "y")


def _names(column: Sequence[Any]) -> list[str]:
    """Return the distinct values as text: numbers sorted, words in order of appearance."""
    if is_numeric(column):
        return [str(value) for value in sorted(set(column))]
    return list(dict.fromkeys(str(value) for value in column))


def _name_ticks(panel: Axes, names: list[str], axis: str) -> None:
    labels = [one_line(name) for name in names]
    if axis == "x":
        turned = 30 if sum(map(len, labels)) > 50 else 0
        panel.set_xticks(range(len(names)), labels, rotation=turned, ha="right" if turned else "center")
        panel.set_xlim(-0.5, len(names) - 0.5)
    else:
        panel.set_yticks(range(len(names)), labels)


def _scale(panel: Axes, column: list[Any], axis: str) -> None:
    if min(column) > 0 and max(column) / min(column) > _WIDE:
        (panel.set_xscale if axis == "x" else panel.set_yscale)("log")
        label_log_axis(panel.xaxis if axis == "x" else panel.yaxis)
