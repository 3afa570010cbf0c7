"""Explains why Hydra refused a YAML file or overrides, and suggests the nearest valid names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ValidationError

from mlxchat.composition.compose import describe_options
from mlxchat.composition.overrides import type_of
from mlxchat.config.schema import MODELS
from mlxchat.config.verbs import VERBS
from mlxchat.errors import suggest
from mlxchat.store.fingerprint import flatten

# Keys below these are names that users choose.
_MAPPINGS = (
    "pipeline",
    "suite",
    "eval.base_tasks",
    "midtrain.mixture",
    "midtrain.validation",
    "sft.mixture",
    "sft.validation",
)
_HYDRAS_OWN = ("hydra",)
# OmegaConf's message about a value of the wrong type, and our names for the types.
_WRONG_TYPE = re.compile(
    r"Value '(?P<value>.*)' (?:of type '\w+' could not be converted to |is not a valid )(?P<type>\w+)"
    r"|field '.*' is not Optional"
    r"|(?:Merge error|Invalid type assigned): \w+ is not a subclass of (?P<section>\w+)\. value: (?P<given>.*)"
)
_TYPES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "Boolean": "true or false"}


def explain_file(
    error: Exception, folders: Sequence[Path], overrides: Sequence[str], groups: dict[str, list[str]], schema: type
) -> str | None:
    """Return FILE:LINE and what is wrong there, if `error` is about a YAML file; None if it is about an override.

    Args:
        error: raised while composing.
        folders: in which YAML files are searched, in this order.
        overrides: of the command line.
        groups: config group → options.
        schema: dataclass of the configuration.
    """
    if (mark := getattr(error, "problem_mark", None)) is not None:
        line = Path(mark.name).read_text("utf-8").splitlines()[mark.line : mark.line + 1]
        started = getattr(error, "context_mark", None)
        since = f" {error.context} that starts in line {started.line + 1}" if started else ""  # type: ignore[attr-defined]
        shown = f": {line[0].strip()}" if line else ""
        return f"{_shown(Path(mark.name), mark.line + 1)}: {error.problem}{since}{shown}\n{_SYNTAX}"  # type: ignore[attr-defined]
    files = [file for folder in reversed(folders) for file in sorted(folder.rglob("*.yaml"))]
    if isinstance(error, UnicodeDecodeError):  # does not name the file
        texts = ((file, file.read_text("utf-8", errors="replace").partition("\ufffd")) for file in files)
        file, before = next((file, text[0]) for file, text in texts if text[1])
        return f"{_shown(file, before.count(chr(10)) + 1)}: not UTF-8. Save the file as UTF-8"
    first, *rest = str(error).splitlines() or [""]
    named = _IN_FILE.match(first)
    found_files = [path for folder in folders if named and (path := folder / f"{named['file']}.yaml").is_file()]
    if named is None or not found_files:  # also a file of a package
        return None
    file = found_files[0]
    if option := named["option"] or named["group"]:
        found = next((place for each in [file, *files] for place in _lines_with(option, each)), None)
        if any(option in override for override in overrides) or found is None:
            return None
        return f"{found}: {_no_option(option, groups)}"
    text = file.read_text("utf-8")
    key = next((line.partition(":")[2] for line in rest if "full_key:" in line), "").strip()
    parent = key.rpartition(".")[0]
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        return f"{_shown(file, root.start_mark.line + 1 if root else 1)}: {_NO_MAPPING}"
    if key and key == named["file"].partition("/")[0] and "@package" not in text:
        return f'{_shown(file)}: the first line must be "# @package _global_"; without it all keys are below "{key}"'
    if not key:  # Hydra does not name a section that is no mapping
        pairs = ((at.value, value) for at, value in root.value if is_dataclass(type_of(at.value, schema)))
        key = next((section for section, value in pairs if not isinstance(value, yaml.MappingNode)), "")
    where = _shown(file, _line_of(key.split("."), root))
    if rest[0].startswith("Key "):
        declared = type_of(parent, schema) if parent else schema
        kinds = [kind for kind in (declared, *get_args(declared)) if is_dataclass(kind)]
        known = [item.name for kind in kinds for item in fields(kind)]
        hint = suggest(key.rpartition(".")[2], known) or f" Known: {', '.join(known)}"
        return f'{where}: there is no "{key}" to set.{hint}'
    return f"{where}: {first_line(Exception(f'{rest[0]}{chr(10)}full_key: {key}'))}"


_IN_FILE = re.compile(
    r"In '(?P<file>.+?)': (?:Could not (?:find|load) '(?P<option>.+?)'|Could not override '(?P<group>.+?)'"
    r"|\w+ raised while composing config:$)"
)
_SYNTAX = "Write `key: value` lines, indented by spaces, and close brackets and quotation marks"
_NO_MAPPING = (
    "expected keys with values, such as `seed: 1` in an experiment or `mine: {task: jsonl, path: mine.jsonl}` in a "
    "mixture"
)


def _shown(file: Path, line: int = 1) -> str:
    """Return FILE:LINE, relative to the working directory if the file is below it."""
    return f"{file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}:{line}"


def _lines_with(option: str, file: Path) -> Iterator[str]:
    """Yield FILE:LINE of the lines that name an option, or its last part, in a defaults list."""
    text = file.read_text("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines() if "defaults:" in text else (), start=1):
        if {option, option.rpartition("/")[2]} & set(re.split(r"[\s:,\[\]'\"]+", line.replace(" /", " "))):
            yield _shown(file, number)


def _no_option(option: str, groups: dict[str, list[str]]) -> str:
    """Return what is wrong with GROUP/NAME in a defaults list, or with GROUP, of which it overrides the choice."""
    group, _, name = option.rpartition("/")
    if group in groups:
        return f'{group} has no option "{name}": {describe_options(groups[group])}.{suggest(name, groups[group])}'
    if (last := group.rpartition("/")[2]) in groups:
        return f"another group is chosen with `override /{last}: {name}`"
    known = [
        *groups,
        *(f"mixture@{stage}.{part}" for stage in ("midtrain", "sft") for part in ("mixture", "validation")),
    ]
    return f'there is no "{option}" to override.{suggest(option, known)}'


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


def explain_override(
    override: str, error: Exception, groups: dict[str, list[str]], default: Callable[[], DictConfig], schema: type
) -> str:
    """Return one line that says why an override, as typed, does not compose; `error` is from composing it alone.

    `groups` is config group → options; `default` composes the configuration without overrides.
    """
    try:
        parsed = OverridesParser.create().parse_override(override)
        key = parsed.key_or_group
    except HydraException:
        key = ""
    if override.isidentifier():
        hint = suggest(override, VERBS)
        return f'"{override}" is neither a verb nor a setting. Verbs: {", ".join(VERBS)}. Settings: key=value.{hint}'
    if not key:
        return f'"{override}" is not an override: expected key=value (quote special characters in the shell)'
    group, value = key.split("@")[0], override.partition("=")[2]
    several = f"{override}: several values need a sweep; add -m"
    if group in groups and value not in groups[group] and "@" not in key:
        if parsed.is_sweep_override():
            return several
        hint = _nearest_model(value) if group == "model" else suggest(value, groups[group])
        return f'{key} has no option "{value}": {describe_options(groups[group])}.{hint}'
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, ValidationError):
        return first_line(cause)
    known = ["stage", *groups, *_known_keys(schema)]
    present = flatten(cast("dict[str, Any]", OmegaConf.to_container(default())))
    present = {**present, **{key.rpartition(".")[0]: None for key in present}}
    if not key.startswith(_HYDRAS_OWN) and not override.startswith("+"):
        hint = suggest(key, [*known, *present])
        if any(key.startswith(f"{mapping}.") for mapping in _MAPPINGS) and key not in present:
            adding = "" if override.startswith("~") else f"; +{override} adds it"
            return f'there is no "{key}" to {"remove" if override.startswith("~") else "set"}{adding}.{hint}'
        if group not in known and key not in present:
            return f'there is no "{key}" to set.{hint}'
    return several if parsed.is_sweep_override() else f"{override}: {first_line(cause)}"


def _nearest_model(value: str) -> str:
    """Return ' Did you mean "dN"?' for the depth in a misspelt model, limited to the depths that exist."""
    digits = re.search(r"\d+", value)
    depth = min(max(int(digits[0]), 1), len(MODELS)) if digits and len(digits[0]) < 9 else None
    return f' Did you mean "d{depth}"?' if depth else " Give a depth, for example model=d20."


def unknown_keys(composed: DictConfig) -> list[str]:
    """Return a line for every key of a composed configuration (added with +) that the schema lacks."""
    schema = OmegaConf.get_type(composed)
    return [f'there is no "{key}" to set.{suggest(key, _known_keys(schema))}' for key in _unknown(composed, schema)]


def first_line(error: Exception) -> str:
    """Return the first line of a Hydra or OmegaConf error, with the key that it concerns."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    where = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key")), "")
    if where and (wrong := _WRONG_TYPE.match(lines[0])):
        expected = "keys with values" if wrong["section"] else _TYPES.get(wrong["type"], "a value")
        return f"{where} is {wrong['value'] or wrong['given'] or 'null'}, expected {expected}"
    return f"{where}: {lines[0]}" if where and where not in lines[0] else lines[0]


def _unknown(node: Any, schema: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, ListConfig) or not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    names = [str(key) for key in node.keys()]  # noqa: SIM118  (iterating a DictConfig resolves its values)
    if get_origin(schema) is dict:
        for name in names:
            yield from _unknown(node._get_node(name), get_args(schema)[1], f"{prefix}{name}.")
        return
    kinds = [kind for kind in (schema, *get_args(schema)) if is_dataclass(kind)]
    if not kinds:
        return
    hints = get_type_hints(kinds[0])
    for name in names:
        if name in hints:
            yield from _unknown(node._get_node(name), hints[name], f"{prefix}{name}.")
        elif f"{prefix}{name}" not in _HYDRAS_OWN:
            yield f"{prefix}{name}"


def _known_keys(schema: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of the schema."""
    keys = []
    hints = get_type_hints(schema)
    for item in fields(schema):
        hint = hints[item.name]
        candidates = [hint, *get_args(hint)] if get_origin(hint) is not dict else []
        nested = next((kind for kind in candidates if is_dataclass(kind)), None)
        keys.append(f"{prefix}{item.name}")
        if nested is not None:
            keys += _known_keys(nested, f"{prefix}{item.name}.")
    return keys
