"""mlxchat plan: what would run, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlxchat.commands.arguments import split_config_dirs
from mlxchat.runner.plan import PlannedStep


def main(arguments: list[str]) -> int:
    """Print the plan for the settings; nothing is written."""
    if "--help" in arguments or "-h" in arguments:
        print(
            "usage: mlxchat plan [SETTINGS]\n\nShow for each step whether it is done or would run, and why; for "
            "trainings also the\nmemory that they are predicted to need, with so many tokens at a time."
        )
        return 0
    from mlxchat.commands.run import plan_of
    from mlxchat.compose import compose_config
    from mlxchat.runner.store import Store
    from mlxchat.training.memory_check import check_memory, describe_memory

    overrides, config_dirs = split_config_dirs(arguments)
    config = compose_config(overrides, config_dirs).config
    plan = plan_of(config, Store(Path(config.outputs)))
    print(format_plan(plan, describe_memory(config, plan)), flush=True)
    check_memory(config, plan)
    return 0


def format_plan(plan: list[PlannedStep], remarks: Mapping[str, str] | None = None) -> str:
    """Return a line per step: state, artifact, reason, and a remark on steps that have one."""
    width = max(len(step.name) for step in plan)
    names = max(len(step.artifact) for step in plan)
    lines = []
    for step in plan:
        line = f"{step.name:<{width}}  {step.state:<4}  {step.artifact:<{names}}  {step.reason}".rstrip()
        remark = (remarks or {}).get(step.name)
        lines.append(f"{line} ({remark})" if remark else line)
    to_run = sum(not step.done for step in plan)
    return "\n".join([*lines, f"{len(plan)} steps: {len(plan) - to_run} done, {to_run} to run"])
