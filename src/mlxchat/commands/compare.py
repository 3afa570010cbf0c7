"""mlxchat compare: runs, a sweep, or the artifacts of a step in one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, split_words
from mlxchat.commands.columns import aligned, print_json, show_value
from mlxchat.errors import ConfigError, StoreError
from mlxchat.runner.progress import format_number
from mlxchat.runner.store import Store
from mlxchat.runner.table import Row, is_number, make_table, numeric, rows_of_runs, rows_of_step, run_folders


def main(arguments: list[str]) -> int:
    """Print the table, and draw it with --plot."""
    parser = make_naming_parser(
        "compare",
        "Compare runs, the jobs of a sweep (a folder's name in multirun/), or all artifacts of --step.",
        "RUN",
    )
    parser.epilog = "RUN: a run's name, its start, or what follows its number (smoke). Without any: all runs"
    parser.add_argument("--step", help="compare all artifacts of this step instead of runs")
    parser.add_argument("--last", type=int, metavar="N", help="only the last N")
    parser.add_argument(
        "--sort", metavar="COLUMN", help="sort by this column; -COLUMN: downwards (write --sort=-COLUMN)"
    )
    parser.add_argument("--metrics", metavar="A,B", help="only metrics whose names contain one of these")
    parser.add_argument("--format", choices=("table", "csv", "json", "md"), default="table")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the metrics against the first setting that differs")
    options = parser.parse_intermixed_args(arguments)
    names, settings = split_words(options.settings)
    store = Store(outputs_folder(settings))
    rows = rows_of_step(store, options.step) if options.step else rows_of_runs(store, run_folders(store, names))
    if options.last is not None:
        rows = rows[len(rows) - min(len(rows), max(0, options.last)) :]
    if options.metrics:
        wanted = options.metrics.split(",")
        for row in rows:
            row["metrics"] = {
                key: value for key, value in row["metrics"].items() if any(part in key for part in wanted)
            }
    if not rows:
        print(f"{store.outputs} holds no runs yet: run mlxchat first")
        return 0
    columns, flat = make_table(rows, options.sort)
    _print(columns, flat, options.format)
    if options.plot:
        _plot(columns, flat, {key for row in rows for key in row["metrics"]}, Path(options.plot))
    return 0


def _print(columns: list[str], rows: list[Row], form: str) -> None:
    if form == "json":
        print_json(rows)
    elif form == "csv":
        import csv

        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
        if form == "md":
            print("\n".join(f"| {' | '.join(line)} |" for line in [cells[0], ["---"] * len(columns), *cells[1:]]))
        else:
            print(aligned(cells, right=[place for place, column in enumerate(columns) if numeric([*rows], column)]))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return format_number(value) if is_number(value) else show_value(value)


def _plot(columns: list[str], rows: list[Row], metrics: set[str], place: Path) -> None:
    """Draw a panel for each metric, the rows from left to right, by the first setting that differs if there is one."""
    shown = [column for column in columns if column in metrics and numeric([*rows], column)][:12]
    if not shown:
        raise ConfigError("--plot: there is no metric to draw")
    setting = next((column for column in columns[1:] if column not in metrics), "")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure, panels = pyplot.subplots(down, across, figsize=(4 * across, 3 * down), squeeze=False, layout="constrained")
    numbers = bool(setting) and numeric([*rows], setting)
    for panel, metric in zip(panels.flat, shown, strict=False):
        have = [row for row in rows if row.get(metric) is not None and (not numbers or row.get(setting) is not None)]
        if numbers:
            panel.scatter([row[setting] for row in have], [row[metric] for row in have], color="#2e7d4f")
            panel.set_xlabel(setting)
        else:
            labels = [_cell(row.get(setting)) if setting else str(row["name"])[-12:] for row in have]
            panel.bar(range(len(have)), [row[metric] for row in have], color="#2e7d4f")
            panel.set_xticks(range(len(have)), labels, rotation=30, ha="right")
        panel.set_title(metric, fontsize=10)
    for panel in panels.flat[len(shown) :]:
        panel.axis("off")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(place, dpi=120, format=place.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise StoreError(f"--plot: {place} cannot be written ({error})") from None
    print(f"plot: {place}", file=sys.stderr)
