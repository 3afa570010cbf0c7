"""The folder of what was fetched and is no artifact: where it is, what is known of its files, and room on its disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxchat.errors import DataError
from mlxchat.runner.progress import format_bytes

# Left free on a disk that is fetched to.
SPARE_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20


def cache_folder() -> Path:
    """Return where listings, plain downloads and notes of what was verified are: $MLXCHAT_CACHE or ~/.cache/mlxchat."""
    chosen = os.environ.get("MLXCHAT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlxchat"


def is_offline() -> bool:
    """Tell whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE, as the official client has it) forbids the network."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def write_json(path: Path, record: Any) -> None:
    """Write plain data under a name of its own, then rename it: readers see the old or the new, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Return the plain data of a file, or None if it is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def checksum_of(path: Path, like: str | None = None, check: Callable[[], None] = lambda: None) -> str:
    """Return a file's sha256, in hex; if `like` has 40 digits, git's id of the content instead.

    `check` is called for each block; it may raise, to end the work.
    """
    is_git = like is not None and len(like) == 40
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False) if is_git else hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            check()
    return digest.hexdigest()


def is_verified(checksum: str, path: Path) -> bool:
    """Return whether this file was hashed to this checksum before and has not changed since; nothing is hashed."""
    try:
        return bool(read_json(cache_folder() / "verified" / checksum) == _stamp_of(path))
    except OSError:
        return False


def note_verified(checksum: str, path: Path) -> None:
    """Remember that a file was hashed to a checksum, unless the note cannot be written."""
    with suppress(OSError):
        write_json(cache_folder() / "verified" / checksum, _stamp_of(path))


def has_content(path: Path, checksum: str) -> bool:
    """Return whether a file is there with the content that the checksum names; each file is hashed once."""
    if is_verified(checksum, path):
        return True
    if not path.exists() or checksum_of(path, like=checksum) != checksum:
        return False
    note_verified(checksum, path)
    return True


def _stamp_of(path: Path) -> list[int]:
    """Return what changes whenever a file is written: its size, time and inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def check_space(folder: Path, needed: int, what: str, beside: tuple[Path, int] | None = None) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: where it will be.
        needed: bytes.
        what: whose bytes, for the message.
        beside: another folder and its bytes, which count if it is on the same disk.

    Raises:
        DataError: fewer bytes are free there than needed and some to spare.
    """
    place = _existing(folder)
    if beside is not None and _existing(beside[0]).stat().st_dev == place.stat().st_dev:
        needed += beside[1]
    free = shutil.disk_usage(place).free
    if needed and needed + SPARE_BYTES > free:
        raise DataError(
            f"{what} needs {format_bytes(needed)}, and the disk of {folder} has {format_bytes(free)} free. Make room "
            "(mlxchat data ls shows what was fetched, mlxchat data rm removes it; mlxchat gc shows what else may go), "
            "or use another disk: HF_HOME=FOLDER for data of the Hub, MLXCHAT_CACHE=FOLDER for other downloads, "
            "outputs=FOLDER for artifacts."
        )


def _existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def missing_bytes(wanted: Iterable[tuple[Path, int]]) -> int:
    """Return how many bytes of (target, size) have not arrived yet."""
    left = 0
    for target, size in wanted:
        part = target.with_name(f"{target.name}.part")
        left += size - min(size, part.stat().st_size if part.exists() else 0)
    return left
