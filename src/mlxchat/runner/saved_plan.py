"""A plan in a file: what was shown is what `mlxchat run --plan FILE` runs, or it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError
from mlxchat.runner.code_digest import changed_modules
from mlxchat.runner.fingerprint import canonical_json
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.sealed import seal, unseal, write_whole

KIND = "mlxchat plan"
_FORMAT = 1
_KEYS = {"config": dict, "overrides": list, "choices": dict, "targets": list, "force": list, "steps": list}


def save_plan(path: Path, plan: list[PlannedStep], *, config: Any, overrides: list[str], choices: Any) -> None:
    """Write a plan with everything that it follows from, whole or not at all.

    Args:
        path: the file.
        plan: the steps.
        config: the whole configuration as plain data.
        overrides: what the command line changed.
        choices: group → chosen option.

    Raises:
        ConfigError: the file cannot be written.
    """
    record = {
        "kind": KIND,
        "format": _FORMAT,
        "config": config,
        "overrides": overrides,
        "choices": choices,
        "targets": [step.name for step in plan],
        "force": [step.name for step in plan if step.forced],
        "steps": [
            {"step": step.name, "rid": step.rid, "state": step.state, "reason": step.reason, "code": step.code}
            for step in plan
        ],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, seal(record))
    except OSError as error:
        raise ConfigError(f"--save: {path} cannot be written ({error.strerror})") from None


def load_plan(path: Path) -> dict[str, Any]:
    """Return a saved plan's record.

    Raises:
        ConfigError: it cannot be read, is no plan, or is not as it was saved.
    """
    remedy = "Save it anew: mlxchat plan --save FILE"
    try:
        record, sealed = unseal(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--plan: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"--plan: {path} is damaged or was altered ({error}). {remedy}") from None
    if record.get("kind") != KIND:
        raise ConfigError(f"--plan: {path} is no saved plan. {remedy}")
    whole = all(isinstance(record.get(key), kind) for key, kind in _KEYS.items())
    if not sealed or record.get("format") != _FORMAT or not whole:
        raise ConfigError(f"--plan: {path} is damaged, was altered, or is from another version of mlxchat. {remedy}")
    return record


def check_saved(record: dict[str, Any], plan: list[PlannedStep], *, strict: bool) -> list[str]:
    """Return remarks on what is otherwise than when the plan was saved, and harmless.

    Args:
        record: the saved plan.
        plan: the plan as it is now made from the same configuration.
        strict: whether changed code counts.

    Raises:
        ConfigError: naming everything that would run differently, or run although it was done.
    """
    saved = {entry["step"]: entry for entry in record["steps"]}
    problems, remarks = [], []
    if [step.name for step in plan] != record["targets"]:
        problems.append(
            f"its steps were {', '.join(record['targets'])}; now they are {', '.join(s.name for s in plan)}"
        )
    for step in plan:
        entry = saved.get(step.name)
        if entry is None:
            continue
        if entry["rid"] != step.rid:
            problems.append(f"{step.name} would make {step.artifact}, another artifact than planned")
        elif entry["state"] == "done" and not step.done:
            problems.append(f"{step.name} was done, and would run now ({step.reason})")
        elif entry["state"] != "done" and step.done:
            remarks.append(f"{step.name} has been done since")
        elif not step.done and canonical_json(entry["code"]) != canonical_json(step.code):
            changed = changed_modules(entry["code"].get("modules", {}), step.code.get("modules", {}))
            line = f"the code of {step.name} changed: {', '.join(changed) or 'its stage'}"
            (problems if strict else remarks).append(line)
    if problems:
        raise ConfigError("\n".join(["the plan no longer holds; make it anew:", *problems]))
    return remarks
