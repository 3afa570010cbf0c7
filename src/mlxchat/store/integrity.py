"""Whether an artifact's files are those that its manifest describes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from mlxchat.errors import StoreError
from mlxchat.store.bases import find_chain
from mlxchat.store.fingerprint import hash_file
from mlxchat.store.store import CONTINUATION, OBSERVATIONS, Manifest, read_manifest

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
