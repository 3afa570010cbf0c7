"""Scaling laws of pretrainings: the best size of a model for a budget of FLOPs, and how it grows with the budget.

The second approach of Hoffmann et al. 2022 (arXiv 2203.15556), as nanochat's scaling_laws.sh is evaluated. At each
budget C the bits per byte of several models lie on a parabola over log N; its minimum is the best size N*(C). Power
laws N* = a·C^α and D* = b·C^β go through the minima. N counts the parameters that `pretrain.horizon_parameters` names,
D the tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlxchat.store.manifest import Manifest

_SAME_BUDGET = 0.1
"""Trainings whose FLOPs differ by less than this share have one budget: iterations are whole numbers."""
_FEWEST_SIZES = 3


@dataclass(frozen=True, kw_only=True)
class Training:
    """One finished pretraining."""

    size: int  # N
    tokens: int  # D
    flops: float
    bpb: float  # held-out bits per byte at the end


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The models of one budget: a parabola of their bits per byte over ln N, and its minimum."""

    flops: float  # C, the geometric mean of the trainings'
    trainings: list[Training]  # by N
    parabola: np.polynomial.Polynomial  # of ln N
    size: float | None  # N*; None if the minimum is not between the smallest and the largest model
    tokens: float  # D*, on the line of ln D over ln N of these trainings; NaN without a minimum
    bpb: float  # at the minimum


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = at_centre · (x / centre)^exponent, by least squares of the logarithms."""

    centre: float
    at_centre: float
    exponent: float
    error: float | None  # standard error of the exponent; None with two points, which leave no residuals


class ScalingLaws(NamedTuple):
    """Laws fitted to trainings at several budgets; a law is None unless two budgets have a minimum."""

    budgets: list[Budget]  # by FLOPs
    size: PowerLaw | None  # N*(C)
    tokens: PowerLaw | None  # D*(C)


def trainings_of(manifests: Iterable[Manifest]) -> list[Training]:
    """Return the distinct pretrainings with a score among artifacts."""
    found: dict[str, Training] = {}
    for manifest in manifests:
        if manifest["stage"] != "pretrain" or manifest["metrics"].get("val_bpb") is None:
            continue
        numbers = manifest["derived"]
        found[manifest["rid"]] = Training(
            size=numbers["num_horizon_parameters"], tokens=numbers["total_tokens"], flops=numbers["total_flops"],
            bpb=manifest["metrics"]["val_bpb"],
        )  # fmt: skip
    return list(found.values())


def fit_power_law(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw | None:
    """Return the power law through points with positive coordinates; None with fewer than two different x."""
    if len(set(xs)) < 2:
        return None
    x, y = np.log(np.array(xs)), np.log(np.array(ys))
    (exponent, at_centre), covariance = np.polyfit(x - x.mean(), y, 1, cov="unscaled")
    residuals = y - exponent * (x - x.mean()) - at_centre
    error = math.sqrt(covariance[0, 0] * (residuals**2).sum() / (len(xs) - 2)) if len(xs) > 2 else None
    return PowerLaw(centre=math.exp(x.mean()), at_centre=math.exp(at_centre), exponent=float(exponent), error=error)


def fit_scaling_laws(trainings: Sequence[Training]) -> ScalingLaws | None:
    """Return the laws of trainings; None unless at least two budgets have three models of different sizes."""
    groups: list[list[Training]] = []
    for one in sorted(trainings, key=lambda one: one.flops):
        if groups and one.flops <= groups[-1][0].flops * (1 + _SAME_BUDGET):
            groups[-1].append(one)
        else:
            groups.append([one])
    groups = [sorted(group, key=lambda one: one.size) for group in groups]
    budgets = [_fit_budget(group) for group in groups if len({one.size for one in group}) >= _FEWEST_SIZES]
    if len(budgets) < 2:
        return None
    found = [one for one in budgets if one.size]
    flops = [one.flops for one in found]
    size, tokens = ([one.size or 0.0 for one in found], [one.tokens for one in found])
    return ScalingLaws(budgets, fit_power_law(flops, size), fit_power_law(flops, tokens))


def _fit_budget(trainings: list[Training]) -> Budget:
    """Return the parabola of the trainings of one budget, of at least three sizes."""
    sizes = np.log([one.size for one in trainings])
    parabola = np.polynomial.Polynomial.fit(sizes, [one.bpb for one in trainings], 2)
    lowest = float(next(iter(parabola.deriv().roots()), np.inf))  # no root: a line
    is_inside = parabola.coef[2] > 0 and sizes.min() <= lowest <= sizes.max()
    tokens = np.polynomial.Polynomial.fit(sizes, np.log([one.tokens for one in trainings]), 1)
    best = math.exp(lowest) if is_inside else None
    return Budget(
        flops=math.exp(float(np.mean(np.log([one.flops for one in trainings])))), trainings=trainings,
        parabola=parabola, size=best, tokens=math.exp(tokens(lowest)) if is_inside else math.nan,
        bpb=float(parabola(lowest)) if is_inside else math.nan,
    )  # fmt: skip


def describe_laws(laws: ScalingLaws) -> str:
    """Return the laws as Markdown: the best model of each budget, and its power laws."""
    lines = [
        "## Scaling laws", "",
        "The best model of each budget, at the minimum of a parabola over log N. N counts the parameters that",
        "`pretrain.horizon_parameters` names, D the tokens. ± is a standard error.", "",
        "| FLOPs | models | best N | best D | D / N | bits per byte |", "|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for one in laws.budgets:
        start = f"| {one.flops:.3g} | {len(one.trainings)} |"
        if one.size is None:
            smallest, largest = (math.log(one.trainings[end].size) for end in (0, -1))
            side = "smaller" if one.parabola(smallest) < one.parabola(largest) else "larger"
            best = min(training.bpb for training in one.trainings)
            lines.append(f"{start} none among these sizes: try {side} ones | | | {best:.4f} |")
        else:
            lines.append(f"{start} {one.size:,.0f} | {one.tokens:,.0f} | {one.tokens / one.size:.1f} | {one.bpb:.4f} |")
    lines.append("")
    for label, law in (("N*", laws.size), ("D*", laws.tokens)):
        if law is not None:
            growth = f"{law.exponent:.3f}" + ("" if law.error is None else f" ± {law.error:.3f}")
            lines.append(f"- {label} = {law.at_centre:.4g} · (C / {law.centre:.3g})^({growth})")
    return "\n".join(lines) + "\n"
