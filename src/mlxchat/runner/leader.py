"""Leads runs: their steps one after the other here, or as jobs elsewhere; what follows when one fails.

A sweep is several runs with one leader: a step that they share is made once, and its failure is theirs.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from mlxchat.config.schema import ExecutorConfig
from mlxchat.errors import Interrupted, MlxchatError, StepFailed, StoreError
from mlxchat.runner.executors import Job, attach, submit
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.process import keep_awake, stop_on_signals
from mlxchat.runner.run import Run, complete, find_done, summarise
from mlxchat.store.files import Records, write_whole
from mlxchat.store.locks import has_saved
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import LATEST, MODEL
from mlxchat.store.store import Store

# Each look at a job is a request to a file server.
_LOOK_SECONDS = 1.0


class Execution:
    """The plan of one run, and how its steps have ended so far."""

    executors: Mapping[str, ExecutorConfig] = {}  # of the steps that do not run here
    becomes_latest = True  # whether the run becomes the latest one once it has finished a model

    def __init__(self, plan: list[PlannedStep], store: Store, begin: Callable[[], Run]) -> None:
        self.plan, self.store = plan, store
        self._begin = begin  # makes the run; called before the first step
        self.planned = {step.name: step for step in plan}
        self.finished: set[str] = set()
        self.failures: dict[str, MlxchatError] = {}
        self.skipped: set[str] = set()
        self.left: dict[str, str] = {}  # step → its job, which continues although this process ends
        self.current: str | None = None  # the step that ran last
        self.has_begun = self.has_ended = False

    @cached_property
    def run(self) -> Run:
        """The run."""
        run = self._begin()
        self.has_begun = True
        run.event("run_started", steps=[step.name for step in self.plan])
        return run

    def end(self, error: BaseException | None) -> None:
        """Record that no further step runs; `error` says why the run has failed or was stopped."""
        self.has_ended = True
        if error is None:
            self.run.event("run_done")
        else:
            self.run.event("run_failed", step=self.current, error=str(error))

    def order(self, step: PlannedStep) -> Callable[[], None]:
        """Return the call that completes a step in a job."""
        raise NotImplementedError

    @property
    def is_over(self) -> bool:
        """Whether every step has ended."""
        return len(self.finished) + len(self.failures) + len(self.skipped) == len(self.plan)

    @property
    def error(self) -> MlxchatError | None:
        """The error of its failed step, or one about all of them; None: no step has failed."""
        if len(self.failures) < 2:
            return next(iter(self.failures.values()), None)
        lines = [f"{name}: {_first_line(error)}" for name, error in self.failures.items()]
        return StepFailed(f"{len(lines)} steps failed:\n" + "\n".join(lines))

    def ready(self) -> Iterator[PlannedStep]:
        """Yield the steps that have not ended and whose inputs exist."""
        for step in self.plan:
            over = {*self.finished, *self.failures, *self.skipped}
            if step.name not in over and self.finished.issuperset(step.inputs.values()):
                yield step

    def finish(self, step: PlannedStep, place: Path) -> None:
        """Record a step's artifact and set its names; a run that has finished a model becomes the latest one."""
        self.finished.add(step.name)
        self.store.set_ref(self.run.name, step.name, place)
        made = self.store.made(step.key)
        step.take(made)
        self.note(step)
        has_made = step.stage.produces == MODEL and made is not None and made["run"] == self.run.name
        is_whole = len(self.finished) == len(self.plan) and any(each.stage.produces == MODEL for each in self.plan)
        if self.becomes_latest and (has_made or is_whole):
            self.store.link_group(LATEST, self.run.name)

    def note(self, step: PlannedStep) -> None:
        """Write a step's final key and its artifact into plan.json."""
        path = self.run.folder / "plan.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"steps": []}
        known = {"key": step.key, "rid": step.rid, "artifact": step.artifact}
        for entry in record["steps"]:
            if entry["step"] == step.name and not known.items() <= entry.items():
                entry |= known
                write_whole(path, json.dumps(record, indent=1).encode() + b"\n")

    def fail(self, step: PlannedStep, error: MlxchatError) -> None:
        """Record that a step failed, and that those which need it are skipped."""
        self.failures[step.name] = error
        lost: list[str] = []
        for other in self.plan:
            if {step.name, *lost} & set(other.inputs.values()) and other.name not in self.skipped:
                lost.append(other.name)
                self.run.event("step_skipped", step=other.name, failed=step.name)
        self.skipped |= {*lost}
        if not self.run.fail_fast and not self.is_over:
            self.run.say(f"{step.name:<10} failed: {_first_line(error)} (other steps continue)")
        for name in lost:
            self.run.say(f"{name:<10} is skipped: {step.name} failed")


