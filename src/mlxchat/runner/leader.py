"""Runs the steps of a plan: one after the other here, and as jobs elsewhere; what follows when one fails."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mlxchat.errors import Interrupted, MlxchatError, StepFailed, StoreError
from mlxchat.runner.executors import Job, attach, submit
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.process import keep_awake, stop_on_signals
from mlxchat.runner.run import Run, complete, find_done, summarise
from mlxchat.store import attempts
from mlxchat.store.files import Records, write_whole
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import LATEST, MODEL, links, runs
from mlxchat.store.store import SAVED, Store

if TYPE_CHECKING:
    from mlxchat.config.schema import ExecutorConfig

# Each look at a job is a request to a file server.
_LOOK_SECONDS = 1.0


def execute(plan: list[PlannedStep], store: Store, run: Run) -> None:
    """Run the unfinished steps of a plan, and set this run's refs to every step's artifact.

    A run that finishes a model becomes the latest one. A failed step also fails the steps that need it; the others
    continue, unless fail_fast is set.
    """
    for step in plan:
        _ = step.code  # digested now: later edits must not be recorded for steps that run now
    leader = _Leader(plan, store, run)
    try:
        run.event("run_started", steps=[step.name for step in plan])
        with keep_awake(), stop_on_signals(run.request_stop, run.announce_stop):
            leader.complete_all()
        leader.conclude()
    except OSError as error:
        raise StoreError(
            f"outputs folder {store.outputs} can no longer be used ({error.strerror or error}: {error.filename}). "
            "Its contents are intact. Fix that and run the same command again: it continues."
        ) from error
    except MlxchatError as error:
        run.event("run_failed", step=leader.current, error=str(error))
        raise
    run.event("run_done")


class _Leader:
    """The process that leads a run: the results of its steps so far, and the next steps."""

    def __init__(self, plan: list[PlannedStep], store: Store, run: Run) -> None:
        self.plan, self.store, self.run = plan, store, run
        self.planned = {step.name: step for step in plan}
        self.finished: set[str] = set()
        self.failures: dict[str, MlxchatError] = {}
        self.skipped: dict[str, str] = {}  # step → the failed step that it needs
        self.jobs: dict[str, Job] = {}  # step → its job elsewhere
        self.seen: dict[str, int] = {}  # step in a job → records of its metrics.jsonl that the tracker has
        self.left: dict[str, str] = {}  # step → its job, which continues although this process ends
        self.interrupted: Interrupted | None = None
        self.current: str | None = None  # the step that ran last

    def complete_all(self) -> None:
        """Run local steps one after the other, and submit the others as soon as their inputs exist."""
        try:
            while True:
                here = None
                if self._is_stopping():
                    self._stop_jobs()
                else:
                    here = self._submit_ready()
                if here is not None:
                    self._start(here, None)
                elif self.jobs:
                    time.sleep(_LOOK_SECONDS)
                else:
                    break
                for name in list(self.jobs):
                    self._look(self.planned[name], self.jobs[name])
        finally:
            for job in self.jobs.values():
                job.cancel()
        if self.interrupted is not None:
            raise self.interrupted
        if (number := self.run.stop_signal) is None or len(self.finished) == len(self.plan) or self.failures:
            return
        if self.left:
            jobs = ", ".join(f"{name} in {job}" for name, job in self.left.items())
            raise Interrupted(
                f"stopped; {jobs} continues: the same command awaits it, mlxchat status --cancel ends it.", number
            )
        raise Interrupted("stopped between two steps. The same command continues from there.", number)

    def _is_stopping(self) -> bool:
        """Return whether no further step may start."""
        run = self.run
        is_over = bool(self.failures) and (run.fail_fast or (run.team is not None and run.team.is_broken))
        return is_over or run.stop_signal is not None or self.interrupted is not None

    def _stop_jobs(self) -> None:
        """Cancel all jobs, which save; after SIGTERM and SIGHUP leave those that outlive this process."""
        for name, job in list(self.jobs.items()):
            if self.run.stop_signal in (signal.SIGTERM, signal.SIGHUP) and job.outlives:
                self.left[name] = job.name
                del self.jobs[name]
            else:
                job.cancel()

    def _submit_ready(self) -> PlannedStep | None:
        """Submit every step with an executor whose inputs exist; return the first other step that can run."""
        here = None
        for step in self.plan:
            begun = {*self.finished, *self.failures, *self.skipped, *self.jobs}
            if step.name in begun or not self.finished.issuperset(step.inputs.values()):
                continue
            executor = self.run.executors.get(step.name)
            if executor is not None:
                self._start(step, executor)
            elif here is None:
                here = step
        return here

    def _start(self, step: PlannedStep, executor: ExecutorConfig | None) -> None:
        """Complete a step here, or submit it; its failure is recorded."""
        self.current = step.name
        try:
            place = find_done(step, self.store, self.run, self.planned, forced=step.forced)
            self._note(step)
            if place is None and executor is not None:
                self._submit(step, executor)
                return
            self._finish(step, place or complete(step, self.store, self.run, self.planned))
        except Interrupted as stop:
            self.interrupted = stop
        except StoreError:
            raise
        except MlxchatError as error:
            self._fail(step, error)

    def _submit(self, step: PlannedStep, executor: ExecutorConfig) -> None:
        """Submit a step, or find the job that an earlier command submitted, which continues if its command ends."""
        run, record = self.run, self.store.jobs / f"{step.key}.jsonl"
        self.seen[step.name] = len(Records(self.store.work(step.key) / "ckpt" / "records" / "metrics.jsonl").read())
        job = attach(record)
        if job is None:
            assert run.order is not None, "a step has an executor"
            calls = {record: run.order(step)}
            (job,) = submit(executor, step.name, calls, run.folder / "jobs", step=step.name, run=run.name)
        elif job.facts["run"] != run.name:
            run.say(f"{step.name:<10} awaits {job.name} of run {job.facts['run']}")
        self.jobs[step.name] = job

    def _look(self, step: PlannedStep, job: Job) -> None:
        """Print what is new about a job, pass on its metrics, and take its result once it has ended."""
        if job.done():
            del self.jobs[step.name]
            self._take(step, job)
            return
        self._pass_on(step, self.store.work(step.key) / "ckpt" / "records")
        if news := job.news():
            self.run.say(f"{step.name:<10} {job.name} {news}")

    def _pass_on(self, step: PlannedStep, folder: Path) -> None:
        records = Records(folder / "metrics.jsonl").read()
        for record in records[self.seen[step.name] :]:
            self.run.on_metrics(step.name, record)
        self.seen[step.name] = max(self.seen[step.name], len(records))

    def _take(self, step: PlannedStep, job: Job) -> None:
        """Record the result of a step whose job has ended: what is in the store, or why the job failed."""
        run = self.run
        self.current = step.name
        error = job.take()
        self.store.forget()
        made = self.store.made(step.key)
        if made is not None and (not step.forced or made["run"] == job.facts["run"]):
            place = self.store.outputs / "store" / made["name"]
            self._pass_on(step, place)
            run.say(f"{step.name:<10} done by {job.name}: {summarise(read_manifest(place))}")
            step.state = "done"
            self._finish(step, place)
        elif job.is_cancelled:
            if run.stop_signal is not None:
                text = f"{step.name} was stopped. The same command continues it."
                self.interrupted = self.interrupted or Interrupted(text, run.stop_signal)
        elif job.end is not None:
            self._fail(step, StepFailed(error or f"{job.name} ended without a result"))
        else:
            saved = ", and it continues from what was saved" if attempts.has_saved(self.store.work(step.key)) else ""
            text = f"step {step.name} failed: {error}\nThe same command submits it again{saved}."
            run.event("step_failed", step=step.name, error=text)
            self._fail(step, StepFailed(text))

    def _finish(self, step: PlannedStep, place: Path) -> None:
        """Record a step's artifact and set its names."""
        self.finished.add(step.name)
        self.store.set_ref(self.run.name, step.name, place)
        made = self.store.made(step.key)
        step.take(made)
        if made is not None:
            self._name_saved(step, {role: each["tree"] for role, each in made["inputs"].items()})
        self._note(step)
        if step.stage.produces == MODEL and made is not None and made["run"] == self.run.name:
            self._become_latest()

    def _name_saved(self, step: PlannedStep, contents: dict[str, str]) -> None:
        """Add refs to this run for the intermediate models of a training that earlier runs published."""
        for run in runs(self.store):
            for name, place in links(self.store, run).items() if run != self.run.name else ():
                of, _, iteration = name.rpartition(SAVED)
                if of != step.name or not iteration.isdecimal():
                    continue
                if read_manifest(place)["key"] == step.key_with(contents, int(iteration)):
                    self.store.set_ref(self.run.name, name, place)

    def _note(self, step: PlannedStep) -> None:
        """Write a step's final key and its artifact into plan.json."""
        path = self.run.folder / "plan.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"steps": []}
        known = {"key": step.key, "rid": step.rid, "artifact": step.artifact}
        for entry in record["steps"]:
            if entry["step"] == step.name and not known.items() <= entry.items():
                entry |= known
                write_whole(path, json.dumps(record, indent=1).encode() + b"\n")

    def _fail(self, step: PlannedStep, error: MlxchatError) -> None:
        """Record that a step failed, and that those which need it are skipped."""
        self.failures[step.name] = error
        lost = {step.name}
        for other in self.plan:
            if lost & set(other.inputs.values()) and other.name not in self.skipped:
                lost.add(other.name)
                self.skipped[other.name] = step.name
                self.run.event("step_skipped", step=other.name, failed=step.name)
        over = {*self.finished, *self.failures, *self.skipped}
        if not self.run.fail_fast and any(other.name not in over for other in self.plan):
            self.run.say(f"{step.name:<10} failed: {_first_line(error)} (other steps continue)")
        for name in lost - {step.name}:
            self.run.say(f"{name:<10} is skipped: {step.name} failed")

    def conclude(self) -> None:
        """Raise the errors of the run, if any."""
        if len(self.failures) == 1:
            raise next(iter(self.failures.values()))
        if self.failures:
            lines = [f"{name}: {_first_line(error)}" for name, error in self.failures.items()]
            raise StepFailed(f"{len(lines)} steps failed:\n" + "\n".join(lines))
        if any(step.stage.produces == MODEL for step in self.plan):
            self._become_latest()

    def _become_latest(self) -> None:
        if self.run.becomes_latest:
            self.store.link_group(LATEST, self.run.name)


def _first_line(error: MlxchatError) -> str:
    return (str(error).splitlines() or ["?"])[0]
