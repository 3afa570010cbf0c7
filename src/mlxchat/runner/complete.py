"""Completing one step: found, waited for or made, each under the step's lock."""

from __future__ import annotations

from pathlib import Path

from mlxchat.errors import StepFailed, StoreError
from mlxchat.runner.make import make
from mlxchat.runner.plan import PlannedStep, Verdict, judge
from mlxchat.runner.run import Run
from mlxchat.runner.waiting import Waiting
from mlxchat.store import attempts, locks
from mlxchat.store.crash import crash_point
from mlxchat.store.store import Manifest, Store

_INPUT_KEYS = {"step": "step", "artifact": "name", "rid": "rid", "tree": "tree"}


def find_done(step: PlannedStep, store: Store, run: Run, planned: dict[str, PlannedStep]) -> Path | None:
    """Return the step's artifact if there is nothing to do. Its inputs are there, so its key is known from here on."""
    store.forget()
    step.identify(store, planned)
    step.verdict = judge(step, store, forced=step.forced, planned=planned)
    return _found(step, store, run)


def complete(step: PlannedStep, store: Store, run: Run, planned: dict[str, PlannedStep]) -> Path:
    """Return the artifact of a step that `find_done` did not find, made now unless another process is quicker.

    Raises:
        MlxchatError: it could not be made, here or in the process that was waited for.
    """
    work, lock = store.work(step.key), store.lock(step.key)
    known = attempts.ended(work)
    waiting = Waiting(run, step.name, lock, doing="is making it", work=work)
    with locks.hold(lock, {"run": run.name, "step": step.name, "key": step.key}, *waiting.calls) as waited:
        crash_point("step.locked")
        store.forget()
        if waited:
            error = attempts.new_failure(work, known)
            if error is not None:
                raise StepFailed(f"step {step.name} failed in the process that was waited for: {error}")
        # Another process may have finished it before we got the lock.
        step.identify(store, planned)
        step.verdict = judge(step, store, forced=step.forced and not waited, planned=planned)
        place = _found(step, store, run)
        if place is None:
            collector = store.outputs / "locks" / "gc.lock"
            looking = Waiting(run, step.name, collector, doing="is collecting garbage")
            with locks.hold(collector, {}, *looking.calls, shared=True):
                place = make(step, store, run, *find_inputs(step, store, planned))
        step.take(store.made(step.key))
        step.verdict = Verdict(state="done")  # for the steps below
        return place


def _found(step: PlannedStep, store: Store, run: Run) -> Path | None:
    """Return the artifact of a step that is done, and note that it was found."""
    place = store.find(step.rid) if step.done else None
    if place is not None:
        run.event("step_cached", step=step.name, artifact=place.name, rid=step.rid)
    return place


def find_inputs(
    step: PlannedStep, store: Store, planned: dict[str, PlannedStep]
) -> tuple[dict[str, Path], dict[str, Manifest]]:
    """Return role → folder, and role → what the manifest records of it.

    Raises:
        StoreError: an input is no longer there.
    """
    folders: dict[str, Path] = {}
    lineage: dict[str, Manifest] = {}
    for role, manifest in step.inputs_made(store, planned).items():
        folder = store.find(manifest["rid"])
        if folder is None:
            raise StoreError(f"{manifest['name']}, which {step.name} needs as {role}, is no longer in {store.outputs}")
        folders[role] = folder
        lineage[role] = {key: manifest[source] for key, source in _INPUT_KEYS.items()}
    return folders, lineage
