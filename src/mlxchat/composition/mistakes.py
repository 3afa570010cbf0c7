"""Explains why Hydra does not compose: the YAML file or the key, what is wrong, and the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

from mlxchat.composition.overrides import Groups, known_keys, no_option
from mlxchat.config.replaced import find_replacement
from mlxchat.errors import suggest

_IN_FILE = re.compile(r"In '(.+?)': ")
_NO_OPTION = re.compile(r"Could not (?:find|load) '(?:.*/)?(\w+)/([^']+)'")
_NO_GROUP = re.compile(r"Could not (?:find|load|override|delete from config\.) '([\w./@]+)'")


def explain(error: Exception, folders: Sequence[Path], groups: Groups, schema: type) -> str:
    """Return what is wrong: with its file for the user's YAML files, with its key for an override.

    Args:
        error: Hydra's, OmegaConf's or YAML's.
        folders: the user's, in which YAML files are searched.
        groups: config group → options.
        schema: dataclass of the configuration.
    """
    if (mark := getattr(error, "problem_mark", None)) is not None:
        return f"{mark.name}:{mark.line + 1}: {error.problem}"  # type: ignore[attr-defined]  # YAML's
    text = str(error)
    named = _IN_FILE.match(text)
    files = [file for folder in folders if named and (file := folder / f"{named[1]}.yaml").is_file()]
    where = f"{files[0]}: " if files else ""
    if option := _NO_OPTION.search(text):
        if option[2] in groups.get(option[1], ()):
            return f"{where}another group is chosen with `override /{option[1]}: {option[2]}`"
        return where + no_option(option[1], option[2], groups)
    if unknown := _NO_GROUP.search(text):
        section, dot, _ = unknown[1].partition(".")
        known = [*groups, *get_type_hints(schema)]
        hint = f" mlxchat --cfg job -p {section} shows what is there" if dot else suggest(section, known)
        return f'{where}there is no "{unknown[1]}" to {"remove" if "delete" in text else "set"}.{hint}'
    if "Sweep parameters" in text or "Ambiguous value" in text:
        return f"{text.splitlines()[0]}: several values need a sweep; add -m"
    key = re.search(r"full_key: (\S+)", text)
    if key and files and "Key '" in text:
        if key[1].partition(".")[0] == files[0].parent.name and "@package" not in files[0].read_text("utf-8"):
            return f'{where}the first line must be "# @package _global_"; without it all keys are below "{key[1]}"'
        return f'{where}there is no "{key[1]}" to set.{find_replacement(key[1]) or suggest(key[1], known_keys(schema))}'
    if files:
        detail = next((line for line in text.splitlines()[1:] if line.strip()), text)
        return f"{where}{key[1]}: {detail}" if key else f"{where}{detail}"
    return first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)


def first_line(error: Exception) -> str:
    """Return the first line of a Hydra or OmegaConf error, with the key that it concerns."""
    lines = str(error).splitlines() or [type(error).__name__]
    key = re.search(r"full_key: (\S+)", str(error))
    return f"{key[1]}: {lines[0]}" if key and key[1] not in lines[0] else lines[0]
