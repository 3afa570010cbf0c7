"""What a person sees while a step works: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_PLAIN_INTERVAL_SECONDS = 5.0


class Progress:
    """Progress of one piece of long work, used as a context manager."""

    def __init__(self, title: str, total: int, unit: str, *, start: int = 0, stream: TextIO | None = None) -> None:
        """Show `total` units of work named `unit`, of which `start` were done before."""
        self.title, self.total, self.unit, self.start = title, total, unit, start
        self.stream = stream if stream is not None else sys.stderr
        self.began = self.last_line = time.monotonic()
        self.bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        """Begin to show the bar, on a terminal."""
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[numbers]}"),
                console=Console(file=self.stream),
                transient=True,
            )
            self.task = self.bar.add_task(f"{self.title:<9}", total=self.total, completed=self.start, numbers="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, **numbers: str) -> None:
        """Show that `done` units are finished, with numbers already formatted: loss="3.91", speed="4.1k tok/s"."""
        now = time.monotonic()
        numbers["eta"] = self._eta(done, now)
        text = f"{self.amount(done)}  " + "  ".join(
            value if key in ("speed", "memory") else f"{key} {value}" for key, value in numbers.items() if value
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=done, numbers=text)
        elif now - self.last_line >= _PLAIN_INTERVAL_SECONDS or done >= self.total:
            self.last_line = now
            print(f"  {self.title:<9} {done / max(1, self.total):>4.0%}  {text}", file=self.stream, flush=True)

    def amount(self, done: int) -> str:
        """Return how much is done, as people read it."""
        return f"{done}/{self.total} {self.unit}"

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        line = f"  {self.title:<9} {text}"
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)

    def _eta(self, done: int, now: float) -> str:
        fresh = done - self.start
        return format_seconds((now - self.began) / fresh * (self.total - done)) if fresh > 0 else ""


def format_seconds(seconds: float) -> str:
    """Return a duration as people read it: 4.2s, 3m05s, 2h07m, 56d16h."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def format_count(count: float) -> str:
    """Return a count with a thousands' letter: 950, 4.1k, 5.24M, 1.3B."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit:
            return f"{count / limit:.3g}{letter}"
    return f"{count:.4g}"


def format_number(number: float) -> str:
    """Return a number of any kind: four digits, or a count with a thousands' letter."""
    return format_count(number) if abs(number) >= 1000 else f"{number:.4g}"


def format_bytes(count: float) -> str:
    """Return a size: 120 kB, 3.4 MB, 1.2 GB (powers of 1,000)."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"
