"""mlxchat graph: the pipeline as text, Mermaid, Graphviz or JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlxchat.commands.arguments import Parser
from mlxchat.composition.compose import compose_config, split_options
from mlxchat.errors import visible
from mlxchat.runner.plan import PlannedStep

_COLOURS = {"done": ("#cde8d5", "#2e7d4f"), "waiting": ("#fdecc8", "#9a6b00"), "maybe": ("#e3e7f7", "#4a5aa8")}


def main(arguments: list[str]) -> int:
    """Print the graph of the pipeline, with each step's state."""
    parser = Parser(prog="mlxchat graph", description="Draw the pipeline with each step's state.", allow_abbrev=False)
    parser.add_argument("--format", choices=tuple(_FORMATS), default="ascii")
    options, rest = parser.parse_known_args(arguments)
    from mlxchat.store.store import Store
    from mlxchat.sweep.job import plan_of

    config = compose_config(*split_options(rest)).config
    plan = plan_of(config, Store(Path(config.outputs)))
    print(visible(_FORMATS[options.format](plan)))
    return 0


def draw_mermaid(plan: list[PlannedStep]) -> str:
    """Return a Mermaid flowchart, steps that are done, waited for or perhaps not needed filled."""
    lines = ["flowchart LR"]
    for step in plan:
        lines.append(f"  {step.name}[{step.name}]{f':::{step.state}' if step.state in _COLOURS else ''}")
        lines += [f"  {source} --> {step.name}" for source in dict.fromkeys(step.inputs.values())]
    used = {step.state for step in plan}
    lines += [
        f"  classDef {state} fill:{fill},stroke:{line}"
        for state, (fill, line) in _COLOURS.items()
        if state in used or state == "done"
    ]
    return "\n".join(lines)


def draw_dot(plan: list[PlannedStep]) -> str:
    """Return a graph for Graphviz's `dot`."""
    lines = ["digraph pipeline {", "  rankdir=LR;", '  node [shape=box, style="rounded,filled", fillcolor=white];']
    for step in plan:
        fill = f', fillcolor="{_COLOURS[step.state][0]}"' if step.state in _COLOURS else ""
        lines.append(f'  "{step.name}" [label="{step.name}\\n{step.state}"{fill}];')
        lines += [f'  "{source}" -> "{step.name}" [label="{role}"];' for role, source in step.inputs.items()]
    return "\n".join([*lines, "}"])


def draw_json(plan: list[PlannedStep]) -> str:
    """Return the steps and their inputs for programs."""
    import json

    return json.dumps(
        [
            {
                "step": step.name, "stage": step.stage.name, "state": step.state, "reason": step.reason,
                "artifact": step.artifact, "key": step.key, "rid": step.rid, "inputs": step.inputs,
            }
            for step in plan
        ],
        indent=1, ensure_ascii=False,
    )  # fmt: skip


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


_FORMATS: dict[str, Callable[[list[PlannedStep]], str]] = {
    "ascii": draw_tree,
    "mermaid": draw_mermaid,
    "dot": draw_dot,
    "json": draw_json,
}
