"""Runs the steps of a plan, here or as jobs elsewhere; what follows when one fails."""

from __future__ import annotations

import json
import signal
import time
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxchat import errors
from mlxchat.errors import ConfigError, Interrupted, MlxchatError, StepFailed, StoreError
from mlxchat.runner.executors import Leave, LostJob, Task, attach, submit
from mlxchat.runner.plan import PlannedStep, Verdict
from mlxchat.runner.process import keep_awake, stop_on_signals
from mlxchat.runner.progress import fill
from mlxchat.runner.run import REFRESH_SECONDS, Run, complete, find_done, ignore, summarise
from mlxchat.store import attempts
from mlxchat.store.files import Record, Records, write_whole
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import LATEST, MODEL, link_saved
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from mlxchat.config.schema import ExecutorConfig

_LOOK_SECONDS = 0.2
# Each poll of a job is a request to a file server.
_JOB_SECONDS = 1.0


def execute(plan: list[PlannedStep], store: Store, run: Run) -> None:
    """Run the unfinished steps of a plan, and set this run's refs to every step's artifact.

    A run that finishes a model becomes the latest one.

    A failed step also fails the steps that need it. The others continue, unless fail_fast is set.

    Raises:
        Interrupted: a signal arrived; finished steps are kept, and running steps can be continued.
        MlxchatError: a step raised it; StepFailed if several failed.
        StoreError: the outputs folder can no longer be written.
    """
    for step in plan:
        _ = step.code  # digested now: later edits must not be recorded for steps that run now
    outcome = Outcome(plan, store, run)
    try:
        run.event("run_started", steps=[step.name for step in plan])
        with keep_awake():
            _complete_steps(outcome)
        outcome.conclude()
    except OSError as error:
        raise StoreError(
            f"outputs folder {store.outputs} can no longer be used ({error.strerror or error}: {error.filename}). "
            "Its contents are intact. Fix that and run the same command again: it continues."
        ) from error
    except MlxchatError as error:
        run.try_event("run_failed", step=outcome.current, error=str(error))
        raise
    run.event("run_done")


def _complete_steps(outcome: Outcome) -> None:
    """Complete the steps of a plan: one after the other here, and jobs elsewhere as soon as their inputs exist.

    Raises:
        Interrupted: a signal arrived; every running step has saved its state.
        StoreError: the outputs folder cannot be used.
    """
    run, jobs, left = outcome.run, dict[str, _Elsewhere](), dict[str, str]()
    fatal: MlxchatError | None = None

    def cancel_all() -> None:
        for job in jobs.values():
            job.stop(signal.SIGTERM)

    with stop_on_signals(run.request_stop, run.announce_stop, cancel_all):
        try:
            while True:
                here = None
                if run.stop_signal in (signal.SIGTERM, signal.SIGHUP):
                    left |= _leave_jobs(jobs)
                if run.stop_signal is not None or fatal is not None or outcome.is_over:
                    for job in jobs.values():
                        job.stop(run.stop_signal or signal.SIGTERM)
                else:
                    here = _submit_what_is_ready(outcome, jobs)
                try:
                    if here is not None:
                        _complete_here(here, outcome)
                    elif jobs:
                        time.sleep(_LOOK_SECONDS)
                    else:
                        break
                    for job in [job for job in jobs.values() if job.has_ended()]:
                        del jobs[job.step.name]
                        _take_result(job, outcome)
                except StoreError as error:
                    fatal = error
                except Interrupted as stop:
                    if run.stop_signal is not None or here is not None:  # else a job that was cancelled after a failure
                        fatal = fatal or stop
        finally:
            cancel_all()
    if fatal is not None:
        raise fatal
    if run.stop_signal is not None and left:
        waiting = ", ".join(f"{name} in {job}" for name, job in left.items())
        raise Interrupted(
            f"stopped; {waiting} continues: the same command awaits it, mlxchat status --cancel ends it.",
            run.stop_signal,
        )
    if run.stop_signal is not None and len(outcome.finished) < len(outcome.plan) and not outcome.failures:
        raise Interrupted("stopped between two steps. The same command continues from there.", run.stop_signal)


