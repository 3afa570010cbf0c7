"""The plot of a sweep: its form for each kind of settings, hostile names, gaps."""

from typing import Any

import pytest

from mlxchat.sweep import plot
from mlxchat.sweep.plot import draw_sweep
from mlxchat.sweep.results import differing, main_metric


def rows(settings: list[dict[str, Any]], values: list[float | None] | None = None) -> list[dict[str, Any]]:
    values = values if values is not None else [1.0 + index / 7 for index in range(len(settings))]
    return [
        {"job": index, "overrides": items, "metrics": {} if value is None else {"sft.val_loss": value}}
        for index, (items, value) in enumerate(zip(settings, values, strict=True))
    ]


def axes_of(found: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the panels of the picture that is drawn."""
    kept: list[Any] = []
    monkeypatch.setattr(plot, "render_png", lambda figure: kept.append(figure) or b"")
    draw_sweep(found, differing([row["overrides"] for row in found]), "sft.val_loss", less_is_better=True)
    (figure,) = kept
    return list(figure.axes)


def points(axes: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for line in axes.lines for x, y in line.get_xydata()]


def test_number_gives_a_curve_with_the_best_marked(monkeypatch):
    (axes,) = axes_of(rows([{"lr": 0.3}, {"lr": 0.1}, {"lr": 0.2}], [3.0, 1.0, 2.0]), monkeypatch)
    assert points(axes) == [(0.1, 1.0), (0.2, 2.0), (0.3, 3.0), (0.1, 1.0)]
    assert axes.get_xscale() == "linear"
    (axes,) = axes_of(rows([{"lr": 0.001}, {"lr": 0.01}, {"lr": 0.1}]), monkeypatch)
    assert axes.get_xscale() == "log"
    labels = {label.get_text() for label in axes.get_xticklabels()}
    assert {"0.001", "0.01", "0.1"} <= labels, "not matplotlib's formulas, unread"


def test_number_and_word_give_a_curve_per_word(monkeypatch):
    settings = [{"lr": lr, "model": model} for lr in (1, 2, 3) for model in ("d2", "d4")]
    (axes,) = axes_of(rows(settings), monkeypatch)
    assert [line.get_label() for line in axes.lines] == ["d2", "d4", "best"]
    assert axes.get_legend().get_title().get_text() == "model"
    assert [float(x) for x in axes.lines[0].get_xdata()] == [1, 2, 3]


def test_two_words_give_a_panel_each(monkeypatch):
    settings = [{"optimizer": name, "model": model} for name in ("muon", "adamw") for model in ("d2", "d4")]
    panels = axes_of(rows(settings, [1.0, 2.0, 3.0, 4.0]), monkeypatch)
    assert [points(panel)[:4] for panel in panels] == [
        [(0, 1.0), (0, 2.0), (1, 3.0), (1, 4.0)], [(0, 1.0), (0, 3.0), (1, 2.0), (1, 4.0)],
    ]  # fmt: skip
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["muon", "adamw"]


def test_several_settings_give_points_without_a_line(monkeypatch):
    """A line joined them: matplotlib's empty format means its default, a line."""
    panels = axes_of(rows([{"lr": 0.1, "x": 1, "y": 2}, {"lr": 0.2, "x": 2, "y": 4}]), monkeypatch)
    assert [panel.lines[0].get_linestyle() for panel in panels] == ["None"] * 3


@pytest.mark.parametrize(
    "found",
    [
        rows([{"a": 1}]),
        rows([{"a": 1}, {"a": 1}]),
        rows([{"a": 1}, {"a": 2}], [1.0, None]),
        rows([{"a": 1}, {"a": 2}], [None, None]),
        [],
    ],
    ids=["one row", "nothing differs", "one value", "no value", "nothing"],
)
def test_nothing_to_compare_draws_nothing(found):
    assert draw_sweep(found, ["a"], "sft.val_loss", less_is_better=True) is None


@pytest.mark.parametrize("name", ["$\\frac{", "_x", "naïve 模型", "a\nb", "x" * 300, ""])
def test_hostile_names_can_be_drawn(name):
    found = rows([{"model": name}, {"model": "other"}])
    picture = draw_sweep(found, ["model"], "sft.val_loss", less_is_better=True)
    assert picture.startswith(b"\x89PNG")


def test_main_metric_is_the_last_that_differs():
    found = [{"metrics": {"pretrain.val_bpb": 1.0, "sft.val_loss": 2.0, "eval.mean_centered": 0.1}} for _ in range(2)]
    assert main_metric(found) == "eval.mean_centered"
    found[0]["metrics"]["sft.val_loss"] = 3.0
    assert main_metric(found) == "sft.val_loss"
    assert main_metric([]) is None
