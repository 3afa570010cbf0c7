"""Garbage: nothing that anything needs is ever listed, a preview changes nothing, and a kill leaves a good store."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kit.artifacts import find_faults
from mlxchat.errors import ConfigError
from mlxchat.store import locks
from mlxchat.store.catalog import read_catalog, references
from mlxchat.store.gc import DAY_SECONDS, Limits, collect, find_garbage, find_removal, parse_age, parse_bytes, remove
from mlxchat.store.naming import Found, Run, groups, latest, resolve

PIPELINE = {"first": {"stage": "make"}, "second": {"stage": "copy", "source": "first"}}
NONE, ALL = Limits(), Limits(keep_last=0)


def run_with(toys: Any, first: int, second: int = 1) -> str:
    """Run both steps with these settings; return the name of the run."""
    toys.config.toy.number, toys.config.other.number = first, second
    # gc tells the refs of runs from names that people gave by the form of theirs.
    toys.invocations += 1
    folder = toys.outputs / "runs" / f"20260101-00000{toys.invocations}-1-toy"
    run = toys.run(toys.plan(PIPELINE))
    target = toys.outputs / "refs" / folder.name
    (toys.outputs / "refs" / run.name).rename(target)
    run.folder.rename(folder)
    return str(folder.name)


def names(toys: Any, limits: Limits) -> set[str]:
    return {item.path.name for item in find_garbage(toys.store, limits).garbage if item.kind == "artifact"}


def artifact(toys: Any, name: str) -> str:
    return str(resolve(toys.store, name).name)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    paths = (path for path in folder.rglob("*") if "index" not in path.parts)
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in paths}


def test_refs_of_ended_runs_keep_everything_until_a_limit_is_given(toys: Any) -> None:
    old = run_with(toys, 1)
    run_with(toys, 2)
    before = {artifact(toys, f"{old}/first"), artifact(toys, f"{old}/second")}
    assert names(toys, NONE) == set()
    assert names(toys, Limits(keep_last=2)) == set()
    assert names(toys, Limits(keep_last=1)) == names(toys, ALL) == before
    assert names(toys, Limits(older_than_seconds=DAY_SECONDS)) == set()
    assert names(toys, Limits(older_than_seconds=0.0)) == before


def test_what_a_kept_artifact_was_made_from_is_kept_too(toys: Any) -> None:
    run_with(toys, 1, 1)
    old = artifact(toys, "second")
    run_with(toys, 1, 2)
    assert names(toys, ALL) == {old}, "the first step's artifact is the input of the latest one's"


def test_a_pin_keeps_an_artifact_and_its_inputs(toys: Any) -> None:
    run_with(toys, 1)
    store = toys.store
    store.set_ref("pins", "best", resolve(store, "second"))
    run_with(toys, 2)
    assert names(toys, ALL) == set()
    (toys.outputs / "refs" / "pins" / "best").unlink()
    assert len(names(toys, ALL)) == 2


def test_an_artifact_that_nothing_refers_to_may_go_without_any_limit(toys: Any) -> None:
    old = run_with(toys, 1)
    lost = artifact(toys, f"{old}/second")
    run_with(toys, 1, 2)
    (toys.outputs / "refs" / old / "second").unlink()
    assert names(toys, NONE) == {lost}


def test_the_oldest_go_first_and_only_until_the_store_is_small_enough(toys: Any) -> None:
    for number in (1, 2, 3):
        run_with(toys, number)
    total = sum(summary["bytes"] for summary in read_catalog(toys.store))
    found = find_garbage(toys.store, Limits(max_bytes=total - 1)).garbage
    assert [item.kind for item in found if item.kind == "artifact"] == ["artifact"]
    oldest = next(summary for summary in read_catalog(toys.store) if summary["step"] == "second")
    assert found[0].path.name == oldest["folder"], "of a step and what was made from it, the latter goes first"
    assert names(toys, Limits(max_bytes=0)) == names(toys, ALL)


def test_a_preview_changes_nothing(toys: Any) -> None:
    run_with(toys, 1)
    run_with(toys, 2)
    before = snapshot(toys.outputs)
    find_garbage(toys.store, ALL)
    assert snapshot(toys.outputs) == before


def test_what_is_removed_is_what_the_preview_said_and_the_rest_is_whole(toys: Any) -> None:
    run_with(toys, 1)
    run_with(toys, 2)
    said = names(toys, ALL)
    collect(toys.store, ALL)
    here = {path.name for path in (toys.outputs / "store").iterdir()}
    assert not here & said
    assert [fault for name in here for fault in find_faults(toys.store, toys.outputs / "store" / name)] == []
    assert find_garbage(toys.store, ALL).garbage == []
    assert not (toys.outputs / "trash").exists()
    known = {summary["rid"] for summary in read_catalog(toys.store)}
    assert all(rid in known for summary in read_catalog(toys.store) for rid in references(summary))
    links = [link for link in (toys.outputs / "refs").rglob("*") if link.is_symlink()]
    assert all(link.exists() for link in links)


def test_work_that_nobody_continues_may_go_and_work_under_a_lock_may_not(toys: Any) -> None:
    run_with(toys, 1)
    store = toys.store
    for rid in ("a" * 52, "b" * 52, "c" * 52):
        (store.work(rid) / "ckpt").mkdir(parents=True)
        for path in (store.work(rid) / "ckpt", store.work(rid)):
            age = 0 if rid[0] == "c" else 8 * DAY_SECONDS
            os.utime(path, (time.time() - age, time.time() - age))
    with store.lock("b" * 52).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert [item.path.name for item in find_garbage(store, NONE).garbage] == ["a" * 52]


def test_nothing_is_collected_while_a_step_is_running(toys: Any) -> None:
    run_with(toys, 1)
    run_with(toys, 2)
    lock = toys.outputs / "locks" / "gc.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time; f = open({str(lock)!r}, 'w')\n"
         "fcntl.flock(f, fcntl.LOCK_SH); print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        before = snapshot(toys.outputs)
        with pytest.raises(ConfigError, match="no step is running"):
            collect(toys.store, ALL)
        assert snapshot(toys.outputs) == before
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_what_a_run_in_progress_plans_is_kept(toys: Any) -> None:
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


def test_refs_that_lead_nowhere_go(toys: Any) -> None:
    run = run_with(toys, 1)
    (toys.outputs / "refs" / run / "gone").symlink_to("../../store/make-z")
    found = {item.path.name for item in find_garbage(toys.store, NONE).garbage}
    assert found == {"gone"}
    collect(toys.store, NONE)
    assert find_garbage(toys.store, NONE).garbage == []


@pytest.mark.parametrize("point", ["gc.planned", "gc.moved", "gc.deleted", "gc.moved:2"])
def test_a_kill_while_collecting_leaves_a_good_store_that_the_next_one_finishes(point: str, toys: Any) -> None:
    for number in (1, 2, 3):
        run_with(toys, number)
    said = names(toys, ALL)
    done = subprocess.run(
        [sys.executable, "-m", "mlxchat", "gc", "--keep-last", "0", "--apply", f"outputs={toys.outputs}"],
        env={**os.environ, "MLXCHAT_CRASH_AT": point}, check=False, capture_output=True, cwd=toys.outputs,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    here = {path.name for path in (toys.outputs / "store").iterdir()}
    assert [fault for name in here for fault in find_faults(toys.store, toys.outputs / "store" / name)] == []
    collect(toys.store, ALL)
    assert {path.name for path in (toys.outputs / "store").iterdir()} & said == set()
    assert not (toys.outputs / "trash").exists()


def test_with_a_run_goes_what_nothing_else_needs(toys: Any) -> None:
    old = run_with(toys, 1, 1)
    only_old, shared = artifact(toys, f"{old}/second"), artifact(toys, f"{old}/first")
    new = run_with(toys, 1, 2)
    before = snapshot(toys.outputs)
    found = find_removal(toys.store, [Run(old)], force=False)
    assert snapshot(toys.outputs) == before
    assert {item.path.name for item in found.garbage if item.kind == "artifact"} == {only_old}
    assert set(found.kept) == {shared}, "the newer run has it, too"
    remove(toys.store, [Run(old)], force=False)
    assert [run for run in (toys.outputs / "runs").iterdir() if run.name == old] == []
    assert (groups(toys.store), latest(toys.store)) == ([new], new)
    assert {path.name for path in (toys.outputs / "store").iterdir()} == {shared, artifact(toys, f"{new}/second")}
    assert not (toys.outputs / "trash").exists()


def test_a_pin_keeps_an_artifact_of_a_removed_run_and_its_inputs(toys: Any) -> None:
    run = run_with(toys, 1)
    toys.store.set_ref("pins", "best", resolve(toys.store, "second"))
    kept = remove(toys.store, [Run(run)], force=False).kept
    assert sorted(kept.values()) == sorted(["pins/best", f"{artifact(toys, 'best')} was made from it"])
    assert latest(toys.store) == ""
    assert find_garbage(toys.store, ALL).garbage == []


def test_an_artifact_that_something_rests_on_is_removed_only_by_force(toys: Any) -> None:
    run_with(toys, 1)
    first, second = resolve(toys.store, "first"), resolve(toys.store, "second")
    toys.store.set_ref("pins", "best", first)
    told = rf"{first.name}: {second.name} was made from it\n{first.name}: it is pinned as best\n.*--force"
    with pytest.raises(ConfigError, match=told):
        remove(toys.store, [Found(first)], force=False)
    assert first.exists()
    remove(toys.store, [Found(first), Found(second)], force=True)
    assert list((toys.outputs / "store").iterdir()) == []
    assert [link for link in (toys.outputs / "refs").rglob("*") if link.is_symlink() and not link.exists()] == []


def test_a_run_that_may_be_in_progress_is_removed_only_by_force(toys: Any) -> None:
    run = run_with(toys, 1)
    record = {"started": "2999-01-01T00:00:00+00:00", "steps": [{"rid": step.rid} for step in toys.plan(PIPELINE)]}
    (toys.outputs / "runs" / run / "plan.json").write_text(json.dumps(record))
    (toys.outputs / "runs" / run / "events.jsonl").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=f"run {run} began less than a day ago"):
        remove(toys.store, [Run(run)], force=False)
    with pytest.raises(ConfigError, match=f"run {run}, which is in progress, uses it"):
        remove(toys.store, [Found(resolve(toys.store, "second"))], force=False)
    remove(toys.store, [Run(run)], force=True)
    assert list((toys.outputs / "store").iterdir()) == []


@pytest.mark.parametrize("point", ["gc.planned", "gc.moved", "gc.deleted", "gc.moved:2", "gc.moved:3", "gc.moved:4"])
def test_a_kill_while_removing_a_run_leaves_nothing_half(point: str, toys: Any) -> None:
    kept = artifact(toys, f"{run_with(toys, 1)}/second")
    run = run_with(toys, 2)
    done = subprocess.run(
        [sys.executable, "-m", "mlxchat", "rm", run, "--apply", f"outputs={toys.outputs}"],
        env={**os.environ, "MLXCHAT_CRASH_AT": point}, check=False, capture_output=True, cwd=toys.outputs,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    here = {path.name for path in (toys.outputs / "store").iterdir()}
    assert [fault for name in here for fault in find_faults(toys.store, toys.outputs / "store" / name)] == []
    if run in groups(toys.store) or (toys.outputs / "runs" / run).exists():
        remove(toys.store, [Run(run)], force=False)
    collect(toys.store, NONE)
    assert artifact(toys, "second") == kept
    assert len(list((toys.outputs / "store").iterdir())) == 2
    assert not (toys.outputs / "trash").exists()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("12h", 43200), ("7d", 7 * DAY_SECONDS), ("1.5m", 90)])
def test_ages_are_read(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize(("text", "count"), [("10GB", 1e10), ("500MB", 5e8), ("1.5T", 1.5e12), ("100", 100)])
def test_sizes_are_read(text: str, count: float) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["7", "d", "-1d", "7 days", ""])
def test_what_is_no_age_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no age"):
        parse_age(text)


def test_giving_up_the_wait_for_a_lock_leaves_its_holders_record(tmp_path: Path) -> None:
    lock = tmp_path / "step.lock"
    lock.write_text('{"pid": 1, "step": "sft"}')

    def give_up(owner: dict[str, Any]) -> None:
        raise ConfigError(str(owner["step"]))

    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="sft"), locks.hold(lock, {"step": "gc"}, give_up):
            pass
        assert locks.read_owner(lock) == {"pid": 1, "step": "sft"}
