"""Joining MLX's group, with an end in any case: MLX waits for ever, and lets no thread of Python run meanwhile."""

from __future__ import annotations

import faulthandler
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxchat.distributed.group import Group
from mlxchat.errors import StepFailed
from mlxchat.launch.meeting import forget_meeting

JOIN_SECONDS = 60.0
_MOST_HANDLES = 1024


def join_group(
    backend: str, variables: Mapping[str, str], hosts: list[list[str]] | None, *, tell: bool
) -> tuple[Group, list[int]]:
    """Return MLX's group, and the handles of the sockets that it made.

    Args:
        backend: ring, jaccl, nccl or mpi.
        variables: what MLX reads, besides what the environment has; it is cleared afterwards.
        hosts: addresses of each rank, for a ring; None: MLX_HOSTFILE names the file.
        tell: whether this process says it to people if the others do not come.

    Raises:
        StepFailed: MLX could not reach the other ranks.
    """
    os.environ.update(variables)
    file = None
    if hosts is not None:
        handle, name = tempfile.mkstemp(prefix="mlxchat-ranks-", suffix=".json")
        with os.fdopen(handle, "w") as opened:
            json.dump(hosts, opened)
        file = Path(name)
        os.environ["MLX_HOSTFILE"] = name
    before = _sockets()
    try:
        with _ending_after(JOIN_SECONDS, tell=tell):
            raw = mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        raise StepFailed(f"MLX could not connect the ranks by {backend}: {error}") from error
    finally:
        forget_meeting()
        if file is not None:
            file.unlink(missing_ok=True)
    return Group(raw, backend), sorted(_sockets() - before)


def shut(handles: list[int]) -> None:
    """End connections that MLX waits at, which it takes for the loss of the other side."""
    for handle in handles:
        with suppress(OSError), socket.socket(fileno=os.dup(handle)) as connection:
            connection.shutdown(socket.SHUT_RDWR)


def _sockets() -> set[int]:
    found = set()
    for handle in range(3, _MOST_HANDLES):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(handle).st_mode):
                found.add(handle)
    return found


@contextmanager
def _ending_after(seconds: float, *, tell: bool) -> Iterator[None]:
    """End this process if the body takes longer, or at any signal: nothing needs to be cleaned up yet."""
    watcher: subprocess.Popen[bytes] | None = None
    if tell:
        text = (
            f"error: the ranks of this run have found each other, but MLX did not connect them within {seconds:g} "
            "seconds.\n       Can all hosts reach each other at the addresses of the hostfile?"
        )
        # It ends with this process, however that ends.
        script = (
            f"i=0; while [ $i -lt {seconds:g} ]; do sleep 1; kill -0 {os.getpid()} 2> /dev/null || exit; "
            f"i=$((i + 1)); done; echo {shlex.quote(text)} >&2; kill -9 {os.getpid()}"
        )
        watcher = subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True)
    else:
        faulthandler.dump_traceback_later(seconds, exit=True)
    former: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for known, handler in former.items():
            signal.signal(known, handler)
        if watcher is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            with suppress(ProcessLookupError):
                os.killpg(watcher.pid, signal.SIGKILL)
            watcher.wait()
