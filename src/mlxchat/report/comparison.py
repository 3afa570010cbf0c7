"""Comparison of several runs: settings that differ, results, overlaid curves, scaling."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxchat.config.wording import ABSENT, format_count, format_dollars, format_seconds, plural
from mlxchat.errors import ConfigError
from mlxchat.evals.scores import mapping
from mlxchat.report.collect import RunReport, StepReport, checkpoint_name, collect_steps, read_json, text
from mlxchat.report.document import Block, Group, escape
from mlxchat.report.plots import COLOURS, Curve, Picture, draw_curves, slug, smooth
from mlxchat.report.summary import num_parameters, trained_tokens
from mlxchat.report.tables import Cell, Table, computing_seconds, format_metric, format_value, known, shown
from mlxchat.store.fingerprint import flatten
from mlxchat.store.naming import model_of

# One curve per colour.
MOST_CURVES = len(COLOURS) - 1
_MOST_SETTINGS = 12
_MOST_IN_TITLE = 4
_ORIGIN = ("run", "id")
"""Columns of the run's model, else its last artifact, and of the run that made it: kept also if they are equal."""
_MOST_NAMED = 8
"""Labelled points; more labels would overlap."""


def reports_of_sweep(outputs: Path, folder: Path) -> tuple[str, list[RunReport], list[str], str]:
    """Return a title, the reports of a sweep's jobs in the order of its table, their names, and the metric it is by.

    Raises:
        ConfigError: no job has artifacts.
    """
    state = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    jobs = [job for job in state["jobs"].values() if job.get("steps")]
    if not jobs:
        raise ConfigError(f"{folder}: no job of it has artifacts")
    titles = [job["title"] for job in jobs]
    reports = [collect_steps(outputs, job["title"], job["steps"], folder) for job in jobs]
    title = title_of_sweep(state.get("name") or folder.name, [job["settings"] for job in jobs])
    return title, reports, titles, state.get("sorted_by") or ""


def title_of_sweep(name: str, settings: Sequence[Mapping[str, object]]) -> str:
    """Return the run's name and the settings that differ between the jobs."""
    keys = _differing(settings)
    more = f" and {len(keys) - _MOST_IN_TITLE} more" if len(keys) > _MOST_IN_TITLE else ""
    return f"{name}: {', '.join(keys[:_MOST_IN_TITLE])}{more}" if keys else name


def comparison_table(reports: Sequence[RunReport], names: Sequence[str], metric: str = "") -> Table:
    """Return a row for each run: settings that differ, scores, size, effort, the model and the run that made it.

    Columns that are equal in all rows are a note. A score is the last of its kind in the pipeline.

    Args:
        reports: the runs.
        names: a name for each; settings that are part of all names get no column.
        metric: STEP.METRIC that the rows are ordered by; empty: none.
    """
    settings = [_settings(report) for report in reports]
    is_named_by_settings = bool(_parts(names))
    keys = [] if is_named_by_settings else _differing(settings)[:_MOST_SETTINGS]
    columns = [
        {**{key: Cell(format_value(found.get(key))) for key in keys}, **_columns(report, metric)}
        for found, report in zip(settings, reports, strict=True)
    ]
    rows: dict[str, list[Cell]] = {}
    equal = []
    for kind in dict.fromkeys(kind for found in columns for kind in found):
        cells = [found.get(kind, Cell(ABSENT)) for found in columns]
        if kind not in (metric, *_ORIGIN) and len(cells) > 1 and len({(c.text, c.detail) for c in cells}) == 1:
            equal.append(f"{kind} {cells[0].text} {cells[0].detail}".rstrip())
        elif [cell.text for cell in cells] != [cell.text for cell in rows.get(metric, ())]:
            rows[kind] = cells
    return Table(
        header=["Settings" if is_named_by_settings else "Name", *rows],
        align="l" + "".join("l" if kind in (*keys, *_ORIGIN) else "r" for kind in rows),
        rows=[[Cell(name), *cells] for name, *cells in zip(names, *rows.values(), strict=True)],
        notes=[f"Equal in all: {', '.join(equal)}."] if equal else [],
    )  # fmt: skip


def _differing(settings: Sequence[Mapping[str, object]]) -> list[str]:
    keys = dict.fromkeys(key for found in settings for key in found)
    return [key for key in keys if len({str(found.get(key)) for found in settings}) > 1]


def _settings(report: RunReport) -> dict[str, object]:
    """Return the identity settings of a run's steps as dotted key → value."""
    return {
        key: value for step in report.steps for key, value in flatten(mapping(step.manifest.get("config"))).items()
        if isinstance(value, str | int | float | bool) or value is None
    }  # fmt: skip


def _columns(report: RunReport, metric: str) -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    step_name, _, fact = metric.rpartition(".")
    if (one := report.step(step_name)) and (value := one.fact(fact)) is not None:
        found[metric] = Cell(format_metric(fact, value))
    for step in report.steps:
        if step.stage == "pretrain" and (bpb := step.fact("val_bpb")) is not None:
            found["val bpb"] = Cell(f"{bpb:.4f}")
    for step in report.evals:
        for kind in ("val_bpb", "core", "chatcore", "mean_centered"):
            if step.scores and (measure := step.scores.find(kind)):
                cell = shown(measure)
                detail = f"{cell.detail} ({checkpoint_name(step)})".lstrip()
                found[measure.name] = Cell(cell.text, detail)
    for step in report.steps:
        if step.stage == "pretrain" and step.manifest:
            flops = step.fact("total_flops")
            found["parameters"] = Cell(known(format_count, num_parameters(step)))
            found["tokens"] = Cell(known(format_count, trained_tokens(step)))
            found["FLOPs"] = Cell(f"{flops:.2e}".replace("e+", "e") if flops else ABSENT)
    found["time"] = Cell(known(format_seconds, computing_seconds(report)))
    if cost := format_dollars(computing_seconds(report), report.cost_per_hour):
        found["cost"] = Cell(cost)
    if made := {step.name: step.folder for step in report.steps if step.folder is not None}:
        last = model_of(made) or [*made.values()][-1]
        found |= {"run": Cell(text(read_json(last / "manifest.json").get("run")) or ABSENT), "id": Cell(last.name)}
    return found


