"""The caches of downloads: where files are, whether their content is right, and free disk space.

Listings, plain downloads and notes are in `cache_folder()`. Files of the Hugging Face Hub are in the Hub's own cache
(HF_HOME), in the layout of the official client, so programs share what any of them fetched.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlxchat.config.wording import format_bytes
from mlxchat.errors import DataError
from mlxchat.store.files import whole_file, write_whole

# Left free on a disk that is fetched to.
SPARE_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20
HUB = "https://huggingface.co"
_NO_NAME = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MOST_PATH_BYTES, _MOST_NAME_BYTES = 1000, 200
_MOST_BYTES = 1 << 60  # of a file: larger numbers are no floats
_COMMIT, _CHECKSUM = re.compile(r"\w[\w.-]{0,99}"), re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def cache_folder() -> Path:
    """Return where listings, plain downloads and notes of what was verified are: $MLXCHAT_CACHE or ~/.cache/mlxchat."""
    chosen = os.environ.get("MLXCHAT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlxchat"


def nanochat_folder() -> Path:
    """Return where nanochat keeps its files: $NANOCHAT_BASE_DIR or ~/.cache/nanochat."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE, as in the official client) forbids the network."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def write_json(path: Path, record: Any) -> None:
    """Write plain data in one step, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record) + "\n", durable=False)


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
    """Refuse a transfer for which the disk has no room.

    Args:
        folder: the target.
        needed: bytes.
        what: what needs them, for the message.
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


# Files of the Hub


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
        """Refuse values that lead out of the cache; they come from a server or a third-party artifact.

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
        """Path of the content."""
        return self.folder / "blobs" / self.etag

    @property
    def place(self) -> Path:
        """Where the file is found by its name: a link to the content."""
        return self.folder / "snapshots" / self.revision / self.path

    def is_there(self) -> bool:
        """Return whether the file is in the cache and was verified; nothing is hashed."""
        return self.place.exists() and is_verified(self.etag, self.blob if self.blob.exists() else self.place)


def hub_cache() -> Path:
    """Return the official client's cache by the environment of now; its own constants are read once, at import."""
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
    """Return whether a file is in the cache with the right content, and link to it if only its blob is there.

    A shard that nanochat downloaded becomes the blob, if it has that content.
    """
    if file.is_there():
        return True
    if has_content(file.blob, file.etag) or _adopt(file):
        link(file)
        return True
    # Where there are no links, the official client puts the content itself there.
    return not file.place.is_symlink() and has_content(file.place, file.etag)


def _adopt(file: HubFile) -> bool:
    """Take a file over from nanochat's folders of shards, as a hard link where that is possible."""
    for path in sorted(nanochat_folder().glob(f"base_data*/{glob.escape(PurePosixPath(file.path).name)}")):
        with suppress(OSError):
            if path.stat().st_size != file.bytes or checksum_of(path, like=file.etag) != file.etag:
                continue
            file.blob.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file.blob, durable=False) as unfinished:
                try:
                    os.link(path, unfinished)
                except OSError:  # of another disk
                    shutil.copyfile(path, unfinished)
            note_verified(file.etag, file.blob)
            return True
    return False


def link(file: HubFile) -> None:
    """Let the content be found by the file's name."""
    if file.place.exists():
        return
    file.place.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file.place, durable=False) as unfinished:
        unfinished.symlink_to(os.path.relpath(file.blob, file.place.parent))
