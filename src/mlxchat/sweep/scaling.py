"""Scaling laws of a sweep's pretrainings: a table with nanochat's columns, the fitted laws, and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlxchat.planning.scaling import IsoFlop, PowerLaw, ScalingLaws, Training, fit_scaling_laws, table_of
from mlxchat.report.document import Block
from mlxchat.report.plots import COLOURS, Picture, label_log_axis, make_panels, name_axes, render_png, styled
from mlxchat.store.files import write_whole
from mlxchat.store.manifest import Manifest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {
    "matrices": "num_matrix_parameters", "embedding": "num_embedding_parameters",
    "value_embeddings": "num_value_embedding_parameters", "head": "num_head_parameters",
    "scalars": "num_scalar_parameters", "total": "num_parameters",
}  # fmt: skip
"""Names in manifests of each kind of parameters."""
_RAMP = ("#a5cdea", "#1a68a8")  # from the smallest to the largest budget, to be seen on white and on dark
_FEWEST = 3
"""Smallest number of different sizes for which a table is written."""


def trainings_of(manifests: Iterable[Manifest]) -> list[Training]:
    """Return the distinct pretrainings among artifacts, except those without a score and those of version 0.1."""
    found: dict[str, Training] = {}
    for manifest in manifests:
        numbers = manifest.get("derived") or {}
        bpb = manifest["metrics"].get("val_bpb")
        if manifest["stage"] != "pretrain" or bpb is None or "num_head_parameters" not in numbers:
            continue
        found[manifest["rid"]] = Training(
            name=manifest["name"],
            depth=numbers["num_layers"],
            width=numbers["width"],
            parameters={kind: numbers[name] for kind, name in _KINDS.items()},
            horizon_parameters=numbers["num_horizon_parameters"],
            num_iterations=numbers["num_iterations"],
            tokens=numbers["total_tokens"],
            flops=numbers["total_flops"],
            bpb=bpb,
            core=manifest["metrics"].get("core"),
            seconds=manifest.get("seconds"),
        )
    return list(found.values())


def write_scaling(trainings: list[Training], folder: Path) -> list[Path]:
    """Write scaling.csv if there are at least three sizes, and scaling.md and scaling.png if parabolas fit.

    Returns:
        the paths written, in this order.
    """
    if len({one.horizon_parameters for one in trainings}) < _FEWEST:
        return []
    rows = table_of(trainings)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    files: dict[str, str | bytes] = {"scaling.csv": text.getvalue()}
    laws = fit_scaling_laws(trainings)
    if laws is not None:
        files |= {"scaling.md": describe_laws(laws), "scaling.png": draw_laws(laws)}
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def laws_of_report(trainings: list[Training]) -> list[Block]:
    """Return the sweep report's section on scaling laws; empty if no parabolas fit."""
    laws = fit_scaling_laws(trainings) if trainings else None
    if laws is None:
        return []
    picture = Picture(
        name="laws",
        title="Scaling laws",
        alt="; ".join(f"{_budget(one)}: best N {one.best_parameters or 'outside'}" for one in laws.budgets),
        draw=partial(_draw, laws),
    )
    return [describe_laws(laws).replace("# ", "## ", 1), [picture]]


