"""The report as one HTML file: nothing is fetched, nothing is executed, and it prints.

Pictures are embedded as data URIs, once for light and once for dark screens. Everything passes through the
automatic escaping of Jinja, so that a model's output stays text whatever it says.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from mlxchat.report.collect import RunReport, StepReport
from mlxchat.report.layout import Box, Line, arrange
from mlxchat.report.scorecard import metric_table
from mlxchat.report.tables import (
    artifact_table,
    compression_tables,
    derived_table,
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
    visible,
)

if TYPE_CHECKING:
    from mlxchat.report.plots import Plot

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


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plot as data URIs."""

    title: str
    alt: str
    light: str
    dark: str


def render_html(report: RunReport, plots: list[Plot], dark_plots: list[Plot]) -> str:
    """Return report.html; `dark_plots` are the same pictures for dark screens, in the same order."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def _finalize(value: object) -> str:
        # What a macro returns is escaped already, and its words went through here.
        return value if isinstance(value, Markup) else visible(value)

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_finalize, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("mlxchat.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        report=report,
        started=format_time(report.started),
        headline=" ".join(headline(report)),
        facts=facts(report),
        troubles=troubles(report),
        metrics=metric_table(report),
        pictures=[
            Picture(title=light.title, alt=light.alt, light=_data_uri(light.png), dark=_data_uri(dark.png))
            for light, dark in zip(plots, dark_plots, strict=True)
        ],
        graphs=[draw_graph(report, is_wide=True), draw_graph(report, is_wide=False)],
        timings=timing_table(report),
        machine=machine_table(report),
        compression=compression_tables(report),
        sample_groups=sample_groups(report),
        artifacts=artifact_table(report),
        sources=source_table(report),
        overrides=overrides(report),
        derived=derived_table(report),
    )


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


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode('ascii')}"
