"""The download caches: paths, checksums and free disk space.

Listings, plain downloads and notes are in `cache_folder()`. Files of the Hugging Face Hub are in the Hub's own cache
(HF_HOME), in the layout of the official client, so programs share what any of them fetched.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlxchat.config.wording import format_bytes
from mlxchat.errors import DataError
from mlxchat.store.files import read_json, write_json

# Left free on a disk that is fetched to.
SPARE_BYTES = 256 << 20
_COMMIT = re.compile(r"\w[\w.-]{0,99}")
_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def cache_folder() -> Path:
    """Return the folder of listings, plain downloads and verification notes: $MLXCHAT_CACHE or ~/.cache/mlxchat."""
    default = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/mlxchat"
    return Path(os.environ.get("MLXCHAT_CACHE") or default).expanduser()


def hub_cache() -> Path:
    """Return the official client's cache folder by the current environment; the client reads it only at import."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(os.path.expandvars(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")).expanduser()


def folder_name(repository: str, kind: str) -> str:
    """Return the name of a repository's folder in the cache."""
    return f"{kind}s--{repository.replace('/', '--')}"


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE, as in the official client) forbids the network."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository of the Hub at one commit, with size and checksum."""

    repository: str
    """<organisation>/<name>."""
    kind: str
    """dataset or model."""
    revision: str
    """The commit."""
    path: str
    bytes: int
    sha256: str | None
    """Of the content, for files in LFS or Xet storage (all large ones)."""
    git_sha1: str | None
    """Git's blob id, for the others."""

    def __post_init__(self) -> None:
        """Reject paths outside the cache and malformed values: they come from a server or a third-party artifact."""
        parts = PurePosixPath(self.path).parts
        is_inside = parts and ".." not in parts and not self.path.startswith("/") and "\\" not in self.path
        is_sound = _COMMIT.fullmatch(str(self.revision)) and _CHECKSUM.fullmatch(self.etag)
        if not (is_inside and is_sound and self.path.isprintable()):
            raise DataError(
                f"{self.repository} lists {self.path[:200]!r} at commit {self.revision!r} with the checksum "
                f"{self.etag!r}: expected a path inside the repository and hexadecimal digits"
            )

    @property
    def etag(self) -> str:
        """The checksum: name of the content in the Hub's cache."""
        return self.sha256 or self.git_sha1 or ""

    @property
    def place(self) -> Path:
        """Path of the file by name: a symlink to the content."""
        return hub_cache() / folder_name(self.repository, self.kind) / "snapshots" / self.revision / self.path

    def is_there(self) -> bool:
        """Return whether the file is in the cache and verified; nothing is hashed."""
        return _is_verified(self.etag, self.place)

    def discard(self) -> None:
        """Remove the file's name and its content from the cache."""
        for path in (self.place.resolve(), self.place):
            path.unlink(missing_ok=True)


def missing_bytes(files: Iterable[HubFile]) -> int:
    """Return how many bytes of these files are still to be downloaded; equal contents count once."""
    return sum({file.etag: file.bytes for file in files if not file.is_there()}.values())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise DataError, which begins with `what`, if the disk of a folder has less than `needed` bytes + 256 MiB."""
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    if needed and needed + SPARE_BYTES > free:
        raise DataError(
            f"{what} needs {format_bytes(needed)}, but the disk of {folder} has {format_bytes(free)} free. Make room "
            "(hf cache ls, hf cache rm, mlxchat gc), or use another disk: HF_HOME, MLXCHAT_CACHE, outputs=FOLDER."
        )


# Checksums


def checksum_of(path: Path, like: str | None = None) -> str:
    """Return a file's sha256 in hex, or git's blob id if `like` has 40 digits."""
    with path.open("rb") as file:
        if like is not None and len(like) == 40:
            content = b"blob %d\0%b" % (path.stat().st_size, file.read())
            return hashlib.sha1(content, usedforsecurity=False).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_content(path: Path, checksum: str) -> bool:
    """Return whether a file exists with this checksum; an unchanged file is hashed only once."""
    if _is_verified(checksum, path):
        return True
    if not path.exists() or checksum_of(path, like=checksum) != checksum:
        return False
    note_verified(checksum, path)
    return True


def note_verified(checksum: str, path: Path) -> None:
    """Record that a file has a checksum; errors are ignored, the file is then hashed again."""
    with suppress(OSError):
        write_json(cache_folder() / "verified" / checksum, _stamp_of(path))


def _is_verified(checksum: str, path: Path) -> bool:
    try:
        return bool(read_json(cache_folder() / "verified" / checksum) == _stamp_of(path))
    except OSError:
        return False


def _stamp_of(path: Path) -> list[int]:
    """Return size, modification time and inode, one of which changes whenever a file is written."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]
