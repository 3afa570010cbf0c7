"""The report of a run: report.md, report.html and pictures, nanochat's report card and more.

    collect      run folder and store → RunReport                   (standard library only)
    sources      reading files that may be absent or damaged
    scores       what eval steps measured; examples: some of their questions
    wording      the headline and how numbers are said
    tables       RunReport → tables, free of any format; benches: of what was measured besides
    sections     RunReport → what is told of each step
    scorecard    RunReport → the tables of metrics, with what is published of the same recipe
    published    the published numbers, and which runs they belong to
    plots        RunReport → charts
    drawing      charts → SVG; axes: scales; smoothing: long curves
    markdown     all of it → report.md
    layout       the pipeline as boxes and lines
    html         all of it → report.html                            (jinja2)
    terminal     the short form → a console                         (rich)
    canvas       the pictures of sweeps                             (matplotlib)

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
    """Write report.md, report.html and report/*.svg into a run's folder.

    Every file appears whole or not at all; pictures of an earlier report that no longer apply are removed.

    Args:
        outputs: the outputs folder.
        run: the run's folder.

    Returns:
        The path of report.html.

    Raises:
        StoreError: the run has no readable plan, or its folder cannot be written.

    """
    from mlxchat.report.html import render_html, standalone
    from mlxchat.report.markdown import render_markdown
    from mlxchat.report.plots import all_charts

    report = collect(outputs, run)
    charts = all_charts(report)
    page = render_html(report)
    pictures = run / PICTURES
    try:
        pictures.mkdir(exist_ok=True)
        for chart in charts:
            _replace(pictures / f"{chart.name}.svg", standalone(chart).encode("utf-8"))
        for path in (*pictures.glob("*.svg"), *pictures.glob("*.png")):  # PNG: those of former versions
            if path.name not in {f"{chart.name}.svg" for chart in charts}:
                path.unlink(missing_ok=True)
        markdown = render_markdown(report, PurePosixPath(PICTURES))
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
