"""Results of sweeps and searches: the metrics that steps declare, the table and the report of all jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxchat.config.secrets import redact
from mlxchat.config.table import Table
from mlxchat.errors import ConfigError, suggest, visible
from mlxchat.report.experiments import group_seeds, table_of_seeds, why_no_best
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.files import write_whole
from mlxchat.store.manifest import MEASURED, Manifest, read_manifest
from mlxchat.store.naming import BEST, LATEST, MODEL, called, model_of
from mlxchat.store.store import Store

Row = dict[str, Any]
"""A job: job (its number), title, settings (key → value), status, metrics (STEP.METRIC → value) and steps (as in
plan.json); error, iterations, run and id, if any."""

_SHOWN = ("val_bpb", "val_loss", "core", "mean_centered", "chatcore", "pass_at_1")
"""Metrics that every table shows, for each step."""
_LAST = ("iterations", "run", "id", "status", "error")


def metrics_of_plan(plan: Sequence[PlannedStep]) -> dict[str, tuple[str | None, str]]:
    """Return STEP.METRIC → direction, and what this configuration lacks to record it ("": it records it)."""
    return {
        f"{step.name}.{each.name.replace('*', str(name))}": (each.better, "" if each.when(step) else each.needs)
        for step in plan
        for each in step.stage.metrics
        for name in ([""] if each.names is None else each.names(step.config))
    }


def find_metric(name: str, direction: str | None, plans: Sequence[Sequence[PlannedStep]]) -> str:
    """Return the direction, minimize or maximize, of a metric that at least one of the plans records.

    Args:
        name: STEP.METRIC.
        direction: sweep.direction; None: the declared one.
        plans: plans, of all jobs of a sweep.

    Raises:
        ConfigError: no plan records it (lists the known names), or it needs sweep.direction.
    """
    declared = [metrics_of_plan(plan) for plan in plans]
    found = [metrics[name] for metrics in declared if name in metrics]
    recorded = [better for better, needs in found if not needs]
    if found and not recorded:
        raise ConfigError(f"sweep.metric={name} is not recorded here; it needs {found[0][1]}")
    if not found:
        step = name.rpartition(".")[0]
        known = [each for each, (_, needs) in declared[0].items() if not needs]
        known = [each for each in known if each.startswith(f"{step}.")] or known
        raise ConfigError(
            f"sweep.metric={name} is not recorded by any step; expected STEP.METRIC, one of: {', '.join(known)}."
            f"{suggest(name, declared[0])}"
        )
    if (chosen := direction or recorded[0]) is None:
        raise ConfigError(
            f"sweep.metric={name}: the metric has no better direction: "
            "give sweep.direction=minimize or sweep.direction=maximize"
        )
    return chosen


def metrics_of(plan: Sequence[PlannedStep], store: Store, metric: str | None = None) -> dict[str, float]:
    """Return STEP.METRIC → value for the columns of a table; `metric` is one of them in any case."""
    found = {}
    for step in plan:
        manifest = store.made(step.key)
        for key, value in recorded_numbers(manifest).items() if manifest is not None else ():
            if key in _SHOWN or f"{step.name}.{key}" == metric:
                found[f"{step.name}.{key}"] = value
    return found


def recorded_numbers(manifest: Manifest) -> dict[str, float]:
    """Return all numbers that a step recorded, including speeds, which manifests store separately."""
    apart = {key: manifest.get(key) for key in MEASURED}
    return {key: value for key, value in {**manifest["metrics"], **apart}.items() if isinstance(value, int | float)}


def settings_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Return key → value of overrides; numeric values as numbers, others as typed."""
    pairs = (override.partition("=") for override in overrides)
    return {key: _number(value) if sign else "" for key, sign, value in pairs}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ, in the order of the command line."""
    keys = dict.fromkeys(key for items in settings for key in items)
    return [key for key in keys if len({str(items.get(key)) for items in settings}) > 1]


def main_metric(rows: Sequence[Row]) -> str | None:
    """Return the last metric of the pipeline that differs between the rows, else the last metric."""
    names: list[str] = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    telling = [name for name in names if len({row["metrics"][name] for row in rows if name in row["metrics"]}) > 1]
    return (telling or names)[-1] if names else None


def write_state(folder: Path, rows: Sequence[Row], **facts: Any) -> None:
    """Write sweep.json, from which `compare` and `report` read the jobs of a sweep."""
    jobs = {str(row["job"]): {key: row[key] for key in ("title", "settings", "steps", "metrics")} for row in rows}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "sweep.json", json.dumps(redact({**facts, "jobs": jobs}), indent=1) + "\n", durable=False)


def conclude(
    folder: Path, store: Store, rows: Sequence[Row], *, metric: str | None, less_is_better: bool, unit: str = "job"
) -> list[Row]:
    """Write table and report of all jobs, name the best model, and print what was made.

    Args:
        folder: the sweep's folder; the end of its name is the sweep's name.
        store: holds the artifacts.
        rows: a row for each job.
        metric: STEP.METRIC to sort by; None: no row has a metric.
        less_is_better: whether small values come first.
        unit: name of a row.

    Returns:
        the rows, best first; pruned rows and then rows without the metric last.
    """
    from mlxchat.sweep.scaling import laws_of_report, trainings_of

    rows = sorted(
        redact([row | _product_of(row, store) for row in rows]), key=lambda row: _rank(row, metric, less_is_better)
    )
    keys = differing([row["settings"] for row in rows])
    write_state(folder, rows, name=called(folder.name), sorted_by=metric, less_is_better=less_is_better)
    _write_table(folder, rows, keys, metric, unit, less_is_better=less_is_better)
    groups = group_seeds(rows, metric, less_is_better=less_is_better)
    if groups and metric is not None:
        print(f"\nover seeds:\n{visible(table_of_seeds(groups, metric).text())}\n", flush=True)
    manifests = [store.made(step["key"]) for row in rows for step in row["steps"]]
    trainings = trainings_of(filter(None, manifests))
    if any(step["rid"] for row in rows for step in row["steps"]):
        print(f"report: {_write_report(folder, store, laws_of_report(trainings))}", flush=True)
    if groups and (reason := why_no_best(groups)):
        print(f"no best {unit}: {visible(reason)}", flush=True)
    else:
        _name_best(rows, metric, folder, store, unit, "best" if groups else "best of one seed each")
    return rows


def _product_of(row: Row, store: Store) -> dict[str, str]:
    """Return `id`, the folder of a finished job's model, else of its last artifact, and `run`, which made it."""
    made = {step["step"]: place for step in row["steps"] if (place := store.find(step["rid"])) is not None}
    place = model_of(made) or next(reversed(made.values()), None)
    if place is None or row["status"] != "done":
        return {}
    return {"run": str(read_manifest(place).get("run")), "id": place.name}


