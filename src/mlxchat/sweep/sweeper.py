"""`mlxchat -m key=a,b`: composes, checks and plans every combination, and runs them all with one leader.

Below: results of sweeps and searches, their metrics, table, report and best model.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from mlxchat.composition.compose import Composed, compose_config, split_config_dirs
from mlxchat.composition.overrides import refuse_hydras
from mlxchat.config.schema import Config
from mlxchat.config.wording import Table, format_number
from mlxchat.errors import ConfigError, Interrupted, MlxchatError, redact, suggest, visible
from mlxchat.pipeline import PipelineRun, place_steps, plan_of, plan_to_run
from mlxchat.report.experiments import group_seeds, table_of_seeds, why_no_best
from mlxchat.runner.leader import lead
from mlxchat.runner.plan import PlannedStep, entries_of
from mlxchat.store.files import write_whole
from mlxchat.store.manifest import MEASURED, read_manifest
from mlxchat.store.naming import BEST, LATEST, MODEL, called, model_of
from mlxchat.store.store import Store


@dataclass(kw_only=True)
class Job:
    """One job of a sweep."""

    number: int  # from 1, in the order of the command line
    overrides: list[str]
    composed: Composed
    plan: list[PlannedStep]
    title: str = ""  # the settings that differ between jobs
    run: PipelineRun | None = None  # None: it was done before, or the sweep has not begun

    @property
    def is_finished(self) -> bool:
        """Whether every step of it is done."""
        return all(step.done for step in self.plan)

    @property
    def status(self) -> str:
        """done, failed, not run, interrupted, or queued: the executor's jobs outlive this process."""
        if self.run is not None and self.run.error is not None:
            return "failed"
        if self.is_finished if self.run is None else self.run.is_over:
            return "done"
        if self.run is None or not self.run.has_begun:
            return "not run"
        return "queued" if self.run.left else "interrupted"

    def row(self, store: Store) -> Row:
        """Return its row of the table."""
        metric = self.composed.config.sweep.metric
        error = self.run.error if self.run is not None else None
        return {
            "job": self.number, "title": self.title or f"job {self.number}", "settings": settings_of(self.overrides),
            "status": self.status, "error": str(error or "").partition("\n")[0],
            "metrics": metrics_of(self.plan, store, metric) if self.status == "done" else {},
            "steps": entries_of(self.plan),
        }  # fmt: skip


def read_sweep(arguments: list[str], make_plan: Callable[[Config, Store], list[PlannedStep]] = plan_of) -> list[Job]:
    """Return the checked and planned jobs of a command line; nothing is written.

    `outputs`, `fail_fast` and `sweep` are the first job's. `plan_to_run` as `make_plan` downloads what keys need.
    """
    overrides, config_dirs = split_config_dirs([item for item in arguments if item not in ("-m", "--multirun")])
    refuse_hydras(overrides)
    parsed = [parse(item, config_dirs) for item in overrides]
    given = {item.key_or_group for item in parsed}
    if "outputs" in {item.key_or_group for item in parsed if item.is_sweep_override()}:
        raise ConfigError("outputs=A,B: all jobs of a sweep share one outputs folder")
    described = [item for item in _described(parsed, config_dirs) if item.key_or_group not in given]
    lists = [_values(item) for item in [*described, *parsed]]
    jobs: list[Job] = []
    problems: list[str] = []
    for number, items in enumerate(dict.fromkeys(itertools.product(*lists)), start=1):
        try:
            composed = compose_config([*items], config_dirs)
            plan = make_plan(composed.config, Store(Path(composed.config.outputs)))
            place_steps(composed.config, plan)
            jobs.append(Job(number=number, overrides=[*items], composed=composed, plan=plan))
        except MlxchatError as error:
            fresh = [line for line in str(error).splitlines() if line not in problems]
            if not fresh:
                break  # the others have the same problems, and finding them takes time
            problems += fresh
    if problems:
        raise ConfigError("\n".join(problems))
    settings = [settings_of(job.overrides) for job in jobs]
    for job, own in zip(jobs, settings, strict=True):
        job.title = redact(" ".join(f"{key}={own[key]}" for key in differing(settings) if key in own))
    sweep = jobs[0].composed.config.sweep
    if sweep.metric is not None:
        find_metric(sweep.metric, sweep.direction, [job.plan for job in jobs])
    return jobs


