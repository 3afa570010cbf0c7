"""Explains why Hydra refused overrides, one by one, and suggests the nearest valid names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, cast, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ValidationError

from mlxchat.composition.compose import describe_options
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
)
_TYPES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "Boolean": "true or false"}


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
        return f"{where} is {wrong['value'] or 'null'}, expected {_TYPES.get(wrong['type'], 'a value')}"
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
