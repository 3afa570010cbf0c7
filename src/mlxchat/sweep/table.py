"""What a sweep ends with: its table in Markdown, CSV and JSON, the best first, and a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxchat.runner.secrets import redact
from mlxchat.sweep.folder import Row
from mlxchat.visible import visible

_LAST = ("status", "error")


def write_results(
    rows: list[Row], folder: Path, *, metric: str | None, less_is_better: bool, unit: str = "job"
) -> list[Row]:
    """Write table.md, table.csv, table.json and, where there is something to see, plot.png; print the table.

    Args:
        rows: of all jobs.
        folder: the sweep's.
        metric: step.metric that the rows are sorted by; None: no row has any.
        less_is_better: whether small values of it come first.
        unit: what a row is called.

    Returns:
        the rows, the best first; those without the metric last.
    """
    rows = sorted(redact(rows), key=lambda row: _rank(row, metric, less_is_better))
    keys = differing([row["overrides"] for row in rows])
    flat = [flatten(row, keys, unit) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row if key not in _LAST))
    columns += [key for key in _LAST if any(key in row for row in flat)]
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(key, "")) for key in columns] for row in flat)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)
    order = f"{unit}s by {metric}, {'smallest' if less_is_better else 'largest'} first\n\n" if metric else ""
    print(f"\n{visible(order + table)}\n", flush=True)
    made = [folder / "table.md"]
    if metric is not None:
        from mlxchat.sweep.plot import draw_sweep

        picture = draw_sweep(rows, keys, metric, less_is_better=less_is_better)
        if picture is not None:
            made.append(folder / "plot.png")
            made[-1].write_bytes(picture)
    print(f"sweep: {', '.join(map(str, made))}", flush=True)
    return rows


def flatten(row: Row, keys: Sequence[str], unit: str) -> dict[str, Any]:
    """Return one row of the table: its number, the settings that differ, the metrics, status, error."""
    settings = {key: row["overrides"].get(key, "") for key in keys}
    last = {key: row[key] for key in _LAST if row.get(key)}
    return {unit: row["job"], **settings, **row["metrics"], **last}


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values are not the same everywhere, in the order of the command line."""
    keys = dict.fromkeys(key for items in settings for key in items)
    return [key for key in keys if len({str(items.get(key)) for items in settings}) > 1]


def main_metric(rows: Sequence[Row]) -> str | None:
    """Return the last metric of the pipeline that differs between the rows, else the last one there is."""
    names: list[str] = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    telling = [name for name in names if len({row["metrics"][name] for row in rows if name in row["metrics"]}) > 1]
    return (telling or names)[-1] if names else None


def _rank(row: Row, metric: str | None, less_is_better: bool) -> tuple[bool, float, int]:
    value = row["metrics"].get(metric)
    if value is None or value != value:
        return True, 0.0, row["job"]
    return False, value if less_is_better else -value, row["job"]


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
