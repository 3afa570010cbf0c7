"""What an artifact's weights rest on: an adapter holds only what it adds to the weights of another artifact, its base.

The base is named in checkpoint.json by its id, which says what its contents are, so that an adapter is never computed
with other weights than it was trained on. It is also an input of the adapter, so that gc, export and import keep both
together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxchat.errors import DataError, StoreError
from mlxchat.store.manifest import read_manifest
from mlxchat.store.store import Store

ADAPTER_KEY = "adapter"
"""Of checkpoint.json: says that a folder holds an adapter, and what is known of it."""


def describe_base(folder: Path) -> dict[str, str]:
    """Return how an adapter names its base: the id of an artifact.

    Args:
        folder: the artifact, or a folder with its manifest.

    Raises:
        StoreError: it is no artifact.
    """
    return {"rid": read_manifest(folder)["rid"]}


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter instead of all of a model's weights."""
    try:
        return _adapter_of(folder) is not None
    except (OSError, ValueError, RecursionError):
        return False  # opening it raises


def find_chain(folder: Path) -> list[Path]:
    """Return a checkpoint's folder and those that its weights rest on, the nearest first; the last has all weights.

    Raises:
        DataError: a checkpoint.json cannot be read, or is not as adapters have it.
        StoreError: a base is not in the same store.
    """
    chain = [folder]
    while (base := _find_base(chain[-1])) is not None:
        if base.resolve() in [each.resolve() for each in chain]:
            raise DataError(f"{folder}: its adapters rest on each other, so there are no weights below them")
        chain.append(base)
    return chain


def folder_of_weights(folder: Path) -> Path:
    """Return the folder with all weights of a checkpoint: its own, or that of the model below adapters.

    If that model is missing, it is the folder itself: for descriptions only. To compute, use `find_chain`.
    """
    try:
        return find_chain(folder)[-1]
    except (DataError, StoreError):
        return folder


def bases_of(folders: Mapping[str, Path]) -> list[Path]:
    """Return what the weights of inputs (role → folder) rest on besides their own files, each once.

    Raises:
        DataError: see `find_chain`, as for StoreError.
    """
    found = [each for folder in folders.values() if is_adapter(folder) for each in find_chain(folder)[1:]]
    return list(dict.fromkeys(found))


def _find_base(folder: Path) -> Path | None:
    try:
        adapter = _adapter_of(folder)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder}: no readable checkpoint ({type(error).__name__}: {error})") from None
    if adapter is None:
        return None
    base = adapter.get("base")
    rid = base.get("rid") if isinstance(base, dict) else None
    if not isinstance(rid, str) or not rid:
        raise DataError(f"{folder}: checkpoint.json does not name the base of its adapter by rid")
    store = Store(folder.resolve().parent.parent)
    place = store.find(rid) if folder.resolve().parent.name == "store" else None
    if place is None:
        raise StoreError(
            f"{folder.name} is an adapter, and its base {rid[:16]} is not in the same store ({store.outputs}). "
            "mlxchat push ID PLACE carries both, and pull takes both in; or run again what made the base"
        )
    return place


def _adapter_of(folder: Path) -> dict[str, Any] | None:
    """Return what checkpoint.json says of an adapter, None if it is of a whole model or there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object.
    """
    facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    if not isinstance(facts, dict):
        raise ValueError("checkpoint.json holds no object")
    adapter = facts.get(ADAPTER_KEY)
    if adapter is not None and not isinstance(adapter, dict):
        raise ValueError("checkpoint.json: adapter is no object")
    return adapter
