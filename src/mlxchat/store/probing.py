"""What the store relies on, tried in a folder: with two processes of this machine, and between two machines."""

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
"""Mark (ok, note, wrong) and what was found, with the remedy."""

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
    """Try what the store relies on with two processes of this machine; yield what was found.

    Args:
        folder: where; it is there, and is left as it was.

    Raises:
        OSError: nothing can be written there.
    """
    place = folder / f".probe-{os.urandom(6).hex()}"
    place.mkdir()
    try:
        for trial in (_flock, _rename, _names, _inodes, _times):
            try:
                yield trial(place)
            except (OSError, StoreError) as error:
                yield "wrong", f"{trial.__doc__}: {getattr(error, 'strerror', None) or error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _flock(place: Path) -> Finding:
    """Locks of two processes."""
    path = place / "lock"
    holder = subprocess.Popen([sys.executable, "-S", "-c", _HOLDER, str(path)], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        assert holder.stdout is not None
        if not holder.stdout.readline():
            return "wrong", "locks: flock is refused here, so nothing keeps two runs from making the same step"
        if not locks.is_held(path):
            return "wrong", "locks: two processes hold the same one at once; two runs could make the same step"
        holder.kill()
        holder.wait()
        began = time.monotonic()
        while locks.is_held(path):
            if time.monotonic() - began > 5:
                return "wrong", "locks: one stays after its holder was killed; a run that dies would block the next"
            time.sleep(0.01)
        return "ok", "locks: of two processes one waits, and gets it when the other is killed"
    finally:
        holder.kill()
        holder.communicate()


def _rename(place: Path) -> Finding:
    """Folders are renamed in one step."""
    made, published = place / "made", place / "published"
    made.mkdir()
    (made / "file").write_text("whole")
    sync(made / "file")
    made.rename(published)
    sync(place)
    if made.exists() or (published / "file").read_text() != "whole":
        return "wrong", "rename: a folder is not under its new name at once"
    return "ok", "rename, fsync: a folder gets its name in one step"


def _names(place: Path) -> Finding:
    """Names are taken once, and links lead where they say."""
    (place / "once").touch(exist_ok=False)
    with suppress(FileExistsError):
        (place / "once").touch(exist_ok=False)
        return "wrong", "names: O_EXCL makes a file that is there already"
    (place / "new").symlink_to("../once")
    (place / "new").replace(place / "latest")
    if str((place / "latest").readlink()) != "../once":
        return "wrong", "symbolic links lead elsewhere; what gc keeps would be lost"
    return "ok", "names: one that is taken is refused, symbolic links work"


def _inodes(place: Path) -> Finding:
    """A removed lock file is noticed."""
    path = place / "inode"
    with path.open("w") as file:
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return "wrong", "numbers of files: an open file has another one than its name, so no lock would be trusted"
        path.unlink()
        path.write_text("another")
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return "wrong", "numbers of files: a new file has the number of an open one that was removed"
    return "ok", "numbers of files: a removed lock file and a new one of the same name differ"


def _times(place: Path) -> Finding:
    """Times of files."""
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
            f"times: the server's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this one; ages "
            "of artifacts and of what was left over are off by that. Set clocks by NTP"
        )
    if grain > _COARSE_SECONDS:
        return "note", f"times: changes less than {grain:.2g} s apart look alike; lists may show a former manifest"
    changed, off = max(grain, 0) * 1000, abs(ahead) * 1000
    return "ok", f"times: a change shows after {changed:.0f} ms, the clock is {off:.0f} ms off"


def probe_hosts(folder: Path, seconds: float, say: Callable[[str], None] = lambda line: None) -> Iterator[Finding]:
    """Try a lock of this folder against another machine that does the same; yield what was found.

    The machine that comes first holds the lock and waits for the other one, which must be refused it, and must get it
    once it is released. That hosts see each other's locks is remembered in the folder.

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
            yield "note", "hosts: no other machine came. Run the same on a second one at the same time"
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
    """Yield what two machines found, and remember it if they see each other's locks."""
    here, kind = locks.host_name(), locks.mount_of(folder).kind
    if other == here:
        yield "note", f"hosts: both processes are on {here}, which tells nothing of other machines"
    if seen == "granted":
        remedy = "mount it so that locks are the server's (NFS: without nolock and local_lock)"
        text = f"hosts: {here} and {other} hold the same lock at once ({kind}): use this folder from one of them only"
        yield "wrong", f"{text}, or {remedy}"
    elif got != "yes":
        yield "wrong", f"hosts: {other} gave a lock back and it was not free, or did not answer within the time"
    else:
        if other != here:
            locks.remember_tested(folder, sorted((here, other)))
        yield "ok", f"hosts: {here} and {other} see each other's locks ({kind})"


def _left_over(meeting: Path) -> str:
    return f"If it is not waiting, {meeting} is left over: remove it, and run this on both machines"


def _tell(path: Path, text: str) -> None:
    with suppress(FileNotFoundError):  # the first machine has its answer and is gone
        write_whole(path, text.encode())


def _await(path: Path, seconds: float) -> str | None:
    """Return what another machine writes to a file within this time; None: nothing."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with suppress(OSError):
            os.listdir(path.parent)  # noqa: PTH208  (asks the server again where it remembers absent names)
            return path.read_text()
        time.sleep(_POLL_SECONDS)
    return None


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
