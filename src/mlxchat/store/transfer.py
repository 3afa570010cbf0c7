"""Artifacts from and for other places: the inputs that belong to them, and their way into the store."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from mlxchat.errors import StoreError
from mlxchat.store import locks
from mlxchat.store.catalog import references
from mlxchat.store.crash import crash_point
from mlxchat.store.files import list_folder, sync
from mlxchat.store.manifest import SHARED_KIND, read_manifest
from mlxchat.store.store import Store


def closure(store: Store, folders: Iterable[Path], elsewhere: Store | None = None) -> list[Path]:
    """Return artifacts and all their inputs, inputs first.

    Args:
        store: holds them.
        folders: the artifacts.
        elsewhere: a store that may hold inputs that `store` lacks; these are omitted.
    """
    seen: set[Path] = set()
    ordered: list[Path] = []

    def visit(folder: Path) -> None:
        if folder in seen:
            return
        seen.add(folder)
        for rid in references(read_manifest(folder)):
            if (place := store.find(rid)) is not None:
                visit(place)
            elif elsewhere is None or elsewhere.find(rid) is None:
                where = (elsewhere or store).outputs
                raise StoreError(f"{folder.name} was made from {rid[:16]}, which is not in {where}")
        ordered.append(folder)

    for folder in folders:
        visit(folder)
    return ordered


def take_in(store: Store, incoming: Path) -> tuple[list[Path], list[Path]]:
    """Rename verified artifacts into the store, inputs first; the caller holds `import.lock`.

    Args:
        store: the target.
        incoming: folder of the artifacts, on the store's file system; new ones are moved out of it.

    Returns:
        the new ones, and those that the store had.
    """
    ordered = closure(Store(incoming.parent), [incoming / name for name in list_folder(incoming)], elsewhere=store)
    crash_point("import.checked")
    new, known = [], []
    with locks.hold(store.outputs / "locks" / "publish.lock", {"step": "import"}):
        for folder in ordered:
            manifest = read_manifest(folder)
            store.forget()
            store.learn(manifest)
            if (here := store.find(manifest["rid"])) is not None:
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
        if manifest["kind"] != SHARED_KIND:  # gc keeps encoded text with its source
            steps[place.name if manifest["step"] in steps else manifest["step"]] = place
    for step, place in steps.items():
        store.set_ref(group, step, place)
    store.forget()
    return new, known
