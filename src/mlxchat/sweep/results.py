"""Results of sweeps: the metrics that steps declare, the rows of jobs, and the final table."""

from __future__ import annotations

import csv
import difflib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.config.secrets import redact
from mlxchat.errors import ConfigError, visible
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.stage import Direction
from mlxchat.store.files import write_whole
from mlxchat.store.manifest import MANIFEST, MEASURED, Manifest, read_manifest
from mlxchat.store.naming import BEST, LATEST, MODEL, called, model_of
from mlxchat.store.store import Store

Row = dict[str, Any]
"""job, overrides (key → value), status, metrics (step.metric → value), seconds; error, run and id, if any."""

_SHOWN = ("val_bpb", "val_loss", "core", "mean_centered", "chatcore", "pass_at_1")
"""Metrics that every table shows, for each step."""
_LAST = ("status", "error")


@dataclass(frozen=True)
class StepMetric:
    """A number that a step declares."""

    step: str
    name: str
    """STEP.METRIC."""
    direction: Direction | None
    needs: str = ""
    """What this configuration lacks to record it; empty: it records it."""


def metrics_of_plan(plan: Sequence[PlannedStep]) -> list[StepMetric]:
    """Return all metrics that the steps declare, in the order of the steps."""
    return [
        StepMetric(step.name, f"{step.name}.{each.name.replace('*', str(name))}", each.better, needs)
        for step in plan
        for each in step.stage.metrics
        for needs in ["" if each.when(step) else each.needs]
        for name in ([""] if each.names is None else each.names(step.config))
    ]


def find_metric(name: str, direction: str | None, plans: Sequence[Sequence[PlannedStep]]) -> str:
    """Return the direction, minimize or maximize, of a metric that at least one of the plans records.

    Args:
        name: STEP.METRIC.
        direction: sweep.direction; None: the declared one.
        plans: plans, of all jobs of a sweep.

    Raises:
        ConfigError: no plan records it (lists the known names), or it needs sweep.direction.
    """
    found = [metric for plan in plans for metric in metrics_of_plan(plan) if metric.name == name]
    recorded = [metric for metric in found if not metric.needs]
    if found and not recorded:
        raise ConfigError(f"sweep.metric={name} is not recorded here; it needs {found[0].needs}")
    if not found:
        raise ConfigError(_refusal(name, metrics_of_plan(plans[0]), [step.name for step in plans[0]]))
    chosen = direction or recorded[0].direction
    if chosen is None:
        raise ConfigError(
            f"sweep.metric={name}: the metric has no better direction: "
            "give sweep.direction=minimize or sweep.direction=maximize"
        )
    return chosen


def _refusal(name: str, declared: list[StepMetric], steps: list[str]) -> str:
    """Return the message about an unknown metric: known names and the nearest one."""
    step, _, metric = name.rpartition(".")
    recorded = {
        one: [each.name.removeprefix(f"{one}.") for each in declared if each.step == one and not each.needs]
        for one in steps
    }
    if step in recorded:
        lines = [f'sweep.metric={name}: step {step} records no "{metric}": {", ".join(recorded[step]) or "nothing"}.']
    else:
        known = f'"{step}" is not a step of this run' if step else "expected STEP.METRIC"
        lines = [f"sweep.metric={name}: {known}. What the steps record:"]
        lines += [f"  {one}: {', '.join(names)}" for one, names in recorded.items() if names]
    near = _nearest(name, declared)
    if near is not None:
        needs = f" It is not recorded here; it needs {near.needs}." if near.needs else ""
        lines.append(f'Did you mean "{near.name}"?{needs}')
    return "\n".join(lines)


def _nearest(name: str, declared: list[StepMetric]) -> StepMetric | None:
    """Return the most likely intended metric: of the same step, of the same name, or with similar spelling."""
    step, _, metric = name.rpartition(".")
    declared = sorted(declared, key=lambda one: bool(one.needs))
    candidates = [one for one in declared if one.step == step] or declared
    same = next((one for one in candidates if one.name == f"{one.step}.{metric}"), None)
    if same is not None:
        return same
    shown = {one.name.removeprefix(f"{step}."): one for one in candidates}
    close = difflib.get_close_matches(name.removeprefix(f"{step}."), shown, n=1, cutoff=0.5)
    return shown[close[0]] if close else None


