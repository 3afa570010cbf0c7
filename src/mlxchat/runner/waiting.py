"""Waiting for another process: whom for, how far it is, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxchat.errors import Interrupted
from mlxchat.runner.run import Run
from mlxchat.store import attempts, locks

REFRESH_SECONDS = 10.0


class Waiting:
    """Says for whom a step waits, again whenever that one got further, and ends the wait when the run shall stop."""

    def __init__(self, run: Run, step: str, lock: Path, *, doing: str, work: Path | None = None) -> None:
        """Prepare to wait for a lock; `doing` is what its holder does, `work` where its iterations can be read."""
        self.run, self.step, self.lock, self.doing, self.work = run, step, lock, doing, work
        self._said = ""
        self._looked = time.monotonic()

    @property
    def calls(self) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
        """What `locks.hold` takes as `on_wait` and `check`."""
        return self._begin, self._look

    def _begin(self, owner: dict[str, Any]) -> None:
        self.run.event("step_waits", step=self.step, owner=owner)
        self._say(owner)

    def _look(self) -> None:
        if self.run.stop_signal is not None:
            raise Interrupted(f"stopped while {self.step} waited. The same command continues.", self.run.stop_signal)
        if time.monotonic() - self._looked >= REFRESH_SECONDS:
            self._looked = time.monotonic()
            self._say(locks.read_owner(self.lock))

    def _say(self, owner: dict[str, Any]) -> None:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} (run {owner.get('run', '?')})"
        iteration = attempts.iteration(self.work) if self.work is not None else None
        line = f"{self.step:<10} waits: {who} {self.doing}" + (f", at iteration {iteration}" if iteration else "")
        if line != self._said:
            self._said = line
            self.run.say(line)
