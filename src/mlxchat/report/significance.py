"""Whether a difference of means over seeds is more than chance: Welch's interval, and how many seeds would decide.

B. L. Welch (1947), The generalization of "Student's" problem when several different population variances are involved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from mlxchat.config.table import Table
from mlxchat.config.wording import plural

CONFIDENCE = 0.95
MOST_SEEDS = 30
"""Further seeds that are worth a suggestion."""


@dataclass(frozen=True)
class Difference:
    """The difference of two means, new − old, and its confidence interval."""

    mean: float
    low: float
    high: float
    more_seeds: int | None = None
    """Seeds that both sides need further, if means and scatter stay as they are, until the interval leaves out 0; 0:
    it does; None: more than are worth it."""

    @property
    def is_decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """Return the difference with its interval: -0.0213 [-0.0310, -0.0116]."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def compare_means(old: Sequence[float], new: Sequence[float]) -> Difference | None:
    """Return the difference of the means of two samples; None: one has fewer than two values, so no known scatter."""
    if min(len(old), len(new)) < 2:
        return None
    mean = fmean(new) - fmean(old)
    half = _half_width(old, new)
    if abs(mean) > half:
        return Difference(mean, mean - half, mean + half, 0)
    enough = (more for more in range(1, MOST_SEEDS + 1) if abs(mean) > _half_width(old, new, more))
    return Difference(mean, mean - half, mean + half, next(enough, None))


@dataclass(frozen=True)
class Seeds:
    """Jobs of a sweep that differ in their seeds only."""

    title: str
    """The settings that differ from other jobs', as overrides."""
    values: list[float]


def group_seeds(jobs: Iterable[Mapping[str, Any]], metric: str | None, *, less_is_better: bool) -> list[Seeds]:
    """Return the jobs with a value of a metric by their settings but `seed`, the best mean first; [] without seeds."""
    groups: dict[str, Seeds] = {}
    jobs = [job for job in jobs if metric in job["metrics"]]
    keys = dict.fromkeys(key for job in jobs for key in job["settings"])
    telling = [key for key in keys if len({str(job["settings"].get(key)) for job in jobs}) > 1]
    for job in jobs if "seed" in telling else []:
        pairs = ((key, job["settings"].get(key, "")) for key in telling if key != "seed")
        title = " ".join(f"{key}={value}" for key, value in pairs) or "all jobs"
        groups.setdefault(title, Seeds(title, [])).values.append(job["metrics"][metric])
    return sorted(groups.values(), key=lambda group: fmean(group.values) * (1 if less_is_better else -1))


def table_of_seeds(groups: Sequence[Seeds], metric: str) -> Table:
    """Return a row for each group: mean ± standard error, and the difference from the first group."""
    rows = []
    for group in groups:
        difference = compare_means(groups[0].values, group.values) if group is not groups[0] else None
        error = standard_error(group.values)
        mean = f"{fmean(group.values):.4f}" + ("" if error is None else f" ± {error:.4f}")
        rows.append([group.title, str(len(group.values)), mean, "" if difference is None else str(difference)])
    header = ["settings", "seeds", metric, f"difference from the first [{CONFIDENCE:.0%}]"]
    return Table(header=header, align="lrrr", rows=rows)


def why_no_best(groups: Sequence[Seeds]) -> str:
    """Return why the first group is not known to be better than the second; "": it is."""
    if len(groups) < 2:
        return "the jobs differ in their seeds only"
    difference = compare_means(groups[0].values, groups[1].values)
    told = f"{groups[0].title} and {groups[1].title}"
    if difference is None:
        return f"{told}: give both at least two seeds"
    if difference.is_decided:
        return ""
    more = difference.more_seeds
    advice = "too close to decide" if more is None else f"about {plural(more, 'more seed')} each would decide"
    return f"{told} differ by {difference}, which may be chance; {advice}"


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of at least two values."""
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else None


def _half_width(old: Sequence[float], new: Sequence[float], more: int = 0) -> float:
    """Return half the width of Welch's interval, as if each sample had `more` values of the same variance."""
    sizes = [len(sample) + more for sample in (old, new)]
    squares = [variance(sample) / size for sample, size in zip((old, new), sizes, strict=True)]
    total = sum(squares)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(square**2 / (size - 1) for square, size in zip(squares, sizes, strict=True))
    return student_quantile(0.5 + CONFIDENCE / 2, freedom) * math.sqrt(total)


def student_quantile(share: float, freedom: float) -> float:
    """Return the value below which a `share` of at least 0.5 of Student's t lies; `freedom`: at least 1.

    With t = √freedom · tan a, the density of the angle a is proportional to cos(a)^(freedom − 1).
    """
    import numpy as np

    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp(2 * share - 1, below / below[-1], angles)
    return math.sqrt(freedom) * math.tan(float(angle))
