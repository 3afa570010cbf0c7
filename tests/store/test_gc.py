"""Garbage collection: nothing needed is removed, a preview changes nothing, and a kill leaves a valid store."""

import json
import os
import signal
import time
from typing import Any

import pytest

from kit.artifacts import find_faults
from kit.commands import run_here, run_process
from kit.toys import PIPELINE
from mlxchat.errors import ConfigError
from mlxchat.store import locks
from mlxchat.store.gc import DAY_SECONDS, Collection, collect, find_garbage, find_removal
from mlxchat.store.naming import groups, latest, resolve

NONE, ALL = None, 0


def run_with(toys: Any, first: int, second: int = 1) -> str:
    """Run both steps with these settings; return the name of the run."""
    toys.config.toy.number, toys.config.other.number = first, second
    # gc recognises the refs of runs by the form of their names.
    toys.invocations += 1
    folder = toys.outputs / "runs" / f"20260101-00000{toys.invocations}-1-toy"
    run = toys.run(toys.plan(PIPELINE))
    target = toys.outputs / "refs" / folder.name
    (toys.outputs / "refs" / run.name).rename(target)
    run.folder.rename(folder)
    return str(folder.name)


def names(toys: Any, keep_last: int | None) -> set[str]:
    return {item.path.name for item in find_garbage(toys.store, keep_last).garbage if item.kind == "artifact"}


def remove(toys: Any, run: str) -> Collection:
    return collect(toys.store, lambda: find_removal(toys.store, {run}))


def artifact(toys: Any, name: str) -> str:
    return str(resolve(toys.store, name).name)


def whole_artifacts(toys: Any) -> set[str]:
    """Return the artifacts in the store, after checking that each is undamaged."""
    places = list((toys.outputs / "store").iterdir())
    assert [fault for place in places for fault in find_faults(toys.store, place)] == []
    return {place.name for place in places}


def kill(toys: Any, point: str, *arguments: str) -> None:
    arguments = (*arguments, "--apply", f"outputs={toys.outputs}")
    done = run_process(*arguments, cwd=toys.outputs, environ={"MLXCHAT_CRASH_AT": point})
    assert done.returncode == -signal.SIGKILL


def test_ended_runs_keep_everything_until_a_limit_is_given(toys):
    old = run_with(toys, 1)
    run_with(toys, 2)
    before = {artifact(toys, f"{old}/first"), artifact(toys, f"{old}/second")}
    assert names(toys, NONE) == set()
    assert names(toys, 2) == set()
    assert names(toys, 1) == names(toys, ALL) == before
    lost = artifact(toys, f"{old}/second")
    (toys.outputs / "refs" / old / "second").unlink()
    assert names(toys, NONE) == {lost}, "nothing refers to it"


def test_abandoned_work_is_garbage_and_locked_work_is_not(toys):
    run_with(toys, 1)
    store = toys.store
    for rid in ("a" * 52, "b" * 52, "c" * 52):
        (store.work(rid) / "ckpt").mkdir(parents=True)
        for path in (store.work(rid) / "ckpt", store.work(rid)):
            age = 0 if rid[0] == "c" else 8 * DAY_SECONDS
            os.utime(path, (time.time() - age, time.time() - age))
    with locks.hold(store.lock("b" * 52), {}):
        assert [item.path.name for item in find_garbage(store, NONE).garbage] == ["a" * 52]


def test_gc_refuses_while_a_step_runs(toys):
    run_with(toys, 1)
    run_with(toys, 2)
    with locks.hold(toys.store.lock("x" * 52), {"step": "first"}), pytest.raises(ConfigError, match="no step is run"):
        collect(toys.store, lambda: find_garbage(toys.store, ALL))
    assert len(whole_artifacts(toys)) == 4


def test_artifacts_of_a_run_in_progress_are_kept(toys):
    old = run_with(toys, 1)
    plan = {step.name: step.rid for step in toys.plan(PIPELINE)}
    run_with(toys, 2)
    folder = toys.outputs / "runs" / "20260102-000000-1-other"
    folder.mkdir()
    record = {"started": "2999-01-01T00:00:00+00:00", "steps": [{"rid": rid} for rid in plan.values()]}
    (folder / "plan.json").write_text(json.dumps(record))
    assert artifact(toys, f"{old}/first") not in names(toys, ALL)
    (folder / "events.jsonl").write_text('{"event": "run_done"}\n')
    assert artifact(toys, f"{old}/first") in names(toys, ALL)


@pytest.mark.parametrize("verb", ["gc", "rm"])
@pytest.mark.parametrize(
    "point",
    ["gc.moved", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gc.planned", "gc.deleted", "gc.moved:2"))],
)
def test_kill_leaves_a_valid_store(verb, point, toys):
    kept = artifact(toys, f"{run_with(toys, 1)}/second")
    run = run_with(toys, 2)
    (toys.outputs / "refs" / run / "gone").symlink_to("../../store/make-z")
    if verb == "gc":
        kept = artifact(toys, f"{run_with(toys, 3)}/second")
    kill(toys, point, *(("gc", "--keep-last", "0") if verb == "gc" else ("rm", run)))
    whole_artifacts(toys)
    if verb == "rm" and (run in groups(toys.store) or (toys.outputs / "runs" / run).exists()):
        remove(toys, run)
    collect(toys.store, lambda: find_garbage(toys.store, ALL if verb == "gc" else NONE))
    assert artifact(toys, "second") == kept
    assert len(whole_artifacts(toys)) == 2
    assert list((toys.outputs / "work").iterdir()) == []


def test_removing_a_run_removes_its_unshared_artifacts(toys):
    old = run_with(toys, 1, 1)
    only_old, shared = artifact(toys, f"{old}/second"), artifact(toys, f"{old}/first")
    new = run_with(toys, 1, 2)
    found = find_removal(toys.store, {old})
    assert {item.path.name for item in found.garbage if item.kind == "artifact"} == {only_old}
    assert set(found.kept) == {shared}, "the newer run has it"
    remove(toys, old)
    assert (groups(toys.store), latest(toys.store)) == ([new], new)
    assert {path.name for path in (toys.outputs / "store").iterdir()} == {shared, artifact(toys, f"{new}/second")}


def test_pin_outlives_its_removed_run(toys):
    run = run_with(toys, 1)
    toys.store.set_ref("pins", "best", resolve(toys.store, "second"))
    kept = remove(toys, run).kept
    assert len(kept) == 2, "the pinned artifact, and what it was made from"
    assert artifact(toys, "best") in kept
    assert latest(toys.store) == ""
    assert find_garbage(toys.store, ALL).garbage == []


def test_removing_a_run_in_progress_needs_force(toys, capsys):
    run = run_with(toys, 1)
    record = {"started": "2999-01-01T00:00:00+00:00", "steps": [{"rid": step.rid} for step in toys.plan(PIPELINE)]}
    (toys.outputs / "runs" / run / "plan.json").write_text(json.dumps(record))
    (toys.outputs / "runs" / run / "events.jsonl").unlink(missing_ok=True)
    assert run_here("rm", run, "--apply", f"outputs={toys.outputs}") == 2
    assert f"run {run} began less than a day ago" in capsys.readouterr().err
    assert run_here("rm", run, "--apply", "--force", f"outputs={toys.outputs}") == 0
    assert list((toys.outputs / "store").iterdir()) == []
