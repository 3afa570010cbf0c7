"""Atomically written files and folders, JSON with a digest, and append-only JSON lines.

A sealed JSON file ends in `digest`, the sha256 of every byte before it, which reveals truncation and changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlxchat.config.secrets import redact
from mlxchat.errors import StoreError
from mlxchat.store.crash import crash_point

_MARK = b',\n "digest": "'
_END_BYTES = 65536
_END = b'"\n}\n'


def seal(record: Mapping[str, Any]) -> bytes:
    """Return a non-empty record as JSON with its digest."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    body = json.dumps(rest, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}").encode()
    return body + _MARK + hashlib.sha256(body).hexdigest().encode() + _END


def unseal(data: bytes) -> dict[str, Any]:
    """Return a sealed record without its digest; ValueError if the bytes were cut or altered."""
    body, mark, end = data.rpartition(_MARK)
    if not mark:
        raise ValueError("it lacks its digest")
    if end != hashlib.sha256(body).hexdigest().encode() + _END:
        raise ValueError("its contents do not match its digest")
    record: dict[str, Any] = json.loads(data)
    del record["digest"]
    return record


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


def write_json(path: Path, record: Any) -> None:
    """Write plain data by an atomic rename; missing parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record) + "\n", durable=False)


def read_json(path: Path) -> Any:
    """Return the plain data of a file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def list_folder(folder: Path) -> list[str]:
    """Return the sorted names in a folder without hidden ones; empty if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208  (speed)
    except OSError:
        return []


def read_end(path: Path) -> bytes:
    """Return the last 64 kB of a file, which may be large and growing; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
            return file.read()
    except OSError:
        return b""


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


@contextmanager
def whole_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it is renamed to `path` when the block ends without an error.

    Its temporary name beside `path` begins with a dot; what a killed process left under it is removed.

    Args:
        path: absent, or an empty folder.
        force: replace an existing folder or file.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        check_free(path, force=force)
        remove(unfinished)
        unfinished.mkdir(parents=True)
        yield unfinished
        settle(unfinished)
        crash_point("export.synced")
        check_free(path, force=force)  # another process may have filled it
        remove(path)
        unfinished.rename(path)
        sync(path.parent)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror or error}); no partial output was left") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_free(path: Path, *, force: bool = False) -> None:
    """Raise a StoreError if a path is more than an empty folder, and `force` is False."""
    if force or not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink() or any(path.iterdir()):
        raise StoreError(f"{path} exists already. Choose another path, or replace it with --force")


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all it contains, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


Record = dict[str, Any]


def now() -> str:
    """Return the current time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


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
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # cut by a crash
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

    def last(self) -> Record:
        """Return the last complete record; {} if there is none near the end."""
        records = (self.parse(line) for line in reversed(read_end(self.path).split(b"\n")))
        return next((record for record in records if record is not None), {})

    @staticmethod
    def parse(line: bytes) -> Record | None:
        """Return the record of a line, or None if it is cut or damaged."""
        try:
            record = json.loads(line)
        except ValueError:
            return None
        return record if isinstance(record, dict) else None

    def truncate(self, iteration: int) -> None:
        """Drop the records after `iteration`, which a resumed attempt repeats."""
        kept = [record for record in self.read() if record.get("iteration", 0) <= iteration]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_whole(self.path, text.encode(errors="backslashreplace"), durable=False)
