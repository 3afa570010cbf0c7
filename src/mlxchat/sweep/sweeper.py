"""`mlxchat -m key=a,b`: lists, checks and plans every combination, runs shared steps once, then the rest."""

from __future__ import annotations

import itertools
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from mlxchat.composition.compose import Composed, compose_config, group_options, refuse_hydras, split_config_dirs
from mlxchat.composition.overrides import implied_experiment
from mlxchat.config.schema import Config
from mlxchat.config.secrets import redact
from mlxchat.config.wording import format_number
from mlxchat.errors import ConfigError, Interrupted, MlxchatError, StoreError, visible
from mlxchat.pipeline import place_steps, plan_of, plan_to_run, run_pipeline
from mlxchat.planning.scaling import Training
from mlxchat.runner.executors import Job as QueueJob
from mlxchat.runner.executors import attach, submit
from mlxchat.runner.plan import PlannedStep, entries_of, plan_again
from mlxchat.store import locks
from mlxchat.store.files import now
from mlxchat.store.store import Store
from mlxchat.sweep.jobs import force_only_others, run_elsewhere, run_job, watched, whereabouts
from mlxchat.sweep.results import (
    Row,
    SweepFolder,
    differing,
    find_metric,
    main_metric,
    metrics_of,
    metrics_of_plan,
    name_best,
    product_of,
    settings_of,
    write_results,
)
from mlxchat.sweep.scaling import laws_of_report, trainings_of, write_scaling

_MOST_OPTIONS = 20
_QUEUE_SECONDS = 1.0


@dataclass(kw_only=True)
class Job:
    """One job of a sweep."""

    number: int
    """Counted from 1, in the order of the command line."""
    overrides: list[str]
    composed: Composed
    plan: list[PlannedStep]
    title: str = ""
    """The settings that differ between jobs."""

    @property
    def store(self) -> Store:
        """Store of the job's artifacts."""
        return Store(Path(self.composed.config.outputs))

    @property
    def is_finished(self) -> bool:
        """Whether every step of it is done and named."""
        return is_finished(self.plan)


@dataclass(kw_only=True)
class Sweep:
    """The checked and planned jobs of a command line."""

    arguments: list[str]
    jobs: list[Job]
    config_dirs: list[str]

    @property
    def shared(self) -> list[tuple[Job, list[PlannedStep]]]:
        """Unfinished steps that several jobs need, each once, with the first job that needs it."""
        needed = Counter((str(job.store.outputs), step.key) for job in self.jobs for step in job.plan)
        taken: set[tuple[str, str]] = set()
        found = []
        for job in self.jobs:
            outputs = str(job.store.outputs)
            new = [
                step for step in job.plan
                if not step.done and needed[outputs, step.key] > 1 and (outputs, step.key) not in taken
            ]  # fmt: skip
            taken |= {(outputs, step.key) for step in new}
            if new:
                found.append((job, new))
        return found


def is_finished(plan: list[PlannedStep]) -> bool:
    """Return True if every step of a plan is done and named."""
    return all(step.done for step in plan)


Planner = Callable[[Config, Store], list[PlannedStep]]


def read_sweep(arguments: list[str], make_plan: Planner = plan_of) -> Sweep:
    """Return the sweep of a command line; nothing is written.

    Args:
        arguments: arguments of the command line.
        make_plan: plans each job; `plan_to_run` also downloads what keys need.

    Raises:
        ConfigError: names all problems of its jobs and the metric.
    """
    arguments = [item for item in arguments if item not in ("-m", "--multirun")]
    overrides, config_dirs = split_config_dirs(arguments)
    refuse_hydras(overrides)
    parsed = [parse(item, config_dirs) for item in overrides]
    given = {item.key_or_group for item in parsed}
    params = [item for item in _described(parsed, config_dirs) if item.key_or_group not in given]
    lists = [_values(item, config_dirs) for item in [*params, *parsed]]
    jobs = compose_jobs([list(job) for job in dict.fromkeys(itertools.product(*lists))], config_dirs, make_plan)
    metric = jobs[0].composed.config.sweep.metric
    if metric is not None:
        find_metric(metric, jobs[0].composed.config.sweep.direction, [job.plan for job in jobs])
    return Sweep(arguments=arguments, jobs=jobs, config_dirs=config_dirs)


