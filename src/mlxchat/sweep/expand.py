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
from hydra.errors import HydraException

from mlxchat.compose import CONF_MODULE, Composed, compose_config
from mlxchat.errors import ConfigError, MlxchatError
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.store import Store
from mlxchat.training.memory_check import check_memory

_MOST_REFUSALS = 20


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


def search_path(config_dirs: list[str]) -> ConfigSearchPath:
    """Return where Hydra looks for YAML files: the built-in ones first, then the user's folders."""
    path = create_automatic_config_search_path(None, None, f"pkg://{CONF_MODULE}")
    for folder in config_dirs:
        path.append("command-line", f"file://{folder}")
    return path


def expand_jobs(overrides: list[str], config_dirs: list[str]) -> list[list[str]]:
    """Return the overrides of every job, as Hydra's basic sweeper lists them; equal ones once.

    Args:
        overrides: without Hydra's own; `key=a,b`, `key=choice(a,b)`, `key=range(1,4)`, `group=glob(*)` are varied.
        config_dirs: folders with further YAML files.

    Raises:
        ConfigError: an override that cannot be read, or whose values cannot be listed.
    """
    loader = ConfigLoaderImpl(search_path(config_dirs)) if any("glob(" in item for item in overrides) else None
    parser = OverridesParser.create(config_loader=loader)
    parsed = []
    for override in overrides:
        try:
            item = parser.parse_override(override)
        except HydraException:
            compose_config([override], config_dirs)  # says what is wrong with it
            raise ConfigError(f'"{override}" is no override: expected key=value') from None
        if item.is_sweep_override() and not item.is_discrete_sweep():
            raise ConfigError(f"{override}: -m needs values that can be listed; to search an interval use sweep=tpe")
        parsed.append(item)
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return [list(job) for job in dict.fromkeys(tuple(job) for job in jobs)]


def compose_jobs(overrides: list[list[str]], config_dirs: list[str]) -> list[Job]:
    """Return the jobs with their configurations and plans.

    Raises:
        ConfigError: what is wrong with any of them; then none is run.
    """
    from mlxchat.commands.run import plan_of

    jobs: list[Job] = []
    refusals: list[MlxchatError] = []
    for number, items in enumerate(overrides, start=1):
        try:
            job = Job(number=number, overrides=items, composed=compose_config(items, config_dirs))
            job.plan = plan_of(job.composed.config, job.store)
            check_memory(job.composed.config, job.plan)
            jobs.append(job)
        except MlxchatError as error:
            refusals.append(error)
            if len(refusals) == _MOST_REFUSALS:
                break
    if refusals:
        raise ConfigError("\n".join(dict.fromkeys(line for error in refusals for line in str(error).splitlines())))
    return jobs


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
