"""The report as one HTML file: nothing is fetched, nothing is executed, and it prints.

Pictures are part of the page and take its colours. Every other text passes through the automatic escaping of Jinja, so
that a model's output stays text whatever it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from mlxchat.errors import visible
from mlxchat.report.benches import bench_tables
from mlxchat.report.collect import RunReport, StepReport
from mlxchat.report.drawing import Drawing
from mlxchat.report.examples import example_groups
from mlxchat.report.layout import Box, Line, arrange
from mlxchat.report.plots import score_charts, step_charts
from mlxchat.report.scorecard import core_table, metric_table, published_tables
from mlxchat.report.scores import Sample
from mlxchat.report.sections import groups_of, sections
from mlxchat.report.tables import (
    Table,
    artifact_table,
    compression_tables,
    machine_table,
    overrides,
    source_table,
    timing_table,
)
from mlxchat.report.wording import (
    facts,
    format_seconds,
    format_time,
    headline,
    sample_groups,
    troubles,
)

if TYPE_CHECKING:
    from markupsafe import Markup

BOX_HEIGHT = 46.0
BOX_PADDING = 22.0
# Widths of a letter in the two lines of a box; wide enough for the usual sans-serif fonts.
NAME_LETTER = 7.9
STATE_LETTER = 6.4
NAME_LETTERS = 26


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A drawing of the pipeline, ready for the template."""

    name: str
    width: float
    height: float
    boxes: list[tuple[Box, StepReport, str, str]]
    """Each with its step and the two lines of words inside."""
    lines: list[Line]


def render_html(report: RunReport) -> str:
    """Return report.html."""
    found = sections(report)
    samples: dict[str, list[tuple[str, list[Sample]]]] = {}
    for step, title, texts in sample_groups(report):
        samples.setdefault(step, []).append((title, texts))
    compression: dict[str, list[Table]] = {}
    for step_report, table in compression_tables(report):
        compression.setdefault(step_report.name, []).append(table)
    examples = example_groups(report)
    return render(
        "report.html.jinja",
        report=report,
        started=format_time(report.started),
        headline=" ".join(headline(report)),
        facts=facts(report),
        troubles=troubles(report),
        metrics=metric_table(report),
        published=published_tables(report),
        core=core_table(report),
        score_charts=inline(score_charts(report)),
        graphs=[draw_graph(report, is_wide=True), draw_graph(report, is_wide=False)],
        timings=timing_table(report),
        sections=found,
        charts={section.step.name: inline(step_charts(report, section.step)) for section in found},
        groups={section.step.name: groups_of(section) for section in found},
        compression=compression,
        sample_groups=samples,
        example_groups=examples,
        last_examples=list(examples)[-1] if examples else "",
        machine=machine_table(report),
        artifacts=artifact_table(report),
        sources=source_table(report),
        overrides=overrides(report),
        benches=bench_tables(report),
    )


def render(template: str, **values: object) -> str:
    """Return a page: every text in it is escaped, and its control characters are made visible."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: object) -> str:
        # What a macro returns is escaped already, and its words went through here.
        return value if isinstance(value, Markup) else visible(value)

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=finalize, trim_blocks=True, lstrip_blocks=True,
        loader=FunctionLoader(lambda name: files("mlxchat.report").joinpath(name).read_text(encoding="utf-8")),
    )  # fmt: skip
    return environment.get_template(template).render(**values)


def inline(charts: Sequence[Drawing]) -> list[Markup]:
    """Return pictures as parts of a page; every word in them is escaped where they are drawn."""
    from markupsafe import Markup

    return [Markup(chart.draw()) for chart in charts]


def standalone(chart: Drawing) -> str:
    """Return a picture as a file of its own, which is light or dark as its reader's screen."""
    from markupsafe import Markup

    return render("chart.svg.jinja", body=Markup(chart.draw().split("\n", 1)[1]), head=Markup(_head(chart)))


def _head(chart: Drawing) -> str:
    return chart.draw().split("\n", 1)[0].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')


def draw_graph(report: RunReport, *, is_wide: bool) -> Graph:
    """Return the pipeline as boxes and lines, from left to right or from top to bottom."""
    words = {step.name: _box_words(step) for step in report.steps}
    widths = {
        name: max(NAME_LETTER * len(label), STATE_LETTER * len(state)) + BOX_PADDING
        for name, (label, state) in words.items()
    }
    if not is_wide:
        widths = dict.fromkeys(widths, max(widths.values(), default=0.0))
    inputs = {step.name: list(dict.fromkeys(step.inputs.values())) for step in report.steps}
    layout = arrange(widths, inputs, height=BOX_HEIGHT, is_wide=is_wide)
    steps = {step.name: step for step in report.steps}
    return Graph(
        name="wide" if is_wide else "tall",
        width=layout.width,
        height=layout.height,
        boxes=[(box, steps[box.name], *words[box.name]) for box in layout.boxes],
        lines=layout.lines,
    )


def _box_words(step: StepReport) -> tuple[str, str]:
    name = step.name if len(step.name) <= NAME_LETTERS else f"{step.name[: NAME_LETTERS - 1]}…"
    time = f" · {format_seconds(step.seconds)}" if step.seconds is not None else ""
    return name, f"{step.outcome}{time}"
