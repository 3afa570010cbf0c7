"""Explains mistakes in overrides and YAML files: where, what is wrong, and the nearest valid names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from mlxchat.composition.compose import describe_options
from mlxchat.composition.overrides import type_of
from mlxchat.errors import suggest

Groups = Mapping[str, Sequence[str]]
"""Config group → options."""
# OmegaConf's message about a value of the wrong type, and our names for the types.
_WRONG_TYPE = re.compile(
    r"Value '(?P<value>.*)' (?:of type '\w+' could not be converted to |is not a valid )(?P<type>\w+)"
    r"|field '.*' is not Optional"
    r"|(?:Merge error|Invalid type assigned): \w+ is not a subclass of (?P<section>\w+)\. value: (?P<given>.*)"
)
_TYPES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "Boolean": "true or false"}
_IN_FILE = re.compile(
    r"In '(?P<file>.+?)': (?:Could not (?:find|load) '(?P<option>.+?)'|Could not override '(?P<group>.+?)'"
    r"|\w+ raised while composing config:$)"
)
_NO_OPTION = re.compile(r"Could not (?:find|load) '(?:.*/)?(\w+)/([^']+)'")
_SYNTAX = "Write `key: value` lines, indented by spaces, and close brackets and quotation marks"
_NO_MAPPING = (
    "expected keys with values, such as `seed: 1` in an experiment or `mine: {task: jsonl, path: mine.jsonl}` in a "
    "mixture"
)


def find_mistakes(overrides: Sequence[str], groups: Groups, schema: type, refused: str = "") -> Iterator[str]:
    """Yield a line for each override that is none, or whose key does not exist.

    A word without dots may be a group of an installed package: it is wrong only if `refused`, Hydra's error, names it.
    """
    parser = OverridesParser.create()
    for override in overrides:
        try:
            parsed = parser.parse_override(override)
        except HydraException:
            parsed = None
        if parsed is None or not parsed.key_or_group:
            yield f'"{override}" is not an override: expected key=value (quote special characters in the shell)'
            continue
        key = parsed.key_or_group
        if parsed.is_sweep_override():
            yield f"{override}: several values need a sweep; add -m"
        elif key in groups and isinstance(parsed.value(), int):  # Hydra's error does not name the group
            yield _no_option(key, str(parsed.value()), groups)
        elif key.partition("@")[0] in groups or key == "stage" or key.startswith("hydra."):
            continue
        elif ("." in key or f"'{key}'" in refused) and type_of(key, schema) is None:
            known = ["stage", *groups, *_known_keys(schema)]
            yield f'there is no "{key}" to {"remove" if parsed.is_delete() else "set"}.{suggest(key, known)}'


def explain(error: Exception, folders: Sequence[Path], groups: Groups, schema: type, present: Callable[[], Any]) -> str:
    """Return what is wrong, if Hydra does not compose: FILE:LINE for a YAML file, the key for an override.

    Args:
        error: Hydra's, OmegaConf's or YAML's.
        folders: in which YAML files are searched, in this order.
        groups: config group → options.
        schema: dataclass of the configuration.
        present: returns the keys of the configuration without overrides.
    """
    if (mark := getattr(error, "problem_mark", None)) is not None:
        return f"{_shown(Path(mark.name), mark.line + 1)}: {error.problem}\n{_SYNTAX}"  # type: ignore[attr-defined]  # YAML's
    named = _IN_FILE.match(str(error).partition("\n")[0])
    files = [path for folder in folders if named and (path := folder / f"{named['file']}.yaml").is_file()]
    if named is not None and files:
        return _explain_file(error, named, files[0], folders, groups, schema)
    if option := _NO_OPTION.search(str(error)):
        return _no_option(option[1], option[2], groups)
    if missing := re.match(r"Could not (override|delete from config\.) '([\w.]+)'", str(error)):
        verb = "set" if missing[1] == "override" else "remove"
        return f'there is no "{missing[2]}" to {verb}; + adds a key.{suggest(missing[2], present())}'
    return first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)


def _explain_file(
    error: Exception, named: re.Match[str], file: Path, folders: Sequence[Path], groups: Groups, schema: type
) -> str:
    text, (_, *rest) = file.read_text("utf-8"), str(error).splitlines()
    if option := named["option"] or named["group"]:
        others = (each for folder in reversed(folders) for each in sorted(folder.rglob("*.yaml")))
        where = next((place for each in (file, *others) for place in _lines_with(option, each)), _shown(file))
        group, _, name = option.rpartition("/")
        if (last := group.rpartition("/")[2]) in groups and group not in groups:
            return f"{where}: another group is chosen with `override /{last}: {name}`"
        return f"{where}: {_no_option(group, name, groups)}"
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        return f"{_shown(file, root.start_mark.line + 1 if root else 1)}: {_NO_MAPPING}"
    key = next((line.partition(":")[2] for line in rest if "full_key:" in line), "").strip()
    if key and key == named["file"].partition("/")[0] and "@package" not in text:
        return f'{_shown(file)}: the first line must be "# @package _global_"; without it all keys are below "{key}"'
    if not key:  # Hydra does not name a section that is no mapping
        pairs = ((at.value, value) for at, value in root.value if is_dataclass(type_of(at.value, schema)))
        key = next((section for section, value in pairs if not isinstance(value, yaml.MappingNode)), "")
    where = _shown(file, _line_of(key.split("."), root))
    if rest[0].startswith("Key "):
        parent, _, last = key.rpartition(".")
        known = _fields_of(type_of(parent, schema) if parent else schema)
        hint = suggest(last, known) or f" Known: {', '.join(known)}"
        return f'{where}: there is no "{key}" to set.{hint}'
    return f"{where}: {first_line(Exception(f'{rest[0]}{chr(10)}full_key: {key}'))}"


def first_line(error: Exception) -> str:
    """Return the first line of a Hydra or OmegaConf error, with the key that it concerns."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    where = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key")), "")
    if where and (wrong := _WRONG_TYPE.match(lines[0])):
        expected = "keys with values" if wrong["section"] else _TYPES.get(wrong["type"], "a value")
        return f"{where} is {wrong['value'] or wrong['given'] or 'null'}, expected {expected}"
    return f"{where}: {lines[0]}" if where and where not in lines[0] else lines[0]


