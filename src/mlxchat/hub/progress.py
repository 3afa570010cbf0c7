"""What a person sees of a transfer: bytes, bytes per second, how long it will take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from mlxchat.runner.progress import Progress, format_bytes, format_seconds

_FIRST_SECONDS = 1.0
_INTERVAL_SECONDS = 0.2


class TransferProgress:
    """Counts the bytes of a transfer, from any thread, and shows them once it takes longer than a moment."""

    def __init__(
        self, title: str, total: int, on_progress: Callable[[int, int], None] | None, *, start: int = 0,
        verb: str = "fetch",
    ) -> None:  # fmt: skip
        """Begin with `start` of `total` bytes (0: not known); `on_progress` replaces the display, `verb` heads it."""
        self.verb = verb
        self.title, self.total, self.done, self.start = title, total, start, start
        self._on_progress, self._lock = on_progress, threading.Lock()
        self._began = self._shown = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> TransferProgress:
        """Begin to measure."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the display away; say in one line what a long transfer brought."""
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
            brought, seconds = self.done - self.start, max(1e-9, time.monotonic() - self._began)
            speed = f"{format_bytes(brought / seconds)}/s"
            self._bar.note(f"{self.title}: {format_bytes(brought)} in {format_seconds(seconds)}, {speed}")

    def add(self, count: int) -> None:
        """Count bytes that arrived, or, below 0, that were thrown away."""
        with self._lock:
            self.done += count
            if self._on_progress is not None:
                self._on_progress(self.done, self.total)
                return
            now = time.monotonic()
            if now - self._began < _FIRST_SECONDS or now - self._shown < _INTERVAL_SECONDS:
                return
            self._shown = now
            if self._bar is None:
                self._bar = _ByteProgress(self.verb, max(1, self.total), "", start=self.start)
                self._bar.__enter__()
                self._bar.began = self._began
            speed = (self.done - self.start) / max(1e-9, now - self._began)
            self._bar.update(self.done, speed=f"{format_bytes(max(0.0, speed))}/s")


class _ByteProgress(Progress):
    """A bar of bytes."""

    def amount(self, done: int) -> str:
        """Return how much is done, as people read it."""
        return f"{format_bytes(done)} of {format_bytes(self.total)}" if self.total > 1 else format_bytes(done)
