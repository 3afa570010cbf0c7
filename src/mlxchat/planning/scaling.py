"""Scaling laws of pretrainings: the best size of a model for a budget of FLOPs, and how it grows with the budget.

The second approach of Hoffmann et al. 2022 (arXiv 2203.15556), as nanochat's scaling_laws.sh is evaluated. At each
budget C the bits per byte of several models lie on a parabola over log N; its minimum is the best size N*(C). Power
laws N* = a·C^α and D* = b·C^β go through the minima. N counts the parameters that the horizon counts, D tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_BUDGETS_ARE_ONE = 0.1
"""Trainings whose FLOPs differ by less than this share have one budget: iterations are whole numbers."""
# Two-sided 95 % points of Student's t by degrees of freedom, from 1.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One finished pretraining."""

    name: str
    depth: int
    width: int
    parameters: dict[str, int]  # by kind, as `count_parameters` returns them
    horizon_parameters: int  # N: those counted by tokens per parameter
    num_iterations: int
    tokens: int
    flops: float
    bpb: float  # held-out bits per byte at the end
    core: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class IsoFlop:
    """The models of one budget: a parabola of their bits per byte over log N, and its minimum."""

    flops: float  # the budget: the geometric mean of the trainings'
    trainings: list[Training]  # by N
    coefficients: tuple[float, float, float]  # a, b, c of bpb = a·x² + b·x + c, with x = ln(N / centre)
    centre: float  # geometric mean of N
    best_parameters: float | None  # N*; None if the parabola has no minimum between the smallest and the largest model
    best_tokens: float
    """D*, along the line of tokens over parameters that the trainings of this budget lie on; NaN without a minimum."""
    best_bpb: float

    def bpb_at(self, parameters: float) -> float:
        """Return the parabola's bits per byte for this number of parameters."""
        a, b, c = self.coefficients
        x = math.log(parameters / self.centre)
        return a * x * x + b * x + c


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = at_centre · (x / centre)^exponent, by least squares of the logarithms."""

    centre: float
    at_centre: float
    exponent: float
    half_width: float | None
    """Of the exponent's 95 % interval, by Student's t; None with two points, which leave no residuals."""
    num_points: int

    def __call__(self, x: float) -> float:
        """Return y."""
        return self.at_centre * math.exp(self.exponent * math.log(x / self.centre))


@dataclass(frozen=True, kw_only=True)
class ScalingLaws:
    """Laws fitted to trainings at several budgets."""

    budgets: list[IsoFlop]  # by FLOPs
    parameters: PowerLaw | None  # N*(C); None unless two budgets have a minimum
    tokens: PowerLaw | None  # D*(C)
    bpb: PowerLaw | None  # the lowest bits per byte of each budget over C

    @property
    def tokens_per_parameter(self) -> list[float]:
        """Return D*/N* of the budgets that have a minimum."""
        return [one.best_tokens / one.best_parameters for one in self.budgets if one.best_parameters]


def fit_power_law(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw | None:
    """Return the power law through points with positive coordinates; None with fewer than two different x."""
    if len(set(xs)) < 2:
        return None
    x, y = np.log(np.array(xs, dtype=float)), np.log(np.array(ys, dtype=float))
    spread = float(((x - x.mean()) ** 2).sum())
    exponent = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    rest = y - y.mean() - exponent * (x - x.mean())
    freedom = len(xs) - 2
    half_width = None
    if freedom > 0:
        # Beyond the table: within 0.1 % of Student's t.
        student = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.4 / freedom + 2.9 / freedom**2
        half_width = student * math.sqrt(float((rest**2).sum()) / freedom / spread)
    centre, at_centre = math.exp(x.mean()), math.exp(y.mean())
    return PowerLaw(centre=centre, at_centre=at_centre, exponent=exponent, half_width=half_width, num_points=len(xs))


def fit_scaling_laws(trainings: Sequence[Training]) -> ScalingLaws | None:
    """Return the laws of trainings; None unless at least two budgets have three models of different sizes."""
    groups = group_by_budget(trainings)
    budgets = [_fit_budget(group) for group in groups if len({one.horizon_parameters for one in group}) >= 3]
    if len(budgets) < 2:
        return None
    found = [one for one in budgets if one.best_parameters]
    flops = [one.flops for one in found]
    return ScalingLaws(
        budgets=budgets,
        parameters=fit_power_law(flops, [one.best_parameters or 0.0 for one in found]),
        tokens=fit_power_law(flops, [one.best_tokens for one in found]),
        bpb=fit_power_law(flops, [one.best_bpb for one in found]),
    )


def group_by_budget(trainings: Sequence[Training]) -> list[list[Training]]:
    """Return the trainings by FLOPs, those of one budget together and by size."""
    groups: list[list[Training]] = []
    for one in sorted(trainings, key=lambda one: one.flops):
        if groups and one.flops <= groups[-1][0].flops * (1 + _BUDGETS_ARE_ONE):
            groups[-1].append(one)
        else:
            groups.append([one])
    return [sorted(group, key=lambda one: one.horizon_parameters) for group in groups]


def _fit_budget(trainings: list[Training]) -> IsoFlop:
    """Return the parabola of the trainings of one budget, of at least three sizes."""
    numbers = [one.horizon_parameters for one in trainings]
    size = np.log(numbers)
    middle = float(size.mean())
    a, b, c = (float(value) for value in np.polyfit(size - middle, [one.bpb for one in trainings], 2))
    lowest = middle - b / (2 * a) if a > 0 else math.inf
    has_minimum = size.min() <= lowest <= size.max()
    law = fit_power_law(numbers, [one.tokens for one in trainings])
    assert law is not None, "there are three sizes"
    return IsoFlop(
        flops=math.exp(float(np.mean(np.log([one.flops for one in trainings])))),
        trainings=trainings,
        coefficients=(a, b, c),
        centre=math.exp(middle),
        best_parameters=math.exp(lowest) if has_minimum else None,
        best_tokens=law(math.exp(lowest)) if has_minimum else math.nan,
        best_bpb=c - b * b / (4 * a) if has_minimum else math.nan,
    )


def table_of(trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """Return a row for each training, with the columns of nanochat's scaling_laws.sh; missing scores are empty."""
    columns = {"transformer": "matrices", "wte": "embedding", "value_embeds": "value_embeddings", "lm_head": "head"}
    return [
        {
            "flops_budget": f"{group[0].flops:.4g}",
            "depth": one.depth,
            "model_dim": one.width,
            **{f"params_{name}": one.parameters[kind] for name, kind in columns.items()},
            "params_scalars": one.parameters["scalars"],
            "params_total": one.parameters["total"],
            "num_iterations": one.num_iterations,
            "tokens_trained": one.tokens,
            "param_data_ratio": round(one.tokens / one.horizon_parameters, 2),
            "val_bpb": one.bpb,
            "core_score": "" if one.core is None else one.core,
            "train_time_sec": "" if one.seconds is None else round(one.seconds, 1),
        }
        for group in group_by_budget(trainings)
        for one in group
    ]
