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
    comparison   several runs side by side; scaling: bits per byte against FLOPs
    writing      the files
    terminal     the short form → a console                         (rich)
    canvas       the pictures of sweeps                             (matplotlib)

Where nanochat finds numbers again by searching its own Markdown, here every number comes from a manifest,
metrics.jsonl or scores.json, so a report can be written anew at any time.
"""

from __future__ import annotations

from mlxchat.report.collect import RunReport, StepReport, collect, latest_run
from mlxchat.report.terminal import print_summary
from mlxchat.report.writing import write_report

__all__ = ["RunReport", "StepReport", "collect", "latest_run", "print_summary", "write_report"]
