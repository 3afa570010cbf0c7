"""The report of a sweep: its table, the curves of its jobs, bits per byte against FLOPs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxchat.config.wording import Table, escape, plural
from mlxchat.errors import ConfigError
from mlxchat.report.collect import RunReport, StepReport, checkpoint_name, collect_steps
from mlxchat.report.document import Block, Group
from mlxchat.report.experiments import group_seeds, table_of_seeds, why_no_best
from mlxchat.report.plots import COLOURS, Curve, Picture, draw_curves, slug, smooth
from mlxchat.report.tables import format_value
from mlxchat.store.naming import called

# One curve per colour.
MOST_CURVES = len(COLOURS)


def reports_of_sweep(outputs: Path, folder: Path) -> list[RunReport]:
    """Return the reports of a sweep's jobs in the order of its table; ConfigError if no job has artifacts."""
    jobs = [job for job in _state(folder)["jobs"].values() if job.get("steps")]
    if not jobs:
        raise ConfigError(f"{folder}: no job of it has artifacts")
    return [collect_steps(outputs, job["title"], job["steps"], folder) for job in jobs]


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    return state


def comparison(folder: Path, reports: Sequence[RunReport], further: Sequence[Block] = ()) -> list[Block]:
    """Return the report of a sweep: its table, the curves of its jobs, and `further` blocks."""
    blocks: list[Block] = [
        f"# {escape(called(folder.name))}",
        Group("byline", [plural(len(reports), "job")]),
        "## Results",
        Group("runs", [_table_of(folder, reports)]),
    ]
    state = _state(folder)
    metric, jobs = state.get("sorted_by"), [job for job in state["jobs"].values() if job.get("metrics")]
    if metric and (groups := group_seeds(jobs, metric, less_is_better=state["less_is_better"])):
        reason = why_no_best(groups)
        told = f"No best: {escape(reason)}." if reason else f"Best: {escape(groups[0].title)}."
        blocks += ["## Over seeds", told, Group("runs", [table_of_seeds(groups, metric)])]
    if charts := comparison_charts(reports):
        blocks += ["## Curves", charts]
    written = (
        f"Written by mlxchat from {escape(folder.name)}. Every number comes from the manifests, metrics.jsonl and "
        "scores.json of the jobs."
    )
    return [*blocks, *further, written]


def _table_of(folder: Path, reports: Sequence[RunReport]) -> Table:
    """Return the table that the sweep wrote, best job first; while it runs, the names of its jobs."""
    path = folder / "table.json"
    rows: list[dict[str, Any]] = [{"job": report.name} for report in reports]
    if path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    align = "".join("l" if any(isinstance(row.get(key), str) for row in rows) else "r" for key in columns)
    return Table(header=columns, align=align, rows=[[format_value(row.get(key)) for key in columns] for row in rows])


def comparison_charts(reports: Sequence[RunReport]) -> list[Picture]:
    """Return the scaling chart, and the curves of each training step that several runs have."""
    charts = [scaling] if (scaling := scaling_chart(points_of(reports))) else []
    for step in dict.fromkeys(step.name for report in reports for step in report.steps):
        # An artifact shared by several runs is drawn once, under the first one's name.
        found: dict[str, tuple[str, StepReport]] = {}
        for report in reports:
            if one := report.step(step):
                found.setdefault(one.rid or one.key, (report.name, one))
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


def points_of(reports: Sequence[RunReport]) -> dict[str, tuple[float, float]]:
    """Return artifact → (FLOPs, held-out bits per byte) of each pretraining, by FLOPs.

    The score is that of an evaluation on the checkpoint's own corpus, else the training's last validation.
    """
    found = {}
    for report in reports:
        for step in report.steps:
            evals = [e.scores.find("val_bpb") for e in report.evals if checkpoint_name(e) == step.name and e.scores]
            bpb = next((measure.value for measure in evals if measure), None) or step.fact("val_bpb")
            flops = step.fact("total_flops")
            if step.stage == "pretrain" and bpb and flops:
                found[step.rid] = (flops, bpb)
    return dict(sorted(found.items(), key=lambda point: point[1]))


def scaling_chart(points: Mapping[str, tuple[float, float]]) -> Picture | None:
    """Return bits per byte against FLOPs, both logarithmic, with a power law; None with fewer than three sizes."""
    import numpy as np

    xs, ys = [x for x, _ in points.values()], [y for _, y in points.values()]
    if len(set(xs)) < 3:  # two points always fit a line
        return None
    centre = np.log(xs).mean()
    exponent, at_centre = np.polyfit(np.log(xs) - centre, np.log(ys), 1)
    label = f"{np.exp(at_centre):.3f} · (FLOPs / {np.exp(centre):.2g})^({exponent:.3f})".replace("-", "−")
    fitted = [float(np.exp(at_centre + exponent * (np.log(x) - centre))) for x in (xs[0], xs[-1])]
    curves = [Curve(points=(xs, ys), has_line=False), Curve(points=([xs[0], xs[-1]], fitted), label=label, colour=1)]
    return draw_curves(
        "scaling", "Held-out bits per byte against FLOPs", f"{len(xs)} pretrainings; fitted: {label}.", curves,
        x="FLOPs of pretraining", y="bits per byte", is_log=True,
    )  # fmt: skip
