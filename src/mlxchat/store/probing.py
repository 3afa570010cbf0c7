"""What the runner relies on, tried in a folder: with two processes of this machine, and between two machines."""

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
from mlxchat.store.locks import mount_of, remember_tested

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
_MEETING = ".two-hosts"
_PUBLICATIONS = 20


def probe_folder(folder: Path) -> Iterator[Finding]:
    """Try what the runner relies on with two processes of this machine; yield what was found.

    Args:
        folder: where; it is there, and is left as it was.

    Raises:
        OSError: nothing can be written there.
    """
    place = folder / f".probe-{os.urandom(6).hex()}"
    place.mkdir()
    try:
        for trial in (_flock, _rename, _exclusive, _links, _inodes, _times):
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
    (place / "made").mkdir()
    (place / "made" / "file").write_text("whole")
    sync(place / "made" / "file")
    sync(place / "made")
    (place / "made").rename(place / "published")
    sync(place)
    first, second = place / "first", place / "second"
    for path in (first, second):
        path.write_text(path.name)
    first.replace(second)
    if (
        (place / "made").exists()
        or (place / "published" / "file").read_text() != "whole"
        or second.read_text() != "first"
    ):
        return "wrong", "rename: a folder or file is not under its new name at once"
    return "ok", "rename, fsync: a folder gets its name in one step"


def _exclusive(place: Path) -> Finding:
    """A name can be taken once."""
    (place / "once").touch(exist_ok=False)
    try:
        (place / "once").touch(exist_ok=False)
    except FileExistsError:
        return "ok", "names: one that is taken is refused"
    return "wrong", "names: O_EXCL makes a file that is there already"


def _links(place: Path) -> Finding:
    """Symbolic links."""
    (place / "refs").mkdir()
    (place / "refs" / "new").symlink_to("../once")
    (place / "refs" / "new").replace(place / "refs" / "latest")
    if str((place / "refs" / "latest").readlink()) != "../once":
        return "wrong", "symbolic links lead elsewhere; what gc keeps would be lost"
    return "ok", "symbolic links work: names for people in refs/"


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
    return "ok", "numbers of files: a lock file that was removed is told from the new one"


def _times(place: Path) -> Finding:
    """Times of files."""
    path = place / "time"
    path.write_text("0")
    seen, began, now = path.stat().st_mtime_ns, time.monotonic(), time.time()
    ahead = seen / 1e9 - now
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
        return (
            "note",
            f"times: a file's changes are told apart {grain:.2g} s apart; lists may show a manifest's former form",
        )
    return (
        "ok",
        f"times: a change shows after {max(grain, 0) * 1000:.0f} ms, the clock is {abs(ahead) * 1000:.0f} ms off",
    )


