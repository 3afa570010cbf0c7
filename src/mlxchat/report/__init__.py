"""The report of a run: report.md, report.html and pictures, nanochat's report card and more.

    collect      run folder and store → RunReport                   (standard library only)
    sources      reading files that may be absent or damaged
    wording      the headline and how numbers are said
    tables       RunReport → tables, free of any format
    scorecard    RunReport → the table of metrics
    canvas       how a picture looks                                (matplotlib)
    plots        RunReport → PNG pictures
    markdown     all of it → report.md
    layout       the pipeline as boxes and lines
    html         all of it → report.html                            (jinja2)
    terminal     the short form → a console                         (rich)

Where nanochat finds numbers again by searching its own Markdown, here every number comes from a manifest,
metrics.jsonl or scores.json, so a report can be written anew at any time.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from mlxchat.errors import StoreError
from mlxchat.report.collect import RunReport, StepReport, collect, latest_run
from mlxchat.report.terminal import print_summary

__all__ = ["RunReport", "StepReport", "collect", "latest_run", "print_summary", "write_report"]

PICTURES = "report"


def write_report(outputs: Path, run: Path) -> Path:
    """Write report.md, report.html and report/*.png into a run's folder.

    Every file appears whole or not at all; pictures of an earlier report that no longer apply are removed.

    Args:
        outputs: the outputs folder.
        run: the run's folder.

    Returns:
        The path of report.html.

    Raises:
        StoreError: the run has no readable plan, or its folder cannot be written.

    """
    from mlxchat.report.canvas import DARK, LIGHT
    from mlxchat.report.html import render_html
    from mlxchat.report.markdown import render_markdown
    from mlxchat.report.plots import draw

    report = collect(outputs, run)
    plots = draw(report, LIGHT)
    page = render_html(report, plots, draw(report, DARK))
    pictures = run / PICTURES
    try:
        pictures.mkdir(exist_ok=True)
        for plot in plots:
            _replace(pictures / f"{plot.name}.png", plot.png)
        for path in pictures.glob("*.png"):
            if path.stem not in {plot.name for plot in plots}:
                path.unlink(missing_ok=True)
        markdown = render_markdown(report, plots, PurePosixPath(PICTURES))
        _replace(run / "report.md", markdown.encode("utf-8"))
        _replace(run / "report.html", page.encode("utf-8"))
    except OSError as fault:
        raise StoreError(f"the report cannot be written to {run}: {fault}; make the folder writable") from fault
    return run / "report.html"


def _replace(path: Path, content: bytes) -> None:
    # The process id keeps two reports written at once from sharing a temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