def _described(parsed: list[Override], config_dirs: list[str]) -> list[Override]:
    """Return the overrides with several values that the chosen experiment describes (hydra.sweeper.params)."""
    chosen = [item for item in parsed if item.key_or_group == "experiment"]
    if not chosen or chosen[0].is_sweep_override():
        return []
    params = compose_config([chosen[0].input_line or ""], config_dirs).params
    return [parse(f"{key}={value}", config_dirs) for key, value in params.items()]


def parse(text: str, config_dirs: list[str]) -> Override:
    """Return an override parsed by Hydra.

    Raises:
        ConfigError: it cannot be parsed.
    """
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        compose_config([text], config_dirs)  # raises the reason
        raise ConfigError(f'"{text}" is no override: expected key=value') from None


def listed(item: Override, config_dirs: Sequence[str]) -> list[str]:
    """Return the values of a varying override as text; a glob gives options of its group.

    Raises:
        ConfigError: a glob matches no option; lists the options.
    """
    value = item.value()
    if not isinstance(value, Glob):
        return list(item.sweep_string_iterator())
    group = item.key_or_group
    folders = [Path(folder) / group for folder in config_dirs]
    options = group_options(group) + [path.stem for folder in folders for path in folder.glob("[!_]*.yaml")]
    found = value.filter(options)
    if found:
        return list(found)
    if not options:
        raise ConfigError(
            f"{item.input_line}: glob stands for the options of a group, and {group} is no group. "
            f"List the values: {group}=A,B"
        )
    more = ", …" if len(options) > _MOST_OPTIONS else ""
    known = f"{', '.join(options[:_MOST_OPTIONS])}{more}"
    raise ConfigError(f"{item.input_line} matches none of the options of {group}: {known}")


def _values(item: Override, config_dirs: list[str]) -> list[str]:
    """Return the single overrides that one with several values stands for, or the override itself."""
    if not item.is_sweep_override():
        return [item.input_line or ""]
    if not item.is_discrete_sweep():
        raise ConfigError(f"{item.input_line}: -m needs values that can be listed; to search an interval use sweep=tpe")
    return [f"{item.get_key_element()}={value}" for value in listed(item, config_dirs)]


def compose_jobs(overrides: list[list[str]], config_dirs: list[str], make_plan: Planner) -> list[Job]:
    """Return the jobs with their configurations and plans.

    Raises:
        ConfigError: names the problems of all jobs.
    """
    first = overrides[0]
    numbers = {tuple(items): number for number, items in enumerate(overrides, start=1)}
    # Jobs that differ from the first in one value come first: together they have every value once.
    tried = sorted(overrides, key=lambda items: sum(one != other for one, other in zip(items, first, strict=True)) > 1)
    jobs: list[Job] = []
    problems: list[str] = []
    for items in tried:
        try:
            composed = compose_config(items, config_dirs)
            plan = make_plan(composed.config, Store(Path(composed.config.outputs)))
            place_steps(composed.config, plan)
            jobs.append(Job(number=numbers[tuple(items)], overrides=items, composed=composed, plan=plan))
        except MlxchatError as error:
            fresh = [line for line in str(error).splitlines() if line not in problems]
            if not fresh:
                break  # the others have the same problems, and finding them takes time
            problems += fresh
    if problems:
        raise ConfigError("\n".join(problems))
    jobs.sort(key=lambda job: job.number)
    settings = [settings_of(job.overrides) for job in jobs]
    keys = differing(settings)
    for job, found in zip(jobs, settings, strict=True):
        job.title = " ".join(f"{key}={found[key]}" for key in keys if key in found)
    return jobs


