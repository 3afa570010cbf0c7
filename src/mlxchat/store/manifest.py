"""Manifests of artifacts: ids, digests, parsing and checks.

An imported manifest may be any JSON, but readers rely on the types of its values. So these are checked wherever one is
parsed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mlxchat.config.secrets import redact
from mlxchat.errors import StoreError, visible
from mlxchat.store.files import seal, unseal
from mlxchat.store.fingerprint import canonical_json, compute_key, encode_digest, hash_file

Manifest = dict[str, Any]

MANIFEST = "manifest.json"
# Since 2 manifests have a digest, since 3 a key beside the id. Version 0.1 wrote 1 and 2.
SCHEMA = 3
_MOST_MANIFEST_BYTES = 64 << 20  # with 10,000 files it has a few MB
# The kind of artifacts that steps share: text as token ids.
SHARED_KIND = "tokens"
# Records of the execution, not of the result: they hold times, so equal artifacts differ in them.
OBSERVATIONS = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl")
# Read only to extend a training. An artifact without it is the same artifact.
CONTINUATION = ("training_state.safetensors", "training_state.json")
# Measurements of the execution, not of the result: manifests keep them apart from the metrics.
MEASURED = ("tokens_per_second", "data_wait_frac")
_MOST_SHOWN = 5  # faults in a message
_REQUIRED = (
    "rid", "name", "stage", "step", "kind", "version", "config", "inputs", "pins", "outputs", "tree", "metrics",
    "seconds", "published",
)  # fmt: skip
_OF_FILES = {"path", "bytes", "sha256"}
_EACH = "*"  # any key of a mapping
_TEXT, _NUMBER, _OBJECT = str | None, int | float | None, dict | None
_INPUT = {"rid": str, "tree": str, "artifact": _TEXT, "step": _TEXT, "stage": _TEXT}
_FILE = {"path": str, "bytes": int, "sha256": str}
_RANKS = {"size": int, "backend": str, "hosts": [str]}
# Key → its type, [type of each item], or {key: type of its value}. Keys that are not listed hold any JSON.
_MANIFEST: Mapping[str, Any] = {
    "schema": int, "key": _TEXT, "rid": str, "name": str, "stage": str, "step": _TEXT,
    "kind": str, "version": int, "config": dict, "full_config": dict, "overrides": [str],
    "excluded": {"ranks": _RANKS}, "inputs": {_EACH: _INPUT}, "outputs": [_FILE], "tree": str, "pins": {_EACH: str},
    "externals": [dict], "metrics": {_EACH: _NUMBER}, "derived": {"predicted_peak_bytes": _NUMBER},
    "tokens_per_second": _NUMBER, "data_wait_frac": _NUMBER, "attempts": [dict], "seconds": _NUMBER,
    "peak_memory_bytes": _NUMBER, "peak_array_bytes": _NUMBER, "code": {"modules": {_EACH: str}},
    "git": _OBJECT, "versions": dict, "device": dict, "run": _TEXT, "published": str,
}  # fmt: skip
_WORDS = {
    dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false",
    int | float: "a number", _TEXT: "text or null", _NUMBER: "a number or null",
    _OBJECT: "an object or null",
}  # fmt: skip
_MOST_DEPTH = 64
# Numbers from 1e300 on, some of which overflow a float.
_LARGE = re.compile(r"[0-9]{300}|e\+[0-9]{3}")
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
    """Return an artifact's manifest.

    Raises:
        StoreError: it is damaged.
    """
    return read_record(folder / MANIFEST)


def read_record(path: Path) -> Manifest:
    """Return the manifest of an artifact or the record of an execution in a file.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return load_manifest(path)
    except (OSError, ValueError) as error:
        what = "the folder" if path.name == MANIFEST else "the file"
        raise StoreError(f"{path} is damaged ({error}). Remove {what}; the next run recomputes it.") from None


