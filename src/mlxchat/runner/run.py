"""One invocation: where it reports, what it knows about itself, and how its steps are executed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlxchat.runner.hooks import Hooks
from mlxchat.store.environment import Environment
from mlxchat.store.records import Record, Records, now

if TYPE_CHECKING:
    from mlxchat.distributed.team import Team


def _ignore_metrics(step: str, record: Record) -> None:
    """Drop a record: nobody tracks this run."""


def _no_gpu() -> bool:
    return False


class Ranks(Protocol):
    """The processes that compute a run's steps together, this one being the first."""

    def start(self, run: Run, work: Path) -> Team:
        """Return them ready for a step that saves in `work`, started now if need be.

        Raises:
            StepFailed: that is not possible.
        """

    def describe(self) -> dict[str, Any] | None:
        """Return their number, backend and hosts, or None if there are none yet."""

    def kill(self) -> None:
        """Kill what this process has started, since it will end at once."""

    @property
    def is_broken(self) -> bool:
        """Tell whether nothing more can be computed together."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How steps are executed; it never changes what they compute."""

    max_parallel_steps: int = 1
    """Steps at a time; above 1 each runs in a process of its own."""
    fail_fast: bool = False
    """Whether a step that fails stops those that do not need it."""
    retry_attempts: int = 1
    """How often a step is tried whose error may pass by itself."""
    retry_seconds: float = 10.0
    """Before the second try; twice as long before each further one."""
    timeouts: Mapping[str, float] = field(default_factory=dict)
    """Step → seconds after which it is stopped."""
    hints: Mapping[str, float] = field(default_factory=dict)
    """What steps are told of the whole run: `Context.hints`."""


@dataclass(kw_only=True)
class Run:
    """One invocation."""

    folder: Path
    """outputs/runs/<…>."""
    config: Any
    """The typed configuration."""
    seed: int
    data_seed: int | None = None
    """None: the same as the run's."""
    force: list[str]
    overrides: list[str]
    environment: Environment
    say: Callable[[str], None] = print
    """Where lines for people go."""
    on_metrics: Callable[[str, Record], None] = _ignore_metrics
    """Called with step and record, for trackers."""
    policy: Policy = field(default_factory=Policy)
    hooks: Hooks = field(default_factory=Hooks)
    uses_gpu: Callable[[], bool] = _no_gpu
    """Returns whether stages that declare `gpu` compute on one; may be slow, since it may load MLX."""
    becomes_latest: bool = True
    """Whether it is the latest run (store/naming.py) once it has finished a model."""
    ranks: Ranks | None = None
    """The processes that compute steps together which declare `gpu`; None: this one is alone."""
    stop_signal: int | None = field(default=None, init=False)
    """The signal that asked the run to stop, if one did."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.folder.name

    def event(self, event: str, **details: Any) -> None:
        """Add a line to events.jsonl."""
        Records(self.folder / "events.jsonl").append({"time": now(), "event": event, **details})

    def request_stop(self, number: int) -> None:
        """Note the signal that asks the run to stop."""
        self.stop_signal = self.stop_signal or number

    def announce_stop(self) -> None:
        """Say that the run will stop."""
        self.say("stopping at the next iteration border (again: stop at once)")

    def try_event(self, event: str, **details: Any) -> None:
        """Add a line to events.jsonl if that is possible: what went wrong may be the disk."""
        with suppress(OSError):
            self.event(event, **details)