def run_sweep(arguments: list[str]) -> int:
    """Run a sweep and write its table; return 1 if a job failed, else 0.

    Args:
        arguments: arguments of the command line, with `-m`.

    Raises:
        ConfigError: a job's configuration or the launcher is invalid; nothing runs.
        Interrupted: a signal arrived; finished jobs are kept and in the table.
    """
    sweep = read_sweep(arguments, plan_to_run)
    if any(implied := [item for job in sweep.jobs for item in implied_experiment(job.overrides)]):
        print(f"recipe: {implied[0]}, implied by model=. The default recipe: experiment=quickstart", flush=True)
    store = sweep.jobs[0].store
    store.prepare()
    name = f"{datetime.now():%Y%m%d-%H%M%S-%f}-{redact(sweep.jobs[0].composed.config.name)}-sweep"
    default = store.outputs / "multirun" / name
    folder = SweepFolder(_with_jobs(store, sweep) or default)

    def tell_waiting(owner: dict[str, Any]) -> None:
        print(f"{locks.name_process(owner)} runs a sweep in this folder; waiting", flush=True)

    with locks.hold(folder.lock, {"sweep": folder.path.name}, tell_waiting):
        return _Run(sweep, folder).run()


def _with_jobs(store: Store, sweep: Sweep) -> Path | None:
    """Return the folder in which the same command line left jobs in a queue or on a cluster, if any."""
    for path in sorted(store.jobs.glob("*.jsonl"), reverse=True):
        place = Path(QueueJob(path).facts.get("sweep", path))
        with suppress(OSError, ValueError):
            state = SweepFolder(place).state()
            is_same = [state["arguments"], state["parent"]["cwd"]] == [sweep.arguments, whereabouts()["cwd"]]
            if is_same and SweepFolder(place).stop() is None and attach(path) is not None:
                return place
    return None


