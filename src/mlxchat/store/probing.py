"""Tests of a file system for `mlxchat doctor`: by two processes of this machine, and by two machines."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from mlxchat.errors import StoreError
from mlxchat.store import locks
from mlxchat.store.files import sync, write_whole

Finding = tuple[str, str]
"""Mark (ok, note, wrong) and finding, with the remedy."""

_HOLDER = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""
_CLOCK_SECONDS = 2.0
_COARSE_SECONDS = 0.05
_POLL_SECONDS = 0.05
_STALE_SECONDS = 600


def probe_folder(folder: Path) -> Iterator[Finding]:
    """Test locks, renames, symlinks, inodes and timestamps in a folder; yield findings.

    Args:
        folder: an existing folder; it is left unchanged.

    Raises:
        OSError: it cannot be written.
    """
    place = folder / f".probe-{os.urandom(6).hex()}"
    place.mkdir()
    try:
        for trial in (_locks, _rename, _names, _inodes, _times):
            try:
                yield trial(place)
            except (OSError, StoreError) as error:
                yield "wrong", f"{trial.__name__[1:]}: {getattr(error, 'strerror', None) or error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _locks(place: Path) -> Finding:
    """Test flock between two processes."""
    path = place / "lock"
    holder = subprocess.Popen([sys.executable, "-S", "-c", _HOLDER, str(path)], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        assert holder.stdout is not None
        if not holder.stdout.readline():
            return "wrong", "locks: flock is refused here, so two runs could run the same step"
        if not locks.is_held(path):
            return "wrong", "locks: two processes hold the same one at once, so two runs could run the same step"
        holder.kill()
        holder.wait()
        began = time.monotonic()
        while locks.is_held(path):
            if time.monotonic() - began > 5:
                return "wrong", "locks: one stays after its holder was killed; a killed run would block the next one"
            time.sleep(0.01)
        return "ok", "locks: one holder at a time, released when the holder is killed"
    finally:
        holder.kill()
        holder.communicate()


def _rename(place: Path) -> Finding:
    """Test that renaming a folder is atomic."""
    made, published = place / "made", place / "published"
    made.mkdir()
    (made / "file").write_text("whole")
    sync(made / "file")
    made.rename(published)
    sync(place)
    if made.exists() or (published / "file").read_text() != "whole":
        return "wrong", "rename: renaming a folder is not atomic"
    return "ok", "rename, fsync: renaming a folder is atomic"


def _names(place: Path) -> Finding:
    """Test O_EXCL and symlinks."""
    (place / "once").touch(exist_ok=False)
    with suppress(FileExistsError):
        (place / "once").touch(exist_ok=False)
        return "wrong", "names: O_EXCL creates a file that exists already"
    (place / "new").symlink_to("../once")
    (place / "new").replace(place / "latest")
    if str((place / "latest").readlink()) != "../once":
        return "wrong", "symbolic links lead elsewhere; gc would remove artifacts that are needed"
    return "ok", "names: O_EXCL and symbolic links work"


def _inodes(place: Path) -> Finding:
    """Test that a replaced file is recognised."""
    path = place / "inode"
    with path.open("w") as file:
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return "wrong", "inodes: an open file has another inode than its path, so locks cannot be verified"
        path.unlink()
        path.write_text("another")
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return "wrong", "inodes: a new file has the inode of an open one that was removed"
    return "ok", "inodes: a removed lock file and its replacement differ"


def _times(place: Path) -> Finding:
    """Test the resolution of timestamps and the server's clock."""
    path = place / "time"
    path.write_text("0")
    seen, began = path.stat().st_mtime_ns, time.monotonic()
    ahead = seen / 1e9 - time.time()
    pause = 1e-4
    while path.stat().st_mtime_ns == seen and time.monotonic() - began < 3:
        time.sleep(pause)
        pause *= 1.5
        path.write_text("1")
    grain = (path.stat().st_mtime_ns - seen) / 1e9
    if abs(ahead) > _CLOCK_SECONDS:
        return "note", (
            f"times: the server's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this one, and so "
            "are ages of artifacts. Set clocks by NTP"
        )
    if grain > _COARSE_SECONDS:
        return "note", f"times: changes less than {grain:.2g} s apart look alike; lists may show an old manifest"
    changed, off = max(grain, 0) * 1000, abs(ahead) * 1000
    return "ok", f"times: resolution {changed:.0f} ms, clock offset {off:.0f} ms"


