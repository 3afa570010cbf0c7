"""Find the descendants of a process, also those that left its group and session, where the system cannot forbid them.

A process that has lost its parent is no longer anybody's child, so descendants are noted while they are: the table of
processes is read several times a second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

_KILL_ROUNDS = 50
_PROC = Path("/proc")


class Watch:
    """A process and all that were seen to descend from it."""

    def __init__(self, pid: int) -> None:
        """Begin with one process."""
        self._known: dict[int, str] = {pid: ""}
        self._root = pid

    def look(self) -> int:
        """Note new descendants; return the resident bytes of all of them together."""
        table = _processes()
        for pid, (_, _, started) in table.items():
            if pid in self._known and self._known[pid] not in ("", started):
                del self._known[pid]  # the number was given to another process
        size = -1
        while size != len(self._known):
            size = len(self._known)
            for pid, (parent, _, started) in table.items():
                if parent in self._known or pid in self._known:
                    self._known[pid] = started
        return sum(resident for pid, (_, resident, _) in table.items() if pid in self._known)

    def written(self) -> int | None:
        """Return how many bytes the first process has written so far, to any file or pipe.

        None: it is unknown, as for root without the capability CAP_SYS_PTRACE.
        """
        try:
            lines = (_PROC / str(self._root) / "io").read_text().splitlines()
        except OSError:
            return None
        counts = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
        # The second also counts pages that were changed through a mapping of a file on a disk.
        return max(counts.get("wchar", 0), counts.get("write_bytes", 0))

    def kill(self) -> None:
        """Kill what is left of them, until a look finds none. The first process is its parent's business."""
        for _ in range(_KILL_ROUNDS):
            self.look()
            table = _processes()
            left = [pid for pid in self._known if pid != self._root and pid in table]
            if not left:
                return
            for pid in left:
                if table[pid][2] == self._known[pid]:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def _processes() -> dict[int, tuple[int, int, str]]:
    """Return each living process's parent, resident bytes and start time."""
    table = {}
    if (_PROC / "self").is_dir():
        for place in _PROC.iterdir():
            if place.name.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    fields = (place / "stat").read_text().rpartition(")")[2].split()
                    if fields[0] not in "ZX":
                        resident = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
                        table[int(place.name)] = (int(fields[1]), resident, fields[19])
        return table
    listing = subprocess.run(
        ["/bin/ps", "-A", "-o", "pid=,ppid=,rss=,stat=,lstart="], capture_output=True, text=True, check=False
    )
    for line in listing.stdout.splitlines():
        fields = line.split(None, 4)
        if len(fields) == 5 and not fields[3].startswith("Z"):
            table[int(fields[0])] = (int(fields[1]), int(fields[2]) * 1024, fields[4])
    return table
