"""mlxchat plan: what would run, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.commands.arguments import Parser
from mlxchat.runner.plan import PlannedStep
from mlxchat.visible import visible

if TYPE_CHECKING:
    from mlxchat.runner.estimates import Estimate

_EXIT_PENDING = 3
_PURPOSE = (
    "Show for each step whether it is done, would run, may run (maybe: an input will be rebuilt, and with the same "
    "bytes the step is done) or is being made by another process (waiting), and why; how long it took and how large "
    "it was the last time; and for trainings the memory that they are predicted to need. Nothing is computed."
)


def main(arguments: list[str]) -> int:
    """Print the plan for the settings; return 3 if --exit-code is given and something is not done."""
    parser = Parser(
        prog="mlxchat plan", description=_PURPOSE, allow_abbrev=False, usage="mlxchat plan [OPTIONS] [SETTINGS]"
    )
    parser.add_argument("--json", action="store_true", help="print it for programs, every changed key included")
    parser.add_argument("--exit-code", action="store_true", help=f"exit with {_EXIT_PENDING} if something is not done")
    options, rest = parser.parse_known_args(arguments)
    from mlxchat.commands.needs import describe_recipe, find_downloads
    from mlxchat.compose import compose_config, split_options
    from mlxchat.ops.machine import device_kind
    from mlxchat.pipeline_run import plan_of
    from mlxchat.planning.duration import estimate_pretraining
    from mlxchat.planning.memory import check_memory, describe_memory
    from mlxchat.planning.text import describe_text
    from mlxchat.runner.comparing import environment_drift
    from mlxchat.runner.estimates import estimate_steps
    from mlxchat.runner.externals import find_unknown
    from mlxchat.runner.plan_table import format_plan
    from mlxchat.runner.store import Store

    composed = compose_config(*split_options(rest))
    config, store = composed.config, Store(Path(composed.config.outputs))
    plan = plan_of(config, store)
    memory = describe_memory(config, plan)
    times = estimate_pretraining(config, plan, store)
    estimates = estimate_steps(plan, store) | times
    backend = device_kind(config.machine.device)
    drift = {
        step.name: environment_drift(manifest, backend)
        for step in plan
        if step.done and "gpu" in step.stage.resources and (manifest := store.read(step.rid)) is not None
    }
    if options.json:
        described = describe_plan(plan, estimates, memory, drift)
        print(visible(json.dumps(described, indent=1, ensure_ascii=False)), flush=True)
    else:
        remarks = dict(memory)
        forecast = {
            step.name: remark(getattr(config, step.stage.name, None))
            for step in plan
            if not step.done and (remark := getattr(step.stage.load_forecast(), "remark", None)) is not None
        }
        drifted = {
            name: f"computed with {', '.join(f'{key} {old}, now {new}' for key, (old, new) in changes.items())}"
            for name, changes in drift.items()
            if changes
        }
        unknown = {
            step.name: f"key not final: {', '.join(dict.fromkeys(found.values()))} is not known yet"
            for step in plan
            if (found := find_unknown(step.externals))
        }
        for further in (describe_text(config, plan, store), forecast, drifted, unknown):
            for name, text in further.items():
                remarks[name] = "; ".join(filter(None, (remarks.get(name), text)))
        for line in describe_recipe(composed, plan, find_downloads(config, plan, store), times):
            print(line)
        print(format_plan(plan, remarks, estimates), flush=True)
    check_memory(config, plan)
    return _EXIT_PENDING if options.exit_code and not all(step.done for step in plan) else 0


def describe_plan(
    plan: list[PlannedStep],
    estimates: Mapping[str, Estimate | None],
    memory: Mapping[str, str],
    drift: Mapping[str, Mapping[str, tuple[Any, Any]]],
) -> dict[str, Any]:
    """Return the plan as plain data: everything that differs from the nearest artifact, key by key."""
    planned = {step.name: step for step in plan}
    steps = []
    for step in plan:
        verdict, estimate = step.verdict, estimates.get(step.name)
        steps.append(
            {
                "step": step.name,
                "stage": step.stage.name,
                "state": step.state,
                "reason": step.reason,
                "rid": step.rid,
                "artifact": step.artifact,
                "forced": step.forced,
                "inputs": {
                    **{role: {"step": source, "rid": planned[source].rid} for role, source in step.inputs.items()},
                    **{role: {"step": None, "rid": made["rid"]} for role, made in step.artifacts.items()},
                },
                "shares": verdict.original["name"] if verdict.original else None,
                "difference": _describe_difference(step),
                "changed_code": verdict.drift,
                "changed_environment": {
                    key: {"old": old, "new": new} for key, (old, new) in drift.get(step.name, {}).items()
                },
                "estimate": asdict(estimate) if estimate else None,
                "memory": memory.get(step.name),
            }
        )
    return {
        "schema": 1,
        "pending": [step.name for step in plan if not step.done],
        "estimate": {
            "seconds": round(sum(estimate.seconds for estimate in estimates.values() if estimate), 3),
            "bytes": sum(estimate.bytes for estimate in estimates.values() if estimate),
            "unknown": [name for name, estimate in estimates.items() if estimate is None],
        },
        "steps": steps,
    }


def _describe_difference(step: PlannedStep) -> dict[str, Any] | None:
    difference = step.verdict.difference
    if difference is None or difference.nearest is None:
        return None
    return {
        "nearest": difference.nearest,
        "version": None if difference.version is None else dict(zip(("old", "new"), difference.version, strict=True)),
        "config": {key: {"old": old, "new": new} for key, (old, new) in difference.config.items()},
        "inputs": difference.inputs,
        "externals": {key: {"old": old, "new": new} for key, (old, new) in difference.externals.items()},
    }
