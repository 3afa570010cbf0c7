"""Locks: one holder at a time; filelock's flock, which the kernel releases when the holder dies.

A lock file holds a note about its last holder, for messages of those that wait. docs/guides/outputs.md says which file
systems share locks between hosts. Below: the attempts at a step; one that has no end was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.errors import StoreError, redact
from mlxchat.store.files import Record, Records, list_folder, now

if TYPE_CHECKING:
    from filelock import BaseFileLock


_POLL_SECONDS = 0.1
# `is_held` takes a lock for an instant; a shorter wait is not reported.
_GLANCE_SECONDS = 0.05
# Locks that this process holds: path → device and inode of the file.
_held: dict[Path, tuple[int, int]] = {}
# The NVIDIA driver's description of each device on Linux.
_NVIDIA = Path("/proc/driver/nvidia/gpus")


@contextmanager
def hold(
    path: Path,
    owner: Mapping[str, Any],
    on_wait: Callable[[dict[str, Any]], None] = lambda owner: None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[bool]:
    """Hold the lock file while the body runs; yield whether another process held it first.

    Args:
        path: the lock file; it is created if needed.
        owner: the record that waiting processes see (process id and host are added).
        on_wait: called once, with the holder's record, before waiting; it may raise instead.
        check: called repeatedly while waiting; it may raise to stop waiting.
    """
    from filelock import FileLock  # slow: not for verbs that only read

    lock = FileLock(path, fallback_to_soft=False)
    waited = False
    began = time.monotonic()
    while not _try(lock, path):
        if not waited and time.monotonic() - began > _GLANCE_SECONDS:
            on_wait(read_owner(path))
            waited = True
        check()
        time.sleep(_POLL_SECONDS if waited else 0.002)
    try:
        _held[path] = _identity(path)
        with suppress(OSError), path.open("r+") as file:  # full disk: the record is only for messages
            file.truncate()
            file.write(json.dumps(redact({"pid": os.getpid(), "host": host_name(), **owner})))
        yield waited
    finally:
        _held.pop(path, None)
        lock.release()


def _try(lock: BaseFileLock, path: Path) -> bool:
    from filelock import Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        return False
    except OSError as error:
        raise StoreError(f"{path} cannot be locked ({error.strerror}). Choose another folder: outputs=PATH") from None
    return True


def owns(path: Path) -> bool:
    """Return whether this process holds the lock and the lock file was not removed or replaced."""
    return path in _held and _held[path] == _identity(path) != (0, 0)


def _identity(path: Path) -> tuple[int, int]:
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return (0, 0)


def is_held(path: Path) -> bool:
    """Return whether a live process holds this lock; it is also found where the folder cannot be written."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def host_name() -> str:
    """Return this machine's name in records."""
    return os.uname().nodename


def gpu_locks() -> dict[str, Path]:
    """Return device → lock file of every GPU that SLURM or CUDA allows, else of all, in the order to take them.

    The locks are per machine, not per outputs folder.
    """
    # In a job CUDA may number the job's devices from 0; SLURM's numbers are the machine's.
    allowed = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    names = names or [str(number) for number in range(len(list(_NVIDIA.glob("*/information"))) or 1)]
    # Not $TMPDIR, which differs between shells and jobs.
    folder = Path(os.environ.get("MLXCHAT_LOCKS") or f"/tmp/mlxchat-{os.getuid()}")
    return {name: folder / f"gpu-{name.replace('/', '-')}.lock" for name in sorted(names)}


def name_process(owner: Mapping[str, Any]) -> str:
    """Return the process in a holder's record, for messages."""
    return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another process"


def read_owner(path: Path) -> dict[str, Any]:
    """Return the record of the lock's holder, or an empty one."""
    with suppress(OSError, ValueError):
        record: dict[str, Any] = json.loads(path.read_text())
        return record
    return {}


# (work folder, number) → start of an execution of this process by the monotonic clock, in seconds.
_began: dict[tuple[Path, int], float] = {}


def start_attempt(work: Path, run: str, step: str) -> int:
    """Record the start of an execution in this process; return its number, from 1."""
    log = Records(work / "attempts.jsonl")
    number = sum("started" in record for record in log.read()) + 1
    record = {"attempt": number, "step": step, "started": now(), "pid": os.getpid(), "host": host_name()}
    log.append({**record, "run": run})
    _began[work, number] = time.monotonic()
    return number


def finish_attempt(work: Path, number: int, outcome: str, error: str | None, resumed_from: int | None) -> None:
    """Record how an execution ended: done, failed or interrupted."""
    record = {"attempt": number, "ended": now(), "outcome": outcome, "error": error, "resumed_from": resumed_from}
    if (began := _began.pop((work, number), None)) is not None:
        record["seconds"] = round(time.monotonic() - began, 3)
    Records(work / "attempts.jsonl").append(record)


def read_attempts(work: Path) -> list[Record]:
    """Return a record per execution: attempt, started, ended, outcome, seconds, pid, host, run, resumed_from, error.

    One that runs in this process has the outcome `running` and the seconds so far.
    """
    merged: dict[int, Record] = {}
    for record in Records(work / "attempts.jsonl").read():
        if isinstance(record.get("attempt"), int):
            merged.setdefault(record["attempt"], {"outcome": "killed", "ended": None, "seconds": None}).update(record)
    for number, record in merged.items():
        if (began := _began.get((work, number))) is not None:
            record |= {"outcome": "running", "seconds": round(time.monotonic() - began, 3)}
    return list(merged.values())


def explain_killed(work: Path, *, on_mac: bool = sys.platform == "darwin") -> str | None:
    """Return what probably ended the last execution and what helps; None: it recorded its end, or there was none.

    Metal aborts a process, without a traceback, if memory is exhausted or, while the display is on, if a command takes
    too long (github.com/ml-explore/mlx/issues/3267).
    """
    if (read_attempts(work) or [{}])[-1].get("outcome") != "killed":
        return None
    tokens = None
    with suppress(OSError):
        tokens = (Records.parse((work / "ckpt" / "derived.json").read_bytes()) or {}).get("micro_batch_tokens")
    smaller = f"machine.device_batch_tokens={tokens // 2}" if isinstance(tokens, int) else "smaller batches"
    if on_mac:
        how = "macOS ends programs that exhaust the memory or whose GPU commands take too long while the display is on"
        return f"{how}. If it happens again: {smaller}, display off, or AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"
    return f"probably killed, maybe by the out-of-memory killer (see dmesg). If it happens again: {smaller}"


def has_saved(work: Path) -> bool:
    """Return whether a step has saved a state in its work folder, besides records of its progress."""
    return any(name != "records" for name in list_folder(work / "ckpt"))
