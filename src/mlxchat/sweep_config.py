"""The schema of `sweep`: what a sweep or a search is about. None of it is part of any identity."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxchat.missing import MISSING


@dataclass(kw_only=True)
class SweepConfig:
    """Many runs from one command."""

    kind: str = MISSING
    """none; tpe: each trial is chosen by the results of those before; halving: random trials, the worse of which stop
    early."""
    name: str | None = MISSING
    """Folder of a search under outputs/multirun; null: the run's name and "-search". The same name continues the same
    search."""
    metric: str | None = MISSING
    """step.metric that is looked for or sorted by, any number that a step records; null (only for -m): the last of the
    pipeline that differs."""
    direction: str | None = MISSING
    """minimize or maximize; null: the direction that the metric's stage declares."""
    trials: int = MISSING
    """Trials of a search, those of earlier commands included."""
    first_rung: int = MISSING
    """halving: iterations after which trials are first compared, at the next record of the metric."""
    factor: int = MISSING
    """halving: of so many trials one goes on, for so many times the iterations."""
    random_trials: int = MISSING
    """Trials before the results so far begin to decide."""
    seed: int = MISSING
    """Seed of the choices."""
    job: int | None = None
    """Set by a sweep in processes of its own: the number of the job to run."""
    space: dict[str, str] = field(default_factory=dict)
    """Key or group → what is tried: choice(a,b), range(1,9), interval(0.1,1), int(interval(1,8)), tag(log,…)."""
