"""From conf/ and overrides to a typed, checked Config; from Hydra's errors to ours."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mlxchat.composed_cache import ComposedCache
from mlxchat.config import Config
from mlxchat.data.vocabulary import vocab_size_of
from mlxchat.errors import ConfigError
from mlxchat.model_config import MODELS
from mlxchat.overrides import as_hydra
from mlxchat.validation import find_problems

if TYPE_CHECKING:  # Hydra takes longer to import than everything else together, and is often not needed
    from omegaconf import DictConfig

CONF_MODULE = "mlxchat.conf"
# Paths that Hydra's grammar takes as they stand, as text.
_PLAIN_OUTPUTS = re.compile(r"outputs=[A-Za-z0-9_./-]*/[A-Za-z0-9_./-]*")


@dataclass(frozen=True)
class Composed:
    """A configuration and how it came about."""

    config: Config
    overrides: list[str]
    """What the command line changed."""
    choices: dict[str, str]
    """Group → chosen option."""


def split_config_dirs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without `--config-dir DIR`, and the folders it named.

    Raises:
        ConfigError: another option is left, or a folder is missing.
    """
    rest, folders = [], []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            value = value or (queue.pop(0) if queue else "")
            if not Path(value).is_dir():
                raise ConfigError(f'--config-dir: there is no folder "{value}"')
            folders.append(str(Path(value).resolve()))
        elif argument.startswith("-"):
            raise ConfigError(f"unknown option {argument}. See: mlxchat --help")
        else:
            rest.append(argument)
    return rest, folders


@cache
def register_schema() -> None:
    """Register with Hydra the types, which config.yaml's defaults list names `schema`, and a model of every depth."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name in MODELS:
        store.store(group="model", name=name, node={"defaults": ["_depth", "_self_"], "depth": int(name[1:])})


def compose_config(overrides: list[str], config_dirs: list[str] | None = None) -> Composed:
    """Return the typed configuration for overrides in Hydra's syntax.

    Args:
        overrides: `group=option`, `key=value`, `+key=value`, `~key`.
        config_dirs: folders with further YAML files, searched after the built-in ones.

    Raises:
        ConfigError: everything that is wrong, with the nearest right names.
    """
    place = _place_of_outputs(overrides) if not config_dirs else None
    if place is not None:
        other = compose_config([each for each in overrides if not each.startswith("outputs=")])
        return Composed(replace(other.config, outputs=place), overrides, other.choices)
    kept = ComposedCache(overrides, config_dirs or [], conf_folder())
    known = kept.recall()
    if known is not None:
        _check(known[0])
        return Composed(known[0], overrides, known[1])
    register_schema()
    search = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in config_dirs)}]"] if config_dirs else []
    try:
        composed = _compose(overrides + search)
    except _refusals() as error:
        raise ConfigError(_diagnose(overrides, search, error)) from None
    choices = {str(group): str(option) for group, option in composed.hydra.runtime.choices.items()}
    choices = {group: option for group, option in choices.items() if "hydra" not in group}
    config = to_typed(composed)
    kept.keep(config, choices)
    return Composed(config, overrides, choices)


def _place_of_outputs(overrides: list[str]) -> str | None:
    """Return the path of a plain `outputs=PATH` that nothing else refers to: all such folders share a cache entry."""
    found = [each for each in overrides if each.lstrip("+~").startswith("outputs")]
    if any("outputs}" in each for each in overrides) or not all(map(_PLAIN_OUTPUTS.fullmatch, found)):
        return None
    return found[-1].removeprefix("outputs=") if found else None


def to_typed(composed: DictConfig) -> Config:
    """Return the dataclasses of a composed configuration, checked; Hydra's own section is taken out of it.

    Raises:
        ConfigError: every value that is missing or impossible.
    """
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    from mlxchat.misspelling import first_line, unknown_keys

    strangers = unknown_keys(composed)
    if strangers:
        raise ConfigError("\n".join(strangers))
    with open_dict(composed):
        composed.pop("hydra", None)
    # The types of the schema are still there: merging into it once more would only take time.
    assert OmegaConf.get_type(composed) is Config
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
        lines = [f"{key} has no value: give {key}=…" for key in missing] or [first_line(error)]
        raise ConfigError("\n".join(lines)) from None
    assert isinstance(config, Config)
    _check(config)
    return config


def _check(config: Config) -> None:
    problems = find_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))
    if config.tokenizer.source != "train":  # each time: a file may be another one than when this was composed
        config.tokenizer.vocab_size = vocab_size_of(config.tokenizer.source)


@cache
def conf_folder() -> Path:
    """Return the folder of the YAML files that ship with mlxchat."""
    spec = find_spec(CONF_MODULE)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def group_options(group: str) -> list[str]:
    """Return the options of a config group that ships with mlxchat."""
    if group == "model":
        return list(MODELS)
    names = [entry.stem for entry in conf_folder().joinpath(group).glob("[!_]*.yaml")]
    return sorted(names)


def describe_options(options: list[str]) -> str:
    """Return the options of a group for a message; those of `model` shortened."""
    return f"{options[0]} … {options[-1]}" if options == MODELS else ", ".join(options)


def group_names() -> list[str]:
    """Return the config groups that ship with mlxchat; conf/hydra only adds to a group of Hydra's own."""
    names = (entry.name for entry in conf_folder().iterdir() if entry.is_dir() and entry.name[0] not in "._")
    return sorted(name for name in names if name != "hydra")


def _refusals() -> tuple[type[Exception], ...]:
    """Return what composing raises; Hydra lets a ValueError through when a group is given a number."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return (HydraException, OmegaConfBaseException, ValueError)


def _compose(overrides: list[str]) -> DictConfig:
    from hydra import compose, initialize_config_module

    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        return compose("config", as_hydra(overrides), return_hydra_config=True)


def _diagnose(overrides: list[str], search: list[str], error: Exception) -> str:
    """Return one line per override that is wrong; Hydra itself stops at the first."""
    from mlxchat.misspelling import explain_override, first_line

    groups = {group: group_options(group) for group in group_names()}
    # Groups first, one after the other: what a key may be depends on what they bring.
    of_groups = [override for override in overrides if re.split("[@=]", override)[0] in groups]
    found: dict[str, str] = {}
    around = list(search)
    for override in of_groups:
        wrong = _wrong_ones([override], around)
        found |= {each: explain_override(each, error, groups, partial(_compose, around)) for each, error in wrong}
        around = [*around, override] if not wrong else around
    keys = [override for override in overrides if override not in of_groups]
    found |= {
        override: explain_override(override, alone, groups, partial(_compose, around))
        for override, alone in _wrong_ones(keys, around)
    }
    problems = [found[override] for override in overrides if override in found]
    return "\n".join(problems) if problems else first_line(error)


def _wrong_ones(overrides: list[str], around: list[str]) -> list[tuple[str, Exception]]:
    """Return the overrides that do not compose with those around them, each with what that raises.

    Halves of them are tried together, since composing takes half a second and most are right.
    """
    if not overrides:
        return []
    try:
        _compose([*around, *overrides])
    except _refusals() as error:
        if len(overrides) == 1:
            return [(overrides[0], error)]
        middle = len(overrides) // 2
        return _wrong_ones(overrides[:middle], around) + _wrong_ones(overrides[middle:], around)
    return []
