"""`mlxchat -m key=a,b`: every combination, what several need computed once beforehand, what is done only looked up."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from mlxchat.compose import refuse_hydras, split_config_dirs
from mlxchat.errors import ConfigError, Interrupted, MlxchatError, StoreError
from mlxchat.overrides import as_hydra, implied_experiment
from mlxchat.runner import locks
from mlxchat.runner.plan import entries_of
from mlxchat.runner.progress import format_number
from mlxchat.runner.secrets import redact
from mlxchat.runner.store import Store
from mlxchat.sweep.expand import Job, compose_jobs, expand_jobs, settings_of, split_hydras
from mlxchat.sweep.folder import Row, SweepFolder, metrics_of
from mlxchat.sweep.launch import (
    check_settings,
    environment,
    launch,
    launcher_of,
    resolve_folder,
    stopped_by_signals,
    told_as_they_end,
    whereabouts,
)
from mlxchat.sweep.metrics import find_metric, metrics_of_plan
from mlxchat.sweep.shared import Shared, make_shared
from mlxchat.sweep.table import differing, main_metric, write_results
from mlxchat.sweep.worker import is_finished, rids_of, run_elsewhere, run_job
from mlxchat.visible import visible

# Hydra's settings that a sweep uses; the others are refused.
_OF_SWEEPS = (
    "hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.sweep.dir", "hydra.searchpath",
    "hydra.job.env", "hydra/callbacks", "hydra.callbacks",
)  # fmt: skip
Elsewhere = Callable[[list[Job], Shared, SweepFolder, "_Teller"], None]


def run_sweep(arguments: list[str]) -> int:
    """Run a sweep and write its table; return 1 if a job failed, else 0.

    Args:
        arguments: those of the command line, with `-m`.

    Raises:
        ConfigError: something is wrong with a job's configuration or the launcher; nothing is run.
        Interrupted: a signal arrived; what is finished is kept, and in the table.
    """
    # Once MLX is loaded these are for its compiler; whoever starts other processes needs those of before.
    before = {name: os.environ.get(name) for name in ("PATH", "TMPDIR")}
    overrides, config_dirs = split_config_dirs([item for item in arguments if item not in ("-m", "--multirun")])
    tasks, hydras = split_hydras(overrides)
    if any(task.partition("=")[0].lstrip("+") == "sweep" and not task.endswith("=none") for task in tasks):
        raise ConfigError("sweep=tpe chooses its own runs, one after the other: leave out -m")
    launcher = launcher_of(hydras)
    refuse_hydras([item for item in hydras if not item.lstrip("+~").startswith(_OF_SWEEPS)])
    hydras, place = _take_folder(hydras, config_dirs, tasks)
    if hydras or config_dirs:
        groups = [task for task in tasks if "." not in task.partition("=")[0] and "," not in task]
        tasks = [*check_settings(hydras, config_dirs, as_hydra(groups)), *tasks]
    jobs = compose_jobs(expand_jobs(tasks, config_dirs), config_dirs)
    sweep = jobs[0].composed.config.sweep
    if sweep.metric is not None:
        find_metric(sweep.metric, sweep.direction, [(job.plan, job.composed.config) for job in jobs])
    if any(implied := [item for job in jobs for item in implied_experiment(job.overrides)]):
        print(f"recipe: {implied[0]}, implied by model=. The default recipe: experiment=quickstart", flush=True)
    store = jobs[0].store
    store.prepare()
    folder = SweepFolder(place or store.outputs / "multirun" / f"{datetime.now():%Y%m%d-%H%M%S-%f}")
    with locks.hold(folder.lock, {"sweep": folder.path.name}, _tell_waiting):
        return _sweep(
            jobs,
            folder,
            arguments,
            partial(_run_elsewhere, launcher=launcher, hydras=hydras, config_dirs=config_dirs, before=before)
            if launcher != "basic"
            else None,
        )


def _sweep(jobs: list[Job], folder: SweepFolder, arguments: list[str], elsewhere: Elsewhere | None) -> int:
    """Run the jobs that are not done, and write what came of all."""
    told = _Teller(jobs)
    pending = [job for job in jobs if not is_finished(job.plan)]
    folder.prepare(
        {
            "parent": whereabouts(),
            "arguments": arguments,
            "jobs": {
                job.number: {
                    "overrides": job.overrides,
                    "settings": told.settings[job.number],
                    "title": told.titles[job.number] or f"job {job.number}",
                    "steps": entries_of(job.plan),
                }
                for job in jobs
            },
            "pending": [],
            "made": [],
        }
    )
    for job in jobs:
        if job not in pending:
            row = _cached(job, told.settings[job.number])
            folder.add_row(row)
            told(row)
    stop: Interrupted | None = None
    try:
        _run(pending, folder, told, elsewhere)
    except Interrupted as error:
        stop = error
    asked = folder.stop()
    if stop is None and asked and asked["why"] == "signal":
        stop = Interrupted("the sweep was stopped. The same command continues from there.", asked["signal"])
    rows = folder.rows()
    for job in jobs:
        settings = told.settings[job.number]
        rows.setdefault(job.number, {"job": job.number, "overrides": settings, "metrics": {}, "status": "not run"})
    results = [rows[number] for number in sorted(rows)]
    config = jobs[0].composed.config.sweep
    metric = config.metric or main_metric(results)
    declared = {one.name: one.direction for job in jobs for one in metrics_of_plan(job.plan, job.composed.config)}
    direction = config.direction or declared.get(metric or "", "minimize")
    write_results(results, folder.path, metric=metric, less_is_better=direction == "minimize")
    _report(jobs, folder, told)
    folder.tidy()
    if stop is not None:
        raise stop
    return int(any(row["status"] != "done" for row in rows.values()))


def _report(jobs: list[Job], folder: SweepFolder, told: _Teller) -> None:
    """Write the report of all jobs side by side, and say where it is."""
    from mlxchat.report.collect import collect_steps
    from mlxchat.report.comparison import write_comparison

    titles = [redact(told.titles[job.number]) or f"job {job.number}" for job in jobs]
    reports = [
        collect_steps(job.store.outputs, title, entries_of(job.plan), folder.path)
        for job, title in zip(jobs, titles, strict=True)
    ]
    try:
        print(f"report: {write_comparison(folder.path, f'Sweep {folder.path.name}', reports, titles)}", flush=True)
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)


def _run(pending: list[Job], folder: SweepFolder, told: _Teller, elsewhere: Elsewhere | None) -> None:
    """Make what is shared, then run the jobs that can run: elsewhere, or one after the other here."""
    fail_fast = any(job.composed.config.fail_fast for job in pending)
    shared = make_shared(pending, fail_fast=fail_fast)
    if shared.failed and fail_fast:
        folder.ask_to_stop("fail_fast", signal.SIGTERM)
    for job in pending:
        reason = shared.failure_for(job)
        if reason is not None:
            told.lost(job, folder, "failed", reason)
    pending = [job for job in pending if shared.failure_for(job) is None]
    if pending and elsewhere is not None:
        elsewhere(pending, shared, folder, told)
        return
    for job in pending:
        told.announce(job)
        told(run_job(folder, job.number, job.overrides, job.composed, told.settings[job.number], shared.made))


def _run_elsewhere(
    pending: list[Job], shared: Shared, folder: SweepFolder, told: _Teller, *,
    launcher: str, hydras: list[str], config_dirs: list[str], before: dict[str, str | None],
) -> None:  # fmt: skip
    """Run jobs in processes that a launcher of Hydra's starts; a job that leaves no row has failed."""
    folder.write_state(folder.state() | {"pending": [job.number for job in pending], "made": sorted(shared.made)})
    print(f"\n── {len(pending)} jobs by {launcher}; their lines begin with their number", flush=True)
    try:
        with environment(before), stopped_by_signals(folder), told_as_they_end(folder, set(folder.rows()), told):
            overrides = [as_hydra(job.overrides) for job in pending]
            launch(overrides, hydras, config_dirs, folder, run_elsewhere)
    except MlxchatError:
        raise
    except Exception as error:  # a worker was killed, or could not be started: each launcher has its own exception
        said = redact(f"error: {launcher} gave up: {type(error).__name__}: {error}")
        print(visible(said), file=sys.stderr, flush=True)
    known = folder.rows()
    for job in pending:
        if job.number not in known and folder.stop():
            told.lost(job, folder, "interrupted", "stopped before it had a result")
        elif job.number not in known:
            told.lost(job, folder, "failed", "its process ended without a result")