class HostsProbe:
    """Two machines try their locks against each other. The first one waits for the second."""

    def __init__(self, folder: Path, seconds: float, say: Callable[[str], None] = lambda line: None) -> None:
        """Prepare to meet another process in a folder, for at most so many seconds."""
        self.folder, self.meeting = folder, folder / _MEETING
        self.ends = time.monotonic() + seconds
        self.say = say

    def run(self) -> Iterator[Finding]:
        """Meet the other one; yield what was found, and remember it in the folder if locks are seen."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            self.meeting.mkdir()
        stale = time.time() - self.meeting.stat().st_mtime > 600 and not (self.meeting / "second").exists()
        if stale:
            shutil.rmtree(self.meeting, ignore_errors=True)
            self.meeting.mkdir()
        try:
            (self.meeting / "first").touch(exist_ok=False)
        except FileExistsError:
            yield from self._second()
            return
        try:
            yield from self._first()
        finally:
            shutil.rmtree(self.meeting, ignore_errors=True)

    def _first(self) -> Iterator[Finding]:
        handle = os.open(self.meeting / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._put("first-is", locks.host_name())
            self.say(f"waiting for the other machine: mlxchat doctor --hosts outputs={self.folder.parent}")
            other = self._await("second")
            if other is None:
                yield "note", "hosts: no other machine came. Run the same on a second one at the same time"
                return
            for number in range(_PUBLICATIONS):  # folders appear whole, or the second one tells
                made = self.meeting / f".made-{number}"
                made.mkdir()
                (made / "file").write_text("x" * 100_000)
                sync(made / "file")
                made.rename(self.meeting / f"published-{number}")
            self._put("published", "all")
            seen = self._await("looked")
            released = time.time()
            fcntl.flock(handle, fcntl.LOCK_UN)
            self._put("released", str(released))
            got = self._await("got") if seen == "refused" else None
        finally:
            os.close(handle)
        wrong = self._await("partial")
        yield from self._verdict(other, seen, got, wrong)
        self._put("end", "")
        self._await("gone", seconds=5)

    def _second(self) -> Iterator[Finding]:
        other = self._await("first-is")
        if other is None:
            yield "note", f"hosts: the other machine does not answer. {self._left_over}"
            return
        handle = os.open(self.meeting / "lock", os.O_RDWR)
        try:
            refused = not _try(handle)
            self._put("second", locks.host_name())
            if self._await("published") is None:
                yield "note", f"hosts: {other} does not answer. {self._left_over}"
                return
            whole = [self._is_whole(number) for number in range(_PUBLICATIONS)]
            self._put("looked", "refused" if refused else "granted")
            got = None
            if refused and self._await("released") is not None:
                limit = time.monotonic() + 10
                while not _try(handle) and time.monotonic() < limit:
                    time.sleep(_POLL_SECONDS)
                got = "late" if time.monotonic() >= limit else "got"
                self._put("got", got)
            wrong = "none" if all(whole) else f"{whole.count(False)} of {len(whole)}"
            self._put("partial", wrong)
        finally:
            os.close(handle)
        yield from self._verdict(other, "refused" if refused else "granted", got, wrong)
        self._await("end", seconds=5)
        with suppress(OSError):
            self._put("gone", "")

    def _verdict(self, other: str, seen: str | None, got: str | None, wrong: str | None) -> Iterator[Finding]:
        here = locks.host_name()
        mount = mount_of(self.folder)
        if other == here:
            yield "note", f"hosts: both processes are on {here}, which tells nothing of other machines"
        if seen == "refused" and got == "got":
            yield "ok", f"hosts: {here} and {other} see each other's locks ({mount.kind})"
            if other != here:
                remember_tested(self.folder, sorted((here, other)))
        elif seen == "granted":
            yield (
                "wrong",
                (
                    f"hosts: {here} and {other} hold the same lock at once ({mount.kind}): use this folder from one of "
                    "them only, or mount it so that locks are the server's (NFS: without nolock and local_lock)"
                ),
            )
        else:
            yield "wrong", f"hosts: {other} gave a lock back and it was not free, or did not answer within the time"
        if wrong not in (None, "none"):
            yield "wrong", f"hosts: of folders that {other} renamed, {wrong} were not there whole at once"
        elif wrong == "none":
            yield "ok", f"hosts: {_PUBLICATIONS} folders that the other one published were whole at once"

    @property
    def _left_over(self) -> str:
        return f"If it is not waiting, {self.meeting} is left over: remove it, and run this on both machines"

    def _is_whole(self, number: int) -> bool:
        try:
            return (self.meeting / f"published-{number}" / "file").stat().st_size == 100_000
        except OSError:
            return False

    def _put(self, name: str, text: str) -> None:
        write_whole(self.meeting / name, text.encode() or b"-")

    def _await(self, name: str, seconds: float | None = None) -> str | None:
        ends = self.ends if seconds is None else time.monotonic() + seconds
        while time.monotonic() < ends:
            with suppress(OSError):
                os.listdir(self.meeting)  # noqa: PTH208  (asks the server anew where absent names are remembered)
                return (self.meeting / name).read_text()
            time.sleep(_POLL_SECONDS)
        return None


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
