"""`mlxchat -m key=a,b`: composes, checks and plans every combination, runs shared steps once, then the rest."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from mlxchat.composition.compose import compose_config, group_options, refuse_hydras, split_config_dirs
from mlxchat.composition.overrides import implied_experiment
from mlxchat.config.schema import Config
from mlxchat.config.secrets import redact
from mlxchat.config.wording import format_number
from mlxchat.errors import ConfigError, Interrupted, MlxchatError, visible
from mlxchat.pipeline import place_steps, plan_of, plan_to_run, run_pipeline
from mlxchat.runner.plan import PlannedStep, plan_again
from mlxchat.store.store import Store
from mlxchat.sweep.jobs import Job, run_elsewhere, run_here
from mlxchat.sweep.results import (
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
class Sweep:
    """The checked and planned jobs of a command line."""

    jobs: list[Job]

    @property
    def config(self) -> Config:
        """The first job's configuration; `outputs`, `executor`, `fail_fast` and `sweep` are taken from it."""
        return self.jobs[0].composed.config

    @property
    def store(self) -> Store:
        """Store of the artifacts of all jobs."""
        return Store(Path(self.config.outputs))

    @property
    def shared(self) -> list[tuple[Job, list[PlannedStep]]]:
        """Unfinished steps that several jobs need, each once, with the first job that needs it."""
        needed = Counter(step.key for job in self.jobs for step in job.plan)
        taken: set[str] = set()
        found = []
        for job in self.jobs:
            new = [step for step in job.plan if not step.done and needed[step.key] > 1 and step.key not in taken]
            taken |= {step.key for step in new}
            if new:
                found.append((job, new))
        return found


Planner = Callable[[Config, Store], list[PlannedStep]]


