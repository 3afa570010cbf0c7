"""How the pictures of a sweep look, which are PNG files: colours, panels, and words on them.

Colours are those of Okabe and Ito, which stay apart under every common form of colour blindness. Only
matplotlib's Figure objects are used, so that no global state is touched.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxchat.errors import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 9.0
DOTS_PER_INCH = 150
LABEL_LETTERS = 40


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a picture."""

    name: str
    ground: str
    ink: str
    faint: str
    train: str
    validation: str
    passes: tuple[str, ...]
    """For pass@k, from the least k up."""
    reference: str
    error: str
    ramp: tuple[str, str]
    """From the first to the last column of the bar chart."""


LIGHT = Theme(
    name="light",
    ground="#ffffff",
    ink="#1f2328",
    faint="#d8dde3",
    train="#0072b2",
    validation="#d55e00",
    passes=("#0072b2", "#d55e00", "#00825f", "#b5478f"),
    reference="#656d76",
    error="#30363d",
    ramp=("#b5d3ea", "#0b4a7a"),
)


def make_panels(count: int, theme: Theme, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    """Return a figure `height` inches high with `count` empty panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained", facecolor=theme.ground)
    grid: Any = figure.subplots(1, count, squeeze=False, gridspec_kw={"wspace": 0.08})
    panels: list[Axes] = list(grid[0])
    for panel in panels:
        panel.set_facecolor(theme.ground)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            panel.spines[side].set_color(theme.faint)
        panel.grid(color=theme.faint, linewidth=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(colors=theme.ink, labelsize=9, length=0)
    return figure, panels


def add_titles(panel: Axes, title: str, y: str, theme: Theme, x: str = "iteration") -> None:
    """Write a panel's title and what its axes measure, with units."""
    from matplotlib.ticker import MaxNLocator

    if x == "iteration":
        panel.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    panel.set_title(plain_label(title), loc="left", fontsize=11, fontweight="bold", color=theme.ink)
    panel.set_xlabel(x, fontsize=9.5, color=theme.ink)
    panel.set_ylabel(y, fontsize=9.5, color=theme.ink)


def add_legend(panel: Axes, theme: Theme, *, outside: bool = False) -> None:
    """Explain lines and bars that have a label, within the panel or to its right."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if outside else {"loc": "best"}
    handles, labels = panel.get_legend_handles_labels()
    if labels:
        # Lines come first in matplotlib's order; chance belongs after the bars.
        order = sorted(range(len(labels)), key=lambda i: labels[i] == "chance")
        handles, labels = [handles[i] for i in order], [labels[i] for i in order]
        panel.legend(handles, labels, frameon=False, fontsize=9, labelcolor=theme.ink, **place)


def plain_label(words: str) -> str:
    """Return a name as matplotlib may show it: on one line, not too long, without mathematics."""
    plain = " ".join(visible(words).split())
    # A leading underscore would hide a label from the legend.
    plain = plain.lstrip("_") if len(plain) <= LABEL_LETTERS else f"{plain[: LABEL_LETTERS - 1].lstrip('_')}…"
    return plain.replace("$", r"\$")


def render_png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes, which is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
