"""A summary of every artifact, for lists, lineage and garbage collection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxchat.errors import StoreError
from mlxchat.store.files import list_folder
from mlxchat.store.manifest import MANIFEST, Manifest, read_manifest
from mlxchat.store.store import Store

Summary = dict[str, Any]
"""folder, rid, key, stage, step, kind, version, published, seconds, bytes, files, tokens_per_second, metrics, inputs,
tree, run; for a damaged manifest only folder and `damaged`, the reason."""

_COPIED = ("rid", "key", "stage", "step", "kind", "version", "published", "seconds", "inputs", "metrics", "tree", "run")


def read_catalog(store: Store) -> list[Summary]:
    """Return the summary of every artifact, the newest last; damaged ones come first."""
    base = store.outputs / "store"
    summaries = [summarise(base / name) for name in list_folder(base) if (base / name / MANIFEST).exists()]
    return sorted(summaries, key=lambda summary: (str(summary.get("published", "")), summary["folder"]))


def summarise(folder: Path) -> Summary:
    """Return the summary of one artifact."""
    try:
        return short_form(folder.name, read_manifest(folder))
    except (StoreError, KeyError, TypeError) as error:
        return {"folder": folder.name, "damaged": str(error) or type(error).__name__}


def short_form(name: str, manifest: Manifest) -> Summary:
    """Return the summary of a manifest in the folder `name`."""
    return {
        "folder": name,
        **{key: manifest[key] if key in ("rid", "published") else manifest.get(key) for key in _COPIED},
        "inputs": manifest.get("inputs") or {},
        "metrics": manifest.get("metrics") or {},
        "tokens_per_second": manifest.get("tokens_per_second"),
        "bytes": sum(file["bytes"] for file in manifest.get("outputs", ())),
        "files": len(manifest.get("outputs", ())),
    }


def references(summary: Summary) -> list[str]:
    """Return the ids of an artifact's inputs, from its summary or its manifest."""
    return [made["rid"] for made in summary["inputs"].values() if made.get("rid")]


def by_rid(summaries: Iterable[Summary]) -> dict[str, Summary]:
    """Return id → summary of the artifacts that are not damaged."""
    return {summary["rid"]: summary for summary in summaries if "damaged" not in summary}


Node = dict[str, Any]
"""An artifact in a lineage: role, step, artifact, rid, published, here (whether it is in the store), and a list of
nodes, `inputs` or `uses`."""


def ancestors(rid: str, known: Mapping[str, Summary], role: str = "") -> Node:
    """Return the tree of an artifact's inputs with the artifact as root."""
    summary = known[rid]
    below = [
        ancestors(made["rid"], known, name) if made["rid"] in known else _gone(name, made)
        for name, made in summary["inputs"].items()
    ]
    return {**_node(summary, role), "inputs": below}


def descendants(rid: str, known: Mapping[str, Summary]) -> Node:
    """Return the tree of everything made from an artifact, in order of time, with the artifact as root."""
    users: dict[str, list[tuple[str, Summary]]] = {}
    for summary in known.values():
        for role, made in summary["inputs"].items():
            users.setdefault(made["rid"], []).append((role, summary))

    def grow(summary: Summary, role: str) -> Node:
        return {**_node(summary, role), "uses": [grow(user, name) for name, user in users.get(summary["rid"], [])]}

    return grow(known[rid], "")


def index(summaries: list[Summary]) -> dict[str, Summary]:
    """Return id → summary, without the shared artifacts of encoded text."""
    return by_rid(summary for summary in summaries if summary.get("kind") != "tokens")


def _node(summary: Summary, role: str) -> Node:
    return {
        "role": role, "step": summary["step"], "artifact": summary["folder"], "rid": summary["rid"],
        "published": summary["published"], "here": True,
    }  # fmt: skip


def _gone(role: str, made: Mapping[str, Any]) -> Node:
    known = {"role": role, "step": made.get("step"), "artifact": made.get("artifact"), "rid": made["rid"]}
    return {**known, "published": None, "here": False, "inputs": []}
