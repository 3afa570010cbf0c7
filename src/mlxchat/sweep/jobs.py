"""The jobs of a sweep: run here one after the other, or by an executor all at once."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from mlxchat.composition.compose import Composed, compose_config, split_options
from mlxchat.config.schema import ExecutorConfig
from mlxchat.config.secrets import redact
from mlxchat.errors import Interrupted, MlxchatError
from mlxchat.pipeline import run_pipeline
from mlxchat.runner.executors import attach, submit
from mlxchat.runner.plan import PlannedStep, entries_of, plan_again
from mlxchat.runner.process import stop_on_signals
from mlxchat.store.store import Store
from mlxchat.sweep.results import Row, metrics_of, settings_of

_QUEUE_SECONDS = 1.0


@dataclass(kw_only=True)
class Job:
    """One job of a sweep, and how it ended."""

    number: int
    """Counted from 1, in the order of the command line."""
    overrides: list[str]
    composed: Composed
    plan: list[PlannedStep]
    title: str = ""
    """The settings that differ between jobs."""
    made: set[str] = field(default_factory=set)
    """Its steps that the sweep has made for several jobs."""
    status: str = "not run"
    """not run, done, failed, interrupted, or queued: the executor's job outlives this process."""
    error: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether every step of it is done."""
        return all(step.done for step in self.plan)

    @property
    def force(self) -> list[str]:
        """Its forced steps that the sweep has not made yet."""
        return [step.name for step in self.plan if step.forced and step.name not in self.made]

    @property
    def words(self) -> list[str]:
        """Its command line."""
        return [*self.composed.options, *self.overrides]

    def row(self, store: Store) -> Row:
        """Return its row of the table."""
        metrics = metrics_of(self.plan, store, self.composed.config.sweep.metric) if self.status == "done" else {}
        return {
            "job": self.number, "title": self.title or f"job {self.number}", "settings": settings_of(self.overrides),
            "status": self.status, "error": self.error, "metrics": metrics, "steps": entries_of(self.plan),
        }  # fmt: skip

    def end(self, error: str, store: Store) -> None:
        """Set how it ended; no error: it is done."""
        self.status, self.error = ("failed", error.splitlines()[0]) if error else ("done", "")
        self.plan = plan_again(self.plan, store)


def run_here(job: Job, store: Store) -> None:
    """Run a job in this process; a failure is its status.

    Raises:
        Interrupted: a signal arrived.
    """
    job.plan = plan_again(job.plan, store, force=job.force)
    error = ""
    try:
        run_pipeline(job.composed, job.plan, job=f"job{job.number}")
    except Interrupted as stop:
        job.status, job.error = "interrupted", str(stop)
        raise
    except MlxchatError as failure:
        error = str(failure)
        print(redact(f"error: {error}"), file=sys.stderr, flush=True)
    job.end(error, store)


def run_elsewhere(
    jobs: Sequence[Job], executor: ExecutorConfig, store: Store, folder: Path, say: Callable[[Job, str], None]
) -> None:
    """Run jobs by an executor until all have ended; those that an earlier command submitted are awaited.

    Ctrl-C cancels them, and they save. They continue if this process ends in another way.

    Args:
        jobs: the jobs.
        executor: the executor of all jobs.
        store: store of their artifacts.
        folder: the sweep's folder, for the executor's files.
        say: prints news of a job.

    Raises:
        Interrupted: a signal arrived.
    """
    records = {job.number: store.jobs / f"{_digest(job)}.jsonl" for job in jobs}
    running = {job.number: found for job in jobs if (found := attach(records[job.number])) is not None}
    new = [job for job in jobs if job.number not in running]
    if new:
        calls = {records[job.number]: partial(run_submitted, job.words, job.number, job.force) for job in new}
        submitted = submit(executor, folder.name, calls, folder / "jobs", sweep=str(folder.resolve()))
        running |= dict(zip((job.number for job in new), submitted, strict=True))
    stop: list[int] = []
    cancelled = False
    with stop_on_signals(stop.append, lambda: say(jobs[0], "stopping: running jobs save (again: stop at once)")):
        while running:
            time.sleep(_QUEUE_SECONDS)
            failed = any(job.status == "failed" for job in jobs) and jobs[0].composed.config.fail_fast
            if stop and stop[0] != signal.SIGINT and all(each.outlives for each in running.values()):
                for job in jobs:
                    job.status = "queued" if job.number in running else job.status
                break
            if (stop or failed) and not cancelled:
                cancelled = True
                for each in running.values():
                    each.cancel()
            for job in jobs:
                if (own := running.get(job.number)) is None:
                    continue
                if own.done():
                    del running[job.number]
                    job.end(own.take(), store)
                    if cancelled and job.status == "failed":
                        job.status = "interrupted"
                    say(job, job.status)
                elif news := own.news():
                    say(job, f"{own.name} {news}")
    if stop:
        left = "; the jobs continue: the same command awaits them, mlxchat status --cancel ends them"
        raise Interrupted(f"the sweep was stopped{left if running else ''}. The same command continues it.", stop[0])


def _digest(job: Job) -> str:
    """Return a name that the same command gives the job again."""
    words = json.dumps([str(Path.cwd()), *job.words])
    return f"sweep-{hashlib.sha256(words.encode()).hexdigest()[:16]}"


def run_submitted(words: list[str], number: int, force: list[str]) -> None:
    """Run a job inside the executor's process.

    Args:
        words: its command line.
        number: its number in the sweep.
        force: steps to run although they are done.

    Raises:
        Interrupted: a signal arrived.
        MlxchatError: it failed.
    """
    composed = compose_config(*split_options(words))
    here = replace(composed.config.executor, kind="local")
    composed = replace(composed, config=replace(composed.config, executor=here, force=force))
    run_pipeline(composed, job=f"job{number}")
