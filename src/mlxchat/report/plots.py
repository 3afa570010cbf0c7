"""Charts: how matplotlib draws them in our style, and which ones a run gives.

A chart is drawn once, in the colours of light screens, as an SVG whose colours are then replaced by the variables of
page.css: so it follows the page into dark mode and onto paper. Its words are text, and `alt` describes it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

from mlxchat.config.wording import format_count, format_share
from mlxchat.errors import visible
from mlxchat.report.collect import RunReport, StepReport, checkpoint_name
from mlxchat.report.tables import baseline_label, columns, passes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 460.0, 265.0  # pixels: two charts fit side by side on a screen, one on a phone
LABEL_LETTERS = 34
SMOOTH_FROM_POINTS = 30  # shorter curves are drawn as they are
INK, SOFT, LINE, PANEL = "#1f2328", "#59636e", "#d8dde3", "#f6f8fa"
# Okabe and Ito's palette, safe for colour blindness.
COLOURS = ("#0072b2", "#b94a00", "#00825f", "#b5478f", "#8a6a00", "#5b5fc7")
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", PANEL: "panel"} | {c: f"c{i}" for i, c in enumerate(COLOURS)}
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 12, "text.color": INK,
    "axes.edgecolor": LINE, "axes.labelcolor": SOFT, "axes.labelsize": 12, "axes.facecolor": "none",
    "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "axes.formatter.useoffset": False, "grid.color": LINE, "grid.linewidth": 0.8,
    "xtick.color": SOFT, "ytick.color": SOFT,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "legend.fontsize": 11.5, "legend.labelcolor": INK,
    "lines.linewidth": 1.9, "lines.markersize": 5, "path.simplify_threshold": 0.5,
}  # fmt: skip

Points = tuple[list[float], list[float]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure with a description, drawn when its SVG is first needed."""

    name: str
    """File name without suffix."""
    alt: str
    draw: Callable[[], Figure]

    @cached_property
    def svg(self) -> str:
        """The figure as an SVG element."""
        import matplotlib as mpl

        # Ids must be unique because all charts are in one page.
        with mpl.rc_context({**_STYLE, "svg.hashsalt": self.name}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # a missing glyph
            figure = self.draw()
            figure.set_facecolor("none")
            return _svg(figure, self.alt)


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

    def drawn(self) -> list[float]:
        """Return the values of the drawn line."""
        ys = self.points[1]
        return smooth(ys) if self.is_smoothed and len(ys) >= SMOOTH_FROM_POINTS else ys


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of the nearby values at each point: of up to a fortieth of all on either side."""
    import numpy as np

    half = max(4, len(values) // 40)
    positions = np.arange(len(values))
    begin, end = np.maximum(positions - half, 0), np.minimum(positions + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return list(((sums[end] - sums[begin]) / (end - begin)).tolist())


def one_line(words: str, letters: int = LABEL_LETTERS) -> str:
    """Return a name for a picture: one line, shortened."""
    # matplotlib's legend omits labels with a leading underscore.
    plain = " ".join(visible(words).split()).lstrip("_")
    return plain if len(plain) <= letters else f"{plain[: letters - 1]}…"


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


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


def _tick(value: float, _: object = None) -> str:
    if value and (abs(value) >= 1e15 or abs(value) < 1e-4):
        return re.sub(r"e([+-])0*", lambda match: "e" + match[1].strip("+"), f"{value:.0e}")
    return format_count(value)


def draw_curves(
    name: str, title: str, alt: str, curves: Sequence[Curve], *, x: str = "iteration", y: str,
    levels: Sequence[tuple[str, float]] = (), is_log: bool = False, from_zero: bool = False,
) -> Picture:  # fmt: skip
    """Return curves over one axis; `levels` are horizontal reference lines, label and value."""

    def draw() -> Figure:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        figure, axes = new_axes(HEIGHT)
        for curve in curves:
            _draw_curve(curve, axes)
        for at, (label, value) in enumerate(levels):
            told = one_line(f"{label} {value:.4g}")
            axes.axhline(value, color=SOFT, linewidth=1.2, linestyle=(0, (4 - at, 3)), label=told)
        if is_log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            label_log_axis(axes.xaxis)
            label_log_axis(axes.yaxis)
        else:
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(5, integer=axis is axes.xaxis and x == "iteration"))
                axis.set_major_formatter(FuncFormatter(_tick))
        if from_zero and axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0)
        finish(figure, axes, title, x, y)
        return figure

    return Picture(name=name, alt=alt, draw=draw)


def _draw_curve(curve: Curve, axes: Axes) -> None:
    (xs, ys), drawn, colour = curve.points, curve.drawn(), COLOURS[curve.colour]
    style: dict[str, Any] = {"color": colour, "solid_joinstyle": "round"}
    if drawn is not ys:
        axes.plot(xs, ys, linewidth=0.7, alpha=0.35, **style)
    if len(curve.errors) == len(ys):
        low, high = ([y + sign * error for y, error in zip(ys, curve.errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0)
    style["linestyle"] = "-" if curve.has_line else "none"
    marker = "" if curve.has_line and len(xs) >= SMOOTH_FROM_POINTS else "o"
    axes.plot(xs, drawn, marker=marker, label=one_line(curve.label) or "_", **style)


Bars = list[tuple[str, list[tuple[float, float] | None], list[float]]]
"""Rows of horizontal bars: label, length and standard error of each bar, and marked values."""


def draw_bars(name: str, title: str, alt: str, rows: Bars, *, x: str, labels: Sequence[str], mark: str) -> Picture:
    """Return rows of bars; `labels` is the legend of a row's bars, `mark` that of the marked values."""

    def draw() -> Figure:
        thick = 0.84 / len(labels)
        figure, axes = new_axes(104 + len(rows) * max(20, 11 * len(labels) + 8))
        for position, (_, bars, marks) in enumerate(rows):
            for at, bar in enumerate(bars):
                if bar is not None:
                    y = position + (at - (len(bars) - 1) / 2) * thick
                    colour = COLOURS[at % len(COLOURS)]
                    axes.barh(y, bar[0], thick * 0.92, color=colour, xerr=bar[1] or None, ecolor=INK)
            axes.vlines(marks, position - 0.45, position + 0.45, color=INK, linestyle=(0, (1.5, 1.5)))
        for at, label in enumerate(labels):
            axes.barh([0], [0], color=COLOURS[at % len(COLOURS)], label=one_line(label))
        if any(marks for *_, marks in rows):
            axes.plot([], [], color=INK, linestyle=(0, (1.5, 1.5)), label=mark)
        axes.set_yticks(range(len(rows)), [one_line(label, 26) for label, *_ in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x")
        axes.axvline(0, color=SOFT, linewidth=1)
        axes.margins(x=0.2)
        finish(figure, axes, title, x, "")
        return figure

    return Picture(name=name, alt=alt, draw=draw)


def new_axes(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """Return a figure of this many pixels with one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.subplots()


def finish(figure: Figure, axes: Axes, title: str, x: str, y: str) -> None:
    """Set title and labels, and a legend above the axes if there are labelled curves."""
    figure.suptitle(one_line(title, 56), x=0.01, ha="left", fontsize=13, fontweight="bold")
    axes.set_xlabel(one_line(x, 60))
    axes.set_ylabel(one_line(y))
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        across = max(1, int(72 * figure.get_figwidth() // (42 + 7.6 * max(map(len, labels)))))
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=min(across, len(labels)),
                    handlelength=1.3, columnspacing=1.4, handletextpad=0.5, borderpad=0.2)  # fmt: skip


def _svg(figure: Figure, alt: str) -> str:
    """Return a figure as an SVG element with the page's colours and fonts."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = buffer.getvalue()
    body = drawn[drawn.index('<g id="figure_1">') :]
    # No clipping: a clip path within a closed <details> would hide the picture.
    body = re.sub(r' clip-path="[^"]*"|<defs>\s*<clipPath.*?</defs>', "", body, flags=re.DOTALL)
    body = re.sub(r' id="(?!m[0-9a-f]{10})[^"]*"', "", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub("<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    box = f'viewBox="0 0 {72 * figure.get_figwidth():g} {72 * figure.get_figheight():g}"'
    return f'<svg class="chart" {box} role="img" aria-label="{escape(visible(alt))}">\n{body}'


# Results: metric → title and unit. Everything else that a training records is a detail.
_RESULTS = {
    "reward": ("mean reward", "per sampled answer"),
    "loss": ("training loss", "nats per token"),
    "val_bpb": ("validation", "bits per byte"),
    "val_loss": ("validation", "nats per token"),
    "core_estimate": ("CORE estimate", "mean centred accuracy"),
    "mean_centered": ("accuracy on tasks", "mean centred accuracy"),
    "val_pair_accuracy": ("held-out pairs whose chosen answer is preferred", "share of the pairs"),
}
_UNITS = {
    "lr_multiplier": "× the peak rate", "grad_norm": "before clipping", "tokens_per_second": "tokens/s",
    "entropy": "nats per token", "kl": "nats per token", "ce": "nats per token", "completion_tokens": "tokens",
    "held_out_reward": "per sampled answer",
}  # fmt: skip
_NOT_DRAWN = ("iteration", "smooth_loss", "val_perplexity", "data_wait_frac", "elapsed_seconds", "peak_memory_bytes")


def main_charts(report: RunReport, step: StepReport) -> list[Picture]:
    """Return the charts of a training's results: loss or reward, pass@k, validation."""
    is_rl = bool(step.series("reward")[0])
    keys = [key for key in _RESULTS if step.series(key)[0] and not (is_rl and key == "loss")]
    found = [_chart(report, step, key) for key in keys]
    return found[:1] + list(_pass_chart(step)) + found[1:]


def more_charts(report: RunReport, step: StepReport) -> list[Picture]:
    """Return the charts of everything else that a training recorded, such as learning rate and speed."""
    hidden = (*_RESULTS, *_NOT_DRAWN)
    keys = [key for key in step.all_series if key not in hidden and not re.match(r"pass_at_|.*_stderr$", key)]
    return [_chart(report, step, key) for key in keys]


def score_charts(report: RunReport) -> list[Picture]:
    """Return the chart of accuracies on each task; none if no task was evaluated."""
    scored = [column for column in columns(report) if column.scores.tasks]
    if not scored:
        return []
    rows: Bars = []
    for task in dict.fromkeys(task for column in scored for task in column.scores.tasks):
        measures = [column.scores.tasks.get(task) for column in scored]
        bars = [None if each is None else (100 * each.value, 100 * (each.stderr or 0)) for each in measures]
        # Chance 0 coincides with the axis.
        rows.append((task, bars, sorted({100 * each.chance for each in measures if each and each.chance})))
    alt = "Bars of the accuracy on each task, with chance marked; the numbers are in the table of scores."
    x, labels = "% of questions right, ± one standard error", [column.label for column in scored]
    return [draw_bars("accuracy", "Accuracy on each task", alt, rows, x=x, labels=labels, mark="chance")]


def bpb_baselines(report: RunReport, step: StepReport) -> dict[str, float]:
    """Return label → bits per byte of the baselines on the text of a step's validation.

    Only an evaluation of this checkpoint on its own corpus measures the same text.
    """
    corpus = step.inputs.get("corpus")
    for other in report.evals:
        same = checkpoint_name(other) == step.name and corpus and other.inputs.get("corpus") == corpus
        if same and other.scores and other.scores.baselines:
            return {baseline_label(name): value for name, value in other.scores.baselines.items()}
    return {}


def _chart(report: RunReport, step: StepReport, key: str) -> Picture:
    xs, ys = step.series(key)
    of_errors, errors = step.series(f"{key}_stderr")
    title, unit = _RESULTS.get(key) or (key.replace("_", " "), _UNITS.get(key, ""))
    if key in ("loss", "val_loss") and step.series("pair_accuracy")[0]:
        unit = "per pair"
    curve = Curve(points=(xs, ys), is_smoothed=True, errors=errors if of_errors == xs else [])
    last = curve.drawn()[-1]
    end = f"{last:.3f}" if abs(last) < 1000 else format_count(last)
    levels = list(bpb_baselines(report, step).items()) if key == "val_bpb" else []
    beside = "".join(f"; {label} {value:.4g}" for label, value in levels)
    return draw_curves(
        f"{slug(step.name)}-{slug(key)}",
        f"{step.name}: {title}{' (bold: smoothed)' if curve.drawn() is not ys else ''}",
        f"Curve of the {title} of step {step.name} over its iterations, {unit}: it ends at {end}{beside}.",
        [replace(curve, label=f"at the end {end}")], y=unit, levels=levels,
    )  # fmt: skip


def _pass_chart(step: StepReport) -> Iterator[Picture]:
    curves, said = [], []
    for position, k in enumerate(passes(step)):
        xs, ys = step.series(f"pass_at_{k}")
        of_errors, errors = step.series(f"pass_at_{k}_stderr")
        known = [100 * error for error in errors] if of_errors == xs else []
        curves.append(Curve(points=(xs, [100 * y for y in ys]), errors=known, colour=position % len(COLOURS),
                            label=f"@{k} {100 * ys[-1]:.0f}%"))  # fmt: skip
        said.append(f"pass@{k} ends at {format_share(ys[-1])}" + (f" ± {known[-1]:.1f}" if known else ""))
    if curves:
        band = " ± standard error" if any(curve.errors for curve in curves) else ""
        yield draw_curves(
            f"{slug(step.name)}-pass", f"{step.name}: pass@k on held-out problems",
            f"Curves of step {step.name}: {'; '.join(said)}.", curves, y=f"% of problems{band}", from_zero=True,
        )  # fmt: skip
