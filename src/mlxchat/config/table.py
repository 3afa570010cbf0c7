"""One table: aligned text for a terminal, and Markdown, from which the report's HTML is rendered."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mlxchat.errors import visible


@dataclass(frozen=True)
class Cell:
    """Text, a detail beside it, and True if it is the best of its row."""

    text: str
    detail: str = ""
    is_best: bool = False

    def __str__(self) -> str:
        """Return text and detail."""
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
        cells = [
            cell.rjust(widths[column]) if column in right else cell.ljust(widths[column])
            for column, cell in enumerate(row)
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
