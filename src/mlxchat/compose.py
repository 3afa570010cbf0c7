"""From conf/ and overrides to a typed, checked Config; from Hydra's errors to ours."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from importlib.resources import files
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlxchat.config import Config
from mlxchat.errors import ConfigError, suggest
from mlxchat.runner.plan import flatten_config
from mlxchat.validation import find_problems

CONF_MODULE = "mlxchat.conf"
_MAPPINGS = ("pipeline", "suite", "midtrain.mixture", "midtrain.validation", "sft.mixture", "sft.validation")


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
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_diagnose(overrides, search, error)) from None
    choices = {str(group): str(option) for group, option in composed.hydra.runtime.choices.items()}
    config = to_typed(composed)
    return Composed(config, overrides, {group: option for group, option in choices.items() if "hydra" not in group})


def to_typed(composed: DictConfig) -> Config:
    """Return the dataclasses of a composed configuration, checked.

    Raises:
        ConfigError: every value that is missing or impossible.
    """
    plain = OmegaConf.merge(
        OmegaConf.structured(Config), OmegaConf.masked_copy(composed, [field.name for field in fields(Config)])
    )
    missing = sorted(str(key) for key in OmegaConf.missing_keys(plain))
    if missing:
        raise ConfigError("\n".join(f"{key} has no value: give {key}=…" for key in missing))
    try:
        config = OmegaConf.to_object(plain)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None
    assert isinstance(config, Config)
    problems = find_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def group_options(group: str) -> list[str]:
    """Return the options of a config group that ships with mlxchat."""
    folder = files(CONF_MODULE).joinpath(group)
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


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
    problems = []
    for override in overrides:
        try:
            _compose([override, *search])
        except (HydraException, OmegaConfBaseException) as alone:
            problems.append(_explain(override, alone))
    return "\n".join(problems) if problems else _first_line(error)


def _explain(override: str, error: Exception) -> str:
    try:
        key = OverridesParser.create().parse_override(override).key_or_group
    except HydraException:
        return f'"{override}" is no override: expected key=value (quote special characters in the shell)'
    group = key.split("@")[0]
    if group in group_names():
        options, value = group_options(group), override.partition("=")[2]
        if value not in options and "@" not in key:
            return f'{key} has no option "{value}": {", ".join(options)}.{suggest(value, options)}'
    known = [*group_names(), *_known_keys(Config)]
    if not key.startswith("hydra") and not override.startswith(("+", "~")):
        if any(key.startswith(f"{mapping}.") for mapping in _MAPPINGS):
            # The names in there are the user's own: those of the default configuration are the nearest guess.
            known = list(flatten_config(OmegaConf.to_container(_compose([]))))
            if key not in known:
                return f'there is no "{key}" to set; +{override} would add it.{suggest(key, known)}'
        elif group not in known:
            return f'there is no "{key}" to set.{suggest(key, known)}'
    return f"{override}: {_first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)}"


def _known_keys(schema: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of the schema."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        candidates = [hint, *get_args(hint)] if get_origin(hint) is not dict else []
        nested = next((kind for kind in candidates if is_dataclass(kind)), None)
        keys.append(f"{prefix}{name}")
        if nested is not None:
            keys += _known_keys(nested, f"{prefix}{name}.")
    return keys


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key")), "")
    return f"{where}: {lines[0]}" if where and where not in lines[0] else lines[0]
