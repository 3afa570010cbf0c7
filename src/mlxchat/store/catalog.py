"""A summary of every artifact, for lists, lineage and garbage collection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from mlxchat.errors import StoreError
from mlxchat.store.files import list_folder
from mlxchat.store.manifest import MANIFEST, read_manifest
from mlxchat.store.store import Store

Summary = dict[str, Any]
"""folder, rid, key, stage, step, kind, version, published, seconds, bytes, files, tokens_per_second, metrics, inputs,
tree, run; for a damaged manifest only folder and `damaged`, the reason."""

_COPIED = (
    "rid", "key", "stage", "step", "kind", "version", "published", "seconds", "inputs", "metrics", "tree", "run",
    "tokens_per_second",
)  # fmt: skip


def read_catalog(store: Store) -> list[Summary]:
    """Return the summary of every artifact, the newest last; damaged ones come first."""
    base = store.outputs / "store"
    summaries: list[Summary] = []
    for name in list_folder(base):
        if not (base / name / MANIFEST).exists():
            continue
        try:
            manifest = read_manifest(base / name)
        except StoreError as error:
            summaries.append({"folder": name, "damaged": str(error)})
            continue
        files = manifest.get("outputs", ())
        counted = {"folder": name, "bytes": sum(file["bytes"] for file in files), "files": len(files)}
        summaries.append(counted | {key: manifest.get(key) for key in _COPIED})
    return sorted(summaries, key=lambda summary: (str(summary.get("published", "")), summary["folder"]))


def references(summary: Summary) -> list[str]:
    """Return the ids of an artifact's inputs, from its summary or its manifest."""
    return [made["rid"] for made in summary["inputs"].values()]


def by_rid(summaries: Iterable[Summary]) -> dict[str, Summary]:
    """Return id → summary of the artifacts that are not damaged."""
    return {summary["rid"]: summary for summary in summaries if "damaged" not in summary}


Node = dict[str, Any]
"""An artifact in a lineage: role, step, artifact, rid, published, here (whether it is in the store), and a list of
nodes, `inputs` or `uses`."""


def lineage(rid: str, known: Mapping[str, Summary], below: Literal["inputs", "uses"]) -> Node:
    """Return the tree of what an artifact was made from, or of everything made from it, with the artifact as root."""
    users: dict[str, list[tuple[str, Summary]]] = {}
    for summary in known.values():
        for role, made in summary["inputs"].items():
            users.setdefault(made["rid"], []).append((role, summary))

    def grow(made: Mapping[str, Any], role: str) -> Node:
        summary = known.get(made["rid"])
        if summary is None:
            gone = {"role": role, "step": made.get("step"), "artifact": made.get("artifact"), "rid": made["rid"]}
            return {**gone, "published": None, "here": False, below: []}
        following = summary["inputs"].items() if below == "inputs" else users.get(summary["rid"], [])
        return {
            "role": role, "step": summary["step"], "artifact": summary["folder"], "rid": summary["rid"],
            "published": summary["published"], "here": True, below: [grow(each, name) for name, each in following],
        }  # fmt: skip

    return grow({"rid": rid}, "")