def parse(text: str, config_dirs: list[str]) -> Override:
    """Return an override parsed by Hydra."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        compose_config([text], config_dirs)  # raises the reason
        raise ConfigError(f'"{text}" is no override: expected key=value') from None


def listed(item: Override) -> list[str]:
    """Return the values of a varying override as text."""
    if isinstance(item.value(), Glob):
        raise ConfigError(f"{item.input_line}: glob is not supported. List the values: {item.key_or_group}=A,B")
    return list(item.sweep_string_iterator())


def _described(parsed: list[Override], config_dirs: list[str]) -> list[Override]:
    """Return the overrides with several values that the chosen experiment describes (hydra.sweeper.params)."""
    chosen = [item for item in parsed if item.key_or_group == "experiment"]
    if not chosen or chosen[0].is_sweep_override():
        return []
    params = compose_config([chosen[0].input_line or ""], config_dirs).params
    return [parse(f"{key}={value}", config_dirs) for key, value in params.items()]


def _values(item: Override) -> list[str]:
    """Return the single overrides that one with several values stands for, or the override itself."""
    if not item.is_sweep_override():
        return [item.input_line or ""]
    if not item.is_discrete_sweep():
        raise ConfigError(f"{item.input_line}: -m needs values that can be listed; to search an interval use sweep=tpe")
    return [f"{item.get_key_element()}={value}" for value in listed(item)]


def run_sweep(arguments: list[str]) -> int:
    """Run the sweep of a command line with `-m` and write its table; return 1 if a job failed, else 0."""
    jobs = read_sweep(arguments, plan_to_run)
    config = jobs[0].composed.config
    store = Store(Path(config.outputs))
    store.prepare()
    folder = store.outputs / "multirun" / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{redact(config.name)}-sweep"
    write_state(folder, [job.row(store) for job in jobs])
    for job in jobs:
        name = f"── job {job.number}/{len(jobs)} {job.title}".rstrip()
        if job.is_finished:
            _print(f"{name} is done already{_describe(job.plan, store, job.composed.config.sweep.metric)}")
        else:
            job.run = _JobRun(job, name, store)
    stop: Interrupted | None = None
    try:
        lead([job.run for job in jobs if job.run is not None], store)
    except Interrupted as error:
        stop = error
    rows = [job.row(store) for job in jobs]
    metric = config.sweep.metric or main_metric(rows)
    declared = {name: better for job in jobs for name, (better, _) in metrics_of_plan(job.plan).items()}
    direction = config.sweep.direction or declared.get(metric or "")
    conclude(folder, store, rows, metric=metric, less_is_better=direction != "maximize")
    if stop is not None:
        raise stop
    return int(any(job.status != "done" for job in jobs))


class _JobRun(PipelineRun):
    """The run of a job, whose lines are printed below the job's name."""

    spoke_last: _JobRun | None = None

    def __init__(self, job: Job, name: str, store: Store) -> None:
        super().__init__(job.composed, job.plan, store, job=f"job{job.number}", say=self._say)
        self.name, self.metric = name, job.composed.config.sweep.metric

    def _say(self, line: str) -> None:
        if _JobRun.spoke_last is not self:
            _JobRun.spoke_last = self
            _print(f"\n{self.name}")
        _print(line)

    def end(self, error: BaseException | None) -> None:
        super().end(error)
        if error is None:
            _print(f"{self.name} done{_describe(self.plan, self.store, self.metric)}")
        elif isinstance(error, Interrupted):
            _print(f"{self.name} was stopped")
        else:
            print(redact(f"error: {error}"), file=sys.stderr, flush=True)
            _print(f"{self.name} failed: {str(error).partition(chr(10))[0]}")


def _describe(plan: Sequence[PlannedStep], store: Store, metric: str | None) -> str:
    numbers = metrics_of(plan, store, metric)
    return "".join(f"  {key} {format_number(value)}" for key, value in numbers.items())


