"""Metrics to a tracking service besides metrics.jsonl: Weights & Biases, Trackio or TensorBoard.

    service               what a service is given, and the three things that it does
    continuing            which tracked run a command continues
    wandb_service, trackio_service, tensorboard_service

A tracker is a convenience and never a reason to lose a training: it works in a thread of its own, and the first thing
that goes wrong (package missing, no network, a fault in the middle) is told once; from then on the run goes on without.
"""

from __future__ import annotations

import importlib
import math
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxchat.config.parts import is_own, load_part
from mlxchat.config.schema import TrackerConfig
from mlxchat.config.secrets import redact
from mlxchat.trackers.continuing import Journal
from mlxchat.trackers.service import Results, Service, TrackedRun

# What the end of a run waits for a service that still has something to send.
FINISH_SECONDS = 60.0
_SERVICES = {
    "wandb": ("wandb_service", "WandbService"),
    "trackio": ("trackio_service", "TrackioService"),
    "tensorboard": ("tensorboard_service", "TensorBoardService"),
}


class Tracker:
    """Passes records on to a service, in their order, in a thread. With kind 'none' every call does nothing."""

    def __init__(
        self, config: TrackerConfig, folder: Path, *, ids: Iterable[str] = (), settings: dict[str, Any] | None = None,
        history: Callable[[str], Iterable[dict[str, Any]]] = lambda step: (), say: Callable[[str], None] = print,
        open_service: Callable[[TrackedRun], Service] | None = None,
    ) -> None:  # fmt: skip
        """Begin to track, or continue a run of the same ids that has not ended.

        Args:
            config: which service, and what the run is called there.
            folder: of the run, below outputs/runs.
            ids: of all steps of the plan.
            settings: the configuration, without secrets.
            history: returns what a step has recorded so far; a service that lost some of it in a crash, or was chosen
                after the step began, gets it before the first new record.
            say: where a warning goes.
            open_service: what begins to track in place of `config.kind`.
        """
        self._kind, self._say, self._history = config.kind, say, history
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
            target=self._work, args=(run, open_service or _open_service(config.kind)), name="tracker", daemon=True
        )
        self._thread.start()

    def log(self, step: str, record: dict[str, Any]) -> None:
        """Pass the numbers of a metrics record on; their x is the record's iteration."""
        iteration = record.get("iteration")
        if self._thread is None or self._is_broken or not isinstance(iteration, int):
            return
        if step not in self._begun:
            self._begun.add(step)
            with suppress(Exception):  # what cannot be read is left out
                for past in self._history(step):
                    if past["iteration"] < iteration:
                        self._pass(step, past)
        self._pass(step, record)

    def _pass(self, step: str, record: dict[str, Any]) -> None:
        iteration, numbers = record["iteration"], numbers_of(record, without="iteration")
        if self._journal.is_new(step, iteration) and numbers:
            self._waiting.put((step, iteration, numbers))

    def finish(self, results: Results | None = None) -> None:
        """End the tracked run with what came of it; wait for what was not sent yet, but not for long."""
        if self._thread is None:
            return
        results = results or Results(is_done=False)
        self._waiting.put(results)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._complain(f"still busy after {FINISH_SECONDS:g} s, left alone")
        if self._is_broken:
            self._journal.write(is_ended=results.is_done)
        else:
            self._journal.settle(is_ended=results.is_done)
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
        except BaseException as error:  # some services end the process when they are refused: here only this thread
            self._complain(f"{type(error).__name__}: {error}")

    def _complain(self, problem: str) -> None:
        if not self._is_broken:
            self._is_broken = True
            line = " ".join(problem.split())
            self._say(redact(
                f"warning: tracker={self._kind} does not work ({line}); the run goes on without it"
            ))  # fmt: skip


def numbers_of(record: dict[str, Any], *, without: str = "") -> dict[str, float]:
    """Return the entries of a record that are finite numbers; what is none of these breaks some services' plots."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and name != without
    }


def _open_service(kind: str) -> Callable[[TrackedRun], Service]:
    """Return what begins to track; its package is only imported then."""

    def begin(run: TrackedRun) -> Service:
        if is_own(kind):
            own: Service = load_part(kind)(run)
            return own
        module, name = _SERVICES[kind]
        service: Service = getattr(importlib.import_module(f"mlxchat.trackers.{module}"), name)(run)
        return service

    return begin
