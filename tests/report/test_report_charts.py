"""Pictures: scales and their numbers, curves and bars as SVG, thinning, hostile names, the fitted power law."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from mlxchat.report.axes import Scale, span, tick_labels, ticks
from mlxchat.report.drawing import Bar, Bars, Chart, Curve
from mlxchat.report.html import standalone
from mlxchat.report.plots import step_charts
from mlxchat.report.scaling import Point, fit, scaling_chart
from mlxchat.report.smoothing import thin


def chart(points, **options):
    curves = [Curve(points=points, end="end")]
    return Chart(**{"name": "c", "title": "t", "alt": "a", "y": "y", "curves": curves, **options})


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.7, 12.2), (1e-7, 3e-7), (5e17, 9e18), (2, 2.0001)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 6
    assert low - 1e-9 * abs(low) <= found[0] <= found[-1] <= high * (1 + 1e-9)
    step = found[1] - found[0]
    assert math.isclose(step / 10 ** math.floor(math.log10(step * 1.0001)), round(step / 10 ** math.floor(
        math.log10(step * 1.0001))), rel_tol=1e-6)  # fmt: skip


def test_ticks_of_a_wide_logarithmic_axis_are_powers_of_ten():
    found = ticks(3e13, 5e19, 8, is_log=True)
    assert all(math.isclose(math.log10(value), round(math.log10(value))) for value in found)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 0.5, 1], ["0.0", "0.5", "1.0"]),
        ([0, 20_000, 40_000], ["0", "20k", "40k"]),
        ([1e18, 1e19], ["1e18", "1e19"]),
        ([2e11, 5e12], ["2e11", "5e12"]),
        ([2000, 4000], ["2,000", "4,000"]),
        ([1_000_000, 1_500_000], ["1.0M", "1.5M"]),
        ([], []),
    ],
)
def test_ticks_say_what_tells_them_apart(values, labels):
    assert tick_labels(values) == labels


@pytest.mark.parametrize("values", [[3.0], [0.0], [-1.0, -1.0], [1e-300]])
def test_one_value_still_has_a_span(values):
    low, high = span(values)
    assert low < min(values) <= max(values) < high


def test_a_logarithmic_scale_gives_equal_ratios_equal_room():
    scale = Scale(low=1, high=10_000, start=0, end=400, is_log=True)
    assert [scale(10.0**i) for i in range(5)] == pytest.approx([0, 100, 200, 300, 400])


def test_thinning_keeps_ends_and_extremes():
    xs = [float(i) for i in range(50_000)]
    ys = [math.sin(x / 500) for x in xs]
    ys[12_345] = 99.0
    kept_x, kept_y = thin((xs, ys))
    assert len(kept_x) < 1000
    assert (kept_x[0], kept_x[-1], max(kept_y), kept_y[kept_x.index(12_345.0)]) == (0.0, 49_999.0, 99.0, 99.0)
    assert kept_x == sorted(kept_x)


@pytest.mark.parametrize("points", [([0.0], [1.0]), ([5.0, 5.0], [2.0, 2.0]), ([0.0, 1.0], [-1e30, 1e30])])
def test_the_smallest_curves_are_drawn_inside_the_picture(points):
    root = ElementTree.fromstring(chart(points).draw())
    width, height = (float(v) for v in root.get("viewBox").split()[2:])
    for dot in root.iter("circle"):
        assert 0 <= float(dot.get("cx")) <= width
        assert 0 <= float(dot.get("cy")) <= height


def test_names_are_text_in_pictures_whatever_they_hold():
    name = '"><script>alert(1)</script>&\x1b[31m\u202e\ud800'
    bars = Bars(
        name="b", title=name, alt=name, x=name, rows=[(name, [Bar(value=1.0), None], [0.5])], labels=[name, "b"]
    )
    for drawn in (bars, chart(([1.0, 2.0], [1.0, 2.0]), title=name, alt=name, y=name, levels=[(name, 1.5)])):
        root = ElementTree.fromstring(standalone(drawn))
        assert not [element for element in root.iter() if element.tag.endswith("script")]
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_a_negative_bar_begins_at_nothing_too():
    root = ElementTree.fromstring(
        Bars(name="b", title="", alt="", x="", rows=[("a", [Bar(value=-0.5)], []), ("b", [Bar(value=1.0)], [])],
             labels=[]).draw()
    )  # fmt: skip
    first, second = (rect for rect in root.iter("rect"))
    assert float(first.get("x")) + float(first.get("width")) == pytest.approx(float(second.get("x")), abs=0.11)


def test_the_fit_is_least_squares_of_the_logarithms():
    draw = np.random.default_rng(3)
    flops = np.array([1e15, 5e15, 2e16, 9e16, 4e17])
    bpb = 2.1 * (flops / 1e16) ** -0.051 * np.exp(draw.normal(0, 0.004, 5))
    found = fit([Point(name="", flops=f, bpb=b) for f, b in zip(flops, bpb, strict=True)])
    slope, offset = np.polyfit(np.log(flops), np.log(bpb), 1)
    assert found.slope == pytest.approx(slope, rel=1e-9)
    assert found(3e16) == pytest.approx(np.exp(offset + slope * np.log(3e16)), rel=1e-9)
    assert found.r2 == pytest.approx(np.corrcoef(np.log(flops), np.log(bpb))[0, 1] ** 2, rel=1e-9)


@pytest.mark.parametrize("flops", [[1e15], [1e15, 2e15], [1e15, 1e15, 1e15]])
def test_a_line_needs_three_sizes(flops):
    assert fit([Point(name="", flops=f, bpb=1.0) for f in flops]) is None


def test_two_sizes_are_drawn_without_a_line_and_one_is_not_drawn():
    points = [Point(name="d2", flops=1e15, bpb=2.0), Point(name="d4", flops=8e15, bpb=1.8)]
    assert len(scaling_chart(points).curves) == 1
    assert scaling_chart(points[:1]) is None


def test_a_training_has_the_curves_that_it_logged(whole):
    lines = [
        {"iteration": i, "loss": 5.0 / i, "lr_multiplier": 1.0, "grad_norm": 0.5, "tokens_per_second": 1e5,
         "peak_memory_bytes": 2_000_000_000, "data_wait_frac": 0.2 if i == 1 else 0.0}
        for i in range(1, 40)
    ]  # fmt: skip
    whole.write_lines(whole.folder("sft") / "metrics.jsonl", lines)
    report = whole.read()
    names = [chart.name for chart in step_charts(report, report.step("sft"))]
    assert names == ["sft-loss", "sft-lr_multiplier", "sft-grad_norm", "sft-tokens_per_second", "sft-peak_memory_bytes"]
    rl = [chart.name for chart in step_charts(report, report.step("rl"))]
    assert rl[:2] == ["rl-reward", "rl-pass"]
    assert step_charts(report, report.step("corpus")) == []
