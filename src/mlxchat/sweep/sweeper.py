"""`mlxchat -m key=a,b`: composes, checks and plans every combination, and runs them all with one leader."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from mlxchat.composition.compose import Composed, compose_config, split_config_dirs
from mlxchat.composition.overrides import refuse_hydras
from mlxchat.config.schema import Config
from mlxchat.config.secrets import redact
from mlxchat.config.wording import format_number
from mlxchat.errors import ConfigError, Interrupted, MlxchatError, visible
from mlxchat.pipeline import PipelineRun, place_steps, plan_of, plan_to_run
from mlxchat.runner.leader import lead
from mlxchat.runner.plan import PlannedStep, entries_of
from mlxchat.store.store import Store
from mlxchat.sweep.results import (
    Row,
    conclude,
    differing,
    find_metric,
    main_metric,
    metrics_of,
    metrics_of_plan,
    settings_of,
    write_state,
)


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

    `outputs`, `fail_fast` and `sweep` are the first job's.

    Args:
        arguments: arguments of the command line.
        make_plan: plans each job; `plan_to_run` also downloads what keys need.
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
    """Run a sweep and write its table; return 1 if a job failed, else 0.

    Args:
        arguments: arguments of the command line, with `-m`.
    """
    jobs = read_sweep(arguments, plan_to_run)
    config = jobs[0].composed.config
    store = Store(Path(config.outputs))
    store.prepare()
    folder = store.outputs / "multirun" / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{redact(config.name)}-sweep"
    write_state(folder, [job.row(store) for job in jobs])
    stop: Interrupted | None = None
    try:
        _run_jobs(jobs, store)
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


def _run_jobs(jobs: Sequence[Job], store: Store) -> None:
    """Run the unfinished jobs."""
    for job in jobs:
        name = f"── job {job.number}/{len(jobs)} {job.title}".rstrip()
        if job.is_finished:
            _print(f"{name} is done already{_describe(job.plan, store, job.composed.config.sweep.metric)}")
        else:
            job.run = _JobRun(job, name, store)
    lead([job.run for job in jobs if job.run is not None], store)


def _describe(plan: Sequence[PlannedStep], store: Store, metric: str | None) -> str:
    numbers = metrics_of(plan, store, metric)
    return "".join(f"  {key} {format_number(value)}" for key, value in numbers.items())


def _print(line: str) -> None:
    print(visible(redact(line)), flush=True)
