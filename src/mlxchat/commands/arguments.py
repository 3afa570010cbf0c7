"""What verbs share: an argument parser that also takes `outputs=PATH`, as the configuration spells it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from mlxchat.errors import ConfigError

DEFAULT_OUTPUTS = "outputs"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are ours: one message, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise ConfigError(f"{message}. See: {self.prog} --help")


def make_parser(verb: str, purpose: str) -> Parser:
    """Return a parser for a verb that works on an outputs folder."""
    parser = Parser(prog=f"mlxchat {verb}", description=purpose, allow_abbrev=False)
    parser.add_argument("settings", nargs="*", metavar="outputs=PATH", help="the outputs folder (default: outputs)")
    return parser


def make_naming_parser(verb: str, purpose: str, what: str = "ID") -> Parser:
    """Return a parser for a verb that takes names of artifacts, which `split_words` then tells from settings."""
    parser = Parser(
        prog=f"mlxchat {verb}", description=purpose, allow_abbrev=False,
        epilog="ID: a step of the latest run (sft), RUN/STEP, RUN (its model), a pin, import:NAME, an artifact's name, "
        "path or id, or the start of one. RUN: latest, quickstart, or the start of a run's name",
    )  # fmt: skip
    parser.add_argument("settings", nargs="*", metavar=what, help="and outputs=PATH, the outputs folder")
    return parser


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words that are names, and those that are settings (key=value)."""
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def take_names(words: list[str], verb: str, least: int, most: int | None, form: str) -> tuple[list[str], list[str]]:
    """Return names and settings, and see to it that there are as many names as the verb takes.

    Raises:
        ConfigError: there are too few or too many, or a setting that no such verb uses.
    """
    names, settings = split_words(words)
    outputs_folder(settings)
    if len(names) < least or (most is not None and len(names) > most):
        raise ConfigError(f"expected mlxchat {verb} {form}, got {len(names) or 'no'} names. See: mlxchat {verb} --help")
    return names, settings


def quoted(value: str) -> str:
    """Return a value as an override takes it, whatever is in it."""
    # Backslashes count where a quotation mark follows: one of the value's, or the one that ends it.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value) + "'"


def outputs_folder(settings: list[str]) -> Path:
    """Return the folder that `outputs=PATH` names among the settings.

    Raises:
        ConfigError: there is another setting, which this verb would not use.
    """
    folder = DEFAULT_OUTPUTS
    for setting in settings:
        key, _, value = setting.partition("=")
        if key != "outputs" or not value:
            raise ConfigError(f'"{setting}" is not used here; this verb takes outputs=PATH')
        folder = value
    return Path(folder)
