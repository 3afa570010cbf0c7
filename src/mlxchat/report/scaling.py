"""Bits per byte against the FLOPs of pretraining, over several runs, with a fitted power law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlxchat.report.collect import RunReport, checkpoint_name
from mlxchat.report.drawing import Chart, Curve

# Below this a line through the points says nothing.
FIT_FROM_POINTS = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One pretraining."""

    name: str
    flops: float
    bpb: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """bpb = bpb_at · (FLOPs / at)^slope, by least squares of the logarithms."""

    at: float
    """The geometric mean of the FLOPs."""
    bpb_at: float
    slope: float
    r2: float
    """Share of the variance of log bpb that the line explains."""

    def __call__(self, flops: float) -> float:
        """Return what the line says for so many FLOPs."""
        return self.bpb_at * math.exp(self.slope * math.log(flops / self.at))


def points_of(reports: Sequence[RunReport], names: Sequence[str]) -> list[Point]:
    """Return a point for each pretraining that was scored, by FLOPs; the same artifact in several runs counts once.

    The score is the eval's of that checkpoint on its own corpus, else the last validation of the training.
    """
    found: dict[str, Point] = {}
    for report, name in zip(reports, names, strict=True):
        for step in report.steps:
            if step.stage != "pretrain" or not step.manifest:
                continue
            evals = [e.scores.bpb for e in report.evals if checkpoint_name(e) == step.name and e.scores]
            bpb = next((value for value in evals if value is not None), None) or step.fact("val_bpb")
            flops = step.fact("total_flops")
            if bpb and flops:
                found.setdefault(step.rid, Point(name=name, flops=flops, bpb=bpb))
    return sorted(found.values(), key=lambda point: point.flops)


def fit(points: Sequence[Point]) -> Fit | None:
    """Return the power law through the points, None if they are too few or all of the same size."""
    if len({point.flops for point in points}) < FIT_FROM_POINTS:
        return None
    xs, ys = [math.log(p.flops) for p in points], [math.log(p.bpb) for p in points]
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - middle_x) ** 2 for x in xs)
    slope = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - middle_y - slope * (x - middle_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    total = sum((y - middle_y) ** 2 for y in ys)
    return Fit(at=math.exp(middle_x), bpb_at=math.exp(middle_y), slope=slope, r2=1 - rest / total if total else 1.0)


def scaling_chart(points: Sequence[Point]) -> Chart | None:
    """Return bits per byte against FLOPs, both logarithmic; None with fewer than two sizes."""
    if len({point.flops for point in points}) < 2:
        return None
    xs, ys = [p.flops for p in points], [p.bpb for p in points]
    curves = [Curve(points=(xs, ys), has_line=False, names=[p.name for p in points])]
    line = fit(points)
    said = ", ".join(f"{p.name} {p.bpb:.4f} at {p.flops:.3g} FLOPs" for p in points)
    if line is not None:
        ends = [min(xs), max(xs)]
        label = f"{line.bpb_at:.3f} · (FLOPs / {line.at:.2g})^{line.slope:.4f}, R² {line.r2:.3f}".replace("^-", "^−")
        curves.append(Curve(points=(ends, [line(x) for x in ends]), label=label, colour=1, has_dots=False))
        said += f"; fitted: {label}"
    return Chart(
        name="scaling",
        title="Held-out bits per byte against FLOPs",
        alt=f"Points of {said}.",
        x="FLOPs of pretraining",
        y="bits per byte",
        curves=curves,
        is_x_log=True,
        is_y_log=True,
    )
