"""The wiring of a pipeline: which step feeds which, checked, and in which order they are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlxchat.errors import ConfigError, suggest
from mlxchat.runner.stage import Stage

Pipeline = Mapping[str, Mapping[str, Any]]
"""Step → {stage, role: what fills it, with: settings of this step alone}."""
GIVEN = ("import:", "artifact:")
"""A role may be filled by a model of the store instead of by a step: import:NAME is one that was imported under this
name, artifact:NAME any, by whatever name `mlxchat show` takes."""
GIVEN_KIND = "checkpoint"


def roles_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return role → what fills it."""
    return {role: str(source) for role, source in entry.items() if role not in ("stage", "with")}


def steps_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return role → step of the roles that steps fill."""
    return {role: source for role, source in roles_of(entry).items() if not source.startswith(GIVEN)}


def given_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return role → import:NAME or artifact:NAME of the roles that models of the store fill."""
    return {role: source for role, source in roles_of(entry).items() if source.startswith(GIVEN)}


def order_steps(pipeline: Pipeline, targets: Iterable[str] | None, stages: Mapping[str, Stage]) -> list[str]:
    """Return the names of the steps that the targets need, inputs first.

    Args:
        pipeline: see `Pipeline`.
        targets: steps, or stages (all steps of that stage); None: every step.
        stages: all that there are.

    Raises:
        ConfigError: naming every unknown stage, role, step or target, every unfilled role, every kind that does not
            fit, or a cycle.
    """
    problems = _check_wiring(pipeline, stages)
    wanted: list[str] = []
    for target in targets if targets is not None else pipeline:
        if target in pipeline:
            wanted.append(target)
        elif target in stages:
            of_stage = [step for step, entry in pipeline.items() if entry.get("stage") == target]
            wanted += of_stage
            if not of_stage:
                problems.append(f'stage "{target}": the pipeline has no step of this stage')
        else:
            problems.append(f'"{target}" is no stage and no step: {", ".join(pipeline)}.{suggest(target, pipeline)}')
    if problems:
        raise ConfigError("\n".join(problems))
    order: list[str] = []
    trail: list[str] = []

    def visit(step: str) -> None:
        if step in order:
            return
        if step in trail:
            raise ConfigError(f"pipeline has a cycle: {' → '.join([*trail[trail.index(step) :], step])}")
        trail.append(step)
        for source in steps_of(pipeline[step]).values():
            visit(source)
        trail.pop()
        order.append(step)

    for step in wanted:
        visit(step)
    return [step for step in pipeline if step in order] if _is_sorted(pipeline, order) else order


def _check_wiring(pipeline: Pipeline, stages: Mapping[str, Stage]) -> list[str]:
    problems = []
    for step, entry in pipeline.items():
        name = entry.get("stage", "")
        if name not in stages:
            known = ", ".join(stages)
            hint = suggest(name, stages)
            problems.append(f'pipeline.{step}.stage is "{name}", which is no stage: {known}.{hint}')
            continue
        stage = stages[name]
        for role in stage.inputs.keys() - entry.keys():
            problems.append(f"pipeline.{step}.{role} is missing: stage {name} needs a {stage.inputs[role]}")
        for role, source in roles_of(entry).items():
            if role not in stage.roles:
                known = ", ".join(stage.roles) or "none"
                hint = suggest(role, stage.roles)
                problems.append(f'pipeline.{step}: "{role}" is no role of stage {name}: {known}.{hint}')
            elif source.startswith(GIVEN):
                if stage.roles[role] != GIVEN_KIND:
                    problems.append(
                        f"pipeline.{step}.{role} is {source}, a {GIVEN_KIND}; expected a {stage.roles[role]}"
                    )
            elif source not in pipeline:
                problems.append(
                    f'pipeline.{step}.{role} is "{source}", which is no step of this pipeline: '
                    f"{', '.join(pipeline)}.{_rewire(pipeline, step, role, str(source), stages)}"
                )
            elif pipeline[source].get("stage") in stages:
                kind = stages[pipeline[source]["stage"]].produces
                if kind != stage.roles[role]:
                    problems.append(f"pipeline.{step}.{role} is {source}, a {kind}; expected a {stage.roles[role]}")
    return problems


def _rewire(pipeline: Pipeline, step: str, role: str, source: str, stages: Mapping[str, Stage]) -> str:
    """Return what to do about a role whose step is not there: leave this step out, or name a fitting one."""
    kind = stages[pipeline[step]["stage"]].roles[role]
    fitting = [
        name
        for name, entry in pipeline.items()
        if entry.get("stage") in stages and stages[entry["stage"]].produces == kind
        and step not in (name, *_sources(pipeline, name))
    ]  # fmt: skip
    rewired = f", or rewire it: pipeline.{step}.{role}={fitting[-1]}" if fitting else ""
    return f"{suggest(source, fitting)} Leave {step} out with '~pipeline.{step}'{rewired}"


def _sources(pipeline: Pipeline, name: str) -> set[str]:
    """Return the steps that a step needs, directly or not; missing ones and cycles are passed over."""
    found: set[str] = set()
    queue = [name]
    while queue:
        for source in steps_of(pipeline.get(queue.pop(), {})).values():
            if source not in found:
                found.add(source)
                queue.append(source)
    return found


def _is_sorted(pipeline: Pipeline, steps: list[str]) -> bool:
    """Tell whether the pipeline's own order already puts inputs first: then it is the order that people know."""
    position = {step: index for index, step in enumerate(pipeline)}
    return all(position[source] < position[step] for step in steps for source in steps_of(pipeline[step]).values())
