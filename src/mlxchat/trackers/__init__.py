"""Sends metrics to W&B, Trackio, TensorBoard or a user's own service.

A tracker never fails or delays a training: it runs in a thread, and its first failure (missing package, no network, any
error) gives one warning, after which the run continues without it.

runs/<run>/tracker.json records the tracked run and what was sent. The same command after a crash or Ctrl-C plans the
same ids, so an unfinished tracked run with the same ids is continued; after a finished one a new one starts.
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from mlxchat.config.parts import is_own, load_part
from mlxchat.config.schema import TrackerConfig
from mlxchat.config.secrets import redact
from mlxchat.store.files import Records, write_whole
from mlxchat.trackers.services import Results, Service, TrackedRun

# How long the end of a run waits for the service to send the rest.
FINISH_SECONDS = 60.0
NOTE = "tracker.json"
_NOTE_SECONDS = 10.0
_SERVICES = {"wandb": "WandbService", "trackio": "TrackioService", "tensorboard": "TensorBoardService"}


class Tracker:
    """Passes records to a service, in order, in a thread. With kind 'none' every call does nothing."""

    def __init__(
        self, config: TrackerConfig, folder: Path, *, ids: Iterable[str] = (), settings: dict[str, Any] | None = None,
        records: Callable[[str], Path] | None = None, say: Callable[[str], None] = print,
        open_service: Callable[[TrackedRun], Service] | None = None,
    ) -> None:  # fmt: skip
        """Start tracking, or continue an unfinished tracked run with the same ids.

        Args:
            config: the service, and the run's project and tags there.
            folder: folder of the run, below outputs/runs.
            ids: ids of all steps of the plan.
            settings: the configuration, without secrets.
            records: returns the path of a running step's metrics; earlier records are sent before the first new one.
            say: prints a warning.
            open_service: in place of that of `config.kind`.
        """
        self._kind, self._say, self._records = config.kind, say, records
        self._begun: set[str] = set()
        self._waiting: queue.Queue[tuple[str, int, dict[str, float]] | Results] = queue.Queue()
        self._is_broken = False
        self._thread: threading.Thread | None = None
        if config.kind == "none":
            return
        self._journal = Journal(folder, config.kind, config.project, ids)
        run = TrackedRun(
            project=config.project, name=self._journal.name, key=self._journal.key,
            outputs=folder.parent.parent.resolve(), settings=settings or {}, tags=list(config.tags),
            is_continued=self._journal.is_continued,
        )  # fmt: skip
        self._thread = threading.Thread(
            target=self._work,
            args=(run, open_service or partial(_open_service, config.kind)),
            name="tracker",
            daemon=True,
        )
        self._thread.start()

    def log(self, step: str, record: dict[str, Any]) -> None:
        """Send the numbers of a metrics record; a step's first call also sends its earlier records."""
        iteration = record.get("iteration")
        if self._thread is None or self._is_broken or not isinstance(iteration, int):
            return
        if step not in self._begun:
            self._begun.add(step)
            with suppress(OSError):
                for past in Records(self._records(step)).read() if self._records is not None else ():
                    if isinstance(past.get("iteration"), int) and past["iteration"] < iteration:
                        self._pass(step, past)
        self._pass(step, record)

    def _pass(self, step: str, record: dict[str, Any]) -> None:
        iteration, numbers = record["iteration"], numbers_of(record, without="iteration")
        if self._journal.is_new(step, iteration) and numbers:
            self._waiting.put((step, iteration, numbers))

    def finish(self, results: Results | None = None) -> None:
        """End the tracked run with its results; wait up to `FINISH_SECONDS` for the service."""
        if self._thread is None:
            return
        results = results or Results(is_done=False)
        self._waiting.put(results)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._complain(f"still busy after {FINISH_SECONDS:g} s, not waiting any longer")
        self._journal.write(is_ended=results.is_done)
        self._thread = None

    def _work(self, run: TrackedRun, open_service: Callable[[TrackedRun], Service]) -> None:
        try:
            service = open_service(run)
            while not isinstance(entry := self._waiting.get(), Results):
                service.log(*entry)
            service.finish(entry)
        except ImportError as error:
            remedy = "" if is_own(self._kind) else f"; install it: pip install 'mlxchat[{self._kind}]'"
            self._complain(f"{error}{remedy}")
        except BaseException as error:  # some services end the process if they are refused; here only the thread ends
            self._complain(f"{type(error).__name__}: {error}")

    def _complain(self, problem: str) -> None:
        if not self._is_broken:
            self._is_broken = True
            line = " ".join(problem.split())
            self._say(redact(f"warning: tracker={self._kind} failed ({line}); the run continues without it"))


def numbers_of(record: Mapping[str, Any], *, without: str = "") -> dict[str, float]:
    """Return the finite numbers of a record; other values break the plots of some services."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and name != without
    }


def _open_service(kind: str, run: TrackedRun) -> Service:
    """Open a service; imports only its package."""
    part = load_part(kind) if is_own(kind) else getattr(import_module("mlxchat.trackers.services"), _SERVICES[kind])
    service: Service = part(run)
    return service


class Journal:
    """The note of one run: its tracked run and the last iteration of each step that was sent."""

    def __init__(self, folder: Path, kind: str, project: str, ids: Iterable[str]) -> None:
        """Find the tracked run that this run, in a folder below outputs/runs, continues; `ids` are of all its steps."""
        same = hashlib.sha256(json.dumps([kind, project, sorted(ids)]).encode()).hexdigest()
        self._path = folder / NOTE
        found = _unfinished(folder, same)
        self.is_continued = found is not None
        self.name: str = found["name"] if found else folder.name
        self.key = hashlib.sha256(f"{same}/{self.name}".encode()).hexdigest()[:16]
        self._before: dict[str, int] = dict(found["passed"]) if found else {}
        self._passed = dict(self._before)
        self._note = {"kind": kind, "project": project, "same": same, "name": self.name, "key": self.key}
        self._written = 0.0
        self.write(is_ended=False)

    def is_new(self, step: str, iteration: int) -> bool:
        """Return True if a record was not sent before, and mark it as sent.

        A step logs several records per iteration (loss, then validation) with different numbers.
        """
        if iteration <= self._before.get(step, -1):
            return False
        self._passed[step] = max(iteration, self._passed.get(step, -1))
        if time.monotonic() - self._written >= _NOTE_SECONDS:
            self.write(is_ended=False)
        return True

    def write(self, *, is_ended: bool) -> None:
        """Write the note."""
        self._written = time.monotonic()
        note = {**self._note, "ended": is_ended, "passed": self._passed}
        with suppress(OSError):  # without the note the next run starts a new tracked run
            write_whole(self._path, json.dumps(note))


def _unfinished(folder: Path, same: str) -> dict[str, Any] | None:
    """Return the note of the newest unfinished other run with the same ids."""
    for path in sorted(folder.parent.glob(f"*/{NOTE}"), reverse=True):
        with suppress(OSError, ValueError):
            note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if path.parent != folder and note["same"] == same:
                return None if note["ended"] else note
    return None