def load_manifest(path: Path) -> Manifest:
    """Return the manifest in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    with path.open("rb") as file:
        data = file.read(_MOST_MANIFEST_BYTES + 1)
    if len(data) > _MOST_MANIFEST_BYTES:
        raise ValueError(f"it is larger than {_MOST_MANIFEST_BYTES >> 20} MB")
    return parse_manifest(data)


def parse_manifest(data: bytes) -> Manifest:
    """Return a manifest from the bytes of its file.

    Raises:
        ValueError: they were cut or altered, or values have wrong types.
    """
    try:
        manifest, sealed = unseal(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not sealed and manifest.get("schema", 1) != 1:
        raise ValueError("it lacks its digest")
    if wrong := list(islice(find_misshapen(manifest), _MOST_SHOWN)):
        raise ValueError(visible("; ".join(wrong)))
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

    Args:
        folder: the artifact.
        manifest: its own.
        again: whether to hash files again that this process has hashed and that are unchanged by size, time and inode.
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


def find_misshapen(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for every value of a manifest that has a wrong type or no plain form."""
    yield from find_wrong_types(manifest, _MANIFEST, "")
    try:
        text = json.dumps(manifest, ensure_ascii=False, allow_nan=False)
        text.encode()
        plain = not _LARGE.search(text) and _count_levels(manifest) <= _MOST_DEPTH
    except (ValueError, RecursionError):
        plain = False
    if not plain:
        yield f"it holds NaN, a number from 1e300 on, a lone surrogate, or more than {_MOST_DEPTH} levels"


def _count_levels(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value
    return 1 + max([_count_levels(item) for item in items if item.__class__ in (dict, list)], default=0)


def find_wrong_types(value: Any, expected: Any, where: str) -> Iterator[str]:
    """Yield a line for each part of a value whose type differs from `expected`, in the notation of `_MANIFEST`."""
    kind: Any = expected.__class__ if expected.__class__ in (list, dict) else expected
    if not isinstance(value, kind):
        yield f"{where} is {str(value)[:40]!r}, expected {_WORDS[kind]}"
    elif expected.__class__ is list:
        for position, item in enumerate(value):
            yield from find_wrong_types(item, expected[0], f"{where}[{position}]")
    elif expected.__class__ is dict:
        for key, item in value.items():
            if (wanted := expected.get(_EACH) or expected.get(key)) is not None:
                yield from find_wrong_types(item, wanted, f"{where}.{key}" if where else key)


def check_manifest(name: str, manifest: Manifest) -> Iterator[str]:
    """Yield every inconsistency of a manifest in the folder `name`."""
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
        yield "its folder's name is not plain text"
    if not is_name(manifest["stage"]):
        yield f"its stage is called {manifest['stage'][:80]!r}, expected a plain name (it is part of file names)"
    if not is_name(manifest["step"] or name):
        yield f"its step is called {manifest['step'][:80]!r}, expected the name of a file in refs/<run>/"


def _check_ids(manifest: Manifest) -> Iterator[str]:
    """Yield a line if the key does not match config, inputs and pins, or the id not key and files."""
    shared = manifest["kind"] == SHARED_KIND  # keys of encoded text include neither inputs nor pins
    of_contents = manifest.get("schema", 1) >= SCHEMA
    of_inputs = "tree" if of_contents else "rid"
    inputs = {} if shared else {role: made[of_inputs] for role, made in manifest["inputs"].items()}
    pins = {} if shared else manifest["pins"]
    key = compute_key(manifest["stage"], manifest["version"], manifest["config"], inputs, pins)
    if key != manifest.get("key" if of_contents else "rid"):
        yield f"its {'key' if of_contents else 'id'} does not follow from its config, inputs and pins"
    if of_contents and manifest["rid"] != identify(manifest):
        yield "its id does not follow from its key and files"


def is_name(value: object) -> bool:
    """Return whether a value can be a file name: at most 200 printable characters, no slash."""
    return isinstance(value, str) and is_plain(value) and "/" not in value and value.isprintable() and len(value) <= 200


def is_plain(path: str) -> bool:
    """Return whether a path is relative and stays within its folder."""
    parts = path.split("/")
    return bool(path) and not path.startswith("/") and "\\" not in path and not {"", ".", ".."} & set(parts)
