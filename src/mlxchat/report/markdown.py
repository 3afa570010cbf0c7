"""The report as GitHub-flavoured Markdown: report.md, with the pipeline as a Mermaid graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from mlxchat.errors import visible
from mlxchat.report.benches import bench_tables
from mlxchat.report.collect import RunReport
from mlxchat.report.drawing import Drawing
from mlxchat.report.examples import example_groups
from mlxchat.report.plots import score_charts, step_charts
from mlxchat.report.scorecard import core_table, metric_table, published_tables
from mlxchat.report.sections import groups_of, sections
from mlxchat.report.tables import (
    Cell,
    Table,
    artifact_table,
    compression_tables,
    machine_table,
    overrides,
    source_table,
    timing_table,
)
from mlxchat.report.wording import (
    format_seconds,
    format_time,
    headline,
    sample_groups,
    troubles,
)


def render_markdown(report: RunReport, pictures: PurePosixPath) -> str:
    """Return report.md; the pictures are linked as `pictures`/<name>.svg."""
    parts = [
        f"# {escape(report.experiment or report.name)}",
        _byline(report),
        escape(" ".join(headline(report))),
    ]
    if faults := troubles(report):
        parts.append("\n".join(["> **Incomplete**", *(f"> - {escape(fault)}" for fault in faults)]))
    if metrics := metric_table(report):
        parts += ["## Metrics", render_table(metrics)]
        for reference, table in published_tables(report):
            parts += [f"### Beside it: {escape(reference.name)}", render_table(table)]
        parts += picture_links(score_charts(report), pictures)
        if core := core_table(report):
            parts += ["### CORE, task by task", render_table(core)]
    parts += ["## Pipeline", render_mermaid(report), "### Time", render_table(timing_table(report))]
    samples, examples = sample_groups(report), example_groups(report)
    compression = compression_tables(report)
    for section in sections(report):
        step = section.step
        label = f" ({section.label})" if section.label else ""
        parts.append(f"## {escape(step.name)}{label}")
        told = [("state", step.outcome), *section.effort]
        parts.append(" · ".join(f"{escape(name)} {escape(value)}" for name, value in told))
        parts += picture_links(step_charts(report, step), pictures)
        parts += [render_table(table) for other, table in compression if other is step]
        for title, pairs in groups_of(section):
            rows = [[Cell(name), Cell(value)] for name, value in pairs]
            parts.append(render_table(Table(header=[title, ""], align="lr", rows=rows)))
        for name, title, texts in samples:
            if name == step.name:
                parts += [f"### {escape(title)}", *(_fenced(f"{one.prompt}\n→ {one.text}") for one in texts)]
        for example in examples.get(step.name, []):
            verdict = "right" if example.is_right else "wrong"
            expected = f", expected {escape(example.expected)}" if example.expected else ""
            parts.append(f"{escape(example.task)}, **{verdict}**{expected}:")
            parts.append(_fenced(f"{example.prompt}\n→ {example.output}"))
    parts.append("## Environment")
    if machine := machine_table(report):
        parts.append(render_table(machine))
    if report.command:
        parts.append(f"Command: {_code(report.command)}")
    for names, given in overrides(report):
        parts.append(f"Overrides of {escape(names)}: {' '.join(', '.join(map(_code, given)).split()) or 'none'}")
    for title, table in bench_tables(report):
        parts += [f"### {escape(title)}", render_table(table)]
    if sources := source_table(report):
        parts += ["### Outside data", render_table(sources)]
    parts += ["### Artifacts", render_table(artifact_table(report))]
    return visible("\n\n".join(parts) + "\n")


def picture_links(charts: Sequence[Drawing], pictures: PurePosixPath) -> list[str]:
    """Return the pictures as one paragraph, so that they stand side by side where there is room."""
    images = [f"![{escape(chart.alt)}]({pictures / chart.name}.svg)" for chart in charts]
    return [" ".join(images)] if images else []


def _code(words: str) -> str:
    return f"`{words.replace('`', chr(39))}`"


def _byline(report: RunReport) -> str:
    run = f"run {report.name}" if report.experiment else ""
    started = f"started {format_time(report.started)}" if report.started else ""
    return escape(" · ".join(part for part in (run, started, report.outcome) if part))


def escape(words: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    line = " ".join(words.split())
    line = re.sub(r"[\\`*{}\[\]<>|&$~]", r"\\\g<0>", line)
    # Inside a word an underscore means nothing; leave names readable.
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)
    return re.sub(r"^([#+=-])", r"\\\1", line)


def render_table(table: Table) -> str:
    """Return a table with its notes as a list beneath."""
    marks = {"l": ":--", "r": "--:"}
    lines = [_line(map(escape, table.header)), _line(marks[letter] for letter in table.align)]
    lines += [_line(map(_cell, row)) for row in table.rows]
    notes = "\n".join(f"- {escape(note)}" for note in table.notes)
    return "\n".join(lines) + (f"\n\n{notes}" if notes else "")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    words = escape(cell.text)
    words = f"**{words}**" if cell.is_best and words else words
    detail = f"({cell.detail})" if cell.detail.startswith("chance") else cell.detail
    return f"{words} {escape(detail)}" if detail else words


def render_mermaid(report: RunReport) -> str:
    """Return the steps and their inputs as a Mermaid flowchart."""
    ids = {step.name: f"n{position}" for position, step in enumerate(report.steps)}
    lines = ["```mermaid", "flowchart LR"]
    for step in report.steps:
        time = f", {format_seconds(step.seconds)}" if step.seconds is not None else ""
        label = f"{_mermaid_text(step.name)}<br/>{_mermaid_text(step.outcome + time)}"
        lines.append(f'    {ids[step.name]}["{label}"]:::{step.outcome}')
    for step in report.steps:
        for source in dict.fromkeys(step.inputs.values()):
            if source in ids:
                lines.append(f"    {ids[source]} --> {ids[step.name]}")
    lines += [
        "    classDef run stroke:#0072b2,stroke-width:2px",
        "    classDef cached stroke:#009e73",
        "    classDef failed stroke:#d55e00,stroke-width:3px",
        "    classDef unfinished stroke:#e69f00,stroke-dasharray:5 3",
        "    classDef missing stroke:#8c959f,stroke-dasharray:3 3",
        "```",
    ]
    return "\n".join(lines)


def _mermaid_text(words: str) -> str:
    names = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;", "\\": "#92;"}
    return "".join(names.get(character, character) for character in " ".join(words.split()))


def _fenced(words: str) -> str:
    # A fence longer than any run of backticks inside cannot be closed from within.
    longest = max((len(run) for run in re.findall(r"`+", words)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{words}\n{fence}"