class SweepFolder:
    """The folder of a sweep. Each file in it is written atomically.

    sweep.json     the jobs, and what was computed for all of them
    rows/<n>.json  the result of a job, from whichever process ran it
    sweep.lock     held by the sweep's own process while it waits for jobs
    stop           a request to end: no further job starts
    table.*        at the end, when rows/ is removed
    """

    def __init__(self, path: Path) -> None:
        """Use a folder, which need not exist yet."""
        self.path = path

    @property
    def lock(self) -> Path:
        """Return the lock file that the sweep's own process holds."""
        return self.path / "sweep.lock"

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace sweep.json; the folder is made if need be."""
        (self.path / "rows").mkdir(parents=True, exist_ok=True)
        _write(self.path / "sweep.json", state)

    def state(self) -> dict[str, Any]:
        """Return sweep.json."""
        state: dict[str, Any] = json.loads((self.path / "sweep.json").read_text(encoding="utf-8"))
        return state

    def add_row(self, row: Row) -> None:
        """Write the result of a job."""
        _write(self.path / "rows" / f"{row['job']}.json", row)

    def rows(self) -> dict[int, Row]:
        """Return job number → its row of the table, for jobs that have one."""
        paths = (self.path / "rows").glob("[0-9]*.json")
        return {int(path.stem): json.loads(path.read_text(encoding="utf-8")) for path in paths}

    def ask_to_stop(self, why: str, signal_number: int) -> None:
        """Start no further job and stop running jobs where they can continue; the first request counts."""
        if not self.stop():
            _write(self.path / "stop", {"why": why, "signal": signal_number})

    def stop(self) -> dict[str, Any] | None:
        """Return the request to stop, or None."""
        try:
            request: dict[str, Any] = json.loads((self.path / "stop").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return request

    def tidy(self) -> None:
        """Remove files that only running processes need."""
        shutil.rmtree(self.path / "rows", ignore_errors=True)
        for name in ("stop", "sweep.lock"):
            (self.path / name).unlink(missing_ok=True)


def _write(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(redact(content), indent=1) + "\n", durable=False)


def metrics_of(plan: Sequence[PlannedStep], store: Store, metric: str | None = None) -> dict[str, float]:
    """Return step.metric → value for the columns of a table; `metric` (STEP.METRIC) is one of them in any case."""
    found = {}
    for step in plan:
        manifest = store.made(step.key)
        recorded = {} if manifest is None else recorded_numbers(manifest)
        for key, value in recorded.items():
            if f"{step.name}.{key}" == metric:
                found[metric] = float(f"{value:.6g}")
            elif key in _SHOWN:
                found[f"{step.name}.{key}"] = round(value, 4)
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


def write_results(
    rows: list[Row], folder: Path, *, metric: str | None, less_is_better: bool, unit: str = "job"
) -> list[Row]:
    """Write table.md, table.csv, table.json and, if there is something to plot, plot.png; print the table.

    Args:
        rows: rows of all jobs.
        folder: the sweep's folder.
        metric: step.metric to sort by; None: no row has a metric.
        less_is_better: whether small values come first.
        unit: name of a row.

    Returns:
        the rows, best first; pruned rows and then rows without the metric last.
    """
    rows = sorted(redact(rows), key=lambda row: _rank(row, metric, less_is_better))
    keys = differing([row["overrides"] for row in rows])
    flat = [
        {
            unit: row["job"],
            **{key: row["overrides"].get(key, "") for key in keys},
            **row["metrics"],
            **{key: row[key] for key in ("iterations", "run", "id", *_LAST) if row.get(key)},
        }
        for row in rows
    ]
    columns = list(dict.fromkeys(key for row in flat for key in row if key not in _LAST))
    columns += [key for key in _LAST if any(key in row for row in flat)]
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(key, "")) for key in columns] for row in flat)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)
    order = f"{unit}s by {metric}, {'smallest' if less_is_better else 'largest'} first\n\n" if metric else ""
    print(f"\n{visible(order + table)}\n", flush=True)
    made = [folder / "table.md"]
    if metric is not None:
        from mlxchat.sweep.plot import draw_sweep

        picture = draw_sweep(rows, keys, metric, less_is_better=less_is_better)
        if picture is not None:
            made.append(folder / "plot.png")
            made[-1].write_bytes(picture)
    print(f"sweep: {', '.join(map(str, made))}", flush=True)
    return rows


def product_of(steps: Sequence[Mapping[str, Any]], store: Store) -> dict[str, str]:
    """Return the model of a job's steps, else its last artifact: `id`, its folder's name, and `run`, which made it."""
    made = {str(step["step"]): place for step in steps if (place := store.find(str(step["rid"]))) is not None}
    place = model_of(made) or next(reversed(made.values()), None)
    return {} if place is None else {"run": str(read_manifest(place).get("run")), "id": place.name}


def name_best(rows: Sequence[Row], metric: str | None, sweep: str, store: Store) -> None:
    """Name the model of the first of the sorted rows SWEEP/best, and print how to chat with it.

    Without any other run it also becomes the latest one.
    """
    best = next((row for row in rows if row["status"] == "done" and metric in row["metrics"]), None)
    place = store.outputs / "store" / best.get("id", "") if best is not None else store.outputs
    if best is None or not (place / MANIFEST).exists() or read_manifest(place)["kind"] != MODEL:
        return
    store.set_ref(sweep, BEST, place)
    if not (store.outputs / "refs" / LATEST).exists():
        store.link_group(LATEST, best["run"])
    name = f"{called(sweep)}/{BEST}"
    print(f"best: job {best['job']}, {name}. To chat with it: mlxchat chat {name}", flush=True)


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ, in the order of the command line."""
    keys = dict.fromkeys(key for items in settings for key in items)
    return [key for key in keys if len({str(items.get(key)) for items in settings}) > 1]


def main_metric(rows: Sequence[Row]) -> str | None:
    """Return the last metric of the pipeline that differs between the rows, else the last metric."""
    names: list[str] = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    telling = [name for name in names if len({row["metrics"][name] for row in rows if name in row["metrics"]}) > 1]
    return (telling or names)[-1] if names else None


def _rank(row: Row, metric: str | None, less_is_better: bool) -> tuple[bool, bool, float, int]:
    value = row["metrics"].get(metric)
    if value is None or value != value:
        return True, True, 0.0, row["job"]
    return False, row.get("status") == "pruned", value if less_is_better else -value, row["job"]


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
