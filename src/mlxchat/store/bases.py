"""Base models of adapters: an adapter holds only its own weights; the others are in its base, another artifact.

checkpoint.json names the base by id, which covers its contents, so an adapter always runs on the weights that it was
trained on. The base is also an input of the adapter, so gc, export and import keep both together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxchat.errors import DataError, StoreError
from mlxchat.store.store import Store

ADAPTER_KEY = "adapter"
"""Key of checkpoint.json: present if the folder holds an adapter, with its description."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, not a full model; False if checkpoint.json cannot be read."""
    try:
        return _adapter_of(folder) is not None
    except DataError:
        return False


def find_chain(folder: Path) -> list[Path]:
    """Return a checkpoint's folder, then its base, the base's base and so on; the last has all weights."""
    chain = [folder]
    while (adapter := _adapter_of(chain[-1])) is not None:
        here, store = chain[-1].resolve(), Store(chain[-1].resolve().parent.parent)
        try:
            rid = str(adapter["base"]["rid"])
        except (KeyError, TypeError):
            raise DataError(f"{here}: checkpoint.json does not name the base of its adapter by rid") from None
        place = store.find(rid) if here.parent.name == "store" else None
        if place is None:
            raise StoreError(
                f"{here.name} is an adapter whose base {rid[:16]} is not in the same store ({store.outputs}). "
                "Copy both with mlxchat push ID PLACE and mlxchat pull, or run the command that made the base again"
            )
        chain.append(place)
    return chain


def folder_of_weights(folder: Path) -> Path:
    """Return the folder of a checkpoint's base model: the folder itself if it is not an adapter.

    If the base is missing, also the folder itself: use this for descriptions, `find_chain` to compute.
    """
    try:
        return find_chain(folder)[-1]
    except (DataError, StoreError):
        return folder


def bases_of(folders: Mapping[str, Path]) -> list[Path]:
    """Return all bases of the adapters among these inputs (role → folder), without duplicates."""
    found = [each for folder in folders.values() if is_adapter(folder) for each in find_chain(folder)[1:]]
    return list(dict.fromkeys(found))


def _adapter_of(folder: Path) -> dict[str, Any] | None:
    """Return the adapter's description in checkpoint.json; None for a full model."""
    try:
        facts: dict[str, Any] = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: checkpoint.json cannot be read ({type(error).__name__}: {error})") from None
    return facts.get(ADAPTER_KEY)
