"""Completing one step: found, shared by alias, waited for or made, each under the step's lock."""

from __future__ import annotations

from pathlib import Path

from mlxchat.errors import StepFailed, StoreError
from mlxchat.runner import attempts, locks
from mlxchat.runner.aliases import publish_alias
from mlxchat.runner.crash import crash_point
from mlxchat.runner.make import make
from mlxchat.runner.plan import PlannedStep, Verdict, judge
from mlxchat.runner.run import Run
from mlxchat.runner.store import Manifest, Store
from mlxchat.runner.waiting import Waiting

_INPUT_KEYS = {"step": "step", "artifact": "name", "rid": "rid", "tree": "tree"}


def find_done(step: PlannedStep, store: Store, run: Run, planned: dict[str, PlannedStep]) -> Path | None:
    """Return the folder with the step's files if there is nothing to do."""
    store.forget()
    step.verdict = judge(step, store, forced=step.forced, planned=planned)
    place = store.find(step.rid) if step.done else None
    if place is not None:
        run.event("step_cached", step=step.name, artifact=place.name)
    return place


def complete(step: PlannedStep, store: Store, run: Run, planned: dict[str, PlannedStep]) -> Path:
    """Return the folder with the step's files, made now if need be.

    Raises:
        MlxchatError: it could not be made, here or in the process that was waited for.
    """
    place = find_done(step, store, run, planned)
    if place is not None:
        return place
    work, lock = store.work(step.rid), store.lock(step.rid)
    known = attempts.ended(work)
    waiting = Waiting(run, step.name, lock, doing="is making it", work=work)
    with locks.hold(lock, {"run": run.name, "step": step.name, "rid": step.rid}, *waiting.calls) as waited:
        crash_point("step.locked")
        store.forget()
        if waited:
            error = attempts.new_failure(work, known)
            if error is not None:
                raise StepFailed(f"step {step.name} failed in the process that was waited for: {error}")
        # Another process may have finished it before we got the lock.
        step.verdict = judge(step, store, forced=step.forced and not waited, planned=planned)
        place = store.find(step.rid) if step.done else None
        if place is not None:
            run.event("step_cached", step=step.name, artifact=place.name)
        else:
            collector = store.outputs / "locks" / "gc.lock"
            looking = Waiting(run, step.name, collector, doing="is collecting garbage")
            with locks.hold(collector, {}, *looking.calls, shared=True):
                original = step.verdict.original
                if original is not None:
                    place = _share(step, original, store, run, planned)
                else:
                    place = make(step, store, run, *find_inputs(step, store, planned))
        step.verdict = Verdict(state="done")  # for the steps below
        return place


def _share(step: PlannedStep, original: Manifest, store: Store, run: Run, planned: dict[str, PlannedStep]) -> Path:
    """Publish an alias of an artifact that was made from inputs of the same contents. The caller holds the lock."""
    _, lineage = find_inputs(step, store, planned)
    facts = {"run": run.name, "overrides": run.overrides, "argv": run.environment.record()["argv"]}
    place = publish_alias(store, step, original, lineage, facts)
    run.event("step_shared", step=step.name, artifact=step.artifact, original=place.name)
    run.say(f"{step.name:<10} done: its inputs have the contents that {place.name} was made from")
    return place


def find_inputs(
    step: PlannedStep, store: Store, planned: dict[str, PlannedStep]
) -> tuple[dict[str, Path], dict[str, Manifest]]:
    """Return role → folder, and role → what the manifest records of it.

    Raises:
        StoreError: an input is no longer there.
    """
    wanted = {role: planned[source].rid for role, source in step.inputs.items()}
    wanted |= {role: manifest["rid"] for role, manifest in step.artifacts.items()}
    folders: dict[str, Path] = {}
    lineage: dict[str, Manifest] = {}
    for role, rid in wanted.items():
        folder, manifest = store.find(rid), store.read(rid)
        if folder is None or manifest is None:
            name = step.artifacts[role]["name"] if role in step.artifacts else planned[step.inputs[role]].artifact
            raise StoreError(f"{name}, which {step.name} needs as {role}, is no longer in {store.outputs}")
        folders[role] = folder
        lineage[role] = {key: manifest[source] for key, source in _INPUT_KEYS.items()}
    return folders, lineage
