"""A file of the Hugging Face Hub in the Hub's own cache (HF_HOME): where it lies, and whether its content is right.

The layout is the official client's, so other programs find what we fetched, and we find what they did.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlxchat.errors import DataError
from mlxchat.hub.cache import has_content, is_verified

HUB = "https://huggingface.co"
_NO_NAME = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MOST_PATH_BYTES, _MOST_NAME_BYTES = 1000, 200
_MOST_BYTES = 1 << 60  # of a file: larger numbers are no floats
_COMMIT, _CHECKSUM = re.compile(r"\w[\w.-]{0,99}"), re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit, and what its content is."""

    repository: str
    """<organisation>/<name>."""
    kind: str
    """dataset or model."""
    revision: str
    """The commit."""
    path: str
    bytes: int
    sha256: str | None
    """Of the content, for files that the Hub keeps outside git (all large ones)."""
    git_sha1: str | None
    """Git's id of the content, for the others."""

    def __post_init__(self) -> None:
        """Refuse what would lead out of the cache: all of this is what a server, or an artifact of others, says.

        Raises:
            DataError: a name, checksum or size that none of the Hub's is.
        """
        parts = PurePosixPath(self.path).parts
        if not parts or ".." in parts or self.path.startswith("/") or _NO_NAME.search(self.path):
            raise DataError(
                f"{self.repository} lists a file {self.path[:200]!r}, which is no path inside of a repository"
            )
        longest = max(len(part.encode()) for part in parts)
        if longest > _MOST_NAME_BYTES or len(self.path.encode()) > _MOST_PATH_BYTES:
            raise DataError(f"{self.repository} lists a file {self.path[:200]!r}…, whose name is too long for a disk")
        check_commit(self.repository, self.revision)
        if not (isinstance(self.bytes, int) and 0 <= self.bytes < _MOST_BYTES and _CHECKSUM.fullmatch(str(self.etag))):
            raise DataError(
                f"{self.repository} lists {self.path} with {self.bytes!r} bytes and the checksum {self.etag!r}, "
                "expected a size and hexadecimal digits"
            )

    @property
    def etag(self) -> str:
        """The checksum that names the content in the Hub's cache."""
        return self.sha256 or self.git_sha1 or ""

    @property
    def folder(self) -> Path:
        """Folder of the repository in the Hub's cache."""
        return hub_cache() / folder_name(self.repository, self.kind)

    @property
    def blob(self) -> Path:
        """Where the content lies."""
        return self.folder / "blobs" / self.etag

    @property
    def place(self) -> Path:
        """Where the file is found by its name: a link to the content."""
        return self.folder / "snapshots" / self.revision / self.path

    def is_there(self) -> bool:
        """Tell whether the file is in the cache and was verified; nothing is hashed."""
        return self.place.exists() and is_verified(self.etag, self.blob if self.blob.exists() else self.place)


def hub_cache() -> Path:
    """Return the official client's cache, as its variables say now."""
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if chosen:
        return Path(os.path.expandvars(chosen)).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def endpoint() -> str:
    """Return the Hub's address: HF_ENDPOINT, or the real one."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def folder_name(repository: str, kind: str) -> str:
    """Return what a repository's folder is called in the cache."""
    return f"{kind}s--{repository.replace('/', '--')}"


def check_commit(repository: str, commit: object) -> None:
    """Refuse the name of a commit that is no name of a folder.

    Raises:
        DataError: it is none.
    """
    if not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
        raise DataError(f"{repository} is at commit {commit!r}, expected hexadecimal digits")


def settle(file: HubFile) -> bool:
    """Return whether a file is in the cache with the right content, and link to it if only its blob is there."""
    if file.is_there():
        return True
    if has_content(file.blob, file.etag):
        link(file)
        return True
    # Where there are no links, the official client puts the content itself there.
    return not file.place.is_symlink() and has_content(file.place, file.etag)


def link(file: HubFile) -> None:
    """Let the content be found by the file's name."""
    if file.place.exists():
        return
    file.place.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.place.with_name(f".{file.place.name}-{os.getpid()}-{threading.get_ident()}")
    with suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(os.path.relpath(file.blob, file.place.parent))
    temporary.replace(file.place)