def read_sweep(arguments: list[str], make_plan: Planner = plan_of) -> Sweep:
    """Return the sweep of a command line; nothing is written.

    Args:
        arguments: arguments of the command line.
        make_plan: plans each job; `plan_to_run` also downloads what keys need.

    Raises:
        ConfigError: names all problems of its jobs and the metric.
    """
    overrides, config_dirs = split_config_dirs([item for item in arguments if item not in ("-m", "--multirun")])
    refuse_hydras(overrides)
    parsed = [parse(item, config_dirs) for item in overrides]
    given = {item.key_or_group for item in parsed}
    if "outputs" in {item.key_or_group for item in parsed if item.is_sweep_override()}:
        raise ConfigError("outputs=A,B: all jobs of a sweep share one outputs folder")
    described = [item for item in _described(parsed, config_dirs) if item.key_or_group not in given]
    lists = [_values(item, config_dirs) for item in [*described, *parsed]]
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
    sweep = Sweep(jobs=jobs)
    if sweep.config.sweep.metric is not None:
        find_metric(sweep.config.sweep.metric, sweep.config.sweep.direction, [job.plan for job in jobs])
    return sweep


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
        ConfigError: a glob matches no option.
    """
    value = item.value()
    if not isinstance(value, Glob):
        return list(item.sweep_string_iterator())
    group = item.key_or_group
    own = [path.stem for folder in config_dirs for path in (Path(folder) / group).glob("[!_]*.yaml")]
    if found := value.filter([*group_options(group), *own]):
        return list(found)
    if not group_options(group):
        raise ConfigError(f"{item.input_line}: {group} is no group. List the values: {group}=A,B")
    raise ConfigError(f"{item.input_line} matches none of the options of {group}: {', '.join(group_options(group))}")


def _described(parsed: list[Override], config_dirs: list[str]) -> list[Override]:
    """Return the overrides with several values that the chosen experiment describes (hydra.sweeper.params)."""
    chosen = [item for item in parsed if item.key_or_group == "experiment"]
    if not chosen or chosen[0].is_sweep_override():
        return []
    params = compose_config([chosen[0].input_line or ""], config_dirs).params
    return [parse(f"{key}={value}", config_dirs) for key, value in params.items()]


def _values(item: Override, config_dirs: list[str]) -> list[str]:
    """Return the single overrides that one with several values stands for, or the override itself."""
    if not item.is_sweep_override():
        return [item.input_line or ""]
    if not item.is_discrete_sweep():
        raise ConfigError(f"{item.input_line}: -m needs values that can be listed; to search an interval use sweep=tpe")
    return [f"{item.get_key_element()}={value}" for value in listed(item, config_dirs)]


def run_sweep(arguments: list[str]) -> int:
    """Run a sweep and write its table; return 1 if a job failed, else 0.

    Args:
        arguments: arguments of the command line, with `-m`.

    Raises:
        ConfigError: a job's configuration is invalid; nothing runs.
        Interrupted: a signal arrived; finished jobs are kept and in the table.
    """
    sweep = read_sweep(arguments, plan_to_run)
    jobs, store = sweep.jobs, sweep.store
    if any(implied := [item for job in jobs for item in implied_experiment(job.overrides)]):
        print(f"recipe: {implied[0]}, implied by model=. The default recipe: experiment=quickstart", flush=True)
    store.prepare()
    folder = store.outputs / "multirun" / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{redact(sweep.config.name)}-sweep"
    write_state(folder, [job.row(store) for job in jobs])
    stop: Interrupted | None = None
    try:
        _run_jobs(sweep, folder)
    except Interrupted as error:
        stop = error
    rows = [job.row(store) for job in jobs]
    metric = sweep.config.sweep.metric or main_metric(rows)
    declared = {name: better for job in jobs for name, (better, _) in metrics_of_plan(job.plan).items()}
    direction = sweep.config.sweep.direction or declared.get(metric or "")
    conclude(folder, store, rows, metric=metric, less_is_better=direction != "maximize")
    if stop is not None:
        raise stop
    return int(any(job.status != "done" for job in jobs))


def _run_jobs(sweep: Sweep, folder: Path) -> None:
    """Make shared steps, then run the unfinished jobs: one after the other here, or by the executor."""
    store, config = sweep.store, sweep.config

    def say(job: Job, text: str) -> None:
        print(visible(f"── job {job.number}/{len(sweep.jobs)} {job.title}".rstrip() + f" {text}".rstrip()), flush=True)

    def say_end(job: Job, how: str) -> None:
        numbers = metrics_of(job.plan, store, config.sweep.metric) if job.status == "done" else {}
        shown = "".join(f"  {key} {format_number(value)}" for key, value in numbers.items())
        say(job, f"{how}{': ' * bool(job.error)}{job.error}{shown}")

    for job in sweep.jobs:
        if job.is_finished:
            job.status = "done"
            say_end(job, "is done already")
    errors = _make_shared(sweep)
    for job in sweep.jobs:
        if reasons := [errors[step.key] for step in job.plan if step.key in errors]:
            job.status, job.error = "failed", reasons[0]
            say_end(job, job.status)
    pending = [job for job in sweep.jobs if job.status == "not run"]
    if errors and config.fail_fast:
        return
    if config.executor.kind != "local" and pending:
        run_elsewhere(pending, config.executor, store, folder, lambda job, text: say_end(job, text))
        return
    for job in pending:
        print()
        say(job, "")
        run_here(job, store)
        say_end(job, job.status)
        if job.error and config.fail_fast:
            return


def _make_shared(sweep: Sweep) -> dict[str, str]:
    """Run the steps that several jobs need; return key → error of those that failed, which ends only their jobs."""
    errors: dict[str, str] = {}
    for job, steps in sweep.shared:
        if any(step.key in errors for step in job.plan):
            continue  # they need what failed, and so does the job
        names, keys = [step.name for step in steps], {step.key for step in steps}
        users = [other for other in sweep.jobs if steps[0].key in {step.key for step in other.plan}]
        print(f"\n── shared by {len(users)} jobs: {', '.join(names)}", flush=True)
        config = replace(job.composed.config, targets=names, force=[step.name for step in steps if step.forced])
        try:
            run_pipeline(replace(job.composed, config=config), job="shared")
        except Interrupted:
            raise
        except MlxchatError as error:
            print(redact(f"error: {error}"), flush=True)
            undone = [step for step in plan_again(job.plan, sweep.store) if step.name in names and not step.done]
            reason = f"shared step {undone[0].name}: {str(error).splitlines()[0]}"
            errors |= {step.key: reason for step in steps if step.name in {each.name for each in undone}}
        for other in sweep.jobs:
            other.made |= {step.name for step in other.plan if step.key in keys}
        if errors and sweep.config.fail_fast:
            break
    return errors