def _rank(row: Row, metric: str | None, less_is_better: bool) -> tuple[bool, bool, float, int]:
    value = row["metrics"].get(metric)
    if value is None or value != value:
        return True, True, 0.0, row["job"]
    return False, row["status"] == "pruned", value if less_is_better else -value, row["job"]


def _write_table(
    folder: Path, rows: Sequence[Row], keys: Sequence[str], metric: str | None, unit: str, *, less_is_better: bool
) -> None:
    """Write table.md and table.json; print the table."""
    flat = [
        {unit: row["job"], **{key: row["settings"].get(key, "") for key in keys}, **row["metrics"]}
        | {key: row[key] for key in _LAST if row.get(key)}
        for row in rows
    ]
    columns = list(dict.fromkeys(key for row in flat for key in row if key not in _LAST))
    columns += [key for key in _LAST if any(key in row for row in flat)]
    rows_of_text = [[_cell(row.get(key, "")) for key in columns] for row in flat]
    table = Table(header=columns, align="l" * len(columns), rows=rows_of_text).markdown()
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")
    order = f"{unit}s by {metric}, {'smallest' if less_is_better else 'largest'} first\n\n" if metric else ""
    print(f"\n{visible(order + table)}\n\nsweep: {folder / 'table.md'}", flush=True)


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _write_report(folder: Path, store: Store, laws: Sequence[Any]) -> Path:
    """Write the comparison of all jobs with the section on scaling laws; return its path."""
    from mlxchat.report.comparison import comparison, reports_of_sweep
    from mlxchat.report.document import write_document

    blocks = comparison(folder, reports_of_sweep(store.outputs, folder), further=laws)
    return write_document(folder, called(folder.name), blocks)


def _name_best(rows: Sequence[Row], metric: str | None, folder: Path, store: Store, unit: str, title: str) -> None:
    """Name the model of the first of the sorted rows SWEEP/best, and print how to chat with it, after a title.

    Without any other run it also becomes the latest one.
    """
    best = next((row for row in rows if row["status"] == "done" and metric in row["metrics"]), None)
    place = store.outputs / "store" / best["id"] if best is not None else None
    if best is None or place is None or read_manifest(place)["kind"] != MODEL:
        return
    store.set_ref(folder.name, BEST, place)
    if not (store.outputs / "refs" / LATEST).exists():
        store.link_group(LATEST, best["run"])
    name = f"{called(folder.name)}/{BEST}"
    print(f"{title}: {unit} {best['job']}, {name}. To chat with it: mlxchat chat {name}", flush=True)
