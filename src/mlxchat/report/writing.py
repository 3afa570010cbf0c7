"""The files of a report: each appears whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mlxchat.errors import StoreError
from mlxchat.report.collect import RunReport, collect
from mlxchat.report.drawing import Drawing
from mlxchat.store.files import write_whole

PICTURES = "report"


def write_report(outputs: Path, run: Path) -> Path:
    """Write report.md, report.html and report/*.svg into a run's folder.

    Args:
        outputs: the outputs folder.
        run: the run's folder.

    Returns:
        The path of report.html.

    Raises:
        StoreError: the run has no readable plan, or its folder cannot be written.

    """
    return write_collected(collect(outputs, run), run)


def write_collected(report: RunReport, folder: Path) -> Path:
    """Write the files of a report that was collected already into a folder; return the path of report.html.

    Raises:
        StoreError: the folder cannot be written.
    """
    from mlxchat.report.html import render_html
    from mlxchat.report.markdown import render_markdown
    from mlxchat.report.plots import all_charts

    return write_files(
        folder, render_html(report), render_markdown(report, PurePosixPath(PICTURES)), all_charts(report)
    )


def write_files(folder: Path, page: str, markdown: str, charts: Sequence[Drawing]) -> Path:
    """Write page, Markdown and pictures; pictures of an earlier report that no longer apply are removed."""
    from mlxchat.report.html import standalone

    pictures = folder / PICTURES
    drawn = {f"{chart.name}.svg": standalone(chart) for chart in charts}
    try:
        if drawn:
            pictures.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in drawn.items():
            write_whole(pictures / name, picture, durable=False)
        for path in (*pictures.glob("*.svg"), *pictures.glob("*.png")):  # PNG: those of former versions
            if path.name not in drawn:
                path.unlink(missing_ok=True)
        write_whole(folder / "report.md", markdown, durable=False)
        write_whole(folder / "report.html", page, durable=False)
    except OSError as fault:
        raise StoreError(f"the report cannot be written to {folder}: {fault}; make the folder writable") from fault
    return folder / "report.html"


def write_page(path: Path, page: str) -> Path:
    """Write a page alone; return its path.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page, durable=False)
    except OSError as fault:
        raise StoreError(f"{path} cannot be written: {fault}") from fault
    return path
