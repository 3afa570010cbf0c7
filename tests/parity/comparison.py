"""Comparisons with nanochat's values, and their results."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_NAMED = 3  # differing cases in a line


class UnreadableError(Exception):
    """A file is missing, damaged or of an unknown format."""


@dataclass(frozen=True)
class Comparison:
    """The error of a quantity, and its tolerance."""

    name: str
    error: float
    """Absolute or relative, as in the name; for exact quantities the number of differing cases."""
    tolerance: float
    detail: str = ""
    """The cases with errors."""

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


Quantity = Callable[[Any], Iterator[Comparison]]
"""Compares one or several related quantities of a `ParityFile`."""


def exact(name: str, differing: Sequence[str], count: int) -> Comparison:
    """Return the number of differing cases; none may differ, and `count` must not be 0."""
    if not count:
        return Comparison(name, float("nan"), 0, "no case was compared")
    named = ", ".join(differing[:_NAMED]) + (", …" if len(differing) > _NAMED else "")
    return Comparison(
        name, len(differing), 0, f"{len(differing)} of {count} differ: {named}" if differing else f"{count} cases"
    )


def same(name: str, pairs: Iterable[tuple[str, Any, Any]]) -> Comparison:
    """Return the number of unequal cases (what, got, expected)."""
    cases = [(what, got == expected) for what, got, expected in pairs]
    return exact(name, [what for what, is_equal in cases if not is_equal], len(cases))


def matching(name: str, cases: Sequence[Any], compute: Callable[[Any], Any], key: str) -> Comparison:
    """Return the number of cases for which `compute` does not give the value of `key`."""
    return same(name, [(str(case)[:60], compute(case), case[key]) for case in cases])


def refusing(name: str, cases: Sequence[Any], is_refused: Callable[[Any], bool]) -> Comparison:
    """Return the number of cases that are not refused."""
    return exact(name, [str(case)[:60] for case in cases if not is_refused(case)], len(cases))


def largest(name: str, differences: Mapping[str, float], tolerance: float) -> Comparison:
    """Return the largest error; NaN counts as the largest."""
    if not differences:
        return Comparison(name, float("nan"), tolerance, "nothing was compared")
    where = max(differences, key=lambda key: np.nan_to_num(differences[key], nan=np.inf, posinf=np.inf))
    detail = f"{len(differences)} cases, worst: {where}" if len(differences) > 1 else ""
    return Comparison(name, differences[where], tolerance, detail)


def distance(got: Any, expected: Any) -> float:
    """Return the largest absolute difference; infinite if the shapes differ."""
    got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if got.shape != expected.shape:
        return float("inf")
    return float(np.abs(got - expected).max()) if got.size else 0.0


def scaled_distance(got: Any, expected: Any) -> float:
    """Return the largest difference, absolute below 1 and relative above; infinite if the shapes differ."""
    scale = np.maximum(1, np.abs(np.asarray(expected, dtype=np.float64)))
    if np.shape(got) != scale.shape:
        return float("inf")
    return distance(np.asarray(got, dtype=np.float64) / scale, np.asarray(expected, dtype=np.float64) / scale)


def relative_distance(got: Any, expected: Any) -> float:
    """Return |got − expected| / |expected| in the 2-norm; infinite if the shapes differ."""
    got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if got.shape != expected.shape:
        return float("inf")
    difference, norm = float(np.linalg.norm(got - expected)), float(np.linalg.norm(expected))
    if norm == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / norm
