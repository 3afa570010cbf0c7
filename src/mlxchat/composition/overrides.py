"""Overrides as people type them: their translation to Hydra's syntax, mistakes in their keys, Hydra's errors."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mlxchat.config.replaced import find_replacement
from mlxchat.config.schema import MODELS, Config
from mlxchat.errors import ConfigError, suggest

Groups = Mapping[str, Sequence[str]]
"""Config group → options."""
# Several values (the jobs of a sweep); a comma inside quotation marks does not separate values.
_SWEEPS = re.compile(r"\w+\(|[^'\"]*,")
# What to give instead of Hydra's settings that have no effect here.
_REFUSED = {
    "hydra.run.": "a run's folder is OUTPUTS/runs/<time>-<name>: set outputs=PATH and name=NAME",
    "hydra/launcher": "executor=slurm, ray or submitit_local runs jobs elsewhere",
    "hydra": "has no effect on a run; sweep=tpe and sweep=halving search, -m KEY=A,B sweeps",
}


def as_hydra(overrides: list[str], schema: type[Config] = Config, *, imply: bool = True) -> list[str]:
    """Return overrides for Hydra; with `imply`, including the implied experiment.

    - `stage=sft` becomes `targets=[sft]`; `stage=all` the whole pipeline. `stage=preference` implies the pipeline that
      has such a step, unless a pipeline or an experiment is chosen.
    - One value for a list (`force=sft`) becomes a list of one.
    - Entries of mappings that start empty (`rl.rewards`, `pipeline.sft.with`) get Hydra's `++`.
    - `+sft.mixture.mine={…}` becomes `++sft.mixture={mine: {…}}`: OmegaConf can merge a new task but not set it.
    """
    implied = implied_experiment(overrides) if imply else []
    chosen = {override.partition("=")[0] for override in overrides}
    if imply and "stage=preference" in overrides and not chosen & {"pipeline", "experiment"}:
        implied.append("pipeline=preference")
    return [*implied, *(_as_hydra(override, schema) for override in overrides)]


def implied_experiment(overrides: list[str]) -> list[str]:
    """Return the override `experiment=…` that overrides imply: nanochat's recipe if they choose a model, else nothing.

    The sizes of the default, quickstart, fit its own depth only. With `corpus=bundled`: the variant without downloads.
    """
    chosen = dict(override.lstrip("+~").partition("=")[::2] for override in overrides)
    if "model" not in chosen or "experiment" in chosen:
        return []
    is_bundled = chosen.get("corpus", "").startswith("bundled")
    return ["experiment=nanochat_bundled" if is_bundled else "experiment=nanochat"]


def _as_hydra(override: str, schema: type[Config]) -> str:
    key, sign, value = override.partition("=")
    name = key.lstrip("+")
    if not sign or name.startswith("~"):
        return override
    if name == "experiment":  # Hydra's usual `+experiment=` would add a second one
        return f"{name}={value}"
    if name == "stage":
        name = key = "targets"
        value = "null" if value == "all" else value
    declared = type_of(name, schema)
    is_list = any(get_origin(kind) is list for kind in (declared, *get_args(declared)))  # maybe: a list or null
    if is_list and not re.match(r"null$|[\[{$]", value) and not _SWEEPS.match(value):
        value = f"[{value}]"
    section, _, last = name.rpartition(".")
    of_section = type_of(section, schema)
    of_tasks = get_origin(of_section) is dict and is_dataclass(get_args(of_section)[1]) and value.startswith("{")
    if of_tasks and (key != name or section == "rl.rewards"):
        return f"++{section}={{{last}: {value}}}"
    if section.partition(".")[0] == "pipeline":
        takes_new = re.match(r"pipeline\.\w+\.(with|executor)\b", name) is not None
    else:
        takes_new = get_origin(type_of(name if value.startswith("{") else section, schema)) is dict
    return f"++{name}={value}" if section and takes_new else f"{key}={value}"


def find_mistakes(overrides: Iterable[str], groups: Groups, schema: type) -> Iterator[str]:
    """Yield a line for each override whose key is in neither the schema nor a group, with the nearest name."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if gone := find_replacement(key):
            yield f'there is no "{key}".{gone}'
        elif key in groups and value.isdigit():  # Hydra's error does not name the group
            yield no_option(key, value, groups)
        elif "." not in key or key.startswith("hydra.") or key.partition("@")[0] in groups:
            continue  # a word without dots may be a group of an installed package; Hydra says whether it exists
        elif type_of(key, schema) is None:
            action = "remove" if override.startswith("~") else "set"
            yield f'there is no "{key}" to {action}.{suggest(key, known_keys(schema))}'


def no_option(group: str, name: str, groups: Groups) -> str:
    """Return what is wrong with GROUP=NAME."""
    known = [*groups.get(group, ())]
    return f'{group} has no option "{name}": {describe_options(known)}.{suggest(name, known)}'


def describe_options(options: list[str]) -> str:
    """Return the options of a group for a message; abbreviated for `model`."""
    return f"{options[0]} … {options[-1]}" if options == MODELS else ", ".join(options)


def refuse_hydras(overrides: list[str]) -> None:
    """Raise ConfigError if there are settings of Hydra that have no effect here; it names each, with the reason."""
    problems = []
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        reason = next((text for prefix, text in _REFUSED.items() if key.startswith(prefix)), None)
        if reason is not None and key != "hydra.searchpath":
            problems.append(f"{override}: {reason}")
    if problems:
        raise ConfigError("\n".join(problems))


def type_of(key: str, schema: Any) -> Any:
    """Return the type that the schema declares at a dotted key; None if there is no such key."""
    for part in key.split("."):
        if schema is Any:
            return Any
        if get_origin(schema) is dict:
            schema = get_args(schema)[1]
            continue
        section = next((kind for kind in (schema, *get_args(schema)) if is_dataclass(kind)), None)
        if section is None:
            return None
        schema = get_type_hints(section).get(part)
    return schema


def known_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of the schema; entries of mappings have none."""
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        for kind in (hint, *get_args(hint)) if get_origin(hint) is not dict else ():
            if is_dataclass(kind):
                yield from known_keys(kind, f"{prefix}{name}.")


_IN_FILE = re.compile(r"In '(.+?)': ")
_NO_OPTION = re.compile(r"Could not (?:find|load) '(?:.*/)?(\w+)/([^']+)'")
_NO_GROUP = re.compile(r"Could not (?:find|load|override|delete from config\.) '([\w./@]+)'")


def explain(error: Exception, folders: Sequence[Path], groups: Groups, schema: type) -> str:
    """Return what an error of Hydra, OmegaConf or YAML is about: the file of one of the user's folders, or the key."""
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
