"""A summary of every artifact, for lists, lineage and garbage collection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

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


def ancestors(rid: str, known: Mapping[str, Summary]) -> Node:
    """Return the tree of an artifact's inputs with the artifact as root."""
    return _grow({"rid": rid}, "", known, "inputs", lambda summary: list(summary["inputs"].items()))


def descendants(rid: str, known: Mapping[str, Summary]) -> Node:
    """Return the tree of everything made from an artifact, in order of time, with the artifact as root."""
    users: dict[str, list[tuple[str, Summary]]] = {}
    for summary in known.values():
        for role, made in summary["inputs"].items():
            users.setdefault(made["rid"], []).append((role, summary))
    return _grow({"rid": rid}, "", known, "uses", lambda summary: users.get(summary["rid"], []))


def _grow(
    made: Mapping[str, Any], role: str, known: Mapping[str, Summary], below: str,
    following: Callable[[Summary], list[tuple[str, Any]]],
) -> Node:  # fmt: skip
    """Return the tree of the artifact `made`, of which at least the id is given."""
    summary = known.get(made["rid"])
    if summary is None:
        gone = {"role": role, "step": made.get("step"), "artifact": made.get("artifact"), "rid": made["rid"]}
        return {**gone, "published": None, "here": False, below: []}
    return {
        "role": role, "step": summary["step"], "artifact": summary["folder"], "rid": summary["rid"],
        "published": summary["published"], "here": True,
        below: [_grow(each, name, known, below, following) for name, each in following(summary)],
    }  # fmt: skip
