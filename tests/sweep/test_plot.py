"""The plot of a sweep: its form for each kind of settings."""

from typing import Any

import pytest

from mlxchat.sweep import plot
from mlxchat.sweep.plot import draw_sweep

METRIC = "sft.val_loss"


@pytest.fixture
def axes_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that returns the panels of the picture of settings and values."""

    def axes(settings: list[dict[str, Any]], values: list[float | None]) -> list[Any]:
        kept: list[Any] = []
        monkeypatch.setattr(plot, "render_png", lambda figure: kept.append(figure) or b"")
        rows = [{"name": "x", **items, METRIC: value} for items, value in zip(settings, values, strict=True)]
        draw_sweep(rows, list(settings[0]), METRIC)
        return list(kept[0].axes)

    return axes


def points(axes: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for line in axes.lines for x, y in line.get_xydata()]


def test_number_gives_a_curve(axes_of):
    (axes,) = axes_of([{"lr": 0.3}, {"lr": 0.1}, {"lr": 0.2}, {"lr": 0.4}], [3.0, 1.0, 2.0, None])
    assert points(axes) == [(0.1, 1.0), (0.2, 2.0), (0.3, 3.0)]
    assert axes.get_xscale() == "linear"
    (axes,) = axes_of([{"lr": 0.001}, {"lr": 0.01}, {"lr": 0.1}], [1.0, 2.0, 3.0])
    assert axes.get_xscale() == "log"


def test_number_and_word_give_a_curve_per_word(axes_of):
    (axes,) = axes_of([{"model": model, "lr": lr} for lr in (1, 2, 3) for model in ("d2", "d4")], [1.0] * 6)
    assert [line.get_label() for line in axes.lines] == ["d2", "d4"]
    assert axes.get_legend().get_title().get_text() == "model"
    assert [float(x) for x in axes.lines[0].get_xdata()] == [1, 2, 3]


def test_words_give_points_without_a_line(axes_of):
    settings = [{"optimizer": name} for name in ("muon", "adamw")]
    (panel,) = axes_of(settings, [1.0, 2.0])
    assert points(panel) == [(0, 1.0), (1, 2.0)]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["muon", "adamw"]
    assert panel.lines[0].get_linestyle() == "None"


def test_nothing_to_compare_draws_nothing():
    for rows in ([{"a": 1, METRIC: 1.0}], [{"a": 1, METRIC: 1.0}, {"a": 1, METRIC: 2.0}], [{"a": 1}, {"a": 2}]):
        assert draw_sweep(rows, ["a"], METRIC) is None


def test_names_that_matplotlib_interprets_are_drawn():
    for name in ("$\\frac{", "_x", "x" * 300, ""):
        picture = draw_sweep([{"model": name, METRIC: 1.0}, {"model": "other", METRIC: 2.0}], ["model"], METRIC)
        assert picture is not None
        assert picture.startswith(b"\x89PNG")
