"""Verification of artifacts against their manifests: id, digest, every file, and inputs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from mlxchat.config.wording import first_of
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
    parse_manifest,
    read_manifest,
)
from mlxchat.store.store import Store

_MOST_COMMANDS = 3


def check_model(folder: Path) -> None:
    """Verify the files that a model and its bases are loaded from."""
    for each in find_chain(folder):
        manifest = read_manifest(each)
        read = [file for file in manifest["outputs"] if file["path"] not in OBSERVATIONS + CONTINUATION]
        if damage := list(find_damage(each, {**manifest, "outputs": read}, again=False)):
            raise StoreError(f"{each.name} is damaged: {'; '.join(damage[:5])}. {remedy([manifest])}")


def remedy(manifests: list[Manifest]) -> str:
    """Return how to repair damaged artifacts: the commands that made them, without duplicates."""
    return f"Remove the folder{'s' * (len(manifests) > 1)} and run again: {makers(manifests)}"


def makers(manifests: list[Manifest]) -> str:
    """Return the commands that made artifacts, without duplicates."""
    commands = list(dict.fromkeys(shlex.join(["mlxchat", *manifest.get("overrides", ())]) for manifest in manifests))
    return first_of(commands, _MOST_COMMANDS) or "the command that made it"


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
