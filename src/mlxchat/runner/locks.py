"""One holder per step, by flock: the kernel releases the lock when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlxchat.errors import StoreError

_POLL_SECONDS = 0.1


@contextlib.contextmanager
def hold(
    path: Path,
    owner: dict[str, Any],
    on_wait: Callable[[dict[str, Any]], None],
    check: Callable[[], None] = lambda: None,
) -> Iterator[bool]:
    """Hold the lock file while the body runs; yield whether another process held it first.

    Args:
        path: the lock file; it is made, and never removed while in use.
        owner: what to tell others about us (the process id and the host are added).
        on_wait: called once, with the holder's record, if we have to wait.
        check: called again and again while we wait; it may raise, to wait no longer.

    Raises:
        StoreError: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Close-on-exec is Python's default; forked children would keep the lock, so none are made while it is held.
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        waited = False
        while not _try_lock(handle, path):
            if not waited:
                on_wait(read_owner(path))
                waited = True
            check()
            time.sleep(_POLL_SECONDS)
        record = {"pid": os.getpid(), "host": socket.gethostname(), **owner}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(record).encode(), 0)
        yield waited
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def is_held(path: Path) -> bool:
    """Tell whether a live process holds this lock."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(handle, path)
    finally:
        os.close(handle)


def read_owner(path: Path) -> dict[str, Any]:
    """Return what the holder wrote about itself, or an empty record."""
    try:
        record = json.loads(path.read_text() or "{}")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _try_lock(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        raise StoreError(
            f"{path}: this file system has no locks ({error.strerror}). Choose another folder: outputs=PATH"
        ) from None
    return True