def execute(plan: list[PlannedStep], store: Store, run: Run) -> None:
    """Run the unfinished steps of a plan, and set this run's refs to every step's artifact."""
    execution = Execution(plan, store, lambda: run)
    lead([execution], store)
    if execution.error is not None:
        raise execution.error


def lead(executions: Sequence[Execution], store: Store) -> None:
    """Run the unfinished steps of all executions, whose `error` says how they failed."""
    for execution in executions:
        for step in execution.plan:
            _ = step.code  # digested now: later edits must not be recorded for steps that run now
    leader = _Leader(executions, store)
    try:
        with keep_awake(), stop_on_signals(leader.request_stop, leader.announce_stop):
            leader.complete_all()
    except BaseException as error:
        if isinstance(error, OSError):
            where = f"{error.strerror or error}: {error.filename}"
            text = f"outputs folder {store.outputs} can no longer be used ({where}). Its contents are intact"
            error = StoreError(f"{text}. Fix that and run the same command again: it continues.")
        for execution in executions:
            if execution.has_begun and not execution.has_ended:
                execution.end(error)
        raise error


_Away = tuple[Execution, PlannedStep, Job]
"""A step in a job."""


class _Leader:
    """The process that leads runs: it chooses the next steps."""

    def __init__(self, executions: Sequence[Execution], store: Store) -> None:
        self.executions, self.store = executions, store
        self.away: list[_Away] = []
        self.made: set[str] = set()  # keys of the steps that ran under this leader
        self.failed: dict[str, MlxchatError] = {}  # key → why that step failed
        self.stop_signal: int | None = None
        self.interrupted: Interrupted | None = None

    def request_stop(self, number: int) -> None:
        """Record the signal that requests all runs to stop."""
        self.stop_signal = self.stop_signal or number
        for execution in self.executions:
            if execution.has_begun:
                execution.run.request_stop(number)

    def announce_stop(self) -> None:
        """Announce that the runs will stop."""
        next(each for each in self.executions if each.has_begun).run.announce_stop()

    def complete_all(self) -> None:
        """Run local steps one after the other, and submit the others as soon as their inputs exist."""
        try:
            is_working = True
            while is_working:
                here = None
                if self._is_stopping():
                    self._stop_jobs()
                else:
                    here = self._submit_ready()
                if here is not None:
                    self._complete(*here)
                elif self.away:
                    time.sleep(_LOOK_SECONDS)
                else:
                    is_working = False
                for away in [away for away in self.away if away[2].done()]:
                    self.away.remove(away)
                    self._take(*away)
                for execution in self.executions:
                    if execution.is_over and not execution.has_ended:
                        execution.end(execution.error)
        finally:
            for _, _, job in self.away:
                job.cancel()
        self._conclude()

    def _conclude(self) -> None:
        """Raise Interrupted if steps are left because of a signal; end the runs that fail_fast stopped."""
        unfinished = [each for each in self.executions if not each.is_over]
        failed = any(execution.failures for execution in self.executions)
        if self.interrupted is not None:
            raise self.interrupted
        if (number := self.stop_signal) is not None and unfinished and not failed:
            text = "stopped between two steps. The same command continues from there."
            if left := ", ".join(f"{name} in {job}" for each in unfinished for name, job in each.left.items()):
                text = f"stopped; {left} continues: the same command awaits it, mlxchat status --cancel ends it."
            raise Interrupted(text, number)
        for execution in unfinished:
            if execution.has_begun:
                execution.end(execution.error or StepFailed("it was stopped, since another job failed"))

    def _is_stopping(self) -> bool:
        """Return whether no further step may start."""
        failed = [execution.run for execution in self.executions if execution.failures]
        is_over = any(run.fail_fast or (run.team is not None and run.team.is_broken) for run in failed)
        return is_over or self.stop_signal is not None or self.interrupted is not None

    def _stop_jobs(self) -> None:
        """Cancel all jobs, which save; after SIGTERM and SIGHUP leave those that outlive this process."""
        for away in list(self.away):
            execution, step, job = away
            if self.stop_signal in (signal.SIGTERM, signal.SIGHUP) and job.outlives:
                execution.left[step.name] = job.name
                self.away.remove(away)
            else:
                job.cancel()

    def _submit_ready(self) -> tuple[Execution, PlannedStep] | None:
        """Finish what is done and submit every step with an executor whose inputs exist; return the next local step."""
        here = None
        for execution in self.executions:
            for step in execution.ready():
                is_away = any(other is step for _, other, _ in self.away)
                is_local = step.name not in execution.executors
                if is_away or (is_local and here is not None) or not self._judge(execution, step):
                    continue
                if is_local:
                    here = execution, step
                elif all(other.key != step.key for _, other, _ in self.away):  # else another run's job makes it
                    self._submit(execution, step)
        return here

    def _judge(self, execution: Execution, step: PlannedStep) -> bool:
        """Judge a step whose inputs exist; return True if it has to run."""
        execution.current = step.name
        forced = step.forced and step.key not in self.made
        place = find_done(step, self.store, execution.run, execution.planned, forced=forced)
        execution.note(step)
        if place is not None:
            execution.finish(step, place)
        elif step.key in self.failed:
            execution.fail(step, self.failed[step.key])
        else:
            return True
        return False

    def _complete(self, execution: Execution, step: PlannedStep) -> None:
        """Complete a step here; its failure is recorded."""
        execution.current = step.name
        try:
            place = complete(step, self.store, execution.run, execution.planned)
        except Interrupted as stop:
            self.interrupted = stop
        except StoreError:
            raise
        except MlxchatError as error:
            self._fail(execution, step, error)
        else:
            self.made.add(step.key)
            execution.finish(step, place)

    def _fail(self, execution: Execution, step: PlannedStep, error: MlxchatError) -> None:
        self.failed[step.key] = error
        execution.fail(step, error)

    def _submit(self, execution: Execution, step: PlannedStep) -> None:
        """Submit a step, unless the job of an earlier command makes it."""
        record, run = self.store.jobs / f"{step.key}.jsonl", execution.run
        if (job := attach(record)) is None:
            executor, facts = execution.executors[step.name], {"step": step.name, "run": run.name}
            try:
                job = submit(executor, step.name, execution.order(step), record, facts, run.folder / "jobs")
            except MlxchatError as error:
                self._fail(execution, step, error)
                return
        is_own, whose = job.facts["run"] == run.name, f"of run {job.facts['run']}"
        run.say(f"{step.name:<10} {f'{job.name} {job.describe()}' if is_own else f'awaits {job.name} {whose}'}")
        self.away.append((execution, step, job))

    def _take(self, execution: Execution, step: PlannedStep, job: Job) -> None:
        """Record the result of a step whose job has ended: what is in the store, or why the job failed."""
        run = execution.run
        execution.current = step.name
        error = job.take()
        self.store.forget()
        made = self.store.made(step.key)
        if made is not None and (not step.forced or made["run"] == job.facts["run"]):
            place = self.store.outputs / "store" / made["name"]
            for record in Records(place / "metrics.jsonl").read():
                run.on_metrics(step.name, record)
            run.say(f"{step.name:<10} done by {job.name}: {summarise(read_manifest(place))}")
            step.state = "done"
            self.made.add(step.key)
            execution.finish(step, place)
        elif job.is_cancelled:
            if self.stop_signal is not None:
                text = f"{step.name} was stopped. The same command continues it."
                self.interrupted = self.interrupted or Interrupted(text, self.stop_signal)
        elif job.end is not None:
            self._fail(execution, step, StepFailed(error or f"{job.name} ended without a result"))
        else:
            saved = ", and it continues from what was saved" if has_saved(self.store.work(step.key)) else ""
            text = f"step {step.name} failed: {error}\nThe same command submits it again{saved}."
            run.event("step_failed", step=step.name, error=text)
            self._fail(execution, step, StepFailed(text))


def _first_line(error: MlxchatError) -> str:
    return (str(error).splitlines() or ["?"])[0]
