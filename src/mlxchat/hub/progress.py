"""Progress of a transfer: bytes, bytes per second, time left."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from mlxchat.config.wording import format_bytes, format_seconds
from mlxchat.runner.progress import Progress

_FIRST_SECONDS = 1.0
_INTERVAL_SECONDS = 0.2


class TransferProgress:
    """Counts the bytes of a transfer, from any thread, and shows them once it takes longer than a moment."""

    def __init__(self, title: str, total: int, *, start: int = 0, verb: str = "fetch") -> None:
        """Begin with `start` of `total` bytes (0: not known); `verb` heads the display."""
        self.title, self.done, self.start = title, start, start
        self._bar = _ByteProgress(verb, max(1, total), "", start=start)
        self._is_shown, self._shown = False, self._bar.began
        self._lock = threading.Lock()

    def __enter__(self) -> TransferProgress:
        """Begin to measure."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the display away; print one line about what a long transfer brought."""
        if self._is_shown:
            self._bar.__exit__(kind, error, trace)
            brought, seconds = self.done - self.start, max(1e-9, time.monotonic() - self._bar.began)
            speed = f"{format_bytes(brought / seconds)}/s"
            self._bar.note(f"{self.title}: {format_bytes(brought)} in {format_seconds(seconds)}, {speed}")

    def add(self, count: int) -> None:
        """Count bytes that arrived, or, below 0, that were thrown away."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            seconds = now - self._bar.began
            if seconds < _FIRST_SECONDS or now - self._shown < _INTERVAL_SECONDS:
                return
            self._shown = now
            if not self._is_shown:
                self._is_shown = True
                self._bar.__enter__()
            speed = max(0.0, (self.done - self.start) / max(1e-9, seconds))
            self._bar.update(self.done, speed=f"{format_bytes(speed)}/s")


class _ByteProgress(Progress):
    """A bar of bytes."""

    def amount(self, done: int) -> str:
        """Return how much is done, as people read it."""
        return f"{format_bytes(done)} of {format_bytes(self.total)}" if self.total > 1 else format_bytes(done)