class _Teller:
    """Says what becomes of each job, by what distinguishes it from the others."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        """Compare the jobs."""
        self.count = len(jobs)
        self.settings = {job.number: settings_of(job.overrides) for job in jobs}
        keys = differing(list(self.settings.values()))
        self.titles = {
            number: " ".join(f"{key}={settings[key]}" for key in keys if key in settings)
            for number, settings in self.settings.items()
        }

    def announce(self, job: Job) -> None:
        """Say that a job begins in this process."""
        print(f"\n── {self._title(job.number)}", flush=True)

    def __call__(self, row: Row) -> None:
        """Say how a job ended."""
        numbers = "  ".join(f"{key} {format_number(value)}" for key, value in row["metrics"].items())
        how = "is done already" if row.get("cached") else row["status"]
        error = f": {row['error']}" if row.get("error") else ""
        print(visible(f"── {self._title(row['job'])} {how}{error}  {numbers}".rstrip()), flush=True)

    def lost(self, job: Job, folder: SweepFolder, status: str, error: str) -> None:
        """Say and keep that a job has no result."""
        row: Row = {"job": job.number, "overrides": self.settings[job.number], "metrics": {}}
        row |= {"status": status, "error": error}
        folder.add_row(row)
        self(row)

    def _title(self, number: int) -> str:
        return redact(f"job {number}/{self.count} {self.titles[number]}".rstrip())


def _cached(job: Job, settings: dict[str, Any]) -> Row:
    """Return the row of a job of which everything is done."""
    metrics = metrics_of(rids_of(job.plan), Store(job.store.outputs), job.composed.config.sweep.metric)
    return {
        "job": job.number,
        "overrides": settings,
        "status": "done",
        "cached": True,
        "metrics": metrics,
        "seconds": 0.0,
    }


def _tell_waiting(owner: dict[str, Any]) -> None:
    print(f"process {owner.get('pid', '?')} on {owner.get('host', '?')} sweeps in this folder; waiting", flush=True)


def _take_folder(hydras: list[str], config_dirs: list[str], tasks: list[str]) -> tuple[list[str], Path | None]:
    """Return Hydra's overrides without the one that names the sweep's folder, and that folder, resolved."""
    named = [override for override in hydras if override.startswith("hydra.sweep.dir=")]
    rest = [override for override in hydras if override not in named]
    fixed = as_hydra([task for task in tasks if "," not in task and "(" not in task])
    return rest, resolve_folder(named[-1], config_dirs, fixed) if named else None