def _parts(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Return the (key, value) pairs of names that are settings, such as `model=d2 seed=1`; empty if any is not."""
    found = [[tuple(part.split("=", 1)) for part in name.split(" ")] for name in names]
    is_settings = all(len(pair) == 2 for pairs in found for pair in pairs)
    same_keys = len({tuple(pair[0] for pair in pairs) for pairs in found}) == 1
    return [[(pair[0], pair[1]) for pair in pairs] for pairs in found] if is_settings and same_keys else []


def comparison_charts(reports: Sequence[RunReport], names: Sequence[str]) -> list[Picture]:
    """Return the scaling chart, and the curves of each training step that several runs have."""
    charts: list[Picture] = []
    if scaling := scaling_chart(points_of(reports, names)):
        charts.append(scaling)
    for step in dict.fromkeys(step.name for report in reports for step in report.steps):
        # An artifact shared by several runs is drawn once, under the first one's name.
        found: dict[str, tuple[str, StepReport]] = {}
        for name, report in zip(names, reports, strict=True):
            if one := report.step(step):
                found.setdefault(one.rid or one.key, (name, one))
        for key, what, unit in (
            ("val_bpb", "validation", "bits per byte"), ("val_loss", "validation", "nats per token"),
            ("loss", "training loss, smoothed", "nats per token"), ("reward", "mean reward, smoothed", "per answer"),
        ):  # fmt: skip
            charts += _overlay(step, key, what, unit, list(found.values()))
    return charts


def _overlay(step: str, key: str, what: str, unit: str, found: list[tuple[str, StepReport]]) -> list[Picture]:
    found = [(name, one) for name, one in found if one.series(key)[0]]
    what += f" (the first {MOST_CURVES} of {len(found)})" if len(found) > MOST_CURVES else ""
    if len(found) < 2 or (key == "loss" and found[0][1].series("reward")[0]):
        return []
    curves: list[Curve] = []
    for name, one in found[:MOST_CURVES]:
        xs, ys = one.series(key)
        drawn = smooth(ys) if "smoothed" in what else ys
        curves.append(Curve(points=(xs, drawn), label=f"{name}: {drawn[-1]:.3f}", colour=len(curves)))
    said = ", ".join(curve.label for curve in curves)
    alt = f"Curves of {what} of step {step}; they end at {said}."
    return [draw_curves(f"{slug(step)}-{slug(key)}", f"{step}: {what}", alt, curves, y=unit)]


def comparison(title: str, reports: Sequence[RunReport], names: Sequence[str], metric: str = "") -> list[Block]:
    """Return the report of several runs, ordered by a metric if one is given."""
    blocks: list[Block] = [
        f"# {escape(title)}",
        Group("byline", [escape(f"{plural(len(reports), 'run')} compared{metric and f', best {metric} first'}")]),
        "## Results",
        Group("runs", [comparison_table(reports, names, metric)]),
    ]
    if charts := comparison_charts(reports, names):
        blocks += ["## Curves", charts]
    return [
        *blocks,
        f"Written by mlxchat from {escape(reports[0].folder.name)}. Every number comes from the manifests, "
        "metrics.jsonl and scores.json of the runs.",
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
    for name, report in zip(names, reports, strict=True):
        for step in report.steps:
            if step.stage != "pretrain" or not step.manifest:
                continue
            evals = [e.scores.find("val_bpb") for e in report.evals if checkpoint_name(e) == step.name and e.scores]
            bpb = next((measure.value for measure in evals if measure), None) or step.fact("val_bpb")
            flops = step.fact("total_flops")
            if bpb and flops:
                found.setdefault(step.rid, Point(name=name, flops=flops, bpb=bpb))
    return sorted(found.values(), key=lambda point: point.flops)


def scaling_chart(points: Sequence[Point]) -> Picture | None:
    """Return bits per byte against FLOPs, both logarithmic, with a power law; None with fewer than two sizes."""
    if len({point.flops for point in points}) < 2:
        return None
    xs, ys = [p.flops for p in points], [p.bpb for p in points]
    names = [p.name for p in points] if len(points) <= _MOST_NAMED else []
    curves = [Curve(points=(xs, ys), has_line=False, names=names)]
    said = ", ".join(f"{p.name} {p.bpb:.4f} at {p.flops:.3g} FLOPs" for p in points)
    if len(set(xs)) >= 3:  # two points always fit a line
        import numpy as np

        centre = np.log(xs).mean()
        exponent, at_centre = np.polyfit(np.log(xs) - centre, np.log(ys), 1)
        label = f"{np.exp(at_centre):.3f} · (FLOPs / {np.exp(centre):.2g})^({exponent:.3f})".replace("-", "−")
        fitted = [float(np.exp(at_centre + exponent * (np.log(x) - centre))) for x in (min(xs), max(xs))]
        curves.append(Curve(points=([min(xs), max(xs)], fitted), label=label, colour=1))
        said += f"; fitted: {label}"
    return draw_curves(
        "scaling", "Held-out bits per byte against FLOPs", f"Points of {said}.", curves, x="FLOPs of pretraining",
        y="bits per byte", is_log=True,
    )  # fmt: skip
