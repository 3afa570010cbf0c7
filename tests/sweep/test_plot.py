"""The plot of a sweep: its form for each kind of settings, and when there is nothing to draw."""

from typing import Any

import pytest

from mlxchat.sweep import plot
from mlxchat.sweep.plot import draw_sweep
from mlxchat.sweep.results import differing, main_metric


def rows(settings: list[dict[str, Any]], values: list[float | None] | None = None) -> list[dict[str, Any]]:
    values = values if values is not None else [1.0 + index / 7 for index in range(len(settings))]
    return [
        {"job": index, "settings": items, "metrics": {} if value is None else {"sft.val_loss": value}}
        for index, (items, value) in enumerate(zip(settings, values, strict=True))
    ]


@pytest.fixture
def axes_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that returns the panels of the picture that is drawn."""

    def axes(found: list[dict[str, Any]]) -> list[Any]:
        kept: list[Any] = []
        monkeypatch.setattr(plot, "render_png", lambda figure: kept.append(figure) or b"")
        draw_sweep(found, differing([row["settings"] for row in found]), "sft.val_loss", less_is_better=True)
        return list(kept[0].axes)

    return axes


def points(axes: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for line in axes.lines for x, y in line.get_xydata()]


def test_number_gives_a_curve_with_the_best_marked(axes_of):
    (axes,) = axes_of(rows([{"lr": 0.3}, {"lr": 0.1}, {"lr": 0.2}], [3.0, 1.0, 2.0]))
    assert points(axes) == [(0.1, 1.0), (0.2, 2.0), (0.3, 3.0), (0.1, 1.0)]
    assert axes.get_xscale() == "linear"
    (axes,) = axes_of(rows([{"lr": 0.001}, {"lr": 0.01}, {"lr": 0.1}]))
    assert axes.get_xscale() == "log"


def test_number_and_word_give_a_curve_per_word(axes_of):
    (axes,) = axes_of(rows([{"lr": lr, "model": model} for lr in (1, 2, 3) for model in ("d2", "d4")]))
    assert [line.get_label() for line in axes.lines] == ["d2", "d4", "best"]
    assert axes.get_legend().get_title().get_text() == "model"
    assert [float(x) for x in axes.lines[0].get_xdata()] == [1, 2, 3]


def test_several_settings_give_a_panel_of_points_each(axes_of):
    settings = [{"optimizer": name, "model": model} for name in ("muon", "adamw") for model in ("d2", "d4")]
    panels = axes_of(rows(settings, [1.0, 2.0, 3.0, 4.0]))
    assert [points(panel)[:4] for panel in panels] == [
        [(0, 1.0), (0, 2.0), (1, 3.0), (1, 4.0)], [(0, 1.0), (1, 2.0), (0, 3.0), (1, 4.0)],
    ]  # fmt: skip
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["muon", "adamw"]
    panels = axes_of(rows([{"lr": 0.1, "x": 1, "y": 2}, {"lr": 0.2, "x": 2, "y": 4}]))
    assert [panel.lines[0].get_linestyle() for panel in panels] == ["None"] * 3


@pytest.mark.parametrize(
    "found",
    [rows([{"a": 1}]), rows([{"a": 1}, {"a": 1}]), rows([{"a": 1}, {"a": 2}], [1.0, None]), []],
    ids=["one row", "nothing differs", "one value", "nothing"],
)
def test_nothing_to_compare_draws_nothing(found):
    assert draw_sweep(found, ["a"], "sft.val_loss", less_is_better=True) is None


def test_names_that_matplotlib_interprets_are_drawn():
    for name in ("$\\frac{", "_x", "x" * 300, ""):
        found = rows([{"model": name}, {"model": "other"}])
        picture = draw_sweep(found, ["model"], "sft.val_loss", less_is_better=True)
        assert picture is not None
        assert picture.startswith(b"\x89PNG")


def test_main_metric_is_the_last_that_differs():
    found = [{"metrics": {"pretrain.val_bpb": 1.0, "sft.val_loss": 2.0, "eval.mean_centered": 0.1}} for _ in range(2)]
    assert main_metric(found) == "eval.mean_centered"
    found[0]["metrics"]["sft.val_loss"] = 3.0
    assert main_metric(found) == "sft.val_loss"
    assert main_metric([]) is None