def _print(line: str) -> None:
    print(visible(redact(line)), flush=True)


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
    """Return the direction (minimize, maximize) of STEP.METRIC, which one of the plans records; else a ConfigError.

    `direction` is sweep.direction; None: the declared one.
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
        one_of = f"{', '.join(known)}.{suggest(name, declared[0])}"
        raise ConfigError(f"sweep.metric={name} is not recorded by any step; expected STEP.METRIC, one of: {one_of}")
    if (chosen := direction or recorded[0]) is None:
        raise ConfigError(f"sweep.metric={name} has no better direction: give sweep.direction=minimize or =maximize")
    return chosen


def metrics_of(plan: Sequence[PlannedStep], store: Store, metric: str | None = None) -> dict[str, float]:
    """Return STEP.METRIC → value for the columns of a table; `metric` is one of them in any case."""
    found = {}
    for step in plan:
        manifest = store.made(step.key) or {"metrics": {}}
        numbers = {**manifest["metrics"], **{key: manifest.get(key) for key in MEASURED}}  # speeds are kept apart
        for key, value in numbers.items():
            if isinstance(value, int | float) and (key in _SHOWN or f"{step.name}.{key}" == metric):
                found[f"{step.name}.{key}"] = value
    return found


def settings_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Return key → value of overrides; numeric values as numbers, others as typed."""
    found: dict[str, Any] = {}
    for key, sign, value in (override.partition("=") for override in overrides):
        found[key] = value if sign else ""
        for kind in (float, int):
            with suppress(ValueError):
                found[key] = kind(value)
    return found


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
) -> None:
    """Write table and report of all jobs, name the best model, and print what was made.

    Args:
        folder: the sweep's folder; the end of its name is the sweep's name.
        store: holds the artifacts.
        rows: a row for each job; the best come first, pruned ones and then those without the metric last.
        metric: STEP.METRIC to sort by; None: no row has a metric.
        less_is_better: whether small values come first.
        unit: name of a row.
    """
    from mlxchat.report.comparison import comparison, reports_of_sweep
    from mlxchat.report.document import write_document
    from mlxchat.sweep.scaling import describe_laws, fit_scaling_laws, trainings_of

    rows = redact([row | _product_of(row, store) for row in rows])
    rows = sorted(rows, key=lambda row: _rank(row, metric, less_is_better))
    keys = differing([row["settings"] for row in rows])
    write_state(folder, rows, name=called(folder.name), sorted_by=metric, less_is_better=less_is_better)
    _write_table(folder, rows, keys, metric, unit, less_is_better=less_is_better)
    groups = group_seeds(rows, metric, less_is_better=less_is_better)
    if groups and metric is not None:
        print(f"\nover seeds:\n{visible(table_of_seeds(groups, metric).text())}\n", flush=True)
    steps = [step for row in rows for step in row["steps"]]
    if any(step["rid"] for step in steps):
        laws = fit_scaling_laws(trainings_of(filter(None, (store.made(step["key"]) for step in steps))))
        further = [describe_laws(laws)] if laws is not None else []
        blocks = comparison(folder, reports_of_sweep(store.outputs, folder), further=further)
        print(f"report: {write_document(folder, called(folder.name), blocks)}", flush=True)
    if groups and (reason := why_no_best(groups)):
        print(f"no best {unit}: {visible(reason)}", flush=True)
    else:
        _name_best(rows, metric, folder, store, unit, "best" if groups else "best of one seed each")


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
    cells = [[row.get(key, "") for key in columns] for row in flat]
    texts = [[f"{value:.5g}" if isinstance(value, float) else str(value) for value in row] for row in cells]
    table = Table(header=columns, align="l" * len(columns), rows=texts).markdown()
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")
    order = f"{unit}s by {metric}, {'smallest' if less_is_better else 'largest'} first\n\n" if metric else ""
    print(f"\n{visible(order + table)}\n\nsweep: {folder / 'table.md'}", flush=True)


def _name_best(rows: Sequence[Row], metric: str | None, folder: Path, store: Store, unit: str, title: str) -> None:
    """Name the model of the first of the sorted rows SWEEP/best, and print how to chat with it, after a title.

    Without any other run it also becomes the latest one.
    """
    best = next((row for row in rows if row["status"] == "done" and metric in row["metrics"]), None)
    if best is None or read_manifest(place := store.outputs / "store" / best["id"])["kind"] != MODEL:
        return
    store.set_ref(folder.name, BEST, place)
    if not (store.outputs / "refs" / LATEST).exists():
        store.link_group(LATEST, best["run"])
    name = f"{called(folder.name)}/{BEST}"
    print(f"{title}: {unit} {best['job']}, {name}. To chat with it: mlxchat chat {name}", flush=True)
