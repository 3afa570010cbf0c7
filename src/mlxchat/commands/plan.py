"""mlxchat plan: what would run, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.commands.arguments import Parser
from mlxchat.errors import ConfigError, visible
from mlxchat.runner.plan import PlannedStep

if TYPE_CHECKING:
    from mlxchat.runner.estimates import Estimate

_EXIT_PENDING = 3
_PURPOSE = (
    "Show for each step whether it is done, would run, may run (maybe: an input will be rebuilt, and with the same "
    "bytes the step is done) or is being made by another process (waiting), and why; how long it took and how large "
    "it was the last time; and for trainings the memory that they are predicted to need. With -m: the jobs of a sweep, "
    "shared steps once. Nothing is computed."
)


def main(arguments: list[str]) -> int:
    """Print the plan for the settings; return 3 if --exit-code is given and something is not done."""
    parser = Parser(
        prog="mlxchat plan", description=_PURPOSE, allow_abbrev=False, usage="mlxchat plan [OPTIONS] [SETTINGS]"
    )
    parser.add_argument("--json", action="store_true", help="print it for programs, every changed key included")
    parser.add_argument("--exit-code", action="store_true", help=f"exit with {_EXIT_PENDING} if something is not done")
    options, rest = parser.parse_known_args(arguments)
    if {"-m", "--multirun"} & set(rest):
        return _plan_sweep(rest, as_json=options.json, exit_code=options.exit_code)
    from mlxchat.commands.needs import describe_recipe, find_downloads
    from mlxchat.composition.compose import compose_config, split_options
    from mlxchat.ops.machine import device_kind
    from mlxchat.planning.duration import estimate_pretraining
    from mlxchat.planning.memory import check_memory, describe_memory
    from mlxchat.planning.text import describe_text
    from mlxchat.runner.estimates import estimate_steps
    from mlxchat.runner.externals import find_unknown
    from mlxchat.runner.plan_table import format_plan
    from mlxchat.store.comparing import environment_drift
    from mlxchat.store.leftovers import remark_old
    from mlxchat.store.store import Store
    from mlxchat.sweep.job import plan_of

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
        if step.done and "gpu" in step.stage.resources and (manifest := store.made(step.key)) is not None
    }
    if options.json:
        described = describe_plan(plan, estimates, memory, drift)
        print(visible(json.dumps(described, indent=1, ensure_ascii=False)), flush=True)
    else:
        remarks = dict(memory)
        forecast = {
            step.name: remark(getattr(step.config, step.stage.name, None))
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
        if (old := remark_old(store)) is not None:
            print(visible(old))
        for line in describe_recipe(composed, plan, find_downloads(config, plan, store), times):
            print(line)
        print(format_plan(plan, remarks, estimates), flush=True)
    check_memory(config, plan)
    return _EXIT_PENDING if options.exit_code and not all(step.done for step in plan) else 0


def _plan_sweep(arguments: list[str], *, as_json: bool, exit_code: bool) -> int:
    """Print what a sweep would do and take, each step once however many jobs need it."""
    from mlxchat.config.wording import format_bytes, format_seconds, plural
    from mlxchat.planning.duration import estimate_pretraining
    from mlxchat.planning.memory import describe_memory
    from mlxchat.runner.estimates import estimate_steps
    from mlxchat.sweep.sweeper import read_sweep

    sweep = read_sweep(arguments)
    if sweep.hydra.sweeper != "basic":
        raise ConfigError(f"hydra/sweeper={sweep.hydra.sweeper} chooses its jobs while it runs: nothing to plan")
    jobs, shared = sweep.jobs, sweep.shared
    estimates: dict[str, Estimate | None] = {}
    memory: dict[str, str] = {}
    for job in jobs:
        config, by_name = job.composed.config, {step.name: step.key for step in job.plan}
        found = estimate_steps(job.plan, job.store) | estimate_pretraining(config, job.plan, job.store)
        estimates |= {by_name[name]: estimate for name, estimate in found.items()}
        memory |= {by_name[name]: text for name, text in describe_memory(config, job.plan).items()}
    known = [estimate for estimate in estimates.values() if estimate is not None]
    seconds, size = sum(each.seconds for each in known), sum(each.bytes for each in known)
    steps = {step.key: step for job in jobs for step in job.plan}
    pending = [step for step in steps.values() if not step.done]
    code = _EXIT_PENDING if exit_code and pending else 0
    of_several = {step.key for _, group in shared for step in group}

    def described(step: PlannedStep) -> dict[str, Any]:
        estimate = estimates.get(step.key)
        return {
            "step": step.name, "state": step.state, "reason": step.reason, "key": step.key,
            "estimate": asdict(estimate) if estimate else None, "memory": memory.get(step.key),
        }  # fmt: skip

    if as_json:
        record = {
            "schema": 1,
            "shared": [described(step) for _, group in shared for step in group],
            "jobs": [
                {"job": job.number, "overrides": job.overrides, "title": job.title, "done": job.is_finished,
                 "steps": [{**described(step), "shared": step.key in of_several} for step in job.plan]}
                for job in jobs
            ],
            "estimate": {"seconds": round(seconds, 3), "bytes": size, "unknown": len(pending) - len(known)},
        }  # fmt: skip
        print(visible(json.dumps(record, indent=1, ensure_ascii=False)), flush=True)
        return code
    width = max(len(step.name) for step in steps.values())

    def lines(group: list[PlannedStep]) -> Iterator[str]:
        for step in group:
            notes = [memory.get(step.key), str(estimates[step.key] or "no estimate") if step.key in estimates else None]
            note = "; ".join(filter(None, notes))
            yield f"  {step.name:<{width}}  {step.state:<5}  {step.reason}".rstrip() + (f" ({note})" if note else "")

    for _, group in shared:
        users = sum(any(step.key == group[0].key for step in job.plan) for job in jobs)
        print(f"shared by {users} jobs", *lines(group), sep="\n")
    for job in jobs:
        own = [step for step in job.plan if not step.done and step.key not in of_several]
        state = "" if own else " is done" if job.is_finished else " only needs what is shared"
        print(visible(f"job {job.number}/{len(jobs)} {job.title}{state}"), *lines(own), sep="\n")
    unknown = len(pending) - len(known)
    cost = f"; together ~{format_seconds(seconds)}, {format_bytes(size)}" if known else ""
    cost += f" and {unknown} without an estimate" if known and unknown else ""
    done = len(steps) - len(pending)
    print(f"{plural(len(jobs), 'job')}, {plural(len(steps), 'step')}: {done} done, {len(pending)} to run{cost}")
    return code


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
                "key": step.key,
                "rid": step.rid or None,
                "artifact": step.artifact or None,
                "forced": step.forced,
                "inputs": {
                    **{role: {"step": source, "key": planned[source].key} for role, source in step.inputs.items()},
                    **{role: {"step": None, "rid": made["rid"]} for role, made in step.artifacts.items()},
                },
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
