"""From conf/ and overrides to a typed, checked Config; from Hydra's errors to ours."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from importlib.resources import files

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlxchat.config import Config
from mlxchat.errors import ConfigError
from mlxchat.misspelling import explain_override, first_line, unknown_keys
from mlxchat.validation import find_problems

CONF_MODULE = "mlxchat.conf"
# What composing raises; Hydra lets a ValueError through when a group is given a number.
_REFUSALS = (HydraException, OmegaConfBaseException, ValueError)


@dataclass(frozen=True)
class Composed:
    """A configuration and how it came about."""

    config: Config
    overrides: list[str]
    """What the command line changed."""
    choices: dict[str, str]
    """Group → chosen option."""


def register_schema() -> None:
    """Tell Hydra the types; config.yaml's defaults list refers to them as `schema`."""
    ConfigStore.instance().store(name="schema", node=Config)


def compose_config(overrides: list[str], config_dirs: list[str] | None = None) -> Composed:
    """Return the typed configuration for overrides in Hydra's syntax.

    Args:
        overrides: `group=option`, `key=value`, `+key=value`, `~key`.
        config_dirs: folders with further YAML files, searched after the built-in ones.

    Raises:
        ConfigError: everything that is wrong, with the nearest right names.
    """
    register_schema()
    search = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in config_dirs)}]"] if config_dirs else []
    try:
        composed = _compose(overrides + search)
    except _REFUSALS as error:
        raise ConfigError(_diagnose(overrides, search, error)) from None
    choices = {str(group): str(option) for group, option in composed.hydra.runtime.choices.items()}
    config = to_typed(composed)
    return Composed(config, overrides, {group: option for group, option in choices.items() if "hydra" not in group})


def to_typed(composed: DictConfig) -> Config:
    """Return the dataclasses of a composed configuration, checked.

    Raises:
        ConfigError: every value that is missing or impossible.
    """
    strangers = unknown_keys(composed)
    if strangers:
        raise ConfigError("\n".join(strangers))
    plain = OmegaConf.merge(
        OmegaConf.structured(Config), OmegaConf.masked_copy(composed, [field.name for field in fields(Config)])
    )
    missing = sorted(str(key) for key in OmegaConf.missing_keys(plain))
    if missing:
        raise ConfigError("\n".join(f"{key} has no value: give {key}=…" for key in missing))
    try:
        config = OmegaConf.to_object(plain)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from None
    assert isinstance(config, Config)
    problems = find_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def group_options(group: str) -> list[str]:
    """Return the options of a config group that ships with mlxchat."""
    folder = files(CONF_MODULE).joinpath(group)
    names = [entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    # d2 before d12
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def group_names() -> list[str]:
    """Return the config groups that ship with mlxchat."""
    return sorted(
        entry.name for entry in files(CONF_MODULE).iterdir() if entry.is_dir() and not entry.name.startswith("_")
    )


def _compose(overrides: list[str]) -> DictConfig:
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        return compose("config", overrides, return_hydra_config=True)


def _diagnose(overrides: list[str], search: list[str], error: Exception) -> str:
    """Return one line per override that is wrong; Hydra itself stops at the first."""
    groups = {group: group_options(group) for group in group_names()}
    problems = []
    for override in overrides:
        try:
            _compose([override, *search])
        except _REFUSALS as alone:
            problems.append(explain_override(override, alone, groups, lambda: _compose(search)))
    return "\n".join(problems) if problems else first_line(error)