def _leave_jobs(jobs: dict[str, _Elsewhere]) -> dict[str, str]:
    """Remove the jobs that outlive this process; return step → job."""
    found = {name: each.job.name for name, each in jobs.items() if each.job.outlives}
    for name in found:
        del jobs[name]
    return found


def _submit_what_is_ready(outcome: Outcome, jobs: dict[str, _Elsewhere]) -> PlannedStep | None:
    """Submit every job whose inputs exist; return the first step that can run here."""
    here = None
    for step in outcome.plan:
        if step.name in outcome.finished or step.name in outcome.failures or step.name in jobs:
            continue
        if outcome.must_skip(step) or any(source not in outcome.finished for source in step.inputs.values()):
            continue
        executor = outcome.run.executors.get(step.name)
        if executor is None:
            here = here or step
            continue
        place = find_done(step, outcome.store, outcome.run, outcome.planned)
        outcome.note(step)
        if place is not None:
            outcome.finish(step, place)
            continue
        try:
            jobs[step.name] = _Elsewhere(step, outcome, executor)
        except ConfigError as error:  # refused by the cluster
            outcome.fail(step, error)
    return here


def _complete_here(step: PlannedStep, outcome: Outcome) -> None:
    """Complete a step in this process, and record how it ended."""
    try:
        place = find_done(step, outcome.store, outcome.run, outcome.planned)
        outcome.note(step)
        place = place or complete(step, outcome.store, outcome.run, outcome.planned)
    except (Interrupted, StoreError):
        outcome.current = step.name
        raise
    except MlxchatError as error:
        outcome.fail(step, error)
    else:
        outcome.finish(step, place)


class Outcome:
    """The results of a run's steps so far."""

    def __init__(self, plan: list[PlannedStep], store: Store, run: Run) -> None:
        """Start without results."""
        self.plan, self.store, self.run = plan, store, run
        self.planned = {step.name: step for step in plan}
        self.finished: set[str] = set()
        self.failures: dict[str, MlxchatError] = {}
        self.skipped: dict[str, str] = {}
        """Step → the failed step that it needs."""
        self.current: str | None = None
        """The step that was running when the run ended."""

    @property
    def is_over(self) -> bool:
        """Whether a failure keeps further steps from starting."""
        run = self.run
        return bool(self.failures) and (run.fail_fast or (run.team is not None and run.team.is_broken))

    def finish(self, step: PlannedStep, place: Path) -> None:
        """Record a step's artifact and set its names."""
        self.finished.add(step.name)
        self.store.set_ref(self.run.name, step.name, place)
        made = self.store.made(step.key)
        step.take(made)
        link_saved(self.store, self.run.name, step.name, made["attempts"] if made is not None else ())
        self.note(step)
        if step.stage.produces == MODEL and made is not None and made["run"] == self.run.name:
            self._become_latest()

    def note(self, step: PlannedStep) -> None:
        """Write a step's final key and its artifact into plan.json."""
        path = self.run.folder / "plan.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"steps": []}
        for entry in record["steps"]:
            known = {"key": step.key, "rid": step.rid, "artifact": step.artifact}
            if entry["step"] == step.name and not known.items() <= entry.items():
                entry |= known
                write_whole(path, json.dumps(record, indent=1).encode() + b"\n")

    def fail(self, step: PlannedStep, error: MlxchatError) -> None:
        """Record that a step failed; print it now if other steps continue."""
        self.failures[step.name] = error
        self.current = step.name
        if not self.run.fail_fast and any(self._goes_on(other) for other in self.plan):
            self.run.say(f"{step.name:<10} failed: {(str(error).splitlines() or ['?'])[0]} (other steps continue)")

    def must_skip(self, step: PlannedStep) -> bool:
        """Return True if a step needs a failed one; record and print this once."""
        cause = next((self.cause_of(source) for source in step.inputs.values() if self.cause_of(source)), None)
        if cause is None:
            return False
        if step.name not in self.skipped:
            self.skipped[step.name] = cause
            self.run.event("step_skipped", step=step.name, failed=cause)
            self.run.say(f"{step.name:<10} is skipped: {cause} failed")
        return True

    def cause_of(self, name: str) -> str | None:
        """Return the failed step that this one needs."""
        return name if name in self.failures else self.skipped.get(name)

    def conclude(self) -> None:
        """Raise the errors of the run, if any."""
        if len(self.failures) == 1:
            raise next(iter(self.failures.values()))
        if self.failures:
            lines = [f"{name}: {(str(error).splitlines() or ['?'])[0]}" for name, error in self.failures.items()]
            raise StepFailed(f"{len(lines)} steps failed:\n" + "\n".join(lines))
        if any(step.stage.produces == MODEL for step in self.plan):
            self._become_latest()

    def _become_latest(self) -> None:
        if self.run.becomes_latest:
            self.store.link_group(LATEST, self.run.name)

    def _goes_on(self, step: PlannedStep) -> bool:
        if step.name in self.finished or step.name in self.failures:
            return False
        return not any(self._lost(source) for source in step.inputs.values())

    def _lost(self, name: str) -> bool:
        step = self.planned[name]
        return name in self.failures or any(self._lost(source) for source in step.inputs.values())


