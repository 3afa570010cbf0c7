"""Charts: what they show (`Chart`, `Bars`), how matplotlib draws them in our style, and which ones a run gives.

A chart is drawn once, in the colours of light screens, as an SVG whose colours are then replaced by the variables of
page.css: so it follows the page into dark mode and onto paper. Its words are text, and `alt` describes it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

from mlxchat.config.wording import format_count, format_share
from mlxchat.errors import visible
from mlxchat.evals.scores import Measure
from mlxchat.report.collect import RunReport, StepReport, checkpoint_name
from mlxchat.report.tables import Column, baseline_label, columns, passes, published_core

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# In pixels: two charts fit side by side on a screen, one on a phone.
WIDTH, HEIGHT = 460.0, 265.0
_LEGEND_LINE, _LABEL_LINE = 18.0, 15.0
LABEL_LETTERS = 34
# Curves up to this length are not thinned.
SMOOTH_FROM_POINTS = 30
INK, SOFT, LINE, PANEL = "#1f2328", "#59636e", "#d8dde3", "#f6f8fa"
# Okabe and Ito's palette, safe for colour blindness; the last colour is for published results.
COLOURS = ("#0072b2", "#b94a00", "#00825f", "#b5478f", "#8a6a00", "#5b5fc7", "#8c959f")
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", PANEL: "panel"} | {c: f"c{i}" for i, c in enumerate(COLOURS)}
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 12.5, "text.color": INK,
    "axes.edgecolor": LINE, "axes.labelcolor": SOFT, "axes.labelsize": 12.5, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "axes.formatter.useoffset": False, "grid.color": LINE, "grid.linewidth": 0.8,
    "xtick.color": SOFT, "ytick.color": SOFT,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "lines.linewidth": 1.9, "lines.markersize": 5, "path.simplify_threshold": 0.5,
}  # fmt: skip

Points = tuple[list[float], list[float]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line through points, or points alone."""

    points: Points
    errors: list[float] = field(default_factory=list)
    """Standard errors of the points, drawn as a band; empty: none."""
    label: str = ""
    colour: int = 0
    is_smoothed: bool = False
    """Draw a long curve faint, with a smoothed one over it."""
    has_line: bool = True
    end: str = ""
    """Label of the last point."""
    names: list[str] = field(default_factory=list)
    """Labels of the points."""

    def drawn(self) -> list[float]:
        """Return the values of the drawn line."""
        ys = self.points[1]
        return smooth(ys) if self.is_smoothed and len(ys) >= SMOOTH_FROM_POINTS else ys


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over one axis."""

    name: str
    """File name without suffix."""
    title: str
    alt: str
    y: str
    """Label of the y axis, with unit."""
    curves: list[Curve]
    x: str = "iteration"
    levels: list[tuple[str, float]] = field(default_factory=list)
    """Horizontal reference lines: label and value."""
    is_log: bool = False
    from_zero: bool = False

    @cached_property
    def svg(self) -> str:
        """The chart as an SVG element."""
        lines = _legend_lines([label for curve in self.curves if (label := one_line(curve.label))])
        with styled(), _figure(HEIGHT + _LEGEND_LINE * max(0, lines - 1)) as (figure, axes):
            _draw_curves(self, figure, axes)
            return _svg(figure, self.name, self.alt)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Length and standard error of a bar."""

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
    """Label of a row, its bars, and marked values."""
    labels: list[str]
    """Legend of the bars; empty: one bar per row, with its value beside it."""
    mark: str = ""
    """Legend of the marks."""

    @cached_property
    def svg(self) -> str:
        """The chart as an SVG element."""
        thick = max((len(bars) for _, bars, _ in self.rows), default=1)
        height = 84 + len(self.rows) * max(20, 11 * thick + 8) + (20 if self.labels else 0)
        with styled(), _figure(height) as (figure, axes):
            _draw_bars(self, figure, axes)
            return _svg(figure, self.name, self.alt)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of several panels."""

    name: str
    title: str
    alt: str
    draw: Callable[[], Figure]

    @cached_property
    def svg(self) -> str:
        """The figure as an SVG element."""
        with styled():
            figure = self.draw()
            figure.set_facecolor("none")
            return _svg(figure, self.name, self.alt)


Drawing = Chart | Bars | Picture


@contextmanager
def styled() -> Iterator[None]:
    """Use our style within the context."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # Missing glyphs are not worth a warning.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def smooth(values: Sequence[float]) -> list[float]:
    """Return, at each point, the least-squares line through a window of nearby points.

    Away from the ends that is the centred mean. At the ends, where the points lie to one side, a mean would lag behind
    a falling curve and a line does not.
    """
    import numpy as np

    if len(values) < 3:
        return list(values)
    count, window = len(values), min(len(values), max(9, len(values) // 20) | 1)
    positions = np.arange(count)
    begin = np.clip(positions - window // 2, 0, count - window)
    sums, moments = (np.concatenate([[0.0], np.cumsum(v)]) for v in (values, positions * np.asarray(values)))
    middle = begin + (window - 1) / 2
    total, moment = sums[begin + window] - sums[begin], moments[begin + window] - moments[begin]
    slope = (moment - middle * total) / (window * (window * window - 1) / 12)
    return list((total / window + slope * (positions - middle)).tolist())


def one_line(words: str, letters: int = LABEL_LETTERS) -> str:
    """Return a name for a picture: one line, shortened."""
    # matplotlib's legend omits labels with a leading underscore.
    plain = " ".join(visible(words).split()).lstrip("_")
    return plain if len(plain) <= letters else f"{plain[: letters - 1]}…"


def render_png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def make_panels(count: int, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    """Return a figure `height` inches high with `count` empty panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height), layout="constrained", facecolor="white")
    grid: Any = figure.subplots(1, count, squeeze=False, gridspec_kw={"wspace": 0.08})
    for panel in grid[0]:
        panel.tick_params(labelsize=9)
        panel.grid(visible=True, axis="both")
    return figure, list(grid[0])


def name_axes(panel: Axes, title: str, x: str, y: str) -> None:
    """Set a panel's title and axis labels."""
    panel.set_title(
        one_line(title, max(LABEL_LETTERS, 90 // len(panel.figure.axes))), loc="left", fontsize=11, fontweight="bold"
    )
    panel.set_xlabel(one_line(x), fontsize=9.5)
    panel.set_ylabel(one_line(y), fontsize=9.5)


@contextmanager
def _figure(height: float) -> Iterator[tuple[Figure, Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
    yield figure, figure.subplots()


def _place(figure: Figure, *, left: float, right: float, top: float, bottom: float = 46) -> None:
    """Set the margins in pixels."""
    height = 72 * figure.get_figheight()
    figure.subplots_adjust(left=left / WIDTH, right=1 - right / WIDTH, top=1 - top / height, bottom=bottom / height)


def _title(figure: Figure, axes: Axes, title: str) -> float:
    """Draw title and legend above the axes; return their height."""
    height = 72 * figure.get_figheight()
    figure.text(0, 1 - 3 / height, one_line(title, 56), va="top", fontsize=13.5, fontweight="bold")
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return 30
    lines = _legend_lines(labels)
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0, 1 - 22 / height), bbox_transform=figure.transFigure,
        ncols=-(-len(labels) // lines), borderpad=0, borderaxespad=0, handlelength=1.3, columnspacing=1.4,
        handletextpad=0.5,
    )  # fmt: skip
    return 30 + _LEGEND_LINE * lines


def _legend_lines(labels: Sequence[str]) -> int:
    across = max(1, int(WIDTH // (42 + 7.6 * max(map(len, labels), default=0))))
    return -(-len(labels) // across)


def spread(places: Sequence[float], gap: float, high: float) -> list[float]:
    """Return ascending places as places at least `gap` apart, if possible within 0 to `high` with a margin.

    Places that are too near to each other are moved apart around their mean.
    """

    def middle(group: list[float]) -> float:
        half = gap * (len(group) - 1) / 2 + gap / 3
        return max(half, min(high - half, sum(group) / len(group)))

    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and (
            middle(groups[-1]) - middle(groups[-2]) < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            groups[-1] += last
    return [middle(group) + gap * (at - (len(group) - 1) / 2) for group in groups for at in range(len(group))]


def _tick(value: float, _: object = None) -> str:
    if value and (abs(value) >= 1e15 or abs(value) < 1e-4):
        return re.sub(r"e([+-])0*", lambda match: "e" + match[1].strip("+"), f"{value:.0e}")
    return format_count(value)


def _draw_curves(chart: Chart, figure: Figure, axes: Axes) -> None:
    for curve in chart.curves:
        _draw_curve(curve, axes)
    if chart.is_log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    for _, value in chart.levels:
        axes.axhline(value, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.margins(x=0.0 if any(len(curve.points[0]) > 1 and curve.has_line for curve in chart.curves) else 0.1, y=0.06)
    if chart.from_zero and axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(one_line(chart.x))
    axes.set_ylabel(one_line(chart.y))
    _set_ticks(chart, axes)
    ends = max((len(curve.end) for curve in chart.curves), default=0)
    top = _title(figure, axes, chart.title)
    marks = [_tick(value) for value in axes.yaxis.get_major_locator().tick_values(*axes.get_ylim())]
    _place(figure, left=30 + 7.6 * max(map(len, marks), default=3), right=12 + 8.6 * ends, top=top)
    height = 72 * figure.get_figheight() - top - 46
    _name_levels(chart, axes, height)
    _name_ends(chart, axes, height)
    for curve in chart.curves:
        if curve.names:
            _name_points(curve, axes, height)


def _draw_curve(curve: Curve, axes: Axes) -> None:
    (xs, ys), drawn, colour = curve.points, curve.drawn(), COLOURS[curve.colour]
    style: dict[str, Any] = {"color": colour, "solid_joinstyle": "round"}
    if drawn is not ys:
        axes.plot(xs, ys, linewidth=0.7, alpha=0.35, **style)
    if len(curve.errors) == len(ys):
        low, high = ([y + sign * error for y, error in zip(ys, curve.errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0)
    is_dotted = not curve.has_line or (len(xs) < SMOOTH_FROM_POINTS and not curve.label)
    label = one_line(curve.label) or "_"
    line = "-" if curve.has_line else "none"
    axes.plot(xs, drawn, linestyle=line, marker="o" if is_dotted else "", label=label, **style)


def _set_ticks(chart: Chart, axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if chart.is_log:
        label_log_axis(axes.xaxis)
        label_log_axis(axes.yaxis)
        return
    for axis in (axes.xaxis, axes.yaxis):
        is_whole = axis is axes.xaxis and chart.x == "iteration"
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=is_whole))
        axis.set_major_formatter(FuncFormatter(_tick))
        axis.set_minor_formatter(NullFormatter())


def label_log_axis(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: matplotlib's labels need mathtext, which is off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high < 10 * low:  # too few ticks at powers of ten
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    else:
        subs = (1, 2, 5) if high < 50 * low else (1, 3) if high < 1000 * low else (1,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_formatter(NullFormatter())


def _name_levels(chart: Chart, axes: Axes, height: float) -> None:
    low, high = axes.get_ylim()
    before = float("inf")
    for label, value in sorted(chart.levels, key=lambda level: -level[1]):
        place = (value - low) / (high - low) * height
        # Above its line, or below if that place is taken.
        above = height - place > 16 and before - place > 32
        before = place
        axes.annotate(f"{one_line(label)} {value:.4g}", (0.5, value), (0, 3 if above else -3), color=SOFT, ha="center",
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points", va="bottom" if above else "top",
                      annotation_clip=False)  # fmt: skip


def _name_ends(chart: Chart, axes: Axes, height: float) -> None:
    """Label the ends of curves at the right of the axes, without overlaps; a curve that ends before gets a dot."""
    low, high = axes.get_ylim()
    curves = sorted((curve for curve in chart.curves if curve.end), key=lambda curve: curve.drawn()[-1])
    places = [(curve.drawn()[-1] - low) / (high - low) * height for curve in curves]
    for curve, place in zip(curves, spread(places, _LABEL_LINE, height), strict=True):
        x, y, colour = curve.points[0][-1], curve.drawn()[-1], COLOURS[curve.colour]
        if len(curves) > 1 and x < axes.get_xlim()[1]:
            axes.plot([x], [y], "o", color=colour)
        axes.annotate(curve.end, (1, place / height), (7, 0), xycoords="axes fraction", textcoords="offset points",
                      va="center", color=colour, fontweight="bold", annotation_clip=False)  # fmt: skip


def _name_points(curve: Curve, axes: Axes, height: float) -> None:
    """Label points towards the middle of the axes, without overlaps."""
    points = axes.transAxes.inverted().transform(axes.transData.transform(list(zip(*curve.points, strict=True))))
    named = sorted(zip(points.tolist(), curve.names, strict=False), key=lambda each: each[0][1])
    for is_left in (True, False):
        side = [((x, y), name) for (x, y), name in named if (x <= 0.5) is is_left]
        places = spread([y * height + 7 for (_, y), _ in side], _LABEL_LINE, height)
        for ((x, _), name), place in zip(side, places, strict=True):
            axes.annotate(one_line(name), (x, place / height), (8 if is_left else -8, 0), xycoords="axes fraction",
                          textcoords="offset points", ha="left" if is_left else "right", va="center",
                          color=COLOURS[curve.colour], annotation_clip=False)  # fmt: skip


def _draw_bars(bars: Bars, figure: Figure, axes: Axes) -> None:
    thick = 0.84 / max((len(cells) for _, cells, _ in bars.rows), default=1)
    for position, (_, cells, marks) in enumerate(bars.rows):
        for at, bar in enumerate(cells):
            if bar is None:
                continue
            y = position + (at - (len(cells) - 1) / 2) * thick
            axes.barh(y, bar.value, thick * 0.92, color=COLOURS[bar.colour])
            if bar.error:
                axes.plot([bar.value - bar.error, bar.value + bar.error], [y, y], color=INK, linewidth=1.1)
            if not bars.labels:
                axes.annotate(f"{bar.value:.4f}", (max(bar.value + bar.error, 0), y), (5, 0), va="center",
                              textcoords="offset points", color=SOFT, annotation_clip=False)  # fmt: skip
        for mark in marks:
            axes.plot([mark, mark], [position - 0.45, position + 0.45], color=INK, linestyle=(0, (1.5, 1.5)))
    for at, label in enumerate(bars.labels):
        axes.barh([0], [0], color=COLOURS[at % (len(COLOURS) - 1)], label=one_line(label))
    if bars.mark and any(marks for *_, marks in bars.rows):
        axes.plot([], [], color=INK, linestyle=(0, (1.5, 1.5)), label=bars.mark)
    names = [one_line(name, 26) for name, *_ in bars.rows]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x")
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.set_xlabel(one_line(bars.x, 60))
    top = _title(figure, axes, bars.title)
    _place(figure, left=14 + 7.4 * max(map(len, names), default=1), right=14 if bars.labels else 54, top=top)


def _svg(figure: Figure, name: str, alt: str) -> str:
    """Return a figure as an SVG element with the page's colours and fonts and unique ids."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # Ids must be unique because all charts are in one page.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = buffer.getvalue()
    body = drawn[drawn.index('<g id="figure_1">') :]
    # No clipping: a clip path within a closed <details> would hide the picture.
    body = re.sub(r' clip-path="[^"]*"|<defs>\s*<clipPath.*?</defs>', "", body, flags=re.DOTALL)
    body = re.sub(r' id="(?!m[0-9a-f]{10}")[^"]*"', "", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub("<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), body)
    body = re.sub("#[0-9a-f]{6}\\b", lambda match: f"var(--{_VARIABLES[match[0]]})" if match[0] in _VARIABLES else
                  match[0], body)  # fmt: skip
    box = f'viewBox="0 0 {72 * figure.get_figwidth():g} {72 * figure.get_figheight():g}"'
    return f'<svg class="chart" {box} role="img" aria-label="{escape(visible(alt))}">\n{body}'


@dataclass(frozen=True, kw_only=True)
class _Series:
    """A logged metric and how it is drawn."""

    key: str
    title: str
    y: str
    show: Callable[[float], str] = "{:.3f}".format
    scale: float = 1.0
    is_smoothed: bool = False
    from_zero: bool = True
    is_main: bool = False
    """True for results, False for details of the training."""


_SERIES = (
    _Series(key="reward", title="mean reward", y="per sampled answer", is_smoothed=True, from_zero=False, is_main=True),
    _Series(key="loss", title="training loss", y="nats per token", is_smoothed=True, from_zero=False, is_main=True),
    _Series(key="val_bpb", title="validation", y="bits per byte", from_zero=False, is_main=True),
    _Series(key="val_loss", title="validation", y="nats per token", from_zero=False, is_main=True),
    _Series(key="val_perplexity", title="validation", y="perplexity", from_zero=False, is_main=True),
    _Series(key="core_estimate", title="CORE estimate", y="mean centred accuracy", show="{:.4f}".format,
            from_zero=False, is_main=True),
    _Series(key="mean_centered", title="accuracy on tasks", y="mean centred accuracy", from_zero=False, is_main=True),
    _Series(key="val_pair_accuracy", title="held-out pairs whose chosen answer is preferred", y="% of the pairs",
            scale=100, show="{:.0f}%".format, from_zero=False, is_main=True),
    _Series(key="val_chosen_log_prob", title="held-out chosen answers", y="log-probability, nats", from_zero=False),
    _Series(key="val_rejected_log_prob", title="held-out rejected answers", y="log-probability, nats", from_zero=False),
    _Series(key="held_out_reward", title="held-out reward", y="per sampled answer", from_zero=False),
    _Series(key="ce", title="cross-entropy", y="nats per token", is_smoothed=True, from_zero=False),
    _Series(key="kl", title="divergence from the teacher", y="nats per token", is_smoothed=True),
    _Series(key="teaching_frac", title="questions with answers of unequal reward", y="% of the asked", is_smoothed=True,
            scale=100, show="{:.0f}%".format),
    _Series(key="completion_tokens", title="length of answers", y="tokens", is_smoothed=True, show="{:.1f}".format),
    _Series(key="entropy", title="entropy of the policy", y="nats per token"),
    _Series(key="clip_frac", title="clipped tokens", y="% of the sampled", scale=100, show="{:.1f}%".format),
    _Series(key="lr_multiplier", title="learning rate", y="× the peak rate"),
    _Series(key="grad_norm", title="gradient norm", y="before clipping", is_smoothed=True),
    _Series(key="tokens_per_second", title="throughput", y="tokens/s", show=lambda v: f"{format_count(v)}/s"),
    _Series(key="data_wait_frac", title="waiting for data", y="% of the time", scale=100, show="{:.1f}%".format),
)  # fmt: skip
# One of these suffices.
_VALIDATION = ("val_bpb", "val_loss", "val_perplexity")


def main_charts(report: RunReport, step: StepReport) -> list[Drawing]:
    """Return the charts of a training's results: loss or reward, validation, pass@k."""
    found: list[Drawing] = list(_charts(report, step, is_main=True))
    return found[:1] + list(_pass_chart(step)) + found[1:]


def more_charts(report: RunReport, step: StepReport) -> list[Drawing]:
    """Return the charts of a training's details, such as learning rate and speed."""
    return list(_charts(report, step, is_main=False))


def score_charts(report: RunReport) -> list[Drawing]:
    """Return the charts of scores."""
    chosen = columns(report)
    accuracy = Bars(
        name="accuracy", title="Accuracy on each task", x="% of questions right, ± one standard error", rows=[],
        alt="Bars of the accuracy on each task, with chance marked; the numbers are in the table of scores.",
        labels=[], mark="chance",
    )  # fmt: skip
    core = Bars(
        name="core-tasks", title="CORE, task by task", x="centred accuracy: 0 is guessing, 1 is perfect", rows=[],
        alt="Bars of the centred accuracy on each of CORE's tasks; the numbers are in its table.", labels=[],
    )  # fmt: skip
    return [
        *_task_bars(accuracy, [(column.label, column.scores.tasks) for column in chosen], is_centered=False),
        *_core_ladder(chosen),
        *_task_bars(core, [(column.label, column.scores.core_tasks) for column in chosen], is_centered=True),
    ]


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


def bpb_baselines(report: RunReport, step: StepReport) -> dict[str, float]:
    """Return label → bits per byte of the baselines for a step's validation curve."""
    # Only an evaluation of this checkpoint on its own corpus measures the same text.
    corpus = step.inputs.get("corpus")
    for other in report.evals:
        same = checkpoint_name(other) == step.name and corpus and other.inputs.get("corpus") == corpus
        if same and other.scores and other.scores.baselines:
            return {baseline_label(name): value for name, value in other.scores.baselines.items()}
    return {}


def _charts(report: RunReport, step: StepReport, *, is_main: bool) -> Iterator[Chart]:
    is_rl, has_pairs = bool(step.series("reward")[0]), bool(step.series("pair_accuracy")[0])
    if not (is_rl or step.series("loss")[0]):
        return
    validation = next((key for key in _VALIDATION if step.series(key)[0]), "")
    for series in _SERIES:
        xs, ys = step.series(series.key)
        is_said = series.key in _VALIDATION and series.key != validation
        # A training that never waited for data except at its start.
        is_empty = series.key == "data_wait_frac" and max(ys[max(1, len(ys) // 10) :], default=0.0) < 0.02
        if not xs or series.is_main is not is_main or is_said or is_empty or (is_rl and series.key == "loss"):
            continue
        end_of_errors, errors = step.series(f"{series.key}_stderr")
        curve = Curve(points=(xs, [y * series.scale for y in ys]), is_smoothed=series.is_smoothed,
                      errors=[e * series.scale for e in errors] if end_of_errors == xs else [])  # fmt: skip
        end = series.show(curve.drawn()[-1])
        title = "divergence from the model that RL began with" if is_rl and series.key == "kl" else series.title
        levels = list(bpb_baselines(report, step).items()) if series.key == "val_bpb" else []
        y = "per pair" if has_pairs and series.key in ("loss", "val_loss") else series.y
        said = f"{title} of step {step.name} over its iterations, {y}: it ends at {end}"
        yield Chart(
            name=f"{slug(step.name)}-{slug(series.key)}",
            title=f"{step.name}: {title}{' (bold: smoothed)' if curve.drawn() is not curve.points[1] else ''}",
            alt=f"Curve of the {said}{''.join(f'; {label} {value:.4g}' for label, value in levels)}.", y=y,
            curves=[Curve(points=curve.points, errors=curve.errors, is_smoothed=series.is_smoothed, end=end)],
            levels=levels, from_zero=series.from_zero,
        )  # fmt: skip


def _pass_chart(step: StepReport) -> Iterator[Chart]:
    curves, said = [], []
    for position, k in enumerate(passes(step)):
        xs, ys = step.series(f"pass_at_{k}")
        of_errors, errors = step.series(f"pass_at_{k}_stderr")
        known = [100 * error for error in errors] if of_errors == xs else []
        curves.append(Curve(points=(xs, [100 * y for y in ys]), errors=known, colour=position % (len(COLOURS) - 1),
                            end=f"@{k} {100 * ys[-1]:.0f}%"))  # fmt: skip
        said.append(f"pass@{k} ends at {format_share(ys[-1])}" + (f" ± {known[-1]:.1f}" if known else ""))
    if curves:
        band = " ± standard error" if any(curve.errors for curve in curves) else ""
        yield Chart(
            name=f"{slug(step.name)}-pass", title=f"{step.name}: pass@k on held-out problems",
            alt=f"Curves of step {step.name}: {'; '.join(said)}.", y=f"% of problems{band}", curves=curves,
            from_zero=True,
        )  # fmt: skip


def _task_bars(bars: Bars, chosen: list[tuple[str, dict[str, Measure]]], *, is_centered: bool) -> Iterator[Bars]:
    """Yield bars of the accuracies of each task, a colour for each (label, measures)."""
    chosen = [(label, tasks) for label, tasks in chosen if tasks]
    for task in dict.fromkeys(task for _, tasks in chosen for task in tasks):
        cells: list[Bar | None] = []
        found = [tasks.get(task) for _, tasks in chosen]
        for position, measure in enumerate(found):
            colour = position % (len(COLOURS) - 1)
            if measure is None or (is_centered and measure.centered is None):
                cells.append(None)
            elif is_centered:
                cells.append(Bar(value=measure.centered or 0, error=measure.centered_stderr or 0, colour=colour))
            else:
                cells.append(Bar(value=100 * measure.value, error=100 * (measure.stderr or 0), colour=colour))
        # Chance 0 coincides with the axis.
        chances = [] if is_centered else sorted({100 * each.chance for each in found if each and each.chance})
        bars.rows.append((task, cells, chances))
    if bars.rows:
        yield replace(bars, labels=[label for label, _ in chosen] if len(chosen) > 1 or not is_centered else [])


def _core_ladder(chosen: list[Column]) -> Iterator[Bars]:
    ours = [(column.label, measure) for column in chosen if (measure := column.scores.find("core"))]
    if not ours:
        return
    rows = [(label, Bar(value=core.value, error=core.stderr or 0)) for label, core in ours]
    published = [(f"{name} (published)", value) for name, value in published_core().items()]
    rows += [(name, Bar(value=value, colour=len(COLOURS) - 1)) for name, value in published]
    rows.sort(key=lambda row: row[1].value)
    said = ", ".join(f"{name} {bar.value:.4f}" for name, bar in rows)
    yield Bars(
        name="core", title="CORE beside GPT-2", alt=f"Bars of CORE: {said}.", labels=[],
        x="CORE; grey: published elsewhere, not measured here", rows=[(name, [bar], []) for name, bar in rows],
    )  # fmt: skip
