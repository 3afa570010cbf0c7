"""Which tracked run a command continues: runs/<run>/tracker.json says who tracked it, as what, and how far.

The same command after a crash or ctrl-c plans the same ids; so a run of the same ids that has not ended is continued.
One that has ended never is: `force=[sft]` begins a new one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxchat.store.files import write_whole

NOTE = "tracker.json"
# How often the note follows what was logged, one such time behind, since a service writes with a delay of its own. So
# after a kill what was sent in twice that time may be sent again.
NOTE_SECONDS = 10.0


class Journal:
    """The note of one run: its tracked run and the last iteration of each step that was passed on."""

    def __init__(self, folder: Path, kind: str, project: str, ids: Iterable[str]) -> None:
        """Find what this run continues, if anything.

        Args:
            folder: the run's, below outputs/runs.
            kind: of tracker.
            project: as the tracker calls it.
            ids: of all steps of the plan.
        """
        same = hashlib.sha256(json.dumps([kind, project, sorted(ids)]).encode()).hexdigest()
        self._path = folder / NOTE
        found = _unfinished(folder, same)
        self.is_continued = found is not None
        self.name: str = found["name"] if found else folder.name
        self.key = hashlib.sha256(f"{same}/{self.name}".encode()).hexdigest()[:16]
        self._before: dict[str, int] = dict(found["passed"]) if found else {}
        self._passed = dict(self._before)
        self._settled = dict(self._before)
        self._note = {"kind": kind, "project": project, "same": same, "name": self.name, "key": self.key}
        self._written = 0.0
        self.write(is_ended=False)

    def is_new(self, step: str, iteration: int) -> bool:
        """Tell whether a record has not been passed on before; if so it counts as passed on from now on.

        A step logs several records at an iteration (loss, then validation), each with its own numbers.
        """
        if iteration <= self._before.get(step, -1):
            return False
        self._passed[step] = max(iteration, self._passed.get(step, -1))
        if time.monotonic() - self._written >= NOTE_SECONDS:
            self.write(is_ended=False)
        return True

    def settle(self, *, is_ended: bool) -> None:
        """Write the note at the end, when the service has taken everything."""
        self._settled = dict(self._passed)
        self.write(is_ended=is_ended)

    def write(self, *, is_ended: bool) -> None:
        """Write the note."""
        self._written = time.monotonic()
        note = {**self._note, "ended": is_ended, "passed": self._settled}
        with suppress(OSError):  # it is a help for the next run, no promise
            write_whole(self._path, json.dumps(note).encode())
        self._settled = dict(self._passed)


def _unfinished(folder: Path, same: str) -> dict[str, Any] | None:
    """Return the note of the newest other run of the same ids, unless it has ended."""
    for path in sorted(folder.parent.glob(f"*/{NOTE}"), reverse=True):
        if path.parent == folder:
            continue
        with suppress(OSError, ValueError):
            note = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(note, dict) and note.get("same") == same:
                is_usable = isinstance(note.get("name"), str) and isinstance(note.get("passed"), dict)
                return None if note.get("ended") or not is_usable else note
    return None