@dataclass(frozen=True)
class Order:
    """Everything that a worker process needs to complete a step."""

    step: str
    planned: dict[str, PlannedStep]
    """Name → step: the step and its inputs."""
    outputs: Path
    run: Run

    @classmethod
    def of(cls, step: PlannedStep, outcome: Outcome) -> Order:
        """Return a step's order without what cannot be pickled."""
        planned = {name: copy(outcome.planned[name]) for name in (step.name, *step.inputs.values())}
        alone = replace(outcome.run, say=_say, on_metrics=ignore)
        return cls(step.name, planned, outcome.store.outputs, alone)

    def complete(self) -> Result:
        """Complete the step in this process; return its result."""
        run = self.run
        try:
            with stop_on_signals(run.request_stop, lambda: None):
                return "done", str(complete(self.planned[self.step], Store(self.outputs), run, self.planned)), 0
        except MlxchatError as error:
            return type(error).__name__, str(error), error.exit_code
        except OSError as error:
            what = f"({error.strerror or error}: {error.filename})"
            return StoreError.__name__, f"outputs folder {self.outputs} can no longer be used {what}", 2


Result = tuple[str, str, int]
"""done and the artifact's folder, or an error's class name, message and exit code."""


def _say(line: str) -> None:
    print(line, flush=True)


def _take_result(job: _Elsewhere, outcome: Outcome) -> None:
    """Record the result of a step whose job has ended."""
    job.close()
    step, run = job.step, outcome.run
    if job.result is None and job.stopped_by:
        raise Interrupted(f"{step.name} was stopped. The same command continues it.", job.stopped_by)
    if job.result is None:
        text = f"step {step.name} failed: {job.how_it_was_lost()}"
        run.event("step_failed", step=step.name, error=text)
        outcome.fail(step, StepFailed(text))
        return
    kind, message, code = job.result
    if kind == "done":
        step.verdict = Verdict(state="done")
        outcome.store.forget()
        outcome.finish(step, Path(message))
    elif kind == Interrupted.__name__:
        raise Interrupted(message, code - 128)
    elif kind == StoreError.__name__:
        outcome.current = step.name
        raise StoreError(message)
    else:
        outcome.fail(step, getattr(errors, kind, StepFailed)(message))