class _Run:
    """A running sweep: starts jobs and collects their results."""

    def __init__(self, sweep: Sweep, folder: SweepFolder) -> None:
        """Write the sweep's folder."""
        self.sweep, self.folder = sweep, folder
        self.jobs = sweep.jobs
        self.config = sweep.jobs[0].composed.config
        self.made: set[str] = set()
        """Keys of shared steps that this sweep has made."""
        self.failed: dict[str, str] = {}
        """Key → error of a shared step that failed."""
        self.has_left = False
        """Whether jobs continue although this process ends."""
        self.titles = {job.number: job.title for job in self.jobs}
        described = {
            job.number: {
                "overrides": job.overrides, "settings": settings_of(job.overrides),
                "title": job.title or f"job {job.number}", "steps": entries_of(job.plan),
            }
            for job in self.jobs
        }  # fmt: skip
        self.state: dict[str, Any] = {
            "parent": whereabouts(), "arguments": sweep.arguments, "config_dirs": sweep.config_dirs,
            "metric": self.config.sweep.metric, "jobs": described, "made": [], "name": self.config.name,
        }  # fmt: skip
        folder.write_state(self.state)

    def run(self) -> int:
        """Run the unfinished jobs and write the results of all."""
        for job in self.jobs:
            if job.is_finished and job.number not in self.folder.rows():
                metrics = metrics_of(job.plan, job.store, self.config.sweep.metric)
                self._end(job, {"status": "done", "cached": True, "metrics": metrics, "seconds": 0.0})
        stop: Interrupted | None = None
        try:
            self._run_pending()
        except Interrupted as error:
            if self.has_left:
                raise
            stop = error
        asked = self.folder.stop()
        if stop is None and asked and asked["why"] == "signal":
            stop = Interrupted("the sweep was stopped. The same command continues from there.", asked["signal"])
        rows = self.folder.rows()
        for job in self.jobs:
            settings = settings_of(job.overrides)
            rows.setdefault(job.number, {"job": job.number, "overrides": settings, "metrics": {}, "status": "not run"})
        self._conclude([rows[number] for number in sorted(rows)])
        if stop is not None:
            raise stop
        return int(any(row["status"] != "done" for row in rows.values()))

    def _run_pending(self) -> None:
        """Make shared steps, then run the other jobs: one after the other here, or by the executor."""
        pending = [job for job in self.jobs if not job.is_finished]
        fail_fast = any(job.composed.config.fail_fast for job in pending)
        for job, steps in self.sweep.shared:
            users = sum(any(step.key == steps[0].key for step in other.plan) for other in self.jobs)
            print(f"\n── shared by {users} jobs: {', '.join(step.name for step in steps)}", flush=True)
            self._make_shared(job, steps)
            if self.failed and fail_fast:
                self.folder.ask_to_stop("fail_fast", signal.SIGTERM)
                break
        for job in list(pending):
            reason = next((self.failed[step.key] for step in job.plan if step.key in self.failed), None)
            if reason is not None:
                self._end(job, {"status": "failed", "error": reason})
                pending.remove(job)
        if self.config.executor.kind == "local":
            for job in pending:
                print(f"\n── {self._title(job.number)}", flush=True)
                self._say(run_job(self.folder, job.number, job.overrides, partial(self._prepare, job)))
        elif pending:
            self._submit_all(pending)

    def _prepare(self, job: Job) -> tuple[Composed, list[PlannedStep]]:
        """Return configuration and plan of a job that runs in this process; steps that this sweep made are done."""
        plan, config = plan_again(job.plan, job.store), job.composed.config
        if force := force_only_others(config.force, plan, self.made):
            plan = plan_again(plan, job.store, force=force)
        return job.composed, plan

    def _make_shared(self, job: Job, steps: list[PlannedStep]) -> None:
        """Make steps of a job's plan; a failure ends only jobs that depend on them."""
        names = [step.name for step in steps]
        composed, plan = self._prepare(job)
        needed: set[str] = set()
        for step in reversed(plan):
            if step.name in (*names, *needed):
                needed |= {step.name, *step.inputs.values()}
        plan = [step for step in plan if step.name in needed]
        composed = replace(composed, config=replace(composed.config, targets=names), overrides=job.overrides)
        lines: list[str] = []
        began = now()
        try:
            run_pipeline(composed, plan, job="shared")
        except Interrupted:
            raise
        except MlxchatError as error:
            print(redact(f"error: {error}"), flush=True)
            lines = str(error).splitlines()
        store = job.store
        keys = {step.name: step.key for step in job.plan}
        now_planned = {step.name: step for step in plan}
        for step in steps:
            manifest = store.made(now_planned[step.name].key)
            if not lines or (manifest is not None and manifest["published"] >= began):
                self.made.add(now_planned[step.name].key)
                continue
            source = next((keys[name] for name in step.inputs.values() if keys[name] in self.failed), None)
            own = next((line for line in lines[1:] if line.startswith(f"{step.name}: ")), lines[0])
            self.failed[step.key] = self.failed[source] if source else f"shared step {step.name}: {own}"

    def _submit_all(self, pending: list[Job]) -> None:
        """Run jobs by the executor; a job without a row has failed."""
        executor = self.config.executor
        self.state["made"] = sorted(self.made)
        self.folder.write_state(self.state)
        print(f"\n── {len(pending)} jobs by executor={executor.kind}; their lines begin with their number", flush=True)
        outlived = (executor.kind, executor.address) != ("ray", None)
        try:
            with watched(self.folder, set(self.folder.rows()), self._say, outlived=outlived):
                self._submit(pending)
        except Interrupted:
            self.has_left = outlived
            raise
        for job in pending:
            self._end_without_row(job, "its process ended without a result")

    def _end_without_row(self, job: Job, error: str) -> None:
        """Write the row of a job that has ended without one."""
        if job.number not in self.folder.rows():
            status = "failed"
            if self.folder.stop():
                status, error = "interrupted", "stopped before it had a result"
            self._end(job, {"status": status, "error": error})

    def _submit(self, pending: list[Job]) -> None:
        """Run jobs by the executor until all have ended; those that an earlier command submitted are awaited."""
        folder, where = self.folder, self.sweep.jobs[0].store.jobs
        records = {job.number: where / f"{folder.path.name}-{job.number}.jsonl" for job in pending}
        running = {number: job for number, path in records.items() if (job := attach(path)) is not None}
        new = [number for number in records if number not in running]
        for number in new:
            (folder.path / "rows" / f"{number}.json").unlink(missing_ok=True)
        place = str(folder.path.resolve())
        if new:
            calls = {records[number]: partial(run_elsewhere, place, number) for number in new}
            jobs = submit(self.config.executor, folder.path.name, calls, folder.path / "jobs", sweep=place)
            running |= dict(zip(new, jobs, strict=True))
        by_number = {job.number: job for job in pending}
        while running:
            time.sleep(_QUEUE_SECONDS)
            for number, job in list(running.items()):
                if job.done():
                    del running[number]
                    self._end_without_row(by_number[number], job.take() or "its process ended without a result")
                elif folder.stop() and job.waits:  # running jobs see the request themselves, and save
                    del running[number]
                    job.cancel()
                elif news := job.news():
                    print(f"── {self._title(number)}: {job.name} {news}", flush=True)

    def _end(self, job: Job, result: Row) -> None:
        """Write and print the row of a job that did not write it itself."""
        row = {"job": job.number, "overrides": settings_of(job.overrides), "metrics": {}, **result}
        self.folder.add_row(row)
        self._say(row)

    def _say(self, row: Row) -> None:
        """Print how a job ended."""
        numbers = "  ".join(f"{key} {format_number(value)}" for key, value in row["metrics"].items())
        how = "is done already" if row.get("cached") else row["status"]
        error = f": {row['error']}" if row.get("error") else ""
        print(visible(f"── {self._title(row['job'])} {how}{error}  {numbers}".rstrip()), flush=True)

    def _title(self, number: int) -> str:
        return redact(f"job {number}/{len(self.jobs)} {self.titles.get(number, '')}".rstrip())

    def _conclude(self, rows: list[Row]) -> None:
        """Write the table, the plot and the report of all jobs."""
        config = self.config.sweep
        for row in rows:
            if "steps" in row:  # keys and ids, unknown before it ran
                self.state["jobs"][row["job"]]["steps"] = row["steps"]
        metric = config.metric or main_metric(rows)
        declared = {one.name: one.direction for job in self.sweep.jobs for one in metrics_of_plan(job.plan)}
        direction = config.direction or declared.get(metric or "", "minimize")
        store = self.sweep.jobs[0].store
        for row in rows:
            if row["status"] == "done":
                row |= product_of(self.state["jobs"][row["job"]]["steps"], store)
        rows = write_results(rows, self.folder.path, metric=metric, less_is_better=direction == "minimize")
        self.state |= {"sorted_by": metric, "jobs": {row["job"]: self.state["jobs"][row["job"]] for row in rows}}
        self.folder.write_state(self.state)
        made = [store.made(step["key"]) for job in self.state["jobs"].values() for step in job["steps"]]
        trainings = trainings_of(filter(None, made))
        if files := write_scaling(trainings, self.folder.path):
            print(f"scaling: {', '.join(map(str, files))}", flush=True)
        self._report(trainings)
        self.folder.tidy()
        name_best(rows, metric, self.folder.path.name, store)

    def _report(self, trainings: list[Training]) -> None:
        """Write the report of all jobs and print its path."""
        from mlxchat.report.collect import collect_steps
        from mlxchat.report.comparison import comparison, title_of_sweep
        from mlxchat.report.document import write_document

        outputs, place = self.sweep.jobs[0].store.outputs, self.folder.path
        jobs = self.state["jobs"]
        stores = {job.number: job.store.outputs for job in self.jobs}
        titles = [redact(job["title"]) for job in jobs.values()]
        reports = [
            collect_steps(stores.get(number, outputs), title, job["steps"], place)
            for (number, job), title in zip(jobs.items(), titles, strict=True)
        ]
        title = redact(title_of_sweep(self.state["name"], [job["settings"] for job in jobs.values()]))
        try:
            blocks = comparison(title, reports, titles, self.state["sorted_by"] or "")
            blocks[-1:-1] = laws_of_report(trainings)
            print(f"report: {write_document(place, title, blocks)}", flush=True)
        except StoreError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
