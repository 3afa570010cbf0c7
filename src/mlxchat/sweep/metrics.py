"""Which numbers the steps of a plan record, and which direction of each is the better one.

Stages declare both in METRICS: `"core": "maximize if base and eval.core"`. {path} in a name stands for the keys of that
mapping of the configuration, or for 1 … n. A condition is a role of the step, which must be filled; base or chat, the
kind of model that the step evaluates; chatcore, a whole set of ChatCORE's tasks in the suite; or a path of the
configuration, alone (neither null, false nor empty), after "not", or before =VALUE.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlxchat.config import Config
from mlxchat.errors import ConfigError
from mlxchat.evals.chat_scores import chatcore_set
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.stage import FORMATS

_REMEDIES = {
    "eval.core": "core=nanochat computes it", "pretrain.core": "core=nanochat estimates it",
    "suite": "suite=bundled has tasks", "chatcore": "suite=chatcore has them",
}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A number that a step declares."""

    step: str
    name: str
    """STEP.METRIC."""
    direction: str
    """minimize, maximize or neither."""
    absent: str = ""
    """Why this configuration does not record it; empty: it does."""


def metrics_of_plan(plan: Sequence[PlannedStep], config: Config) -> list[Metric]:
    """Return all that the steps declare, in the order of the steps."""
    return [metric for step in plan for metric in _metrics_of_step(step, config)]


def find_metric(name: str, direction: str | None, plans: Sequence[tuple[Sequence[PlannedStep], Config]]) -> str:
    """Return the direction, minimize or maximize, of a metric that at least one of the plans records.

    Args:
        name: STEP.METRIC.
        direction: sweep.direction; None: the declared one.
        plans: with their configurations.

    Raises:
        ConfigError: no plan records it, with the names that there are; or it has no direction of its own.
    """
    declared = [metric for plan, config in plans for metric in metrics_of_plan(plan, config)]
    found = [metric for metric in declared if metric.name == name]
    recorded = [metric for metric in found if not metric.absent]
    if found and not recorded:
        raise ConfigError(f"sweep.metric={name} is not recorded here, since {found[0].absent}")
    if not found:
        plan, config = plans[0]
        raise ConfigError(_refusal(name, metrics_of_plan(plan, config), [step.name for step in plan]))
    chosen = direction or recorded[0].direction
    if chosen == "neither":
        raise ConfigError(
            f"sweep.metric={name}: neither small nor large values of it are better in themselves: "
            "give sweep.direction=minimize or sweep.direction=maximize"
        )
    return chosen


def _refusal(name: str, declared: list[Metric], steps: list[str]) -> str:
    """Return what is wrong with a name, the names that there are, and the nearest of them."""
    step, _, metric = name.rpartition(".")
    recorded = {
        one: [each.name.removeprefix(f"{one}.") for each in declared if each.step == one and not each.absent]
        for one in steps
    }
    if step in recorded:
        lines = [f'sweep.metric={name}: step {step} records no "{metric}": {", ".join(recorded[step]) or "nothing"}.']
    else:
        known = f'"{step}" is no step that runs' if step else "expected STEP.METRIC"
        lines = [f"sweep.metric={name}: {known}. What the steps record:"]
        lines += [f"  {one}: {', '.join(names)}" for one, names in recorded.items() if names]
    near = _nearest(name, declared)
    if near is not None:
        absent = f" It is not recorded here, since {near.absent}." if near.absent else ""
        lines.append(f'Did you mean "{near.name}"?{absent}')
    return "\n".join(lines)


def _nearest(name: str, declared: list[Metric]) -> Metric | None:
    """Return the metric that is most likely meant: one of the same step, of the same name, or spelt alike."""
    step, _, metric = name.rpartition(".")
    declared = sorted(declared, key=lambda one: bool(one.absent))
    candidates = [one for one in declared if one.step == step] or declared
    same = next((one for one in candidates if one.name == f"{one.step}.{metric}"), None)
    if same is not None:
        return same
    shown = {one.name.removeprefix(f"{step}."): one for one in candidates}
    close = difflib.get_close_matches(name.removeprefix(f"{step}."), shown, n=1, cutoff=0.5)
    return shown[close[0]] if close else None


def _metrics_of_step(step: PlannedStep, config: Config) -> Iterator[Metric]:
    for pattern, declared in step.stage.metrics.items():
        direction, _, conditions = declared.partition(" if ")
        reasons = (_unmet(condition, step, config) for condition in conditions.split(" and ") if condition)
        absent = next(filter(None, reasons), "")
        for name in _expand(pattern, config):
            yield Metric(step.name, f"{step.name}.{name}", direction, absent)


def _expand(pattern: str, config: Config) -> Iterator[str]:
    place = re.search(r"\{(.+)\}", pattern)
    if place is None:
        yield pattern
        return
    value = _value(place[1], config)
    for key in range(1, value + 1) if isinstance(value, int) else value or ():
        yield pattern.replace(place[0], str(key))


def _unmet(condition: str, step: PlannedStep, config: Config) -> str:
    """Return why a condition does not hold, or nothing."""
    if condition in step.stage.roles:
        filled = condition in step.inputs or condition in step.artifacts
        return "" if filled else f"pipeline.{step.name} has no {condition}"
    if condition in FORMATS:
        if step.format in (condition, None):
            return ""
        return f"{step.name} evaluates a {step.format} model, and this is of {condition} ones"
    if condition == "chatcore":
        tasks = {item.task for item in config.suite.values() if item.split == "test"}
        return "" if chatcore_set(tasks) else f"the suite lacks tasks of ChatCORE ({_REMEDIES[condition]})"
    is_negated = condition.startswith("not ")
    path, _, wanted = condition.removeprefix("not ").partition("=")
    value = _value(path, config)
    holds = str(value) == wanted if wanted else bool(value)
    if holds != is_negated:
        return ""
    if is_negated:
        return f"{path} is set"
    shown = "null" if value is None else "empty" if value in ({}, []) else value
    remedy = _REMEDIES.get(path) or (f"{path}={wanted} records it" if wanted else "")
    return f"{path} is {shown}" + (f" ({remedy})" if remedy else "")


def _value(path: str, config: Any) -> Any:
    for part in path.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    return config
