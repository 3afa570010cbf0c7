"""Manifests of artifacts: ids, digests, parsing and checks."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxchat.errors import StoreError, redact
from mlxchat.store.files import seal, unseal
from mlxchat.store.fingerprint import canonical_json, compute_key, encode_digest, hash_file

Manifest = dict[str, Any]

MANIFEST = "manifest.json"
SCHEMA = 3
# The kind of artifacts that steps share: text as token ids.
SHARED_KIND = "tokens"
# Records of the execution, not of the result: they hold times, so equal artifacts differ in them.
OBSERVATIONS = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl")
# Read only to extend a training. An artifact without it is the same artifact.
CONTINUATION = ("training_state.safetensors", "training_state.json")
# Measurements of the execution, not of the result: manifests keep them apart from the metrics.
MEASURED = ("tokens_per_second", "data_wait_frac")
# Files hashed by this process: path → hash and (size, mtime, inode).
_read: dict[Path, tuple[str, tuple[int, int, int]]] = {}


def identify(manifest: Manifest) -> str:
    """Return an artifact's id, 52 characters of lower-case base32: the hash of its key and its files but observations.

    It includes the key because two settings can give the same bytes, but the manifest must state the right settings.
    Keys of later steps depend only on an artifact's `tree`.
    """
    content = [[file["path"], file["sha256"]] for file in manifest["outputs"] if file["path"] not in OBSERVATIONS]
    return encode_digest(canonical_json([manifest["key"], content]))


def read_manifest(folder: Path) -> Manifest:
    """Return an artifact's manifest."""
    return read_record(folder / MANIFEST)


def read_record(path: Path) -> Manifest:
    """Return the manifest of an artifact or the record of an execution in a file."""
    try:
        return parse_manifest(path.read_bytes())
    except (OSError, ValueError) as error:
        what = "the folder" if path.name == MANIFEST else "the file"
        raise StoreError(f"{path} is damaged ({error}). Remove {what}; the next run recomputes it.") from None


def parse_manifest(data: bytes) -> Manifest:
    """Return a manifest from the bytes of its file."""
    manifest = unseal(data)
    if manifest.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {manifest.get('schema')}, expected {SCHEMA}")
    return manifest


def describe(manifest: Manifest) -> bytes:
    """Return a manifest as the bytes of its file, with a digest and without the environment's secrets."""
    return seal({**redact(manifest), "schema": SCHEMA})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write an artifact's manifest."""
    (folder / MANIFEST).write_bytes(describe(manifest))


def describe_outputs(out: Path) -> tuple[list[dict[str, Any]], str]:
    """Return each file's path, bytes and sha256, and `tree_of` them."""
    files = [
        {"path": str(path.relative_to(out)), "bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    ]
    return files, tree_of({"outputs": files})


def tree_of(manifest: Manifest) -> str:
    """Return the digest of a manifest's files, without observations and continuation."""
    left_out = OBSERVATIONS + CONTINUATION
    content = [[file["path"], file["sha256"]] for file in manifest["outputs"] if file["path"] not in left_out]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def find_damage(folder: Path, manifest: Manifest, *, again: bool = True) -> Iterator[str]:
    """Yield a line for each file that is missing or differs from its manifest.

    Without `again`, files that this process has hashed and whose size, time and inode are the same are not read.
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
                yield f"{file['path']} has other contents than its manifest says"
        except FileNotFoundError:
            yield f"{file['path']} is missing"
        except OSError as error:
            yield f"{file['path']} cannot be read ({error.strerror})"


def check_metrics(manifest: Manifest) -> Iterator[str]:
    """Yield a line for each metric that is no number, as a user's stage may record one."""
    for name, value in manifest["metrics"].items():
        if not isinstance(value, int | float | None):
            yield f"metrics.{name} is {str(value)[:40]!r}, expected a number"


def check_manifest(name: str, manifest: Manifest) -> Iterator[str]:
    """Yield every inconsistency of a manifest, which others may have written, in the folder `name`."""
    try:
        yield from check_metrics(manifest)
        shared = manifest["kind"] == SHARED_KIND  # keys of encoded text include neither inputs nor pins
        inputs = {} if shared else {role: made["tree"] for role, made in manifest["inputs"].items()}
        pins = {} if shared else manifest["pins"]
        if manifest["key"] != compute_key(manifest["stage"], manifest["version"], manifest["config"], inputs, pins):
            yield "its key does not follow from its config, inputs and pins"
        if manifest["rid"] != identify(manifest) or manifest["rid"][:16] != name[-16:]:
            yield "its id does not follow from its key and files"
        if tree_of(manifest) != manifest["tree"]:
            yield "its digest does not follow from its files"
        if strange := [each["path"] for each in manifest["outputs"] if each["bytes"] < 0 or not is_plain(each["path"])]:
            yield f"it lists files outside its folder: {', '.join(strange)}"
        for what, value in (("folder", name), ("stage", manifest["stage"]), ("step", manifest["step"])):
            if not is_name(value):
                yield f"its {what} is called {str(value)[:80]!r}, expected a plain name"
        rids = [made["rid"] for made in manifest["inputs"].values()]
        if not all(isinstance(value, str) for value in (manifest["published"], *rids)):
            yield "it does not name its inputs by id, or say when it was published"
    except (KeyError, TypeError, AttributeError) as error:
        yield f"its manifest lacks a value or has one of a wrong type ({type(error).__name__}: {error})"


def is_name(value: object) -> bool:
    """Return whether a value can be a file name: at most 200 printable characters, no slash."""
    return isinstance(value, str) and is_plain(value) and "/" not in value and value.isprintable() and len(value) <= 200


def is_plain(path: str) -> bool:
    """Return whether a path is relative and stays within its folder."""
    parts = path.split("/")
    return bool(path) and not path.startswith("/") and "\\" not in path and not {"", ".", ".."} & set(parts)
