"""From the command line of a sweep to its jobs: every combination of the listed values, composed, checked, planned."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from mlxchat.compose import CONF_MODULE, Composed, compose_config, register_schema
from mlxchat.errors import ConfigError, MlxchatError
from mlxchat.planning.memory import check_memory
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.store import Store

_MOST_OPTIONS = 20


@dataclass(kw_only=True)
class Job:
    """One run of a sweep."""

    number: int
    """From 1, in the order of the command line."""
    overrides: list[str]
    composed: Composed
    plan: list[PlannedStep] = field(default_factory=list)

    @property
    def store(self) -> Store:
        """Where the job's artifacts are."""
        return Store(Path(self.composed.config.outputs))


def split_hydras(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Return the overrides of our configuration, and those of Hydra's own (`hydra/launcher=…`, `hydra.…`)."""
    own = [override for override in overrides if override.lstrip("+~").startswith(("hydra.", "hydra/"))]
    return [override for override in overrides if override not in own], own


def search_path() -> ConfigSearchPath:
    """Return where Hydra looks for the built-in YAML files."""
    return create_automatic_config_search_path(None, None, f"pkg://{CONF_MODULE}")


def expand_jobs(overrides: list[str], config_dirs: list[str]) -> list[list[str]]:
    """Return the overrides of every job, as Hydra's basic sweeper lists them; equal ones once.

    Args:
        overrides: without Hydra's own; `key=a,b`, `key=choice(a,b)`, `key=range(1,4)`, `group=glob(*)` are varied.
        config_dirs: folders with further YAML files.

    Raises:
        ConfigError: an override that cannot be read, or whose values cannot be listed.
    """
    parser = parser_of(overrides, config_dirs)
    parsed = []
    for override in overrides:
        try:
            (item,) = parser.parse_overrides([override])
        except HydraException:
            compose_config([override], config_dirs)  # says what is wrong with it
            raise ConfigError(f'"{override}" is no override: expected key=value') from None
        if item.is_sweep_override() and not item.is_discrete_sweep():
            raise ConfigError(f"{override}: -m needs values that can be listed; to search an interval use sweep=tpe")
        check_glob(override, item)
        parsed.append(item)
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return [list(job) for job in dict.fromkeys(tuple(job) for job in jobs)]


def parser_of(overrides: list[str], config_dirs: list[str]) -> OverridesParser:
    """Return a parser of overrides, which finds the options of groups if one of these has a glob."""
    if not any("glob(" in item for item in overrides):
        return OverridesParser.create()
    register_schema()  # model=glob(*) finds the depths there
    path = search_path()
    for folder in config_dirs:
        path.prepend("command-line", f"file://{folder}")
    return OverridesParser.create(config_loader=ConfigLoaderImpl(path))


def check_glob(text: str, item: Override) -> None:
    """Refuse a glob that matches no option.

    Raises:
        ConfigError: with the options that there are.
    """
    if not isinstance(item.value(), Glob) or any(item.sweep_string_iterator()):
        return
    assert item.config_loader is not None
    options = item.config_loader.get_group_options(item.key_or_group)
    if not options:
        raise ConfigError(
            f"{text}: glob stands for the options of a group, and {item.key_or_group} is no group. "
            f"List the values: {item.key_or_group}=A,B"
        )
    shown = [option for option in options if not option.startswith("_")]
    more = ", …" if len(shown) > _MOST_OPTIONS else ""
    known = f"{', '.join(shown[:_MOST_OPTIONS])}{more}"
    raise ConfigError(f"{text} matches none of the options of {item.key_or_group}: {known}")


def compose_jobs(overrides: list[list[str]], config_dirs: list[str]) -> list[Job]:
    """Return the jobs with their configurations and plans.

    Raises:
        ConfigError: what is wrong with any of them; then none is run.
    """
    from mlxchat.pipeline_run import plan_to_run

    jobs: list[Job] = []
    problems: list[str] = []
    wrong: dict[str, MlxchatError] = {}
    for number, items in enumerate(overrides, start=1):
        if wrong.keys() & set(items):
            continue  # what is wrong with it was said
        try:
            job = Job(number=number, overrides=items, composed=compose_config(items, config_dirs))
            job.plan = plan_to_run(job.composed.config, job.store)
            check_memory(job.composed.config, job.plan)
            jobs.append(job)
        except MlxchatError as error:
            if not problems:
                wrong = _refused_alone(overrides, config_dirs)
            fresh = [line for line in str(error).splitlines() if line not in problems]
            if not fresh:
                break  # the others have the same mistake, and to find it again takes time
            problems += fresh
    problems += [line for error in wrong.values() for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return jobs


def _refused_alone(jobs: list[list[str]], config_dirs: list[str]) -> dict[str, MlxchatError]:
    """Return the overrides that only some jobs have and that do not compose even alone, with what was said."""
    refused = {}
    for item in dict.fromkeys(item for job in jobs for item in job):
        if not all(item in job for job in jobs):
            try:
                compose_config([item], config_dirs)
            except MlxchatError as error:
                refused[item] = error
    return refused


def settings_of(overrides: list[str]) -> dict[str, Any]:
    """Return key → value of overrides, numbers as numbers, everything else as it was typed."""
    pairs = (override.partition("=") for override in overrides)
    return {key: _number(value) if sign else "" for key, sign, value in pairs}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
