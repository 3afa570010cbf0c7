"""Where an artifact came from, and what was made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxchat.store.catalog import Summary, by_rid

Node = dict[str, Any]
"""role, step, artifact, rid, here (whether it is in the store), and `inputs` or `uses`, a list of nodes."""


def ancestors(rid: str, known: Mapping[str, Summary], role: str = "") -> Node:
    """Return the tree of what an artifact was made from, itself at the root."""
    summary = known[rid]
    below = [
        ancestors(made["rid"], known, name) if made["rid"] in known else _gone(name, made)
        for name, made in summary["inputs"].items()
    ]
    return {**_node(summary, role), "inputs": below}


def descendants(rid: str, known: Mapping[str, Summary]) -> Node:
    """Return the tree of what was made from an artifact, itself at the root, in order of time."""
    users: dict[str, list[tuple[str, Summary]]] = {}
    for summary in known.values():
        for role, made in summary["inputs"].items():
            users.setdefault(made["rid"], []).append((role, summary))

    def grow(summary: Summary, role: str) -> Node:
        return {**_node(summary, role), "uses": [grow(user, name) for name, user in users.get(summary["rid"], [])]}

    return grow(known[rid], "")


def index(summaries: list[Summary]) -> dict[str, Summary]:
    """Return id → short form, without encoded text, which everything shares."""
    return by_rid(summary for summary in summaries if summary.get("kind") != "tokens")


def _node(summary: Summary, role: str) -> Node:
    return {
        "role": role, "step": summary["step"], "artifact": summary["folder"], "rid": summary["rid"],
        "published": summary["published"], "here": True,
    }  # fmt: skip


def _gone(role: str, made: Mapping[str, Any]) -> Node:
    known = {"role": role, "step": made.get("step"), "artifact": made.get("artifact"), "rid": made["rid"]}
    return {**known, "published": None, "here": False, "inputs": []}
