"""A limit on the time of one step: first it is asked to stop and save, later it is made to."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

# What a step may take to come to a border at which it looks, and to save.
GRACE_SECONDS = 30.0


class TimeIsUp(BaseException):
    """Raised in a step that was asked to stop and did not; no `except Exception` of a stage's keeps it."""


class TimeLimit:
    """A context in which `passed` becomes true after some seconds, counted by a clock that nobody sets."""

    def __init__(self, seconds: float | None, *, grace_seconds: float = GRACE_SECONDS) -> None:
        """Take the limit; None: there is none."""
        self.seconds, self.grace_seconds = seconds, grace_seconds
        self.passed = False
        self._timers: list[threading.Timer] = []
        self._over = False

    def __enter__(self) -> TimeLimit:
        """Begin to count."""
        if self.seconds is None:
            return self
        self._timers = [threading.Timer(self.seconds, self._pass)]
        if threading.current_thread() is threading.main_thread():  # only there can an exception be raised from outside
            self._former = signal.signal(signal.SIGALRM, self._raise)
            self._timers.append(threading.Timer(self.seconds + self.grace_seconds, self._ring))
        for timer in self._timers:
            timer.daemon = True
            timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Count no longer."""
        self._over = True
        for timer in self._timers:
            timer.cancel()
        if len(self._timers) > 1:
            signal.signal(signal.SIGALRM, self._former)

    def _pass(self) -> None:
        self.passed = True

    def _ring(self) -> None:
        if not self._over:
            identity = threading.main_thread().ident
            assert identity is not None
            signal.pthread_kill(identity, signal.SIGALRM)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not self._over:
            raise TimeIsUp
