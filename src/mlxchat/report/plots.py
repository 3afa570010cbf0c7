"""The pictures of the report: training curves, RL curves, and accuracy against chance.

Which there are follows from what each step logged, not from its name. Each is drawn once per theme; the bars
of one task go from light to dark in the order of training.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxchat.report.canvas import (
    LIGHT,
    Theme,
    add_legend,
    add_titles,
    draw_curve,
    make_panels,
    mark_ends,
    plain_label,
    render_png,
)
from mlxchat.report.collect import RunReport, StepReport, checkpoint_name
from mlxchat.report.scorecard import Column, columns, passes, task_names
from mlxchat.report.wording import baseline_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture: its name (of the file, no suffix), a title, words for those who cannot see it."""

    name: str
    title: str
    alt: str
    png: bytes


def draw(report: RunReport, theme: Theme = LIGHT) -> list[Plot]:
    """Return every picture for which the run has data, in the order of the pipeline."""
    plots = []
    for step in report.steps:
        if step.series("reward")[0]:
            plots.append(_draw_rl(step, theme))
        elif step.series("loss")[0]:
            plots.append(_draw_training(report, step, theme))
    chosen = [column for column in columns(report) if column.scores and column.scores.tasks]
    if chosen:
        plots.append(_draw_accuracy(chosen, theme))
    return plots


def _draw_training(report: RunReport, step: StepReport, theme: Theme) -> Plot:
    bpb = step.series("val_bpb")
    validation = bpb if bpb[0] else step.series("val_loss")
    figure, axes = make_panels(2 if validation[0] else 1, theme)
    x, last = draw_curve(axes[0], step.series("loss"), "training loss", theme.train, theme)
    mark_ends(axes[0], [(x, last, f"{last:.3f}", theme.train)])
    add_titles(axes[0], f"{step.name}: training loss", "nats per token", theme)
    add_legend(axes[0], theme)
    said = [f"training loss ends at {last:.3f} nats per token"]
    if validation[0]:
        unit = "bits per byte" if bpb[0] else "nats per token"
        add_titles(axes[1], f"{step.name}: validation {'bpb' if bpb[0] else 'loss'}", unit, theme)
        x, last = draw_curve(axes[1], validation, "", theme.validation, theme, is_smoothed=False)
        _draw_baselines(axes[1], bpb_baselines(report, step) if bpb[0] else {}, theme)
        mark_ends(axes[1], [(x, last, f"{last:.3f}", theme.validation)])
        said.append(f"validation ends at {last:.3f} {unit}")
    return Plot(
        name=f"curve-{_slug(step.name)}",
        title=f"{step.name}: loss",
        alt=f"Curves of step {step.name}: {'; '.join(said)}.",
        png=render_png(figure),
    )


def bpb_baselines(report: RunReport, step: StepReport) -> dict[str, float]:
    """Return label to bits per byte of what a step's validation curve may be compared with."""
    # Only an eval of this checkpoint on the corpus that it was trained on measures the same text.
    corpus = step.inputs.get("corpus")
    for other in report.evals:
        same = checkpoint_name(other) == step.name and corpus and other.inputs.get("corpus") == corpus
        if same and other.scores and other.scores.baselines:
            return {baseline_label(name): value for name, value in other.scores.baselines.items()}
    return {}


def _draw_baselines(panel: Axes, baselines: dict[str, float], theme: Theme) -> None:
    lines = sorted(baselines.items(), key=lambda item: item[1])
    for (_, value), style in zip(lines, _line_styles(), strict=False):
        panel.axhline(value, color=theme.reference, linewidth=1.2, linestyle=style)
    low, high = panel.get_ylim()
    if lines:
        # Room for the words above the highest line.
        high = max(high, lines[-1][1] + (high - low) * 0.08)
        panel.set_ylim(low, high)
    for position, (name, value) in enumerate(lines):
        is_crowded = any(0 <= other - value < 0.09 * (high - low) for _, other in lines[position + 1 :])
        panel.annotate(
            f"{plain_label(name)} {value:.2f}",
            (0.5, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3 if is_crowded else 3),
            textcoords="offset points",
            ha="center",
            va="top" if is_crowded else "bottom",
            fontsize=9,
            color=theme.reference,
            bbox={"facecolor": theme.ground, "edgecolor": "none", "pad": 1},
        )


