"""JSON files that know their own contents: a cut or altered one is told from a whole one.

The last key, `digest`, is the sha256 of every byte before it. Records without it, from before there were digests, are
read as they are; whoever reads decides whether to accept them.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MARK = b',\n "digest": "'
_END = b'"\n}\n'


def seal(record: Mapping[str, Any]) -> bytes:
    """Return a record, which must not be empty, as JSON with its digest.

    Raises:
        ValueError: it holds NaN or Infinity.
    """
    rest = {key: value for key, value in record.items() if key != "digest"}
    body = json.dumps(rest, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}").encode()
    return body + _MARK + hashlib.sha256(body).hexdigest().encode() + _END


def unseal(data: bytes) -> tuple[dict[str, Any], bool]:
    """Return the record without its digest, and whether it had one.

    Raises:
        ValueError: it is no JSON object, or not the one that the digest was made of.
    """
    record = json.loads(data)
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    body, mark, end = data.rpartition(_MARK)
    if not mark:
        return record, False
    if end != hashlib.sha256(body).hexdigest().encode() + _END:
        raise ValueError("its contents do not have the digest that it names")
    del record["digest"]
    return record, True


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is never seen half-written: under another name first, on disk before it gets its own."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle(folder: Path) -> None:
    """Wait until all of a folder is on disk, its files readable for whoever may read the folder.

    The writer of safetensors lets the owner alone read, and others may work in the same outputs folder.
    """
    readable = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != readable:
            path.chmod(readable)
        sync(path)
    sync(folder)
