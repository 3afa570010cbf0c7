"""Identity of artifacts: canonical JSON of configuration, inputs and data, and its hash.

Fields of the typed configuration are part of the identity unless their metadata says `identity: False`. A field
added later declares `since_default`; while it has that value it is left out, so old artifacts stay valid.
"""

import base64
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
_SCALARS = (str, int, float, bool, type(None))


def identity_of(config: Any) -> Any:
    """Return the identity part of a typed configuration as plain, canonical data."""
    return _plain(config, identity_only=True)


def is_identity(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field of a section belongs to its identity."""
    return field.metadata.get("identity") is not False


def plain_of(config: Any) -> Any:
    """Return a complete typed configuration as plain data."""
    return _plain(config, identity_only=False)


def compute_key(
    stage: str, version: int, identity: Any, inputs: Mapping[str, str], externals: Mapping[str, str]
) -> str:
    """Return a step's key, 52 characters of lower-case base32.

    Args:
        stage: name of the stage.
        version: its VERSION.
        identity: `identity_of` its configuration.
        inputs: role → digest of the contents.
        externals: name → content hash or revision of all external data.
    """
    record = {"schema": SCHEMA, "stage": stage, "version": version, "config": identity}
    return encode_digest(canonical_json({**record, "inputs": dict(inputs), "externals": dict(externals)}))


def encode_digest(text: str) -> str:
    """Return the sha256 of a text as 52 characters of lower-case base32 (macOS file names ignore case)."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=").lower()


def canonical_json(value: Any) -> str:
    """Return canonical JSON of plain data: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested data as dotted key → value; empty mappings are left out."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        # Test for dict first, because isinstance with Mapping is slow.
        if isinstance(item, dict) or (type(item) not in _SCALARS and isinstance(item, Mapping)):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def changes(old: Mapping[str, Any], new: Mapping[str, Any], absent: str = "absent") -> dict[str, tuple[Any, Any]]:
    """Return key → (old, new) of all differences; a missing key has the value `absent`."""
    missing = object()
    changed = [key for key in {**old, **new} if old.get(key, missing) != new.get(key, missing)]
    return {key: (old.get(key, absent), new.get(key, absent)) for key in changed}


def _plain(value: Any, *, identity_only: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        record = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if identity_only:
                if not is_identity(field) or _is_later_default(item, field.metadata):
                    continue
                if _FLOAT.search(str(field.type)) and not _INT.search(str(field.type)):
                    item = _with_floats(item)
            record[field.name] = _plain(item, identity_only=identity_only)
        return record
    if isinstance(value, Mapping):
        plain = {str(key): _plain(item, identity_only=identity_only) for key, item in value.items()}
        if len(plain) < len(value):
            raise TypeError(f"{value!r} has no canonical form: two of its keys are equal as text")
        return plain
    if isinstance(value, list | tuple):
        return [_plain(item, identity_only=identity_only) for item in value]
    if identity_only and isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{value} cannot be part of an identity")
    if isinstance(value, _SCALARS):
        return value
    raise TypeError(f"{value!r} ({type(value).__name__}) has no canonical form")


# Matched against field types, which are text where annotations are postponed.
_FLOAT, _INT = re.compile(r"\bfloat\b"), re.compile(r"\bint\b")


def _with_floats(value: Any) -> Any:
    """Return the value of a float field with integers as floats, so that 1 and 1.0 are the same."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list | tuple) else value


def _is_later_default(value: Any, metadata: Mapping[str, Any]) -> bool:
    """Return whether a field added later has the value at which it is left out."""
    default = metadata.get("since_default")
    is_equal = bool(value == default) and isinstance(value, bool) == isinstance(default, bool)
    return "since_default" in metadata and is_equal
