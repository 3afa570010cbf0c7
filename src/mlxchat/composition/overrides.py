"""Translates overrides as people type them to Hydra's syntax."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from mlxchat.config.schema import Config

# Groups of the defaults list, where `+` would add a second entry.
_LISTED_GROUPS = (
    "pipeline", "model", "architecture", "optimizer", "corpus", "adapter", "rl", "preference", "suite", "core",
    "machine", "executor", "tracker", "sweep", "experiment",
)  # fmt: skip
# Several values (the jobs of a sweep); a comma inside quotation marks does not separate values.
_SWEEPS = re.compile(r"\w+\(|[^'\"]*,")


def as_hydra(overrides: list[str], schema: type[Config] = Config, *, imply: bool = True) -> list[str]:
    """Return overrides for Hydra; with `imply`, including the implied experiment.

    - `stage=sft` becomes `targets=[sft]`; `stage=all` the whole pipeline. `stage=preference` implies the pipeline that
      has such a step, unless a pipeline or an experiment is chosen.
    - `+experiment=smoke` becomes `experiment=smoke`.
    - One value for a list (`force=sft`) becomes a list of one.
    - A new key of a mapping that starts empty (`rl.rewards={…}`), and of a step's settings
      (`pipeline.sft.with.num_epochs=2`, `pipeline.sft.executor=slurm`), needs no `+`.
    - `+sft.mixture.mine={…}` becomes `+sft.mixture={mine: {…}}`: OmegaConf can merge a new task but not set it.
    """
    implied = implied_experiment(overrides) if imply else []
    chosen = {override.partition("=")[0] for override in overrides}
    if imply and "stage=preference" in overrides and not chosen & {"pipeline", "experiment"}:
        implied.append("pipeline=preference")
    return [*implied, *(_as_hydra(override, schema) for override in overrides)]


def implied_experiment(overrides: list[str]) -> list[str]:
    """Return the override `experiment=…` that overrides imply: nanochat's recipe if they choose a model, else nothing.

    Plain `mlxchat` runs the quickstart, whose sizes fit its own depth only. Choosing a model without an experiment
    therefore implies nanochat's recipe; with `corpus=bundled`, the variant that downloads nothing.
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
    if name == "stage":
        key, name, value = "targets", "targets", "null" if value == "all" else value
    if name in _LISTED_GROUPS and not value.startswith("{"):
        return f"{name}={value}"
    if _is_list(name, schema) and value and value not in ("null", "[]") and not re.match(r"[\[{$]", value):
        return f"{key}={value}" if _SWEEPS.match(value) else f"{key}=[{value}]"
    of_step = re.fullmatch(r"pipeline\.\w+\.(with|executor)(\.\w+)*", name)
    mapping = name if value.startswith("{") else name.rpartition(".")[0]
    if key == name and (of_step or _starts_empty(mapping, schema)):
        key = f"++{name}"
    elif key == name and (name == "rl.rewards" or name.startswith("rl.rewards.")) and value.startswith("{"):
        key = f"+{name}"
    tasks = r"^(\+{1,2}(?:[\w.]+\.)?(?:mixture|validation|suite|base_tasks|rewards))\.(\w+)=(\{.*\})$"
    return re.sub(tasks, r"\1={\2: \3}", f"{key}={value}")


def _is_list(key: str, schema: type[Config]) -> bool:
    """Return True if the schema declares a list, or a list or null, at a dotted key."""
    declared = type_of(key, schema)
    kinds = [kind for kind in (get_args(declared) or (declared,)) if kind is not type(None)]
    return get_origin(declared) is list or (len(kinds) == 1 and get_origin(kinds[0]) is list)


def _starts_empty(key: str, schema: type[Config]) -> bool:
    """Return True if the schema declares a mapping to plain values at a dotted key, such as sweep.space."""
    declared = type_of(key, schema)
    if get_origin(declared) is not dict or key.startswith("pipeline"):
        return False
    return not any(is_dataclass(kind) or get_origin(kind) is dict for kind in get_args(declared)[1:])


def type_of(key: str, schema: Any) -> Any:
    """Return the type that the schema declares at a dotted key; None if there is no such key."""
    for part in key.split("."):
        kinds = [kind for kind in (schema, *get_args(schema)) if is_dataclass(kind)]
        if schema is Any:
            return Any
        if get_origin(schema) is dict:
            schema = get_args(schema)[1]
        elif kinds:
            schema = get_type_hints(kinds[0]).get(part)
        else:
            return None
    return schema
