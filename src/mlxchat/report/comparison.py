"""Comparison of several runs: settings that differ, results, overlaid curves, scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxchat.config.wording import ABSENT, format_count, format_dollars, format_seconds, plural
from mlxchat.evals.scores import mapping
from mlxchat.planning.scaling import fit_power_law
from mlxchat.report.collect import RunReport, StepReport, checkpoint_name
from mlxchat.report.document import Block, Group, escape
from mlxchat.report.plots import COLOURS, Chart, Curve, Drawing, slug, smooth
from mlxchat.report.summary import num_parameters, trained_tokens
from mlxchat.report.tables import Cell, Table, computing_seconds, format_value, known, shown
from mlxchat.store.fingerprint import flatten

# One curve per colour.
MOST_CURVES = len(COLOURS) - 1
_MOST_SETTINGS = 12
_MOST_NAMED = 8
"""Labelled points; more labels would overlap."""


def comparison_table(reports: Sequence[RunReport], names: Sequence[str]) -> Table:
    """Return a row for each run: settings that differ, size, effort, and the last score of each kind."""
    settings = [_settings(report) for report in reports]
    keys = list(dict.fromkeys(key for found in settings for key in found))
    differing = [key for key in keys if len({str(found.get(key)) for found in settings}) > 1][:_MOST_SETTINGS]
    columns = [_columns(report) for report in reports]
    kinds = list(dict.fromkeys(kind for found in columns for kind in found))
    rows = []
    for name, found, told in zip(names, settings, columns, strict=True):
        cells = [Cell(name), *(Cell(format_value(found.get(key))) for key in differing)]
        rows.append(cells + [told.get(kind, Cell(ABSENT)) for kind in kinds])
    header = ["Run", *differing, *kinds]
    return Table(header=header, align="l" * (1 + len(differing)) + "r" * len(kinds), rows=rows)


def _settings(report: RunReport) -> dict[str, object]:
    """Return the identity settings of a run's steps as dotted key → value."""
    return {
        key: value for step in report.steps for key, value in flatten(mapping(step.manifest.get("config"))).items()
        if isinstance(value, str | int | float | bool) or value is None
    }  # fmt: skip


def _columns(report: RunReport) -> dict[str, Cell]:
    """Return the cells of one run; a score is the last of its kind in the pipeline."""
    found: dict[str, Cell] = {}
    for step in report.steps:
        if step.stage == "pretrain" and step.manifest:
            flops = step.fact("total_flops")
            found["parameters"] = Cell(known(format_count, num_parameters(step)))
            found["tokens"] = Cell(known(format_count, trained_tokens(step)))
            found["FLOPs"] = Cell(f"{flops:.2e}".replace("e+", "e") if flops else ABSENT)
    found["time"] = Cell(known(format_seconds, computing_seconds(report)))
    if cost := format_dollars(computing_seconds(report), report.cost_per_hour):
        found["cost"] = Cell(cost)
    for step in report.steps:
        if step.stage == "pretrain" and (bpb := step.fact("val_bpb")) is not None:
            found["val bpb"] = Cell(f"{bpb:.4f}")
    for step in report.evals:
        for metric in ("val_bpb", "core", "chatcore", "mean_centered"):
            if step.scores and (measure := step.scores.find(metric)):
                cell = shown(measure)
                detail = f"{cell.detail} ({checkpoint_name(step)})".lstrip()
                found[measure.name] = Cell(cell.text, detail, measure=cell.measure)
    return found


def comparison_charts(reports: Sequence[RunReport], names: Sequence[str]) -> list[Drawing]:
    """Return the scaling chart, and the curves of each training step that several runs have."""
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
    """Return the steps that exist; an artifact shared by several runs occurs once."""
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
            drawn = smooth(ys) if "smoothed" in what else ys
            end = f"{drawn[-1]:.3f}"
            curves.append(Curve(points=(xs, drawn), label=name, colour=len(curves), end=end))
    if len(curves) < 2 or (key == "loss" and found[0][1].series("reward")[0]):
        return []
    said = ", ".join(f"{curve.label} {curve.end}" for curve in curves)
    return [
        Chart(
            name=f"{slug(step)}-{slug(key)}", title=f"{step}: {what}", y=unit, curves=curves,
            alt=f"Curves of {what} of step {step}; they end at {said}.",
        )
    ]  # fmt: skip


def comparison(title: str, reports: Sequence[RunReport], names: Sequence[str]) -> list[Block]:
    """Return the report of several runs."""
    blocks: list[Block] = [
        f"# {escape(title)}",
        Group("byline", [f"{plural(len(reports), 'run')} compared"]),
        "## Results",
        comparison_table(reports, names),
    ]
    if charts := comparison_charts(reports, names):
        blocks += ["## Curves", charts]
    return [
        *blocks,
        "Written by mlxchat. Every number comes from the manifests, metrics.jsonl and scores.json of the runs.",
    ]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One pretraining."""

    name: str
    flops: float
    bpb: float


def points_of(reports: Sequence[RunReport], names: Sequence[str]) -> list[Point]:
    """Return a point for each pretraining that was scored, by FLOPs; the same artifact in several runs counts once.

    The score is that of an evaluation on the checkpoint's own corpus, else the training's last validation.
    """
    found: dict[str, Point] = {}
    for report, name in zip(reports, names, strict=True):
        for step in report.steps:
            if step.stage != "pretrain" or not step.manifest:
                continue
            evals = [e.scores.find("val_bpb") for e in report.evals if checkpoint_name(e) == step.name and e.scores]
            bpb = next((measure.value for measure in evals if measure), None) or step.fact("val_bpb")
            flops = step.fact("total_flops")
            if bpb and flops:
                found.setdefault(step.rid, Point(name=name, flops=flops, bpb=bpb))
    return sorted(found.values(), key=lambda point: point.flops)


def scaling_chart(points: Sequence[Point]) -> Chart | None:
    """Return bits per byte against FLOPs, both logarithmic, with a power law; None with fewer than two sizes."""
    if len({point.flops for point in points}) < 2:
        return None
    xs, ys = [p.flops for p in points], [p.bpb for p in points]
    names = [p.name for p in points] if len(points) <= _MOST_NAMED else []
    curves = [Curve(points=(xs, ys), has_line=False, names=names)]
    said = ", ".join(f"{p.name} {p.bpb:.4f} at {p.flops:.3g} FLOPs" for p in points)
    # Two points always fit a line.
    law = fit_power_law(xs, ys) if len(set(xs)) >= 3 else None
    if law is not None:
        ends = [min(xs), max(xs)]
        interval = "" if law.half_width is None else f" ± {law.half_width:.3f}"
        label = f"{law.at_centre:.3f} · (FLOPs / {law.centre:.2g})^({law.exponent:.3f}{interval})".replace("-", "−")
        curves.append(Curve(points=(ends, [law(x) for x in ends]), label=label, colour=1))
        said += f"; fitted: {label}"
    return Chart(
        name="scaling",
        title="Held-out bits per byte against FLOPs",
        alt=f"Points of {said}.",
        x="FLOPs of pretraining",
        y="bits per byte",
        curves=curves,
        is_log=True,
    )
