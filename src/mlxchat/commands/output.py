"""Output of verbs: JSON, values, times, trees."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from mlxchat.errors import visible

Node = TypeVar("Node")


def print_json(record: Any) -> None:
    """Print plain data as JSON."""
    print(visible(json.dumps(record, indent=1, ensure_ascii=False)))


def show_value(value: Any) -> str:
    """Return a value in YAML's notation, in one line."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def when(moment: str) -> str:
    """Return an ISO time to the minute."""
    return str(moment)[:16].replace("T", " ")


def draw_tree(root: Node, label: Callable[[Node], str], children: Callable[[Node], list[Node]]) -> str:
    """Return a tree as lines of text."""
    lines = [label(root)]
    below = children(root)
    for child in below:
        branch, further = ("└─ ", "   ") if child is below[-1] else ("├─ ", "│  ")
        first, *others = draw_tree(child, label, children).split("\n")
        lines += [branch + first, *(further + line for line in others)]
    return "\n".join(lines)
