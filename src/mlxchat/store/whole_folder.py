"""A folder outside the store that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxchat.errors import StoreError
from mlxchat.store.crash import crash_point
from mlxchat.store.sealed import settle, sync

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
    unfinished = path.with_name(f".{path.name}.{_UNFINISHED}-{socket.gethostname()}-{os.getpid()}")
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
        replaced = path.with_name(f".{path.name}.{_REPLACED}-{socket.gethostname()}-{os.getpid()}")
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
    host = socket.gethostname()
    for kind in (_UNFINISHED, _REPLACED):
        prefix = f".{path.name}.{kind}-{host}-"
        for place in path.parent.iterdir():
            number = place.name.removeprefix(prefix)
            if place.name.startswith(prefix) and number.isdecimal() and not _is_alive(int(number)):
                if kind == _REPLACED and not os.path.lexists(path):
                    place.rename(path)  # killed between the two renames: the former folder comes back
                else:
                    shutil.rmtree(place, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be written ({error.strerror or error}); nothing of it was left there")
