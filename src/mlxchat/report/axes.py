"""Scales and the numbers on them: from values to places in a picture, linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Values from `low` to `high` as places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value; on a logarithmic scale it must be positive."""
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def span(values: Sequence[float], *, is_log: bool = False, from_zero: bool = False) -> tuple[float, float]:
    """Return the least and the largest value with room around them; never an empty span."""
    low, high = min(values), max(values)
    if is_log:
        room = (high / low) ** 0.06 if high > low else 1.5
        return low / room, high * room
    low = min(low, 0.0) if from_zero else low
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low if from_zero and low == 0 else low - room, high + room


def ticks(low: float, high: float, most: int, *, is_log: bool = False, whole: bool = False) -> list[float]:
    """Return up to `most` round numbers within a span: 1, 2 or 5 times a power of ten apart.

    Args:
        low: of the span.
        high: of the span.
        most: how many there may be.
        is_log: whether the scale is logarithmic; then powers of ten, with 2 and 5 between where few fit.
        whole: whether only whole numbers make sense.
    """
    if is_log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        if high < 10 * low:  # hardly more than linear, and too few powers of ten
            return ticks(low, high, most)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
            if len(found) <= most:
                return found
        return found[:: math.ceil(len(found) / most)]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return what stands beside ticks: the decimals that tell them apart, thousands as k, M, B, else as 1e18."""
    if not values:
        return []
    largest = max(abs(value) for value in values)
    if largest >= 1e15 or 0 < largest < 1e-4 or (largest >= 1e9 and largest >= 10 * min(map(abs, values))):
        return [f"{value:.0e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-") for value in values]
    size, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")) if largest >= s), (1.0, ""))
    size = 1e3 if unit == "k" else size
    scaled = [value / size for value in values]
    decimals = next((d for d in range(6) if all(abs(v - round(v, d)) <= 1e-6 * max(1, abs(v)) for v in scaled)), 6)
    return [f"{value:,.{decimals}f}{unit if value else ''}" for value in scaled]
