"""What `mlxchat bench` measured with the same outputs folder: outputs/bench/*.json, newest first."""

from __future__ import annotations

from mlxchat.report.collect import RunReport
from mlxchat.report.sources import mapping, number, read_json, text
from mlxchat.report.tables import Cell, Table
from mlxchat.report.wording import format_time, format_value
from mlxchat.store.fingerprint import flatten

# The newest measurements of each kind that are shown.
MOST = 3
_LETTERS = 120
# What was measured with, and not what was measured.
_LEFT_OUT = ("sizes.", "bench.", "device.", "versions.", "optimizer.", "seed")


def bench_tables(report: RunReport) -> list[tuple[str, Table]]:
    """Return (title, table) for each kind that was measured: a column for each measurement."""
    folder = report.folder.parent.parent / "bench"
    kinds: dict[str, list[dict[str, object]]] = {}
    for path in sorted(folder.glob("*.json"), reverse=True):
        record = read_json(path)
        if (kind := text(record.get("kind"))) and len(kinds.setdefault(kind, [])) < MOST:
            kinds[kind].append(record)
    return [(f"Measured by mlxchat bench {kind}", _table(records)) for kind, records in sorted(kinds.items())]


def _table(records: list[dict[str, object]]) -> Table:
    columns = [flatten(mapping(record.get("result"))) for record in records]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = []
    for name in names:
        if name.startswith(_LEFT_OUT):
            continue
        values = [column.get(name) for column in columns]
        if any(number(value) is not None or (isinstance(value, str) and len(value) < _LETTERS) for value in values):
            rows.append([Cell(name), *(Cell(format_value(value)) for value in values)])
    header = ["Quantity", *(format_time(text(record.get("time"))).partition(".")[0] for record in records)]
    commands = [f"{title}: {text(record.get('command'))}" for title, record in zip(header[1:], records, strict=True)]
    return Table(header=header, align="l" + "r" * len(records), rows=rows, notes=commands)
