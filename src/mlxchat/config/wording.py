"""Counts, sizes and durations as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def format_seconds(seconds: float) -> str:
    """Return a duration as people read it: 4.2s, 3m05s, 2h07m, 56d16h, 3.4 years."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    days = hours // 24
    return f"{days}d{hours % 24:02d}h" if days < 730 else f"{days / 365:.1f} years"


def format_count(count: float) -> str:
    """Return a count with a thousands' letter: 950, 4.1k, 5.24M, 1.3B."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit:
            return f"{count / limit:.3g}{letter}"
    return f"{count:.4g}"


def plural(count: int, noun: str) -> str:
    """Return "1 step", "2 steps"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def first_of(names: Sequence[str], most: int) -> str:
    """Return at most so many names in one line, and how many more there are: a, b and 3 more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def format_number(number: float | None) -> str:
    """Return a number of any kind: four digits, or a count with a thousands' letter; None, which was no number: "-"."""
    if number is None:
        return "-"
    return format_count(number) if abs(number) >= 1000 else f"{number:.4g}"


def format_bytes(count: float) -> str:
    """Return a size: 120 kB, 3.4 MB, 1.2 GB (powers of 1,000)."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"
