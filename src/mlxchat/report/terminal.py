"""The short form of the report, for a terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from mlxchat.config.wording import plural
from mlxchat.errors import visible
from mlxchat.report.collect import RunReport, collect
from mlxchat.report.scorecard import metric_table
from mlxchat.report.tables import Table
from mlxchat.report.wording import format_time, headline, troubles
from mlxchat.report.writing import write_collected

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


def show_report(outputs: Path, run: Path) -> None:
    """Write report.md and report.html into a run's folder, print a summary and where they are.

    Raises:
        StoreError: the run has no readable plan, or its folder cannot be written.
    """
    from rich.console import Console

    report = collect(outputs, run)
    place = write_collected(report, report.folder)
    print_summary(report, Console())
    print(f"report: {place}")


def print_summary(report: RunReport, console: Console) -> None:
    """Print what was trained, the metric table, and what is missing.

    All text of the run is printed as it is: neither rich's markup nor escape sequences in it have effect.
    """
    from rich.text import Text

    experiment = f"experiment {report.experiment}" if report.experiment else ""
    counts = Counter(step.outcome for step in report.steps)
    states = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    details = [experiment, format_time(report.started), f"{plural(len(report.steps), 'step')}: {states}"]
    console.print(Text(visible(report.name), style="bold"))
    console.print(Text(visible(" · ".join(detail for detail in details if detail)), style="dim"))
    console.print(Text(visible(" ".join(headline(report)))))
    for trouble in troubles(report):
        console.print(Text(visible(trouble), style="yellow"))
    if metrics := metric_table(report):
        console.print(_rich_table(metrics))


def _rich_table(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title, letter in zip(table.header, table.align, strict=True):
        drawn.add_column(Text(visible(title)), justify="right" if letter == "r" else "left")
    for row in table.rows:
        cells = []
        for cell in row:
            words = Text(visible(cell.text), style="bold green" if cell.is_best else "")
            if cell.detail:
                # Without its space "±" leaves room for four columns at 80 characters.
                words.append(f" {visible(cell.detail).replace('± ', '±')}", style="dim")
            cells.append(words)
        drawn.add_row(*cells)
    return drawn
