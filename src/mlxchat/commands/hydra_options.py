"""Hydra's own options: `--cfg`, `--info`, `--shell-completion`, `--hydra-help`. Hydra answers them; nothing runs."""

from __future__ import annotations

import os
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mlxchat.compose import compose_config, register_schema
from mlxchat.errors import ConfigError
from mlxchat.overrides import as_hydra

_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn", "--info", "-i")


def run_with_hydra(arguments: list[str]) -> int:
    """Hand a command line to Hydra; return 0.

    Raises:
        ConfigError: the composition is wrong, or the options ask for nothing to be shown.
    """
    if not any("--config-dir" in argument or "-cd" in argument for argument in arguments):
        compose_config(_settings(arguments))  # its mistakes, as a run names them; a user's folders are Hydra's to check
    register_schema()
    if settings := _settings(arguments):  # in one place: argparse takes overrides in one piece only
        place = arguments.index(settings[0])
        rest = [argument for argument in arguments if argument not in settings]
        arguments = [*rest[:place], *as_hydra(settings), *rest[place:]]
    # Otherwise Hydra prints its own errors and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path="pkg://mlxchat.conf", config_name="config")
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


def _settings(arguments: list[str]) -> list[str]:
    """Return the overrides among arguments."""
    found, queue = [], list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument in _WITH_VALUE:
            queue = queue[1:]
        elif not argument.startswith("-"):
            found.append(argument)
    # What Hydra calls an override after --shell-completion is a word of its own.
    return [] if {"--shell-completion", "-sc"} & set(arguments) else found