class _Elsewhere:
    """A step that runs in an executor's job: one that an earlier command submitted, or a new one.

    Its progress is read from its records in the outputs folder, which both machines share. It continues if this process
    ends, and the next run awaits it.
    """

    def __init__(self, step: PlannedStep, outcome: Outcome, executor: ExecutorConfig) -> None:
        """Find the job, or submit it."""
        self.step, self.run, self.outcome = step, outcome.run, outcome
        self.result: Result | None = None
        self.stopped_by = 0
        """The signal because of which it was cancelled."""
        self.work = outcome.store.work(step.key)
        self.seen = len(self._metrics(self.work / "ckpt" / "records"))
        self.looked = self.said = time.monotonic()
        self.iteration: int | None = None
        self.lost = ""
        record = outcome.store.jobs / f"{step.key}.jsonl"
        found = attach(record)
        if found is None:
            task = Task(step.name, _Submitted(Order.of(step, outcome)), record)
            facts = {"step": step.name, "run": self.run.name}
            (found,) = submit(executor, step.name, [task], self.run.folder / "jobs", **facts)
        elif found.facts["run"] != self.run.name:
            self.run.say(f"{step.name:<10} awaits {found.name} of run {found.facts['run']}")
        self.job = found
        self._report()

    def has_ended(self) -> bool:
        """Return True if it has ended; pass on its new records."""
        if time.monotonic() - self.looked < _JOB_SECONDS:
            return False
        self.looked = time.monotonic()
        ended = self.job.done()
        if not ended:
            self._report()
        return ended

    def stop(self, number: int) -> None:
        """Cancel it, once; if running, it saves and ends."""
        if not self.stopped_by:
            self.stopped_by = number
            self.job.cancel()

    def close(self) -> None:
        """Return its result."""
        try:
            self.result = tuple(self.job.result())
        except LostJob as error:
            self.lost = str(error)
        if self.stopped_by:
            self.result = None
        if self.result is not None and self.result[0] == "done":
            place = Path(self.result[1])
            self._pass_on(place)
            self.run.say(fill(f"{self.step.name:<10} done by {self.job.name}: {summarise(read_manifest(place))}"))

    def how_it_was_lost(self) -> str:
        """Return how it ended without a result."""
        saved = attempts.has_saved(self.work)
        return f"{self.lost}\nThe same command submits it again{', and it continues from what was saved' * saved}."

    def _report(self) -> None:
        """Print its progress if it has changed, and pass on its metrics."""
        self._pass_on(self.work / "ckpt" / "records")
        starts, executions = self.job.lines("started"), attempts.read(self.work)
        is_own = bool(starts and executions) and all(executions[-1][it] == starts[-1][it] for it in ("pid", "host"))
        iteration = attempts.iteration(self.work) if is_own else None
        is_due = time.monotonic() - self.said >= REFRESH_SECONDS
        state = self.job.news()
        if state or (is_due and iteration != self.iteration):
            self.iteration, self.said = iteration, time.monotonic()
            far = f", at iteration {iteration}" if iteration else ""
            self.run.say(f"{self.step.name:<10} {self.job.name} {state or self.job.describe()}{far}")

    def _pass_on(self, folder: Path) -> None:
        records = self._metrics(folder)
        for record in records[self.seen :]:
            self.run.on_metrics(self.step.name, record)
        self.seen = max(self.seen, len(records))

    @staticmethod
    def _metrics(folder: Path) -> list[Record]:
        return Records(folder / "metrics.jsonl").read()


@dataclass(frozen=True)
class _Submitted:
    """The call of a job that completes a step."""

    order: Order

    def __call__(self, leave: Leave | None) -> Result:
        """Complete the step, inside the job."""
        Store(self.order.outputs).prepare()  # this machine must see the locks, too
        kind, message, code = self.order.complete()
        if kind == Interrupted.__name__ and leave is not None:
            return StepFailed.__name__, f"{message}\nIts job ended: {leave()}", 1
        return kind, message, code
