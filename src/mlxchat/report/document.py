"""The report as a document of blocks, rendered as Markdown and as one HTML page.

markdown-it renders each block's Markdown separately and passes no HTML through, so no text can leave its block or
become markup. Charts, folds and the pipeline are rendered as HTML directly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape as escape_html
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlxchat.config.wording import Table, escape, format_bytes, format_seconds, format_time
from mlxchat.errors import StoreError, visible
from mlxchat.evals.scores import number
from mlxchat.report.collect import STAGE_LABELS, RunReport, StepReport, collect
from mlxchat.report.examples import Example, sample_groups, telling_examples
from mlxchat.report.plots import Picture, main_charts, more_charts, score_charts
from mlxchat.report.summary import answers, facts, print_summary, troubles
from mlxchat.report.tables import (
    all_settings,
    artifact_table,
    compression_table,
    core_table,
    machine_table,
    metric_table,
    source_table,
    timing_table,
)
from mlxchat.store.files import write_whole

PICTURES = "report"


@dataclass(frozen=True)
class Group:
    """Blocks within a <div>, or folded below a summary."""

    kind: str
    """CSS class."""
    blocks: Sequence[Block]
    summary: str = ""
    """Title of the fold; empty: not folded."""


Block = str | Table | Group | list[Picture]


def show_report(outputs: Path, run: Path) -> None:
    """Write report.md and report.html into a run's folder; print a summary and their path."""
    report = collect(outputs, run)
    place = write_document(report.folder, title_of(report), document(report))
    print_summary(report)
    print(f"report: {place}")


def title_of(report: RunReport) -> str:
    """Return the report's title."""
    return report.experiment or report.name


def document(report: RunReport) -> list[Block]:
    """Return the report of a run: answers, scores, examples and curves, then folded details."""
    run = f"run {report.name}" if report.experiment else ""
    started = f"started {format_time(report.started)}" if report.started else ""
    blocks: list[Block] = [
        f"# {escape(title_of(report))}",
        Group("byline", [escape(" · ".join(part for part in (run, started, report.outcome) if part))]),
    ]
    if faults := troubles(report):
        blocks.append(Group("troubles", ["\n".join(["> **Incomplete**", *(f"> - {escape(each)}" for each in faults)])]))
    if found := facts(report):
        blocks.append(Group("facts", ["\n".join(f"* {escape(what)} **{escape(value)}**" for what, value in found)]))
    told = "\n".join(f"- **{question}** {_sentences(said)}" for question, said in answers(report))
    blocks.append(Group("answers", [told]))
    if metrics := metric_table(report):
        blocks += ["## Scores", metrics]
    blocks += _telling(report)
    if curves := [chart for step in report.steps for chart in main_charts(report, step)]:
        blocks += ["## Curves", curves]
    blocks += ["## Pipeline", timing_table(report), "## Details"]
    if metrics and (charts := score_charts(report)):
        core = core_table(report)
        pictures: list[Block] = [charts, "### CORE, task by task", core] if core else [charts]
        blocks.append(Group("fold", pictures, "Scores in pictures"))
    return [*blocks, *_steps(report), Group("fold", [*_environment(report)], "Environment and artifacts")]


def _telling(report: RunReport) -> Iterator[Block]:
    """Yield up to three answers of the best evaluated model, or samples of the last training if there are none."""
    if found := telling_examples(report):
        step, examples = found
        yield f"## Answers ({escape(step.name)})"
        yield Group("cards", [_card(example, name) for name, example in examples.items()])
    elif samples := sample_groups(report):
        name, title, texts = samples[-1]
        yield f"## {escape(title)} ({escape(name)})"
        yield Group("cards", [Group("card", [fenced(f"{one.prompt}\n→ {one.text}")]) for one in texts[:3]])


def _card(example: Example, name: str) -> Group:
    last = example.expected.strip().rpartition("\n")[2]
    last = last if example.verdict == "wrong form" else last.removeprefix("#### ")
    expected = f", expected {escape(last)}" if last else ""
    said = f"**{name}:** {escape(example.task)}, **{example.verdict}**{expected}"
    words: list[Block] = [said, Group("prompt", [fenced(example.prompt)]), fenced(f"→ {example.output}")]
    return Group(f"card {'right' if example.is_right else 'wrong'}", words)


def _steps(report: RunReport) -> Iterator[Block]:
    """Yield a fold for each step with content, inputs first."""
    samples = sample_groups(report)
    for step in report.steps:
        if not (step.manifest or step.records or step.error):
            continue
        blocks: list[Block] = [escape(f"Artifact {step.artifact}") if step.manifest else ""]
        blocks += [Group("troubles", [f"> {escape(step.error)}"])] if step.error else []
        blocks += [table for table in [compression_table(step)] if table]
        if charts := more_charts(report, step):
            blocks.append(charts)
        for name, title, texts in samples:
            if name == step.name:
                cards = [Group("card", [fenced(f"{one.prompt}\n→ {one.text}")]) for one in texts]
                blocks += [f"#### {escape(title)}", Group("cards", cards)]
        if settings := all_settings(step):
            blocks.append(Group("fold long", [fenced("\n".join(settings))], "All settings"))
        yield Group("fold step", [block for block in blocks if block], _heading(step))