def probe_hosts(folder: Path, seconds: float, say: Callable[[str], None] = lambda line: None) -> Iterator[Finding]:
    """Test a lock of this folder against another machine that does the same; yield findings.

    The first machine holds the lock and waits for the second one, which must not get it until it is released. Success
    is recorded in the folder.

    Args:
        folder: `locks/` of an outputs folder.
        seconds: how long to wait for the other machine.
        say: prints a line.
    """
    meeting = folder / ".two-hosts"
    meeting.mkdir(parents=True, exist_ok=True)
    if time.time() - meeting.stat().st_mtime > _STALE_SECONDS and not (meeting / "second").exists():
        shutil.rmtree(meeting, ignore_errors=True)
        meeting.mkdir()
    try:
        (meeting / "first").touch(exist_ok=False)
    except FileExistsError:
        yield from _come_second(folder, meeting, seconds)
        return
    try:
        yield from _come_first(folder, meeting, seconds, say)
    finally:
        shutil.rmtree(meeting, ignore_errors=True)


def _come_first(folder: Path, meeting: Path, seconds: float, say: Callable[[str], None]) -> Iterator[Finding]:
    with (meeting / "lock").open("w") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        _tell(meeting / "first-is", locks.host_name())
        say(f"waiting for the other machine: mlxchat doctor --hosts outputs={folder.parent}")
        if (answer := _await(meeting / "second", seconds)) is None:
            yield "note", "hosts: no other machine responded. Run the same command on a second one at the same time"
            return
        other, seen = answer.split("\n")
        fcntl.flock(lock.fileno(), fcntl.LOCK_UN)
        _tell(meeting / "released", "yes")
        got = _await(meeting / "got", seconds)
    yield from _conclude(folder, other, seen, got)


def _come_second(folder: Path, meeting: Path, seconds: float) -> Iterator[Finding]:
    if (other := _await(meeting / "first-is", seconds)) is None:
        yield "note", f"hosts: the other machine does not answer. {_left_over(meeting)}"
        return
    with (meeting / "lock").open("r+") as lock:
        seen = "granted" if _try(lock.fileno()) else "refused"
        _tell(meeting / "second", f"{locks.host_name()}\n{seen}")
        if _await(meeting / "released", seconds) is None:
            yield "note", f"hosts: {other} does not answer. {_left_over(meeting)}"
            return
        ends = time.monotonic() + 10
        while not (got := _try(lock.fileno())) and time.monotonic() < ends:
            time.sleep(_POLL_SECONDS)
        _tell(meeting / "got", "yes" if got else "no")
    yield from _conclude(folder, other, seen, "yes" if got else "no")


def _conclude(folder: Path, other: str, seen: str, got: str | None) -> Iterator[Finding]:
    """Yield the findings of two machines, and record it if they see each other's locks."""
    here, kind = locks.host_name(), locks.mount_of(folder).kind
    if other == here:
        yield "note", f"hosts: both processes are on {here}, which does not test other machines"
    if seen == "granted":
        remedy = "mount it so that locks are the server's (NFS: without nolock and local_lock)"
        text = f"hosts: {here} and {other} hold the same lock at once ({kind}): use this folder from one of them only"
        yield "wrong", f"{text}, or {remedy}"
    elif got != "yes":
        yield "wrong", f"hosts: {other} released a lock that did not become free, or did not answer in time"
    else:
        if other != here:
            locks.remember_tested(folder, sorted((here, other)))
        yield "ok", f"hosts: {here} and {other} see each other's locks ({kind})"


def _left_over(meeting: Path) -> str:
    return f"If it is not waiting, {meeting} is left over: remove it, and run the command on both machines again"


def _tell(path: Path, text: str) -> None:
    with suppress(FileNotFoundError):  # the first machine has finished and removed the folder
        write_whole(path, text.encode())


def _await(path: Path, seconds: float) -> str | None:
    """Return what another machine writes to a file within this time, or None."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with suppress(OSError):
            os.listdir(path.parent)  # noqa: PTH208  (makes NFS look up absent names again)
            return path.read_text()
        time.sleep(_POLL_SECONDS)
    return None


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
