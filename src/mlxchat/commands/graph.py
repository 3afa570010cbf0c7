"""mlxchat graph: the pipeline as text or as Mermaid."""

from __future__ import annotations

from pathlib import Path

from mlxchat.commands.arguments import Parser, split_config_dirs
from mlxchat.runner.plan import PlannedStep


def main(arguments: list[str]) -> int:
    """Print the graph of the pipeline, with each step's state."""
    parser = Parser(prog="mlxchat graph", description="Draw the pipeline with each step's state.", allow_abbrev=False)
    parser.add_argument("--format", choices=("ascii", "mermaid"), default="ascii")
    options, rest = parser.parse_known_args(arguments)
    from mlxchat.commands.run import plan_of
    from mlxchat.compose import compose_config
    from mlxchat.runner.store import Store

    overrides, config_dirs = split_config_dirs(rest)
    config = compose_config(overrides, config_dirs).config
    plan = plan_of(config, Store(Path(config.outputs)))
    print(draw_mermaid(plan) if options.format == "mermaid" else draw_tree(plan))
    return 0


def draw_mermaid(plan: list[PlannedStep]) -> str:
    """Return a Mermaid flowchart, finished steps filled."""
    lines = ["flowchart LR"]
    for step in plan:
        lines.append(f"  {step.name}[{step.name}]{':::done' if step.done else ''}")
        lines += [f"  {source} --> {step.name}" for source in dict.fromkeys(step.inputs.values())]
    return "\n".join([*lines, "  classDef done fill:#cde8d5,stroke:#2e7d4f"])


def draw_tree(plan: list[PlannedStep]) -> str:
    """Return the steps as a tree: each hangs on the input that is made last; further inputs are named beside it."""
    position = {step.name: index for index, step in enumerate(plan)}
    parent = {step.name: max(step.inputs.values(), key=lambda source: position[source]) for step in plan if step.inputs}
    lines: list[str] = []

    def draw(step: PlannedStep, before: str, last: bool) -> None:
        others = [source for source in dict.fromkeys(step.inputs.values()) if source != parent.get(step.name)]
        beside = f"  (and {', '.join(others)})" if others else ""
        branch = "" if step.name not in parent else ("└─ " if last else "├─ ")
        lines.append(f"{before}{branch}{step.name} [{step.state}]{beside}")
        below = before if step.name not in parent else before + ("   " if last else "│  ")
        children = [child for child in plan if parent.get(child.name) == step.name]
        for child in children:
            draw(child, below, child is children[-1])

    for step in plan:
        if step.name not in parent:
            draw(step, "", True)
    return "\n".join(lines)
