"""Several runs side by side: what differs, what came of it, their losses in one picture, and how they scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mlxchat.config.wording import plural
from mlxchat.errors import visible
from mlxchat.report.collect import RunReport, StepReport, checkpoint_name
from mlxchat.report.drawing import COLOURS, Chart, Curve, Drawing
from mlxchat.report.html import inline, render
from mlxchat.report.markdown import escape, picture_links, render_table
from mlxchat.report.plots import slug
from mlxchat.report.scaling import points_of, scaling_chart
from mlxchat.report.smoothing import smooth
from mlxchat.report.sources import mapping
from mlxchat.report.tables import Cell, Table
from mlxchat.report.wording import (
    ABSENT,
    computing_seconds,
    format_count,
    format_dollars,
    format_seconds,
    format_value,
    num_parameters,
    trained_tokens,
)
from mlxchat.store.fingerprint import flatten

# More curves than colours cannot be told apart.
MOST_CURVES = COLOURS
_MOST_SETTINGS = 12


def comparison_table(reports: Sequence[RunReport], names: Sequence[str]) -> Table:
    """Return a row for each run: settings that differ, size, effort, and the last score of each kind."""
    settings = [_settings(report) for report in reports]
    keys = list(dict.fromkeys(key for found in settings for key in found))
    differing = [key for key in keys if len({str(found.get(key)) for found in settings}) > 1][:_MOST_SETTINGS]
    columns = [_columns(report) for report in reports]
    kinds = list(dict.fromkeys(kind for found in columns for kind in found))
    rows = []
    for name, found, told in zip(names, settings, columns, strict=True):
        cells = [Cell(name), *(Cell(_shown(found.get(key))) for key in differing)]
        rows.append(cells + [told.get(kind, Cell(ABSENT)) for kind in kinds])
    header = ["Run", *differing, *kinds]
    return Table(header=header, align="l" * (1 + len(differing)) + "r" * len(kinds), rows=rows)


def _settings(report: RunReport) -> dict[str, object]:
    """Return what identifies the steps of a run, as dotted key → value."""
    return {
        key: value for step in report.steps for key, value in flatten(mapping(step.manifest.get("config"))).items()
        if isinstance(value, str | int | float | bool) or value is None
    }  # fmt: skip


def _shown(value: object) -> str:
    return ABSENT if value is None else format_value(value)


def _columns(report: RunReport) -> dict[str, Cell]:
    """Return what the table says of one run: a score of a kind is the last one of the pipeline."""
    found: dict[str, Cell] = {}
    for step in report.steps:
        if step.stage == "pretrain" and step.manifest:
            flops = step.fact("total_flops")
            found["parameters"] = Cell(format_count(num_parameters(step)))
            found["tokens"] = Cell(format_count(trained_tokens(step)))
            found["FLOPs"] = Cell(f"{flops:.2e}".replace("e+", "e") if flops else ABSENT)
    found["time"] = Cell(format_seconds(computing_seconds(report)))
    if cost := format_dollars(computing_seconds(report), report.cost_per_hour):
        found["cost"] = Cell(cost)
    for step in report.steps:
        if step.stage == "pretrain" and (bpb := step.fact("val_bpb")) is not None:
            found["val bpb"] = Cell(f"{bpb:.4f}")
    for step in report.evals:
        scores = step.scores
        if scores is None:
            continue
        source = f"({checkpoint_name(step)})"
        if scores.bpb is not None:
            found["val bpb"] = Cell(f"{scores.bpb:.4f}")
        if scores.core and scores.core.value is not None:
            error = f"± {scores.core.stderr:.4f}" if scores.core.stderr is not None else source
            found["CORE"] = Cell(f"{scores.core.value:.4f}", error)
        if scores.chatcore is not None:
            found["ChatCORE"] = Cell(f"{scores.chatcore:.4f}", source)
        elif scores.mean_centered is not None:
            found["mean centred"] = Cell(f"{scores.mean_centered:.4f}", source)
    return found


def comparison_charts(reports: Sequence[RunReport], names: Sequence[str]) -> list[Drawing]:
    """Return how the runs scale, and the curves of each training step that several runs have."""
    charts: list[Drawing] = []
    if scaling := scaling_chart(points_of(reports, names)):
        charts.append(scaling)
    steps = list(dict.fromkeys(step.name for report in reports for step in report.steps))
    for step in steps:
        for key, what, unit in (
            ("val_bpb", "validation", "bits per byte"), ("val_loss", "validation", "nats per token"),
            ("loss", "training loss, smoothed", "nats per token"), ("reward", "mean reward, smoothed", "per answer"),
        ):  # fmt: skip
            found = [(name, report.step(step)) for report, name in zip(reports, names, strict=True)]
            charts += _overlay(step, key, what, unit, _distinct(found))
    return charts


def _distinct(found: list[tuple[str, StepReport | None]]) -> list[tuple[str, StepReport]]:
    """Return the steps that there are, an artifact that several runs share once."""
    kept: dict[str, tuple[str, StepReport]] = {}
    for name, step in found:
        if step is not None:
            kept.setdefault(step.rid or step.key, (name, step))
    return list(kept.values())


def _overlay(step: str, key: str, what: str, unit: str, found: list[tuple[str, StepReport]]) -> list[Chart]:
    curves: list[Curve] = []
    for name, one in found:
        xs, ys = one.series(key)
        if xs and len(curves) < MOST_CURVES:
            shown = smooth(ys, max(9, len(ys) // 20) | 1) if "smoothed" in what else ys
            curves.append(Curve(points=(xs, shown), label=name, colour=len(curves), end=f"{shown[-1]:.3f}",
                                has_dots=False))  # fmt: skip
    if len(curves) < 2 or (key == "loss" and found[0][1].series("reward")[0]):
        return []
    said = ", ".join(f"{curve.label} {curve.end}" for curve in curves)
    return [
        Chart(
            name=f"{slug(step)}-{slug(key)}", title=f"{step}: {what}", y=unit, curves=curves,
            alt=f"Curves of {what} of step {step}; they end at {said}.",
        )
    ]  # fmt: skip


def render_comparison(title: str, reports: Sequence[RunReport], names: Sequence[str]) -> str:
    """Return the page of several runs."""
    return render(
        "comparison.html.jinja",
        title=title,
        count=plural(len(reports), "run"),
        table=comparison_table(reports, names),
        charts=inline(comparison_charts(reports, names)),
        links=[(name, report.folder.name) for name, report in zip(names, reports, strict=True)],
    )


def render_comparison_markdown(
    title: str, reports: Sequence[RunReport], names: Sequence[str], pictures: PurePosixPath
) -> str:
    """Return the same as Markdown."""
    parts = [f"# {escape(title)}", render_table(comparison_table(reports, names))]
    return visible("\n\n".join([*parts, *picture_links(comparison_charts(reports, names), pictures)]) + "\n")


def write_comparison(folder: Path, title: str, reports: Sequence[RunReport], names: Sequence[str]) -> Path:
    """Write report.html, report.md and report/*.svg of several runs into a folder; return the page's path.

    Raises:
        StoreError: the folder cannot be written.
    """
    from mlxchat.report.writing import PICTURES, write_files

    page = render_comparison(title, reports, names)
    markdown = render_comparison_markdown(title, reports, names, PurePosixPath(PICTURES))
    return write_files(folder, page, markdown, comparison_charts(reports, names))
