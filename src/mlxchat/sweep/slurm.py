"""Jobs of a sweep in a queue: what SLURM stops saves and is queued again; a lost job is not the end of the others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from mlxchat.runner.signals import is_stopping
from mlxchat.sweep.folder import SweepFolder

_POLL_SECONDS = 1.0
# submitit asks sacct every ten minutes whether a job without a result has ended.
_ASK_SECONDS = 60

Leave = Callable[[], str]
"""Hands the job back to its queue and does not return; or returns why it cannot."""


def in_queue() -> bool:
    """Tell whether SLURM started this process through submitit."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


@contextmanager
def leaving() -> Iterator[Leave | None]:
    """Have the run stop when SLURM says that its time is up; yield how to be queued again, None if nobody queued us.

    SLURM tells a job so by SIGUSR2 (submitit asks for that) or, where jobs are preempted, by SIGTERM, in any order. The
    first of them is the run's SIGTERM: it saves. What comes later must not make it leave before it has saved.
    """
    if not in_queue():
        yield None
        return
    requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
    told: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        told.append(number)
        stopping, stop = is_stopping(), signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not stopping and callable(stop):
            stop(signal.SIGTERM, frame)

    def leave() -> str:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not told:  # SLURM itself queues what it preempts; what was cancelled is over
            print("stopped by SLURM; saved. Where it queues the job again, the job goes on from there", flush=True)
            raise SystemExit(128 + signal.SIGTERM)
        try:
            if callable(requeue):
                requeue(told[0], None)  # asks SLURM to queue the job again, and leaves
        except Exception as error:  # submitit raises all kinds where it gives up
            return f"{error} hydra.launcher.max_num_timeout is how often. The same command goes on"
        return "submitit does not queue it again. The same command goes on"

    signal.signal(signal.SIGUSR2, hear)
    try:
        yield leave
    finally:
        signal.signal(signal.SIGUSR2, requeue)


@contextmanager
def all_waited_for(folder: SweepFolder) -> Iterator[None]:
    """Have Hydra's submitit launcher wait for every job, whatever becomes of the others, while the body runs.

    By itself it gives up at the first job without a result, and takes no job out of the queue when the sweep stops.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        yield
        return
    executor: Any = submitit.AutoExecutor
    original = executor.map_array

    def map_array(self: Any, function: Any, *arguments: Any) -> list[_Waiting]:
        jobs = original(self, function, *arguments)
        numbers = folder.state()["pending"]
        started = [numbers[place] for place in arguments[2]]  # hydra.job.num of each
        waiting = [_Waiting(job, number, folder) for job, number in zip(jobs, started, strict=True)]
        for each in waiting:
            each.others = waiting
        return waiting

    executor.map_array = map_array
    try:
        yield
    finally:
        executor.map_array = original


class _Waiting:
    """A job of submitit's as its launcher sees it: it has results once it has ended, in whatever way."""

    def __init__(self, job: Any, number: int, folder: SweepFolder) -> None:
        """Wait for the job of this number."""
        self.job, self.number, self.folder = job, number, folder
        self.others: list[_Waiting] = []
        self.cancelled = False
        with suppress(AttributeError):
            job.watcher._delay_s = min(job.watcher._delay_s, _ASK_SECONDS)

    def results(self) -> list[Any]:
        """Return when the job has ended; what it found is in the sweep's folder."""
        while not self.job.done():
            if self.folder.stop():
                for each in self.others:
                    each.take_back()
            time.sleep(_POLL_SECONDS)
            if self.cancelled:
                break
        return [None]

    def take_back(self) -> None:
        """Take a job that has not begun out of the queue: it would begin, see that there is nothing to do, and end."""
        if not self.cancelled and not self.folder.has_begun(self.number):
            self.cancelled = True
            with suppress(OSError):
                self.job.cancel(check=False)
