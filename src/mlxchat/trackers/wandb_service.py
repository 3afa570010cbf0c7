"""Weights & Biases: online, or offline (WANDB_MODE=offline) in outputs/wandb, to be sent by `wandb sync` later."""

from __future__ import annotations

import os
from typing import Any

from mlxchat.trackers.service import Numbers, Results, TrackedRun

# What a run may wait for a service that does not answer; its metrics wait in memory meanwhile.
INIT_SECONDS = 60.0


class WandbService:
    """One W&B run; every step's curves have that step's iteration as their x."""

    def __init__(self, run: TrackedRun) -> None:
        """Begin the run, or continue it.

        Raises:
            ImportError: wandb is not installed.
            Exception: what wandb raises, for instance without a key or a network.
        """
        import wandb

        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=run.project, name=run.name, id=run.key, resume="allow", config=run.settings, tags=run.tags,
            dir=os.environ.get("WANDB_DIR") or str(run.outputs),
            # The terminal is the run's own: wandb neither takes its lines nor adds to them.
            settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS),
        )  # fmt: skip
        self._steps: set[str] = set()

    def log(self, step: str, iteration: int, numbers: Numbers) -> None:
        """Add a point to each of the step's curves."""
        if step not in self._steps:
            self._steps.add(step)
            self._run.define_metric(f"{step}/iteration")
            self._run.define_metric(f"{step}/*", step_metric=f"{step}/iteration")
        self._run.log({f"{step}/iteration": iteration, **{f"{step}/{name}": value for name, value in numbers.items()}})

    def finish(self, results: Results) -> None:
        """Set the summary and the table of metrics, and end the run."""
        for step, numbers in results.numbers.items():
            self._run.summary.update({f"{step}/{name}": value for name, value in numbers.items()})
        if results.rows:
            self._run.log({"metrics": self._wandb.Table(columns=results.header, data=results.rows)})
        self._run.finish(exit_code=0 if results.is_done else 1)
