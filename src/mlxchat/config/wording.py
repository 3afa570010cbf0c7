"""Formats numbers, durations, sizes and times for people; tables for terminals and Markdown."""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mlxchat.errors import visible

ABSENT = "—"
"""Shown in place of a missing measurement."""


def format_seconds(seconds: float) -> str:
    """Return a duration: 4.2s, 3m05s, 2h07m, 56d16h, 3.4 years."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    days = hours // 24
    return f"{days}d{hours % 24:02d}h" if days < 730 else f"{days / 365:.1f} years"


def format_count(count: float) -> str:
    """Return a count in at most three digits and a letter for its thousands: 950, 4.1k, 5.24M, 1.3B."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit * 0.9995:  # 999,999 is 1M, not 1e+03k
            return f"{count / limit:.3g}{letter}"
    return f"{count:.4g}"


def format_number(number: float | None) -> str:
    """Return a number with four digits, or as a count from 1,000 on; "-" for None (NaN)."""
    if number is None:
        return "-"
    return format_count(number) if abs(number) >= 1000 else f"{number:.4g}"


def format_exact(number: float) -> str:
    """Return a number grouped by thousands, below a million with up to 6 digits: 5,672,310, 0.02, 3.9171e19."""
    if abs(number) < 1e15 and (number == round(number) or abs(number) >= 1e6):
        return f"{number:,.0f}"
    return f"{number:,.6g}".replace("e+", "e")


def format_bytes(count: float) -> str:
    """Return a size in powers of 1,000: 812 B, 120.0 kB, 3.4 MB, 1.2 GB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit * 0.99995:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"


def format_share(share: float) -> str:
    """Return a fraction of 1 as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def format_dollars(seconds: float | None, per_hour: float | None) -> str:
    """Return the cost of a duration, such as $92.40; empty if either is unknown."""
    return "" if seconds is None or per_hour is None else f"${seconds / 3600 * per_hour:,.2f}"


def format_time(stamp: str) -> str:
    """Return an ISO time to the second, such as 2026-11-21 10:15:02 +00:00; other text unchanged."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d(?::\d\d)?)(?:\.\d+)?(?=([+-]|Z?$))", r"\1 \2 ", stamp).strip()


def plural(count: int, noun: str) -> str:
    """Return "1 step", "2 steps"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def join(parts: Iterable[str]) -> str:
    """Return "a, b and c"."""
    items = list(parts)
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def first_of(names: Sequence[str], most: int) -> str:
    """Return the first `most` names in one line and the number of others: a, b and 3 more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def wrapped(line: str, indent: int) -> str:
    """Return a line wrapped to the terminal's width, further lines indented; unchanged if output is no terminal."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return "\n".join(textwrap.wrap(line, width, subsequent_indent=" " * indent, break_on_hyphens=False))


@dataclass(frozen=True)
class Cell:
    """Text, a detail beside it, and True if it is the best of its row."""

    text: str
    detail: str = ""
    is_best: bool = False

    def __str__(self) -> str:
        return f"{self.text} {self.detail.replace('± ', '±')}" if self.detail else self.text


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under a header; `align` has one l or r per column."""

    header: Sequence[str]
    align: str
    rows: Sequence[Sequence[Cell | str]]
    notes: Sequence[str] = field(default_factory=list)

    def text(self) -> str:
        """Return header and rows in aligned columns."""
        return aligned([self.header, *self.rows], right=[at for at, side in enumerate(self.align) if side == "r"])

    def markdown(self) -> str:
        """Return the table, with its notes as a list beneath."""
        marks = {"l": ":--", "r": "--:"}
        lines = [[escape(title) for title in self.header], [marks[side] for side in self.align]]
        lines += [[_markdown_cell(cell) for cell in row] for row in self.rows]
        notes = "\n".join(f"- {escape(note)}" for note in self.notes)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + (f"\n\n{notes}" if notes else "")


def _markdown_cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return escape(cell)
    words = escape(cell.text)
    words = f"**{words}**" if cell.is_best and words else words
    return f"{words} *{escape(cell.detail)}*" if cell.detail else words


def escape(words: str) -> str:
    """Return text escaped for Markdown, on one line."""
    line = " ".join(words.split())
    line = re.sub(r"[\\`*{}\[\]<>|&$~]", r"\\\g<0>", line)
    # Underscores within words have no meaning in Markdown.
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)
    return re.sub(r"^([#+=-]|\d+(?=[.)](?: |$)))", lambda m: f"{m[0]}\\" if m[0].isdigit() else f"\\{m[0]}", line)


def aligned(rows: Iterable[Sequence[Cell | str]], *, right: Sequence[int] = (), indent: str = "") -> str:
    """Return rows as lines with aligned columns; columns in `right` are right-aligned."""
    table = [[visible(cell) for cell in row] for row in rows]
    count = max((len(row) for row in table), default=0)
    widths = [max((len(row[column]) for row in table if column < len(row)), default=0) for column in range(count)]
    lines = []
    for row in table:
        justified = [cell.rjust if column in right else cell.ljust for column, cell in enumerate(row)]
        cells = [justify(width) for justify, width in zip(justified, widths, strict=False)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