def _no_option(group: str, name: str, groups: Groups) -> str:
    """Return what is wrong with GROUP=NAME; if there is no such group, with naming it in a defaults list."""
    if group in groups:
        return f'{group} has no option "{name}": {describe_options([*groups[group]])}.{suggest(name, groups[group])}'
    unknown = group or name
    return f'there is no "{unknown}" to override.{suggest(unknown, groups)}'


def _shown(file: Path, line: int = 1) -> str:
    """Return FILE:LINE, relative to the working directory if the file is below it."""
    return f"{file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}:{line}"


def _lines_with(option: str, file: Path) -> Iterator[str]:
    """Yield FILE:LINE of the lines that name an option, or its last part, in a defaults list."""
    text = file.read_text("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines() if "defaults:" in text else (), start=1):
        if {option, option.rpartition("/")[2]} & set(re.split(r"[\s:,\[\]'\"]+", line.replace(" /", " "))):
            yield _shown(file, number)


def _line_of(keys: Sequence[str], root: Any) -> int:
    """Return the line of a dotted key, whose first parts may be the package of the file; 1 if it is not there."""
    for start in range(len(keys)):
        node, line = root, 1
        for key in keys[start:]:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            node, line = next(((value, at.start_mark.line + 1) for at, value in pairs if at.value == key), (None, 1))
        if node is not None:
            return line
    return 1


def _fields_of(declared: Any) -> list[str]:
    return [item.name for kind in (declared, *get_args(declared)) if is_dataclass(kind) for item in fields(kind)]


def _known_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of the schema."""
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        for kind in (hint, *get_args(hint)) if get_origin(hint) is not dict else ():
            if is_dataclass(kind):
                yield from _known_keys(kind, f"{prefix}{name}.")
