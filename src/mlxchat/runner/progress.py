"""Progress of a step: a live line on a terminal, otherwise a plain line from time to time."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from mlxchat.config.wording import format_seconds
from mlxchat.errors import visible

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_PLAIN_INTERVAL_SECONDS = 5.0
_SPINNER_COLUMNS = 2


class Progress:
    """Progress of one long task, used as a context manager."""

    def __init__(self, title: str, total: int, unit: str, *, start: int = 0, stream: TextIO | None = None) -> None:
        """Show `total` units of work called `unit`; `start` of them are already done."""
        self.title, self.total, self.unit, self.start = title, total, unit, start
        self.stream = stream if stream is not None else sys.stderr
        self.began = self.last_line = time.monotonic()
        self._first: tuple[int, float] | None = None
        """Units and time of the first update: what comes before includes compiling and loading."""
        self.bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        """Show the line, on a terminal."""
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn

            columns = (SpinnerColumn(), TextColumn("{task.fields[line]}", markup=False))
            self.bar = Progress(*columns, console=Console(file=self.stream), transient=True)
            self.task = self.bar.add_task("", line=self.title)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the line."""
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, **numbers: str) -> None:
        """Show that `done` units are finished.

        Args:
            done: number of finished units.
            numbers: formatted values such as loss="3.91", speed="4.1k tok/s", most important first, since a narrow
                terminal cuts the line.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
        before, then = self._first
        eta = [f"eta {format_seconds((now - then) / (done - before) * (self.total - done))}"] if done > before else []
        parts = [value if key in ("speed", "memory") else f"{key} {value}" for key, value in numbers.items() if value]
        share, amount = min(1.0, done / max(1, self.total)), f"{done}/{self.total} {self.unit}"
        if self.bar is not None:
            width = self.bar.console.width - _SPINNER_COLUMNS
            line = f"{self.title:<9} {share:>4.0%}  " + "  ".join([amount, *eta, *parts])
            self.bar.update(self.task, line=line[:width])
        elif now - self.last_line >= _PLAIN_INTERVAL_SECONDS or done >= self.total:
            self.last_line = now
            text = "  ".join([amount, *parts, *eta])
            print(f"  {self.title:<9} {share:>4.0%}  {text}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """Print a permanent line, above the live one if there is one."""
        line = visible(f"  {self.title:<9} {text}")
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)
