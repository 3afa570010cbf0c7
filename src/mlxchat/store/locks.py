"""Locks: one holder per step, by flock, which the kernel releases when the holder dies.

docs/guides/outputs.md says which file systems share locks between hosts.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlxchat.config.secrets import redact
from mlxchat.errors import StoreError
from mlxchat.store.files import is_alive

_POLL_SECONDS = 0.1
# `is_held` takes a lock for an instant; a shorter wait is not reported.
_GLANCE_SECONDS = 0.05
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
# The NVIDIA driver's description of each device on Linux.
_NVIDIA = Path("/proc/driver/nvidia/gpus")
# Open lock files of this process: handle → path.
_held: dict[int, Path] = {}


def _close_in_child() -> None:
    """Close inherited locks: a forked child would otherwise keep them after the parent's death."""
    for handle in list(_held):
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def hold(
    path: Path,
    owner: dict[str, Any],
    on_wait: Callable[[dict[str, Any]], None],
    check: Callable[[], None] = lambda: None,
    *,
    shared: bool = False,
) -> Iterator[bool]:
    """Hold the lock file while the body runs; yield whether another process held it first.

    Args:
        path: the lock file; it is created if needed.
        owner: the record that waiting processes see (process id and host are added).
        on_wait: called once, with the holder's record, before waiting; it may raise instead.
        check: called repeatedly while waiting; it may raise to stop waiting.
        shared: take a shared lock, which excludes only exclusive holders. Shared holders leave no record.

    Raises:
        StoreError: the file cannot be created, or its file system has no locks.
    """
    waited = granted = False
    began = time.monotonic()
    handle = _open(path)
    try:
        while not _try_lock(handle, path, shared=shared) or not _is_named(handle, path):
            holder = read_owner(path)
            if not waited and (_may_be_alive(holder) or time.monotonic() - began > _GLANCE_SECONDS):
                on_wait(holder)
                waited = True
            check()
            time.sleep(_POLL_SECONDS if waited else 0.002)
            if not _is_named(handle, path):  # it was removed meanwhile: a lock on it excludes nobody
                _close(handle)
                handle = _open(path)
        granted = True
        if not shared:
            _write_owner(handle, {"pid": os.getpid(), "host": host_name(), **owner})
        yield waited
    finally:
        if handle in _held:  # a forked child has closed it, and the number may mean another file
            if granted and not shared and _is_named(handle, path):  # else the record is another holder's
                _write_owner(handle, None)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # also for children that inherited the handle
            _close(handle)


def owns(path: Path) -> bool:
    """Return whether this process holds the lock and the lock file was not replaced."""
    return any(held == path and _is_named(handle, path) for handle, held in list(_held.items()))


def is_held(path: Path) -> bool:
    """Return whether a live process holds this lock."""
    try:
        handle = os.open(path, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # read-only folder
        handle = os.open(path, os.O_RDONLY)
    try:
        return not _try_lock(handle, path, shared=False)
    finally:
        os.close(handle)


def host_name() -> str:
    """Return this machine's name in records."""
    return os.uname().nodename


def gpu_locks() -> dict[str, Path]:
    """Return device → lock file of every GPU that this process may use, in the order to take them.

    The locks are per machine, not per outputs folder.

    Raises:
        StoreError: the folder of these locks belongs to another user.
    """
    # Not $TMPDIR, which differs between shells and jobs.
    folder = Path(os.environ.get("MLXCHAT_LOCKS") or f"/tmp/mlxchat-{os.getuid()}")
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.exists() and folder.lstat().st_uid != os.getuid():
        raise StoreError(
            f"{folder}, the folder of GPU locks, belongs to another user: set MLXCHAT_LOCKS to a folder of yours"
        )
    names = {name: re.sub(r"[^\w.-]", "-", name)[:200] for name in _gpu_names()}
    return {name: folder / f"gpu-{clean}.lock" for name, clean in sorted(names.items())}


def _gpu_names() -> list[str]:
    """Return the devices that SLURM and CUDA allow; without a restriction, all."""
    visible = _split(os.environ.get("CUDA_VISIBLE_DEVICES"))
    job = _split(os.environ.get("SLURM_JOB_GPUS"))
    # In a job CUDA may number the job's devices from 0; SLURM's numbers are the machine's.
    chosen = visible if visible and set(visible) <= set(job or visible) else job
    return chosen or [str(number) for number in range(len(list(_NVIDIA.glob("*/information"))) or 1)]


def _split(text: str | None) -> list[str] | None:
    """Return the items of a comma-separated list, or None if it is empty."""
    return [name for item in text.split(",") if (name := item.strip())] or None if text else None


def name_process(owner: Mapping[str, Any]) -> str:
    """Return the process in a holder's record, for messages."""
    return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another process"


def read_owner(path: Path) -> dict[str, Any]:
    """Return the holder's record, or an empty one."""
    try:
        record = json.loads(path.read_text() or "{}")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # Python's files are closed on exec
    except OSError as error:
        raise StoreError(f"lock file {path} cannot be created ({error.strerror})") from None
    _held[handle] = path
    return handle


def _close(handle: int) -> None:
    del _held[handle]
    os.close(handle)


def _is_named(handle: int, path: Path) -> bool:
    """Return whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _may_be_alive(holder: dict[str, Any]) -> bool:
    """Return whether a record's process may hold the lock; records of dead processes stay in the file."""
    if not holder:
        return False
    if holder.get("host") != host_name():
        return True
    try:
        return is_alive(int(holder["pid"]))
    except (KeyError, ValueError, TypeError):
        return True


def _write_owner(handle: int, record: dict[str, Any] | None) -> None:
    with suppress(OSError):  # full disk: the record is only for messages
        os.ftruncate(handle, 0)
        if record is not None:
            os.pwrite(handle, json.dumps(redact(record)).encode(), 0)


def _try_lock(handle: int, path: Path, *, shared: bool) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise StoreError(
            f"{path}: this file system has no locks ({error.strerror}). Choose another folder: outputs=PATH"
        ) from None
    return True
