"""Progress of a step: a live bar on a terminal, otherwise a plain line from time to time."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from mlxchat.config.wording import format_seconds
from mlxchat.errors import visible

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_PLAIN_INTERVAL_SECONDS = 5.0
_SPINNER_COLUMNS, _LEAST_BAR, _MOST_BAR = 2, 8, 24
_NAME_COLUMNS = 11


class Progress:
    """Progress of one long task, used as a context manager."""

    def __init__(self, title: str, total: int, unit: str, *, start: int = 0, stream: TextIO | None = None) -> None:
        """Show `total` units of work called `unit`; `start` of them are already done."""
        self.title, self.total, self.unit, self.start = title, total, unit, start
        self.stream = stream if stream is not None else sys.stderr
        self.began = self.last_line = time.monotonic()
        self._first: tuple[int, float] | None = None
        self.bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        """Show the bar, on a terminal."""
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn

            console = Console(file=self.stream)
            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.fields[line]}", markup=False),
                console=console, transient=True, expand=False,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=self.total, completed=self.start, line=self.title)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, **numbers: str) -> None:
        """Show that `done` units are finished.

        Args:
            done: number of finished units.
            numbers: formatted values such as loss="3.91", speed="4.1k tok/s", most important first, since a narrow
                terminal shows only as many as fit.
        """
        now = time.monotonic()
        eta = self._eta(done, now)
        parts = [value if key in ("speed", "memory") else f"{key} {value}" for key, value in numbers.items() if value]
        if self.bar is not None:
            width = self.bar.console.width - _SPINNER_COLUMNS
            self.bar.update(self.task, completed=done, line=self._fit(done, parts, eta, width))
        elif now - self.last_line >= _PLAIN_INTERVAL_SECONDS or done >= self.total:
            self.last_line = now
            text = "  ".join([self.amount(done), *parts, *([f"eta {eta}"] if eta else [])])
            print(f"  {self.title:<9} {done / max(1, self.total):>4.0%}  {text}", file=self.stream, flush=True)

    def amount(self, done: int) -> str:
        """Return the amount done, such as 3/10."""
        return f"{done}/{self.total} {self.unit}"

    def note(self, text: str) -> None:
        """Print a permanent line, above the bar if there is one."""
        line = visible(f"  {self.title:<9} {text}")
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)

    def _fit(self, done: int, parts: list[str], eta: str, width: int) -> str:
        """Return a line of at most `width` columns: title, amount, ETA, a bar, and as many parts as fit."""
        last = f"  eta {eta}" if eta else ""
        head, amount = f"{self.title:<9} ", self.amount(done)
        if len(head + amount + last) > width:
            amount = amount.removesuffix(f" {self.unit}")
        left = width - len(head + amount + last)
        bar = ""
        if left > _LEAST_BAR:
            # The bar gets the columns that the parts leave, between its minimum and 24.
            cells = max(_LEAST_BAR, min(_MOST_BAR, left - 1 - sum(len(part) + 2 for part in parts)))
            full = round(cells * min(1.0, done / max(1, self.total)))
            bar = "━" * full + "─" * (cells - full) + " "
            left -= len(bar)
        shown = []
        for part in parts:
            if len(part) + 2 > left:
                break
            shown.append(f"  {part}")
            left -= len(part) + 2
        return (head + bar + amount + "".join(shown) + last)[:width]

    def _eta(self, done: int, now: float) -> str:
        """Return the estimated remaining time, empty while unknown.

        The first update includes compiling and loading, so it is ignored as soon as there is another one, and always if
        it has a single unit.
        """
        before, then = self._first or (self.start, self.began)
        alone = self._first is None and done - self.start == 1 < self.total - self.start
        self._first = self._first or (done, now)
        if alone or done <= before:
            return ""
        return format_seconds((now - then) / (done - before) * (self.total - done))


def fill(text: str, *, width: int | None = None) -> str:
    """Return pairs in a line, two spaces apart, wrapped between pairs at the terminal's width.

    Args:
        text: the line; further lines are indented to its twelfth column, where the text after a step's name begins.
        width: columns; None: the terminal's, or unlimited if the output is not a terminal.
    """
    if width is None:
        if not sys.stdout.isatty():
            return text
        width = shutil.get_terminal_size().columns
    lines, line = [], ""
    head, _, rest = text.partition(": ")
    for number, part in enumerate([f"{head}:", *rest.split("  ")] if rest else text.split("  ")):
        joined = f"{line}{' ' if number == 1 and rest else '  '}{part}" if line else part
        if line and len(joined) > width:
            lines.append(line)
            joined = " " * _NAME_COLUMNS + part
        line = joined
    return "\n".join([*lines, line])