def _draw_rl(step: StepReport, theme: Theme) -> Plot:
    ks = passes(step)
    figure, axes = make_panels(2 if ks else 1, theme)
    x, last = draw_curve(axes[0], step.series("reward"), "reward", theme.train, theme)
    mark_ends(axes[0], [(x, last, f"{last:.3f}", theme.train)])
    add_titles(axes[0], f"{step.name}: mean reward", "reward per completion", theme)
    add_legend(axes[0], theme)
    said, ends = [f"mean reward ends at {last:.3f}"], []
    for k, colour in zip(ks, itertools.cycle(theme.passes), strict=False):
        iterations, values = step.series(f"pass_at_{k}")
        shares = (iterations, [100 * value for value in values])
        x, last = draw_curve(axes[1], shares, "", colour, theme, is_smoothed=False)
        ends.append((x, last, f"pass@{k}  {last:.1f}%", colour))
        said.append(f"pass@{k} ends at {last:.1f}%")
    if ks:
        axes[1].set_ylim(bottom=0)
        mark_ends(axes[1], ends)
        add_titles(axes[1], f"{step.name}: pass@k", "% of problems", theme)
    return Plot(
        name=f"curve-{_slug(step.name)}",
        title=f"{step.name}: reward",
        alt=f"Curves of step {step.name}: {'; '.join(said)}.",
        png=render_png(figure),
    )


def _draw_accuracy(chosen: list[Column], theme: Theme) -> Plot:
    from matplotlib.colors import LinearSegmentedColormap

    tasks = task_names(chosen)
    bar = 0.8 / len(chosen)
    height = 1.1 + len(tasks) * max(0.42, 0.2 * len(chosen))
    figure, (panel,) = make_panels(1, theme, height)
    ramp = LinearSegmentedColormap.from_list("ramp", theme.ramp)
    for position, column in enumerate(chosen):
        results = column.scores.tasks if column.scores else {}
        colour = ramp(position / (len(chosen) - 1) if len(chosen) > 1 else 0.75)
        bars = [
            (row + bar * (position + 0.5) - 0.4, 100 * result.accuracy, 100 * (result.stderr or 0))
            for row, task in enumerate(tasks)
            if (result := results.get(task)) and result.accuracy is not None
        ]
        if not bars:
            continue
        heights, shares, errors = zip(*bars, strict=True)
        label = plain_label(column.label)
        panel.barh(heights, shares, bar * 0.9, color=colour, label=label, zorder=2)
        panel.errorbar(shares, heights, xerr=errors, fmt="none", ecolor=theme.error, elinewidth=1, zorder=3)
    for row, task in enumerate(tasks):
        chances = {c.scores.tasks[task].chance for c in chosen if c.scores and task in c.scores.tasks}
        # A chance of nothing is the axis itself.
        for chance in sorted(c for c in chances if c):
            ends = (row - 0.46, row + 0.46)
            label = "chance" if "chance" not in panel.get_legend_handles_labels()[1] else ""
            panel.plot([100 * chance] * 2, ends, color=theme.validation, linewidth=2, label=label, zorder=4)
    panel.set_yticks(range(len(tasks)), [plain_label(task) for task in tasks])
    panel.set_ylim(len(tasks) - 0.45, -0.55)
    panel.set_xlim(left=0)
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", labelsize=9.5)
    add_titles(panel, "Accuracy after each stage", "", theme, x="% of examples right (bars: ± one standard error)")
    add_legend(panel, theme, outside=True)
    labels = ", ".join(column.label for column in chosen)
    alt = f"Bars of the accuracy on {', '.join(tasks)} for {labels}, with chance marked."
    return Plot(name="accuracy", title="Accuracy after each stage", alt=alt, png=render_png(figure))


def _line_styles() -> Iterator[Any]:
    yield from ("--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)
