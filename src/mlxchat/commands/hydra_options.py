"""Hydra's own options: `--cfg`, `--info`, `--shell-completion`, `--hydra-help`. Hydra answers them; nothing runs."""

from __future__ import annotations

import os
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mlxchat.composition.compose import (
    CONF_MODULE,
    compose_config,
    places_of_stages,
    register_schema,
    search_path,
    split_options,
)
from mlxchat.composition.overrides import as_hydra
from mlxchat.composition.sections import schema_of
from mlxchat.errors import ConfigError

_WITH_VALUE = ("--cfg", "-c", "--package", "-p")
_INFO = ("--info", "-i")
_COMPLETION = ("--shell-completion", "-sc")
_ALONE = (*_INFO, "--resolve", "--hydra-help", "--run", "-r", "--multirun", "-m")
_TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def run_with_hydra(arguments: list[str]) -> int:
    """Hand a command line to Hydra; return 0.

    Raises:
        ConfigError: the composition is wrong, or the options ask for nothing to be shown.
    """
    register_schema()  # for --shell-completion
    if not {*_COMPLETION} & {*arguments}:  # what follows that is a word, not an override
        arguments = _prepare(arguments)
    # Otherwise Hydra prints its own errors and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path=f"pkg://{CONF_MODULE}", config_name="config")
    def refuse(composed: DictConfig) -> None:
        raise ConfigError("-p SECTION and --resolve go with --cfg job")

    argv, sys.argv = sys.argv, ["mlxchat", *arguments]
    try:
        refuse()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    finally:
        sys.argv = argv
    return 0


def _prepare(arguments: list[str]) -> list[str]:
    """Return the arguments for Hydra's parser; mistakes in the settings are refused as a run refuses them."""
    flags, rest = [], []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        option = argument.partition("=")[0]
        if option in (*_WITH_VALUE, *_ALONE):
            flags.append(argument)
            takes = argument in _WITH_VALUE or (argument in _INFO and queue[:1] and queue[0] in _TOPICS)
            flags += [queue.pop(0)] if takes and queue else []
        else:
            rest.append(argument)
    overrides, folders, primary = split_options(rest)
    of_hydra = [each for each in overrides if each.lstrip("+~").startswith(("hydra.", "hydra/"))]
    compose_config([each for each in overrides if each not in of_hydra], folders, primary)
    schema = schema_of(places_of_stages(overrides, folders, primary))
    register_schema(schema)
    if primary is not None:
        flags += ["--config-path", str(primary.parent), "--config-name", primary.stem]
    return [*flags, *as_hydra(overrides, schema, imply=primary is None), *search_path(folders, primary)]
