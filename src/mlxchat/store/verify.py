"""Whether artifacts are what their manifests say: id, digest, every file, and the inputs that they refer to."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from mlxchat.errors import StoreError
from mlxchat.store.bases import find_chain
from mlxchat.store.fingerprint import canonical_json, compute_key, hash_file
from mlxchat.store.store import (
    CONTINUATION,
    MANIFEST,
    OBSERVATIONS,
    SCHEMA,
    SHARED_KIND,
    Manifest,
    Store,
    identify,
    read_manifest,
)

_MOST_COMMANDS = 3
# Files that this process has read: path → their hash, and what would change with them.
_read: dict[Path, tuple[str, tuple[int, int, int]]] = {}


def find_damage(folder: Path, manifest: Manifest, *, again: bool = True) -> Iterator[str]:
    """Yield a line for each file that is missing or has other bytes than when the artifact was published.

    Args:
        folder: the artifact.
        manifest: its own.
        again: whether to read what this process has read before and what has the same size, time and inode since.
    """
    for file in manifest["outputs"]:
        path = folder / file["path"]
        try:
            status = path.stat()
            stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
            if status.st_size != file["bytes"]:
                yield f"{file['path']} has {status.st_size} bytes instead of {file['bytes']}"
                continue
            if again or _read.get(path) != (file["sha256"], stamp):
                _read[path] = (hash_file(path), stamp)
            if _read[path][0] != file["sha256"]:
                yield f"{file['path']} has other contents than when it was made"
        except FileNotFoundError:
            yield f"{file['path']} is missing"
        except OSError as error:
            yield f"{file['path']} cannot be read ({error.strerror})"


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
    """Return the commands that made artifacts, without repetition."""
    commands = {} if manifests else {"the command that made it": None}
    commands |= dict.fromkeys(shlex.join(["mlxchat", *manifest.get("overrides", ())]) for manifest in manifests)
    shown = list(commands)[:_MOST_COMMANDS]
    return ", ".join(shown) + (" …" if len(commands) > len(shown) else "")


_REQUIRED = (
    "rid", "name", "stage", "step", "kind", "version", "config", "inputs", "pins", "outputs", "tree", "metrics",
    "seconds", "published",
)  # fmt: skip
_OF_FILES = {"path", "bytes", "sha256"}


def find_faults(store: Store, folder: Path) -> Iterator[str]:
    """Yield a line for everything about an artifact that is not as its manifest, or the store, requires."""
    yield from check_contents(folder)
    yield from find_absent(store, folder)


def check_contents(folder: Path) -> Iterator[str]:
    """Yield a line for everything about an artifact itself that is not as its manifest requires."""
    try:
        manifest = read_manifest(folder)
    except StoreError:
        yield f"{MANIFEST} cannot be read, or is not what was written"
        return
    yield from check_manifest(folder.name, manifest)
    yield from find_damage(folder, manifest)
    listed = {file["path"] for file in manifest["outputs"]} | {MANIFEST}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and str(path.relative_to(folder)) not in listed:
            yield f"{path.relative_to(folder)} is no part of it"


def find_absent(store: Store, folder: Path) -> Iterator[str]:
    """Yield a line for everything that an artifact was made from and that the store lacks."""
    try:
        manifest = read_manifest(folder)
    except StoreError:
        return
    for role, made in manifest["inputs"].items():
        if manifest["kind"] != "tokens" and store.find(made["rid"]) is None:
            yield f"{made.get('artifact')}, its {role}, is no longer in the store"


def check_manifest(name: str, manifest: Manifest) -> Iterator[str]:
    """Yield what is inconsistent within a manifest; `name` is that of its folder."""
    if missing := [key for key in _REQUIRED if key not in manifest]:
        yield f"its manifest lacks {', '.join(missing)}"
        return
    vague = [role for role, made in manifest["inputs"].items() if "rid" not in made]
    vague += [
        f"file {number}"
        for number, file in enumerate(manifest["outputs"])
        if not file.keys() >= _OF_FILES or file["bytes"] < 0
    ]
    if vague:
        yield f"its manifest lacks the rid, path, bytes or sha256 of {', '.join(vague[:5])}"
        return
    yield from _check_ids(manifest)
    if manifest["rid"][:16] != name[-16:]:
        yield f"its folder's name does not end in its id, {manifest['rid'][:16]}"
    if tree_of(manifest) != manifest["tree"]:
        yield "its digest does not follow from its files"
    strange = [file["path"] for file in manifest["outputs"] if not is_plain(file["path"])]
    if strange:
        yield f"it lists files outside its folder: {', '.join(strange)}"
    if not is_name(name):
        yield "its folder's name is no plain text"
    if not is_name(manifest["stage"]):
        yield f"its stage is called {manifest['stage'][:80]!r}, expected a plain name: it is part of a record's"
    if not is_name(manifest["step"] or name):
        yield f"its step is called {manifest['step'][:80]!r}, expected the name of a file in refs/<run>/"


def _check_ids(manifest: Manifest) -> Iterator[str]:
    """Yield what does not follow: the key from what was asked for, the id from the contents."""
    shared = manifest["kind"] == SHARED_KIND  # the key of encoded text covers neither inputs nor pins
    of_contents = manifest.get("schema", 1) >= SCHEMA
    of_inputs = "tree" if of_contents else "rid"
    inputs = {} if shared else {role: made[of_inputs] for role, made in manifest["inputs"].items()}
    pins = {} if shared else manifest["pins"]
    key = compute_key(manifest["stage"], manifest["version"], manifest["config"], inputs, pins)
    if key != manifest.get("key" if of_contents else "rid"):
        yield f"its {'key' if of_contents else 'id'} does not follow from its config, inputs and pins"
    if of_contents and manifest["rid"] != identify(manifest):
        yield "its id does not follow from its key and files"


def tree_of(manifest: Manifest) -> str:
    """Return the digest of the contents that the manifest lists, as `describe_outputs` makes it."""
    from hashlib import sha256

    left_out = OBSERVATIONS + CONTINUATION
    content = [[file["path"], file["sha256"]] for file in manifest["outputs"] if file["path"] not in left_out]
    return sha256(canonical_json(content).encode()).hexdigest()


def is_name(value: object) -> bool:
    """Tell whether a value can be the name of a file or link in one folder: short, printable, without a slash."""
    return isinstance(value, str) and is_plain(value) and "/" not in value and value.isprintable() and len(value) <= 200


def is_plain(path: str) -> bool:
    """Tell whether a relative path stays within its folder."""
    parts = path.split("/")
    return bool(path) and not path.startswith("/") and "\\" not in path and not {"", ".", ".."} & set(parts)
