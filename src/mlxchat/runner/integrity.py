"""Whether an artifact's files are those that its manifest describes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlxchat.runner.fingerprint import hash_file
from mlxchat.runner.store import Manifest


def find_damage(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield a line for each file that is missing or has other bytes than when the artifact was published."""
    for file in manifest["outputs"]:
        path = folder / file["path"]
        try:
            size = path.stat().st_size
            if size != file["bytes"]:
                yield f"{file['path']} has {size} bytes instead of {file['bytes']}"
            elif hash_file(path) != file["sha256"]:
                yield f"{file['path']} has other contents than when it was made"
        except FileNotFoundError:
            yield f"{file['path']} is missing"
        except OSError as error:
            yield f"{file['path']} cannot be read ({error.strerror})"
