"""What every tracking service is given, and what it must be able to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """One run as a service knows it; a command that continues another's work continues its tracked run."""

    project: str
    name: str
    """That of the folder of the run that began it."""
    key: str
    """Sixteen hexadecimal digits, the same whenever it is continued."""
    outputs: Path
    """The outputs folder, absolute; a service keeps its files in a folder of its own there."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The whole configuration, without secrets."""
    tags: list[str] = field(default_factory=list)
    is_continued: bool = False


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a run ends with."""

    numbers: dict[str, Numbers] = field(default_factory=dict)
    """Step → its final numbers."""
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    """The table of metrics; none if nothing was scored."""
    is_done: bool = True
    """Whether every step has its artifact."""


class Service(Protocol):
    """A place that metrics go to. Whatever it raises is told once, and it is left alone from then on."""

    def log(self, step: str, iteration: int, numbers: Numbers) -> None:
        """Take the numbers of a step after so many of its iterations."""

    def finish(self, results: Results) -> None:
        """Take the results, and end. It may be begun again under the same key."""
