"""Atomically written files and folders, JSON with a digest, and append-only JSON lines.

A sealed JSON file ends in `digest`, the sha256 of every byte before it, which reveals truncation and changes. Older
files have no digest; the caller decides whether to accept them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from mlxchat.config.secrets import redact
from mlxchat.errors import StoreError
from mlxchat.store.crash import crash_point

_MARK = b',\n "digest": "'
_END = b'"\n}\n'


def seal(record: Mapping[str, Any]) -> bytes:
    """Return a non-empty record as JSON with its digest.

    Raises:
        ValueError: it holds NaN or Infinity.
    """
    rest = {key: value for key, value in record.items() if key != "digest"}
    body = json.dumps(rest, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}").encode()
    return body + _MARK + hashlib.sha256(body).hexdigest().encode() + _END


def unseal(data: bytes) -> tuple[dict[str, Any], bool]:
    """Return the record without its digest, and whether it had one.

    Raises:
        ValueError: it is not a JSON object, or does not match its digest.
    """
    record = json.loads(data)
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    body, mark, end = data.rpartition(_MARK)
    if not mark:
        return record, False
    if end != hashlib.sha256(body).hexdigest().encode() + _END:
        raise ValueError("its contents do not match its digest")
    del record["digest"]
    return record, True


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it is renamed to `path` when the block ends without an error.

    Readers see the old file or the new one, never a part. The temporary name is unique and begins with a dot.

    Args:
        path: in an existing folder; an existing file is replaced.
        durable: fsync before the rename, so that the contents survive a power cut.
    """
    unfinished = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        yield unfinished
        if durable:
            sync(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Write a file atomically, text as UTF-8; see `whole_file`."""
    with whole_file(path, durable=durable) as unfinished:
        unfinished.write_bytes(data.encode() if isinstance(data, str) else data)


def list_folder(folder: Path) -> list[str]:
    """Return the sorted names in a folder without hidden ones; empty if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208  (speed)
    except OSError:
        return []


def sync(path: Path) -> None:
    """Call fsync on a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle(folder: Path) -> None:
    """Fsync a folder and all it contains, and give its files the folder's read and write permissions.

    The safetensors writer makes files readable only by the owner, but several users may share an outputs folder.
    """
    readable = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != readable:
            path.chmod(readable)
        sync(path)
    sync(folder)


_UNFINISHED, _REPLACED = "unfinished", "replaced"


@contextmanager
def whole_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it is renamed to `path` when the block ends without an error.

    Its temporary name beside `path` begins with a dot. Folders that killed processes left there are removed.

    Args:
        path: absent, or an empty folder.
        force: replace an existing folder or file.

    Raises:
        StoreError: `path` exists, or cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{_UNFINISHED}-{os.uname().nodename}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        check_free(path, force=force)
        unfinished.mkdir()
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield unfinished
        settle(unfinished)
        crash_point("export.synced")
        _put(unfinished, path, force=force)
        sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_free(path: Path, *, force: bool = False) -> None:
    """Raise if a path is taken.

    Raises:
        StoreError: `path` is more than an empty folder, and `force` is False.
    """
    if force or not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink() or any(path.iterdir()):
        raise StoreError(f"{path} exists already. Choose another path, or replace it with --force")


def _put(unfinished: Path, path: Path, *, force: bool) -> None:
    """Rename a finished folder to `path`: one step if `path` is absent or an empty folder, else two."""
    if force and os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        replaced = path.with_name(f".{path.name}.{_REPLACED}-{os.uname().nodename}-{os.getpid()}")
        path.rename(replaced)
        try:
            unfinished.rename(path)
        except OSError:
            replaced.rename(path)
            raise
        if replaced.is_dir() and not replaced.is_symlink():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.unlink()
        return
    try:
        unfinished.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise StoreError(f"{path} was filled meanwhile; it was not changed") from None
        raise


def _remove_leftovers(path: Path) -> None:
    """Remove temporary folders of ended processes of this machine."""
    host = os.uname().nodename
    for kind in (_UNFINISHED, _REPLACED):
        prefix = f".{path.name}.{kind}-{host}-"
        for place in path.parent.iterdir():
            number = place.name.removeprefix(prefix)
            if place.name.startswith(prefix) and number.isdecimal() and not is_alive(int(number)):
                if kind == _REPLACED and not os.path.lexists(path):
                    place.rename(path)  # killed between the two renames: restore the old folder
                else:
                    shutil.rmtree(place, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Return whether a process of this machine may be running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be written ({error.strerror or error}); no partial output was left")


Record = dict[str, Any]


def now() -> str:
    """Return the current time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_cache(path: Path, kind: str) -> dict[str, Any]:
    """Return the contents of a cache file; {} if it is absent, damaged or not of this kind (name and format)."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        found: dict[str, Any] = json.loads(body) if head == _head_of(kind, body) else {}
    except (OSError, ValueError):
        return {}
    return found


def write_cache(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a cache file atomically; errors are ignored."""
    # ASCII, since paths that are not UTF-8 have lone surrogates.
    body = json.dumps(content, separators=(",", ":")).encode()
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        write_whole(path, _head_of(kind, body) + b"\n" + body, durable=False)


def _head_of(kind: str, body: bytes) -> bytes:
    return f"mlxchat {kind} {len(body)} {zlib.crc32(body):08x}".encode()


class Records:
    """One .jsonl file."""

    def __init__(self, path: Path) -> None:
        """The first `append` creates the file."""
        self.path = path

    def append(self, record: Record) -> None:
        """Write one line, unbuffered, without the environment's secrets."""
        # Lone surrogates, which UTF-8 cannot encode, become JSON escapes.
        line = json.dumps(redact(record), ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell() and self._is_cut(file):
                file.write(b"\n")
            file.write(line)

    def read(self) -> list[Record]:
        """Return all complete records; a line cut by a crash is skipped."""
        try:
            text = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return []
        # Not splitlines: text may contain U+2028.
        records = (self.parse(line) for line in text.split(b"\n"))
        return [record for record in records if record is not None]

    @staticmethod
    def parse(line: bytes) -> Record | None:
        """Return the record of a line, or None if it is cut or damaged."""
        try:
            record = json.loads(line)
        except ValueError:
            return None
        return record if isinstance(record, dict) else None

    @staticmethod
    def _is_cut(file: IO[bytes]) -> bool:
        """Return whether the last line has no newline, as after a crash."""
        file.seek(-1, 2)
        return file.read(1) != b"\n"

    def truncate(self, iteration: int) -> None:
        """Drop the records after `iteration`, which a resumed attempt repeats."""
        kept = [record for record in self.read() if record.get("iteration", 0) <= iteration]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_whole(self.path, text.encode(errors="backslashreplace"), durable=False)