def describe_laws(laws: ScalingLaws) -> str:
    """Return the laws as Markdown: the best model of each budget, and its power laws."""
    lines = [
        "# Scaling laws", "",
        "The best model of each budget, at the minimum of a parabola over log N. N counts the parameters that",
        "`pretrain.horizon_parameters` names, D the tokens.", "",
        "| FLOPs | models | best N | best D | D / N | bits per byte |", "|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for one in laws.budgets:
        sizes = [training.horizon_parameters for training in one.trainings]
        if one.best_parameters is None:
            side = "smaller" if one.bpb_at(sizes[0]) < one.bpb_at(sizes[-1]) else "larger"
            found = f"none among these sizes: try {side} ones | | |"
            lines.append(f"| {one.flops:.3g} | {len(sizes)} | {found} {min(t.bpb for t in one.trainings):.4f} |")
            continue
        ratio = one.best_tokens / one.best_parameters
        numbers = f"{one.best_parameters:,.0f} | {one.best_tokens:,.0f} | {ratio:.1f} | {one.best_bpb:.4f}"
        lines.append(f"| {one.flops:.3g} | {len(sizes)} | {numbers} |")
    lines.append("")
    for label, law in (("N*", laws.parameters), ("D*", laws.tokens), ("bits per byte", laws.bpb)):
        if law is not None:
            lines.append(f"- {label} = {law.at_centre:.4g} · (C / {law.centre:.3g})^{format_exponent(law)}")
    ratios = laws.tokens_per_parameter
    if ratios:
        lines.append(f"- best tokens per parameter: {min(ratios):.1f} to {max(ratios):.1f}")
    return "\n".join(lines) + "\n"


def format_exponent(law: PowerLaw) -> str:
    """Return an exponent with its 95 % interval, if there is one."""
    if law.half_width is None:
        return f"{law.exponent:.3f} (two points: no interval)"
    return f"{law.exponent:.3f} ± {law.half_width:.3f} (95 %, {law.num_points} points)"


def draw_laws(laws: ScalingLaws) -> bytes:
    """Return a PNG: parabolas with their minima, and N* and D* against the budget."""
    with styled():
        return render_png(_draw(laws))


def _draw(laws: ScalingLaws) -> Figure:
    figure, (left, right) = make_panels(2, height=4.0)
    name_axes(left, "The best size for a budget", "N, parameters", "held-out bits per byte")
    name_axes(right, "How it grows", "C, FLOPs of pretraining", "parameters, tokens")
    colours = _ramp(len(laws.budgets))
    for one, colour in zip(laws.budgets, colours, strict=True):
        _draw_parabola(left, one, colour)
    left.set_xscale("log")
    label_log_axis(left.xaxis)
    found = [one for one in laws.budgets if one.best_parameters]
    flops = [one.flops for one in found]
    for label, values, law, colour in (
        ("N*", [one.best_parameters or 0.0 for one in found], laws.parameters, COLOURS[0]),
        ("D*", [one.best_tokens or 0.0 for one in found], laws.tokens, COLOURS[1]),
    ):
        if law is not None:
            label = f"{label} ∝ C^{format_exponent(law).partition(' (')[0]}"
            right.plot(flops, [law(x) for x in flops], color=colour, lw=1.5, label=label)
        right.plot(flops, values, "o", color=colour, ms=5)
    if found:  # matplotlib refuses logarithmic axes without data
        right.set_xscale("log")
        right.set_yscale("log")
        label_log_axis(right.xaxis)
        label_log_axis(right.yaxis)
    for panel in (left, right):
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=9)
    return figure


def _draw_parabola(panel: Axes, one: IsoFlop, colour: str) -> None:
    sizes = [training.horizon_parameters for training in one.trainings]
    between = np.geomspace(sizes[0], sizes[-1], 60)
    panel.plot(sizes, [training.bpb for training in one.trainings], "o", color=colour, ms=4)
    panel.plot(
        between,
        [one.bpb_at(float(x)) for x in between],
        color=colour,
        lw=1.3,
        label=f"{one.flops:.3g} FLOPs".replace("e+", "e"),
    )
    if one.best_parameters:
        panel.plot([one.best_parameters], [one.best_bpb], "*", color=COLOURS[1], ms=11, zorder=3)


def _budget(one: IsoFlop) -> str:
    return f"{one.flops:.3g} FLOPs".replace("e+", "e")


def _ramp(count: int) -> list[str]:
    """Return `count` colours, from light to dark."""
    ends = [np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in _RAMP]
    steps = np.linspace(0.15, 1.0, count)
    mixed = [np.rint(ends[0] + step * (ends[1] - ends[0])).astype(int) for step in steps]
    return ["#" + "".join(f"{value:02x}" for value in colour) for colour in mixed]
