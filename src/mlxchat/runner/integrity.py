"""Whether an artifact's files are those that its manifest describes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlxchat.runner.fingerprint import hash_file
from mlxchat.runner.store import Manifest

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
