"""Run a plan: every step under its lock, each published whole or not at all, whatever happens to the others."""

from __future__ import annotations

import json
from pathlib import Path

from mlxchat.errors import Interrupted, MlxchatError, StepFailed, StoreError
from mlxchat.runner.awake import keep_awake
from mlxchat.runner.complete import complete, find_done
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.run import Policy as Policy
from mlxchat.runner.run import Run as Run
from mlxchat.runner.signals import stop_on_signals
from mlxchat.store.naming import LATEST, MODEL
from mlxchat.store.sealed import write_whole
from mlxchat.store.store import Store


def execute(plan: list[PlannedStep], store: Store, run: Run) -> None:
    """Run what the plan says is not done, and point the refs of this run at every step's artifact.

    A run that finishes a model becomes the latest one.

    A step that fails takes those with it that need it. The others go on, unless the run shall fail fast.

    Raises:
        Interrupted: a signal arrived; everything finished so far is kept, the current steps can continue.
        MlxchatError: what a step raised; StepFailed if several did.
        StoreError: the outputs folder can no longer be written.
    """
    for step in plan:
        _ = step.code  # looked at now: an edit while the first steps run is not what later ones are made with
    if plan and plan[0].digests is not None:
        plan[0].digests.save()  # again: there may have been no outputs folder when they were planned
    outcome = Outcome(plan, store, run)
    try:
        run.event("run_started", steps=[step.name for step in plan])
        with keep_awake():
            if run.policy.max_parallel_steps > 1:
                from mlxchat.runner.parallel import execute_in_processes

                execute_in_processes(outcome)
            else:
                _execute_here(outcome)
        outcome.conclude()
    except OSError as error:
        raise StoreError(
            f"outputs folder {store.outputs} can no longer be used ({error.strerror or error}: {error.filename}). "
            "What is in it is whole. Mend that and run the same command again: it continues."
        ) from error
    except MlxchatError as error:
        run.try_event("run_failed", step=outcome.last_step(), error=str(error))
        raise
    finally:
        run.hooks.finish()
    run.event("run_done")


def _execute_here(outcome: Outcome) -> None:
    """Complete one step after the other in this process."""
    plan, run = outcome.plan, outcome.run

    leave = run.ranks.kill if run.ranks is not None else lambda: None
    with stop_on_signals(run.request_stop, run.announce_stop, leave):
        for step in plan:
            if outcome.must_skip(step):
                continue
            try:
                place = find_done(step, outcome.store, run, outcome.planned)
                outcome.note(step)
                place = place or complete(step, outcome.store, run, outcome.planned)
            except (Interrupted, StoreError):
                outcome.current = step.name
                raise
            except MlxchatError as error:
                outcome.fail(step, error)
                if run.policy.fail_fast or (run.ranks is not None and run.ranks.is_broken):
                    return
                continue
            outcome.finish(step, place)
            # A stage need not look at signals: then the run stops between its steps.
            if run.stop_signal is not None and step is not plan[-1]:
                raise Interrupted(f"stopped after {step.name}. The same command continues from there.", run.stop_signal)


class Outcome:
    """What became of the steps of a run so far."""

    def __init__(self, plan: list[PlannedStep], store: Store, run: Run) -> None:
        """Begin with nothing done."""
        self.plan, self.store, self.run = plan, store, run
        self.planned = {step.name: step for step in plan}
        self.finished: set[str] = set()
        self.failures: dict[str, MlxchatError] = {}
        self.skipped: dict[str, str] = {}
        """Step → the one that failed."""
        self.current: str | None = None
        """The step that was at work when the run ended."""

    def finish(self, step: PlannedStep, place: Path) -> None:
        """Note a step's artifact and give it its names."""
        self.finished.add(step.name)
        self.store.set_ref(self.run.name, step.name, place)
        made = self.store.made(step.key)
        step.take(made)
        self.note(step)
        if step.stage.produces == MODEL and made is not None and made["run"] == self.run.name:
            self._become_latest()

    def note(self, step: PlannedStep) -> None:
        """Write a step's key, known once its inputs are there, and what it gave into plan.json."""
        path = self.run.folder / "plan.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"steps": []}
        for entry in record["steps"]:
            known = {"key": step.key, "rid": step.rid, "artifact": step.artifact}
            if entry["step"] == step.name and not known.items() <= entry.items():
                entry |= known
                write_whole(path, json.dumps(record, indent=1).encode() + b"\n")

    def fail(self, step: PlannedStep, error: MlxchatError) -> None:
        """Note that a step failed, and say so now if anything else goes on."""
        self.failures[step.name] = error
        self.current = step.name
        if not self.run.policy.fail_fast and any(self._goes_on(other) for other in self.plan):
            self.run.say(f"{step.name:<10} failed: {(str(error).splitlines() or ['?'])[0]} (other steps go on)")

    def must_skip(self, step: PlannedStep) -> bool:
        """Tell whether a step needs one that failed; it is noted and said once."""
        cause = next((self.cause_of(source) for source in step.inputs.values() if self.cause_of(source)), None)
        if cause is None:
            return False
        if step.name not in self.skipped:
            self.skipped[step.name] = cause
            self.run.event("step_skipped", step=step.name, failed=cause)
            self.run.say(f"{step.name:<10} is left out: {cause} failed")
        return True

    def cause_of(self, name: str) -> str | None:
        """Return the failed step because of which this one is not there."""
        return name if name in self.failures else self.skipped.get(name)

    def conclude(self) -> None:
        """Raise what went wrong, if anything did."""
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

    def last_step(self) -> str | None:
        """Return the step that a failure of the run is about."""
        return self.current

    def _goes_on(self, step: PlannedStep) -> bool:
        if step.name in self.finished or step.name in self.failures:
            return False
        return not any(self._lost(source) for source in step.inputs.values())

    def _lost(self, name: str) -> bool:
        step = self.planned[name]
        return name in self.failures or any(self._lost(source) for source in step.inputs.values())
