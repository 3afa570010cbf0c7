"""Output of verbs: aligned columns of plain text, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from mlxchat.errors import visible


def aligned(rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), indent: str = "") -> str:
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


def print_json(record: Any) -> None:
    """Print plain data as JSON."""
    print(visible(json.dumps(record, indent=1, ensure_ascii=False)))


def show_value(value: Any) -> str:
    """Return a value in YAML's notation, in one line."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def when(moment: str) -> str:
    """Return an ISO time to the minute."""
    return str(moment)[:16].replace("T", " ")
