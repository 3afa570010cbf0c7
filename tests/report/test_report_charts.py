"""Pictures: what they show, that they stay inside, hostile names, smoothing, the fitted power law."""

import re
from xml.etree import ElementTree

import pytest

from mlxchat.report.comparison import scaling_chart
from mlxchat.report.document import standalone
from mlxchat.report.plots import Curve, draw_bars, draw_curves, main_charts, more_charts, smooth

SVG = "{http://www.w3.org/2000/svg}"


def chart(points, **options):
    curves = [Curve(points=points, label="end", errors=options.pop("errors", []))]
    return draw_curves(**{"name": "c", "title": "t", "alt": "a", "y": "y", "curves": curves, **options})


def words(svg):
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_hostile_names_stay_text_in_pictures():
    name = '"><script>alert(1)</script>&\x1b[31m\u202e\ud800 $x^2$'
    rows = [(name, [(1.0, 0.1), None], [0.5])]
    bars = draw_bars("b", name, name, rows, x=name, labels=[name, "b"], mark="chance")
    for drawn in (bars, chart(([1.0, 2.0], [1.0, 2.0]), title=name, alt=name, y=name, levels=[(name, 1.5)])):
        root = ElementTree.fromstring(standalone(drawn))
        assert not [element for element in root.iter() if element.tag.endswith("script")]
        assert root.tag == f"{SVG}svg"
        assert any("<script>alert(1)" in word for word in words(standalone(drawn)))


def test_pictures_use_the_pages_colours_and_unique_ids():
    """Guards against pictures that stay light on a dark page, and against one that shows the markers of another."""
    first, second = (chart(([1.0, 2.0], [1.0, 2.0]), name=name).svg for name in "ab")
    assert "#" not in re.sub(r'(href="|url\()#', "", first)
    assert "var(--c0)" in first
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_smoothing_is_a_moving_mean():
    values = [9.0 if i == 20 else 0.0 for i in range(41)]
    assert smooth(values)[16:25] == pytest.approx([1.0] * 9)
    line = [3.0 - 0.5 * i for i in range(99)]
    assert smooth(line)[4:-4] == pytest.approx(line[4:-4])
    assert smooth(line)[0] == pytest.approx(2.0), "the mean of what is there"
    assert smooth([5.0]) == [5.0]


def test_charts_follow_the_logged_metrics(made):
    lines = [
        {"iteration": i, "loss": 5.0 / i, "lr_multiplier": 1.0, "grad_norm": 0.5, "tokens_per_second": 1e5,
         "val_loss": 1.0, "val_perplexity": 2.7, "data_wait_frac": 0.2, "own": 3.0}
        for i in range(1, 40)
    ]  # fmt: skip
    made.write_lines("sft", "metrics.jsonl", lines)
    passes = {f"pass_at_{k}": 0.5 for k in range(1, 9)}
    lines = [{"iteration": i, "reward": 0.1 * i, **passes, "pass_at_1_stderr": 0.05} for i in range(5)]
    made.write_lines("rl", "metrics.jsonl", lines)
    report = made.report()
    sft, rl = report.step("sft"), report.step("rl")
    assert [chart.name for chart in main_charts(report, sft)] == ["sft-loss", "sft-val_loss"]
    more = ["sft-lr_multiplier", "sft-grad_norm", "sft-tokens_per_second", "sft-own"]
    assert [chart.name for chart in more_charts(report, sft)] == more
    assert [chart.name for chart in main_charts(report, rl)] == ["rl-reward", "rl-pass"]
    passed = main_charts(report, rl)[1]
    assert "pass@1 ends at 50.0% ± 5.0; pass@2 ends at 50.0%; pass@4" in passed.alt
    assert len(passed.draw().axes[0].collections) == 1, "a band of standard errors"
    assert main_charts(report, report.step("corpus")) == []


def test_three_sizes_are_drawn_with_a_power_law():
    points = {f"d{i}": (1e15 * 10**i, 2.0 * 10 ** (-0.05 * i)) for i in range(3)}
    assert "fitted: 1.783 · (FLOPs / 1e+16)^(−0.050)" in scaling_chart(points).alt  # 2 · 10^-0.05 in the middle
    assert scaling_chart({name: points[name] for name in ("d0", "d1")}) is None
