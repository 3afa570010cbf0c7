"""What several jobs of a sweep need is computed before the jobs fan out, so that none waits for another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mlxchat.errors import Interrupted, MlxchatError
from mlxchat.runner import attempts
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.records import now
from mlxchat.runner.secrets import redact
from mlxchat.sweep.expand import Job
from mlxchat.sweep.worker import force_only_others


@dataclass
class Shared:
    """What became of the steps that several jobs need."""

    made: set[str] = field(default_factory=set)
    """Ids that this sweep has made."""
    failed: dict[str, str] = field(default_factory=dict)
    """Id → why it could not be made."""

    def failure_for(self, job: Job) -> str | None:
        """Return why a job cannot run, or None."""
        return next((self.failed[step.rid] for step in job.plan if step.rid in self.failed), None)


def shared_steps(jobs: Sequence[Job]) -> list[tuple[Job, list[PlannedStep]]]:
    """Return the steps that more than one job needs and that are not done, each once, with the first job to need it."""
    needed = Counter((str(job.store.outputs), step.rid) for job in jobs for step in job.plan)
    taken: set[tuple[str, str]] = set()
    found = []
    for job in jobs:
        outputs = str(job.store.outputs)
        steps = [
            step
            for step in job.plan
            if not step.done and needed[outputs, step.rid] > 1 and (outputs, step.rid) not in taken
        ]
        taken |= {(outputs, step.rid) for step in steps}
        if steps:
            found.append((job, steps))
    return found


def make_shared(jobs: Sequence[Job], *, fail_fast: bool) -> Shared:
    """Make what several jobs need, and return what became of it; a failure ends only what depends on it.

    Raises:
        Interrupted: a signal arrived.
    """
    shared = Shared()
    for job, steps in shared_steps(jobs):
        users = sum(any(step.rid == steps[0].rid for step in other.plan) for other in jobs)
        print(f"\n── shared by {users} jobs: {', '.join(step.name for step in steps)}", flush=True)
        _make(job, steps, shared)
        if shared.failed and fail_fast:
            break
    return shared


def _make(job: Job, steps: list[PlannedStep], shared: Shared) -> None:
    """Make steps of a job's plan, with another try for those that a failing one kept from being reached."""
    from mlxchat.pipeline_run import run_pipeline

    store, waiting = job.store, list(steps)
    rids = {step.name: step.rid for step in job.plan}
    while waiting:
        began = now()
        force = force_only_others(job.composed.config.force, waiting, shared.made)
        config = replace(job.composed.config, targets=[step.name for step in waiting], force=force)
        try:
            run_pipeline(replace(job.composed, config=config, overrides=job.overrides))
            shared.made |= {step.rid for step in waiting}
            return
        except Interrupted:
            raise
        except MlxchatError as error:
            print(redact(f"error: {error}"), flush=True)
            reason = str(error).splitlines()[0]
            before = len(shared.failed)
            for step in waiting:
                if attempts.failure_since(store.work(step.rid), began):
                    shared.failed[step.rid] = f"shared step {step.name}: {reason}"
            if len(shared.failed) == before:  # nothing says which one it was
                shared.failed |= {step.rid: reason for step in waiting}
        for step in waiting:
            source = next((rids[name] for name in step.inputs.values() if rids[name] in shared.failed), None)
            if source is not None:
                shared.failed[step.rid] = shared.failed[source]
        store.forget()
        for step in waiting:
            manifest = store.read(step.rid)
            if manifest is not None and manifest["published"] >= began:
                shared.made.add(step.rid)
        waiting = [step for step in waiting if step.rid not in shared.made and step.rid not in shared.failed]