def _heading(step: StepReport) -> str:
    memory = number(step.manifest.get("peak_memory_bytes"))
    name = f"{step.name} ({STAGE_LABELS[step.stage]})" if step.stage in STAGE_LABELS else step.name
    time = "" if step.seconds is None else format_seconds(step.seconds)
    return " · ".join(filter(None, [name, step.outcome, time, format_bytes(memory) if memory else ""]))


def _environment(report: RunReport) -> Iterator[Block]:
    if machine := machine_table(report):
        yield machine
    if report.command:
        yield f"Command: {_code(report.command)}"
    if sources := source_table(report):
        yield from ("### Data", sources)
    yield from ("### Artifacts", artifact_table(report))
    files = "a manifest, metrics.jsonl or scores.json of this run's artifacts"
    yield f"Written by mlxchat from {escape(report.folder.name)}. Every number comes from {files}."


def fenced(words: str) -> str:
    """Return text as a block of code."""
    # The fence is longer than any run of backticks in the text, so the text cannot close it.
    longest = max((len(run) for run in re.findall(r"`+", words)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{words}\n{fence}"


def _sentences(words: str) -> str:
    """Return text whose `commands` are code."""
    parts = enumerate(words.split("`"))
    return " ".join(_code(part) if at % 2 else escape(part) for at, part in parts if part.strip())


def _code(words: str) -> str:
    return f"`{' '.join(words.split()).replace('`', chr(39))}`"


def render_markdown(blocks: Iterable[Block]) -> str:
    """Return blocks as GitHub-flavoured Markdown, the charts linked as report/<name>.svg."""
    return visible("\n\n".join(_markdown(block) for block in blocks) + "\n")


def _markdown(block: Block) -> str:
    match block:
        case str():
            return block
        case Table():
            return block.markdown()
        case Group():
            inside = "\n\n".join(map(_markdown, block.blocks))
            if not block.summary:
                return inside
            summary = escape_html(" ".join(block.summary.split()))
            return f"<details>\n<summary>{summary}</summary>\n\n{inside}\n\n</details>"
        case charts:
            # One paragraph, so that they are side by side on wide screens.
            return " ".join(f"![{escape(chart.alt)}]({PICTURES}/{chart.name}.svg)" for chart in charts)


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """Return blocks as a self-contained page without scripts."""
    style = files("mlxchat.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape_html(visible(title))} – mlxchat report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(map(_html, blocks))}</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case str():
            return str(_parser().render(visible(block)))
        case Table():
            return _table_html(block)
        case Group():
            inside = "".join(map(_html, block.blocks))
            if not block.summary:
                return f'<div class="{block.kind}" dir="auto">\n{inside}</div>\n'
            summary = escape_html(visible(block.summary))
            return f'<details class="{block.kind}">\n<summary>{summary}</summary>\n{inside}</details>\n'
        case charts:
            return f'<div class="charts">\n{"".join(f"<figure>{chart.svg}</figure>" for chart in charts)}</div>\n'


def _table_html(table: Table) -> str:
    """Return a table with its notes beneath; many notes are folded."""
    parser = _parser()
    drawn = parser.render(visible(replace(table, notes=[]).markdown()))
    notes = "\n".join(f"- {escape(note)}" for note in table.notes)
    listed = f'<div class="notes">\n{parser.render(visible(notes))}</div>\n' if notes else ""
    if len(table.notes) > 3:
        listed = f"<details>\n<summary>How to read this table</summary>\n{listed}</details>\n"
    return f'<div class="scroll" tabindex="0">\n{drawn}</div>\n{listed}'


def write_document(folder: Path, title: str, blocks: Sequence[Block]) -> Path:
    """Write report.html, report.md and report/*.svg into a folder, each whole; return the path of report.html.

    Pictures of an earlier report that no longer apply are removed. StoreError: the folder cannot be written.
    """
    pictures = folder / PICTURES
    charts = {f"{chart.name}.svg": chart for chart in _charts(blocks)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if charts:
            pictures.mkdir(exist_ok=True)
        for name, chart in charts.items():
            write_whole(pictures / name, standalone(chart), durable=False)
        for path in pictures.glob("*.svg"):
            if path.name not in charts:
                path.unlink(missing_ok=True)
        write_whole(folder / "report.md", render_markdown(blocks), durable=False)
        write_whole(folder / "report.html", render_html(title, blocks), durable=False)
    except OSError as fault:
        raise StoreError(f"the report cannot be written to {folder}: {fault}; make the folder writable") from fault
    return folder / "report.html"


def standalone(chart: Picture) -> str:
    """Return a picture as a file of its own, which is light or dark as its reader's screen."""
    style = files("mlxchat.report").joinpath("page.css").read_text(encoding="utf-8")
    colours, _, rest = style.partition("/* page */")
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head, _, body = chart.svg.partition(">\n")
    fonts = next(line for line in rest.splitlines() if line.startswith(".chart text"))
    shown = "svg { background: var(--panel); }"
    return f"{head.replace('<svg ', f'<svg {spaces} ')}>\n<style>\n{colours}{fonts}\n{shown}\n</style>\n{body}"


def _charts(blocks: Iterable[Block]) -> Iterator[Picture]:
    for block in blocks:
        if isinstance(block, Group):
            yield from _charts(block.blocks)
        elif isinstance(block, list):
            yield from block
