"""All artifacts of a store: bases of adapters, summaries, lineage, verification, artifacts from other places."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from mlxchat.errors import DataError, StoreError
from mlxchat.store import locks
from mlxchat.store.files import crash_point, list_folder, sync
from mlxchat.store.manifest import (
    CONTINUATION,
    MANIFEST,
    OBSERVATIONS,
    SHARED_KIND,
    check_manifest,
    find_damage,
    parse_manifest,
    read_manifest,
)
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
            text = f"{here.name} is an adapter whose base {rid[:16]} is not in the same store ({store.outputs}). "
            raise StoreError(f"{text}Copy both with mlxchat push and pull, or run the command that made the base again")
        chain.append(place)
    return chain


def folder_of_weights(folder: Path) -> Path:
    """Return the folder of a checkpoint's base model, for descriptions: the folder itself if it has, or lacks, none."""
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


_MOST_COMMANDS = 3

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


def closure(store: Store, folders: Iterable[Path], elsewhere: Store | None = None) -> list[Path]:
    """Return artifacts of a store and all their inputs, inputs first, without those that only `elsewhere` has."""
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
    """Rename verified artifacts into the store, inputs first; return the new ones, and those that the store had.

    `incoming` is their folder, on the store's file system. The caller holds `import.lock`.
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


def check_model(folder: Path) -> None:
    """Verify the files that a model and its bases are loaded from."""
    for each in find_chain(folder):
        manifest = read_manifest(each)
        read = [file for file in manifest["outputs"] if file["path"] not in OBSERVATIONS + CONTINUATION]
        if damage := list(find_damage(each, {**manifest, "outputs": read}, again=False)):
            command = shlex.join(["mlxchat", *manifest.get("overrides", ())])
            text = f"{each.name} is damaged: {'; '.join(damage[:5])}. Remove the folder and run again: {command}"
            raise StoreError(text)


def check_contents(folder: Path) -> Iterator[str]:
    """Yield a line for everything in an artifact's folder that differs from its manifest."""
    try:
        manifest = parse_manifest((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        yield f"its manifest is damaged ({error})"
        return
    if faults := list(check_manifest(folder.name, manifest)):
        yield from faults
        return
    yield from find_damage(folder, manifest)
    listed = {file["path"] for file in manifest["outputs"]} | {MANIFEST}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and str(path.relative_to(folder)) not in listed:
            yield f"{path.relative_to(folder)} is not listed in its manifest"


def find_absent(store: Store, folder: Path) -> Iterator[str]:
    """Yield a line for each input of an artifact that the store lacks."""
    manifest = read_manifest(folder)
    for role, made in manifest["inputs"].items():
        if manifest["kind"] != SHARED_KIND and store.find(made["rid"]) is None:
            yield f"{made.get('artifact')}, its {role}, is no longer in the store"
