"""Files and folders that are written whole or not at all, with digests, and append-only JSON lines.

A sealed JSON file ends in `digest`, the sha256 of every byte before it, so that a cut or altered one is recognised.
Records without it, from before there were digests, are read as they are; the caller decides whether to accept them.
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


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a name beside `path` to write to, which becomes `path` in one rename when the block ends without an error.

    Readers see the former file or the new one, never a part. The name begins with a dot and belongs to this call alone.

    Args:
        path: in a folder that is there; what stands there is replaced.
        durable: wait until the contents are on disk before the rename, so that they also survive a power cut.
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
    """Write a file in one step, text as UTF-8; see `whole_file`."""
    with whole_file(path, durable=durable) as unfinished:
        unfinished.write_bytes(data.encode() if isinstance(data, str) else data)


def list_folder(folder: Path) -> list[str]:
    """Return the sorted names in a folder without hidden ones; nothing if it is not there."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208  (ten thousand)
    except OSError:
        return []


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle(folder: Path) -> None:
    """Wait until all of a folder is on disk, its files readable for all who may read the folder.

    The writer of safetensors lets the owner alone read, and others may work in the same outputs folder.
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
    """Give an empty folder to fill, which becomes `path` in one rename when the block ends without an error.

    It lies beside `path` under a name that begins with a dot. What a killed process left there is removed.

    Args:
        path: absent, or an empty folder.
        force: a folder or file that is there is replaced.

    Raises:
        StoreError: something is there, or nothing can be written there.
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
    """Refuse a place where something is.

    Raises:
        StoreError: there is more than an empty folder, and `force` is not given.
    """
    if force or not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink() or any(path.iterdir()):
        raise StoreError(f"{path} is there already. Choose another place, or replace it with --force")


def _put(unfinished: Path, path: Path, *, force: bool) -> None:
    """Rename a finished folder; over an empty folder that is one step, over anything else two."""
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
            raise StoreError(f"{path} was filled meanwhile; nothing of it was touched") from None
        raise


def _remove_leftovers(path: Path) -> None:
    """Remove what processes of this machine that are gone left of an earlier try."""
    host = os.uname().nodename
    for kind in (_UNFINISHED, _REPLACED):
        prefix = f".{path.name}.{kind}-{host}-"
        for place in path.parent.iterdir():
            number = place.name.removeprefix(prefix)
            if place.name.startswith(prefix) and number.isdecimal() and not is_alive(int(number)):
                if kind == _REPLACED and not os.path.lexists(path):
                    place.rename(path)  # killed between the two renames: the former folder comes back
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
    return StoreError(f"{path} cannot be written ({error.strerror or error}); nothing of it was left there")


Record = dict[str, Any]


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_cache(path: Path, kind: str) -> dict[str, Any]:
    """Return what a cache file holds; {} if it is absent, damaged or of another kind (its name and format)."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        found: dict[str, Any] = json.loads(body) if head == _head_of(kind, body) else {}
    except (OSError, ValueError):
        return {}
    return found


def write_cache(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a cache file whole, unless the folder above its own is missing or it cannot be written."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        write_whole(path, _head_of(kind, body) + b"\n" + body, durable=False)


def _head_of(kind: str, body: bytes) -> bytes:
    return f"mlxchat {kind} {len(body)} {zlib.crc32(body):08x}".encode()


class Records:
    """One .jsonl file."""

    def __init__(self, path: Path) -> None:
        """Remember the file; it is made by the first record."""
        self.path = path

    def append(self, record: Record) -> None:
        """Write one line, at once, without the environment's secrets."""
        # Half a character, which no UTF-8 is of, becomes the escape that JSON has for it.
        line = json.dumps(redact(record), ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell() and self._is_cut(file):
                file.write(b"\n")
            file.write(line)

    def read(self) -> list[Record]:
        """Return all whole records; a line cut by a crash is left out."""
        try:
            text = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return []
        # Not splitlines: text may hold U+2028.
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
        """Tell whether the last line lacks its end, as a crash leaves it."""
        file.seek(-1, 2)
        return file.read(1) != b"\n"

    def truncate(self, iteration: int) -> None:
        """Drop the records after `iteration`: work that a resumed attempt does again."""
        kept = [record for record in self.read() if record.get("iteration", 0) <= iteration]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_whole(self.path, text.encode(errors="backslashreplace"), durable=False)
