"""Artifacts from and for other places: the inputs that belong to them, and their way into the store.

Incoming artifacts are copied to work/, hashed against their manifests and renamed into store/, inputs first, so that a
store never holds an artifact without its inputs.
"""

from __future__ import annotations

import sys
from datetime import datetime
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from mlxchat.errors import StoreError
from mlxchat.store import locks
from mlxchat.store.catalog import references
from mlxchat.store.crash import crash_point
from mlxchat.store.files import list_folder, sync
from mlxchat.store.manifest import SHARED_KIND, read_manifest
from mlxchat.store.store import Store
from mlxchat.store.verify import check_contents


def closure(store: Store, folders: list[Path], elsewhere: Store | None = None) -> list[Path]:
    """Return artifacts and all their inputs, inputs first.

    Args:
        store: holds them.
        folders: the artifacts.
        elsewhere: a store that may hold inputs that `store` lacks; these are omitted.

    Raises:
        StoreError: an input is missing, or (forged) manifests are inputs of each other.
    """
    inputs: dict[Path, list[Path]] = {}
    missing = []
    queue = list(folders)
    while queue:
        if (folder := queue.pop(0)) in inputs:
            continue
        inputs[folder] = []
        for rid in references(read_manifest(folder)):
            if (place := store.find(rid)) is not None:
                inputs[folder].append(place)
            elif elsewhere is None or elsewhere.find(rid) is None:
                where = (elsewhere or store).outputs
                missing.append(f"{folder.name} was made from {rid[:16]}, which is not in {where}")
        queue += inputs[folder]
    if missing:
        raise StoreError("\n".join(missing))
    try:
        return list(TopologicalSorter(inputs).static_order())
    except CycleError as error:
        names = ", ".join(folder.name for folder in error.args[1])
        raise StoreError(f"the manifests of these artifacts name each other as inputs: {names}") from None


def is_url(place: str) -> bool:
    """Return whether a place is a URL rather than a path."""
    scheme, mark, _ = place.partition("://")
    return bool(mark) and scheme.replace("+", "").isalnum()


def tell_waiting(owner: dict[str, Any]) -> None:
    """Print which process holds the lock of imports."""
    print(f"waiting for the import of {locks.name_process(owner)}", file=sys.stderr, flush=True)


def take_in(store: Store, incoming: Path) -> tuple[list[Path], list[Path]]:
    """Verify unpacked artifacts and rename them into the store; the caller holds `import.lock`.

    Args:
        store: the target.
        incoming: folder of the artifacts, on the store's file system; new ones are moved out of it.

    Returns:
        the new ones, and those that the store had.

    Raises:
        StoreError: one differs from its manifest or lacks an input; none was imported.
    """
    staged = Store(incoming.parent)
    folders = [incoming / name for name in list_folder(incoming)]
    if not folders:
        raise StoreError("it holds no artifacts: expected store/<artifact>/manifest.json or <artifact>/manifest.json")
    faults = [f"{folder.name}: {fault}" for folder in folders for fault in check_contents(folder)]
    if faults:
        raise StoreError("nothing was imported:\n" + "\n".join(faults))
    try:
        ordered = closure(staged, folders, elsewhere=store)
    except StoreError as error:
        raise StoreError(f"nothing was imported:\n{error}") from None
    crash_point("import.checked")
    new, known = [], []
    with locks.hold(store.outputs / "locks" / "gc.lock", {"step": "import"}):
        for folder in ordered:
            manifest = read_manifest(folder)
            rid = manifest["rid"]
            with locks.hold(store.lock(rid), {"step": "import"}):
                store.forget()
                store.learn(manifest)
                here = store.find(rid)
                if here is not None:
                    known.append(here)
                    continue
                place = store.outputs / "store" / folder.name
                folder.rename(place)
                sync(place.parent)
                crash_point("import.renamed")
                new.append(place)
        group = f"imported-{datetime.now():%Y%m%d-%H%M%S}"
        steps: dict[str, Path] = {}
        for place in [*new, *known] if new else []:
            manifest = read_manifest(place)
            if manifest.get("kind") != SHARED_KIND:  # gc keeps encoded text with its source
                step = str(manifest.get("step"))
                steps[place.name if step in steps else step] = place
        for step, place in steps.items():
            store.set_ref(group, step, place)
    store.forget()
    return new, known
