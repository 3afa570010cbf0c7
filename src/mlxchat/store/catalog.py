"""A cached summary of every artifact, for lists, lineage and garbage collection.

`outputs/index/catalog.json` holds the summary of every manifest with its file's (size, mtime_ns, inode). A manifest
whose file differs is read again; a damaged catalog is rebuilt.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxchat.errors import StoreError
from mlxchat.store.files import read_cache, write_cache
from mlxchat.store.manifest import MANIFEST, Manifest, read_manifest
from mlxchat.store.store import Store

Summary = dict[str, Any]
"""folder, rid, key, stage, step, kind, version, published, seconds, bytes, files, tokens_per_second, metrics, inputs,
tree, run; for a damaged manifest only folder and `damaged`, the reason."""

_KIND = "catalog 2"
_COPIED = ("rid", "key", "stage", "step", "kind", "version", "published", "seconds", "inputs", "metrics", "tree", "run")


def read_catalog(store: Store, *, trusted: bool = True) -> list[Summary]:
    """Return the summary of every artifact, the newest last; damaged ones come first.

    Args:
        store: only its index is written.
        trusted: whether cached summaries of unchanged files may be used; False reads every manifest.
    """
    place = store.outputs / "index" / "catalog.json"
    known = read_cache(place, _KIND) if trusted else {}
    stamps = _stamps(store)
    kept: dict[str, list[Any]] = {}
    changed = len(known) != len(stamps)
    for name, stamp in stamps.items():
        entry = known.get(name)
        if entry is None or entry[0] != stamp:
            entry, changed = [stamp, summarise(store.outputs / "store" / name)], True
        kept[name] = entry
    if changed:
        write_cache(place, _KIND, kept)
    summaries = [summary for _, summary in kept.values()]
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


def _stamps(store: Store) -> dict[str, list[int]]:
    """Return folder → [size, mtime_ns, inode] of every manifest."""
    found: dict[str, list[int]] = {}
    base = f"{store.outputs}/store"
    with contextlib.suppress(OSError):
        for name in os.listdir(base):  # noqa: PTH208  (Path objects would double the time for 10,000 artifacts)
            with contextlib.suppress(OSError):
                status = os.stat(f"{base}/{name}/{MANIFEST}")  # noqa: PTH116  (speed)
                found[name] = [status.st_size, status.st_mtime_ns, status.st_ino]
    return found


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
