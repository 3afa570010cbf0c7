"""The report as GitHub-flavoured Markdown: report.md, with the pipeline as a Mermaid graph."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from mlxchat.report.collect import RunReport
from mlxchat.report.scorecard import metric_table
from mlxchat.report.tables import (
    Cell,
    Table,
    artifact_table,
    compression_tables,
    derived_table,
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
    visible,
)

if TYPE_CHECKING:
    from mlxchat.report.plots import Plot


def render_markdown(report: RunReport, plots: list[Plot], pictures: PurePosixPath) -> str:
    """Return report.md; the pictures are linked as `pictures`/<name>.png."""
    parts = [
        f"# {escape(report.experiment or report.name)}",
        _byline(report),
        escape(" ".join(headline(report))),
    ]
    if faults := troubles(report):
        parts.append("\n".join(["> **Incomplete**", *(f"> - {escape(fault)}" for fault in faults)]))
    if metrics := metric_table(report):
        parts += ["## Metrics", render_table(metrics)]
    if plots:
        parts.append("## Curves and accuracy")
        parts += [f"![{escape(plot.alt)}]({pictures / plot.name}.png)" for plot in plots]
    parts += ["## Pipeline", render_mermaid(report), "## Time", render_table(timing_table(report))]
    if machine := machine_table(report):
        parts += ["## Machine and software", render_table(machine)]
    tokenizers = compression_tables(report)
    for position, (step, table) in enumerate(tokenizers):
        parts += [] if position else ["## Tokenizer"]
        parts += [f"### {escape(step.name)}"] if len(tokenizers) > 1 else []
        parts.append(render_table(table))
    if groups := sample_groups(report):
        parts.append("## Samples")
        for title, samples in groups:
            parts.append(f"### {escape(title)}")
            parts += [_fenced(f"{sample.prompt}\n→ {sample.text}") for sample in samples]
    parts += ["## Artifacts", render_table(artifact_table(report))]
    if sources := source_table(report):
        parts += ["### Outside data", render_table(sources)]
    parts.append("## Configuration")
    for names, given in overrides(report):
        settings = ", ".join(f"`{item.replace('`', chr(39))}`" for item in given) or "none"
        parts.append(f"Overrides of {escape(names)}: {' '.join(settings.split())}")
    if derived := derived_table(report):
        parts += ["### Derived hyperparameters", render_table(derived)]
    return visible("\n\n".join(parts) + "\n")


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
