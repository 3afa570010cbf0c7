"""Whether artifacts are what their manifests say: id, digest, every file, and the inputs that they refer to."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from mlxchat.errors import StoreError
from mlxchat.store.bases import find_chain
from mlxchat.store.manifest import (
    CONTINUATION,
    MANIFEST,
    OBSERVATIONS,
    SHARED_KIND,
    Manifest,
    check_manifest,
    find_damage,
    load_manifest,
    read_manifest,
)
from mlxchat.store.store import Store

_MOST_COMMANDS = 3


def check_model(folder: Path) -> None:
    """Make sure that the files which a model is loaded from, and those of its bases, are those that were published.

    Raises:
        StoreError: a file is missing or has other contents.
        DataError: the checkpoint cannot be read.
    """
    for each in find_chain(folder):
        manifest = read_manifest(each)
        read = [file for file in manifest["outputs"] if file["path"] not in OBSERVATIONS + CONTINUATION]
        if damage := list(find_damage(each, {**manifest, "outputs": read}, again=False)):
            raise StoreError(f"{each.name} is damaged: {'; '.join(damage[:5])}. {remedy([manifest])}")


def remedy(manifests: list[Manifest]) -> str:
    """Return what to do about artifacts that are damaged."""
    return f"Remove the folder{'' if len(manifests) == 1 else 's'} and run again: {makers(manifests)}"


def makers(manifests: list[Manifest]) -> str:
    """Return the commands that made artifacts, each once."""
    commands = list(dict.fromkeys(shlex.join(["mlxchat", *manifest.get("overrides", ())]) for manifest in manifests))
    more = " …" if len(commands) > _MOST_COMMANDS else ""
    return ", ".join(commands[:_MOST_COMMANDS] or ["the command that made it"]) + more


def check_contents(folder: Path) -> Iterator[str]:
    """Yield a line for everything about an artifact itself that is not as its manifest requires."""
    try:
        manifest = load_manifest(folder / MANIFEST)
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
            yield f"{path.relative_to(folder)} is no part of it"


def find_absent(store: Store, folder: Path) -> Iterator[str]:
    """Yield a line for each input of an artifact that the store lacks.

    Raises:
        StoreError: its manifest is damaged.
    """
    manifest = read_manifest(folder)
    for role, made in manifest["inputs"].items():
        if manifest["kind"] != SHARED_KIND and store.find(made["rid"]) is None:
            yield f"{made.get('artifact')}, its {role}, is no longer in the store"
