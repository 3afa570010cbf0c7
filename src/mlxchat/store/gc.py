"""Garbage collection, as in git: refs are roots, and what no root leads to may be removed.

Roots are the refs of runs, pins and imports, and the artifacts of runs in progress. Whatever a kept artifact was made
from is kept, too. `--keep-last N` releases the refs of ended runs, except those of the latest one and to the newest N
artifacts of each step.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from mlxchat.errors import ConfigError
from mlxchat.store import locks
from mlxchat.store.catalog import Summary, by_rid, read_catalog, references
from mlxchat.store.crash import crash_point
from mlxchat.store.files import Records, list_folder, remove
from mlxchat.store.manifest import MANIFEST, SHARED_KIND
from mlxchat.store.naming import IMPORTS, LATEST, PINS, groups, latest, links, running_steps
from mlxchat.store.store import SAVED, Store, rid_of_record, sweep

DAY_SECONDS = 86400.0
_LEFT_OVER_DAYS = 7
_RUN = re.compile(r"\d{8}-\d{6}-")


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can be removed."""

    path: Path
    kind: str
    """artifact, work, run or ref."""
    bytes: int
    reason: str


@dataclass
class Collection:
    """What can be removed, and why the rest is kept."""

    garbage: list[Garbage] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Artifact's folder → reason."""
    kept_bytes: int = 0


def find_garbage(store: Store, keep_last: int | None = None, *, without: Set[str] = frozenset()) -> Collection:
    """Return what can be removed; nothing is changed.

    Args:
        store: the outputs folder.
        keep_last: artifacts to keep of each step of ended runs, the newest; intermediate models do not count. None:
            everything that their refs lead to.
        without: runs whose refs do not count.
    """
    known = by_rid(read_catalog(store))
    roots = _roots(store, known, keep_last, without)
    stays = {rid: reason for rid, reason in roots.items() if rid in known}
    queue = list(stays)
    while queue:
        summary = known[queue.pop()]
        for rid in references(summary):
            if rid in known and rid not in stays:
                stays[rid] = f"{summary['folder']} was made from it"
                queue.append(rid)
    for rid, summary in known.items():  # encoded text is no step's input: it is kept with the text that it is made of
        if summary["kind"] == SHARED_KIND and all(source in stays for source in references(summary)):
            stays[rid] = "encoded text of artifacts that are kept"
    found = Collection(
        kept={known[rid]["folder"]: reason for rid, reason in stays.items()},
        kept_bytes=sum(known[rid]["bytes"] for rid in stays),
    )
    # Encoded text first, and users before what they were made from, so that a kill leaves no artifact without inputs.
    going = [summary for rid, summary in reversed(known.items()) if rid not in stays]
    for summary in sorted(going, key=lambda each: each["kind"] != SHARED_KIND):
        path = store.outputs / "store" / summary["folder"]
        found.garbage.append(Garbage(path, "artifact", summary["bytes"], _why(summary, keep_last)))
    found.garbage += [*_unreadable(store, known), *_abandoned(store)]
    for group in groups(store):
        for link in _entries(store.outputs / "refs" / group) if group not in without else ():
            if link.is_symlink() and link.readlink().name not in found.kept:
                found.garbage.append(Garbage(link, "ref", 0, "its artifact is gone"))
    return found


def collect(store: Store, keep_last: int | None = None) -> Collection:
    """Remove garbage and return it. No step can start meanwhile."""
    return _delete(store, "gc", lambda: find_garbage(store, keep_last))


def find_removal(store: Store, runs: Set[str]) -> Collection:
    """Return what is removed with these runs; nothing is changed.

    That are their refs, events and those of their artifacts that no other ref leads to.
    """
    already = {each.path for each in find_garbage(store).garbage}
    found = find_garbage(store, without=runs)
    found.garbage = [each for each in found.garbage if each.path not in already]
    own = {folder for group, _, folder in _refs(store) if group in runs}
    found.kept = {folder: reason for folder, reason in found.kept.items() if folder in own}
    refs = store.outputs / "refs"
    if (refs / LATEST).is_symlink() and (refs / LATEST).readlink().name in runs:
        found.garbage.append(Garbage(refs / LATEST, "ref", 0, "the latest run is removed"))
    for run in sorted(runs):
        folders = {refs / run: "names of its artifacts", store.outputs / "runs" / run: "plan, events, report"}
        for path, what in folders.items():
            if path.is_dir():
                found.garbage.append(Garbage(path, "run", size_of(path), what))
    return found


def collect_removal(store: Store, runs: Set[str]) -> Collection:
    """Remove what `find_removal` returns, and return it."""
    return _delete(store, "rm", lambda: find_removal(store, runs))


def runs_in_progress(store: Store) -> dict[str, list[str]]:
    """Return run → ids of its artifacts, of runs that hold a lock, or began within a day and have no recorded end."""
    busy = {run for run, _ in running_steps(store)}
    found: dict[str, list[str]] = {}
    for folder in _entries(store.outputs / "runs"):
        try:
            record = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            is_young = time.time() - datetime.fromisoformat(record["started"]).timestamp() < DAY_SECONDS
            if folder.name in busy or (is_young and not _has_ended(folder)):
                found[folder.name] = [step["rid"] for step in record["steps"]]
        except (OSError, ValueError, KeyError):
            continue  # no plan yet, or an unreadable one
    return found


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def _has_ended(run: Path) -> bool:
    return Records(run / "events.jsonl").last().get("event") in ("run_done", "run_failed")


def _refs(store: Store) -> Iterator[tuple[str, str, str]]:
    """Yield group, name and artifact's folder of every ref."""
    for group in groups(store):
        for name, place in links(store, group).items():
            yield group, name, place.name


def _roots(store: Store, known: Mapping[str, Summary], keep_last: int | None, without: Set[str]) -> dict[str, str]:
    """Return id → reason of the artifacts that are kept for themselves, not for runs of `without`."""
    at = {summary["folder"]: rid for rid, summary in known.items()}
    current = latest(store)
    busy = runs_in_progress(store)
    roots = {rid: f"run {run} is in progress" for run in busy.keys() - without for rid in busy[run]}
    for group, name, folder in _refs(store):
        is_released = keep_last is not None and _RUN.match(group) and group != current and group not in busy
        if folder in at and group not in without and not is_released:
            named = {PINS: f"pinned as {name}", IMPORTS: f"import:{name}"}
            roots[at[folder]] = named.get(group, f"{group}/{name}")
    made: dict[str, list[Summary]] = {}
    for summary in known.values():  # oldest first
        if SAVED not in str(summary["step"]) and summary["kind"] != SHARED_KIND:
            made.setdefault(str(summary["step"]), []).append(summary)
    for step, summaries in made.items():
        for summary in summaries[-keep_last:] if keep_last else ():
            roots.setdefault(summary["rid"], f"one of the last {keep_last} of {step}")
    return roots


def _why(summary: Summary, keep_last: int | None) -> str:
    if summary["kind"] == SHARED_KIND:
        return "encoded text: made again on demand"
    if keep_last is None:
        return "nothing needs it"
    step, intermediate, _ = str(summary["step"]).partition(SAVED)
    return f"an intermediate model of {step}" if intermediate else f"not one of the last {keep_last} of {step}"


def _unreadable(store: Store, known: Mapping[str, Summary]) -> Iterator[Garbage]:
    """Yield what is in store/ without a readable manifest."""
    readable = {summary["folder"] for summary in known.values()}
    for path in _entries(store.outputs / "store"):
        if path.name not in readable:
            reason = "its manifest is damaged" if (path / MANIFEST).exists() else "unfinished: it has no manifest"
            yield Garbage(path, "artifact", size_of(path), reason)


def _abandoned(store: Store) -> Iterator[Garbage]:
    """Yield saved work of steps and transfers that nobody has continued for a week."""
    work = store.outputs / "work"
    for path in [*_entries(work), *work.glob(".import-*")]:
        lock = store.lock("import" if path.name.startswith(".") else path.name)
        idle = time.time() - max(each.lstat().st_mtime for each in [path, *path.rglob("*")])
        if idle >= _LEFT_OVER_DAYS * DAY_SECONDS and not locks.is_held(lock):
            yield Garbage(path, "work", size_of(path), f"abandoned, unchanged for {idle / DAY_SECONDS:.0f} days")


def _delete(store: Store, verb: str, find: Callable[[], Collection]) -> Collection:
    """Remove what `find` returns, while no step runs.

    Each item is renamed and then deleted, so that a kill leaves no partial artifact.
    """

    def refuse(owner: object = None) -> None:
        running = ", ".join(sorted({run for run, _ in running_steps(store)})) or "another process"
        raise ConfigError(f"{verb} needs that no step is running, but {running} is. See: mlxchat status")

    folder = store.outputs / "locks"
    with locks.hold(folder / "gc.lock", {"step": verb}, refuse):
        # A step takes its own lock first and then waits for this one.
        if any(locks.is_held(lock) for lock in _entries(folder) if lock.name != "gc.lock"):
            refuse()
        sweep(store)
        found = find()
        crash_point("gc.planned")
        for item in found.garbage:
            if item.kind == "ref":
                item.path.unlink(missing_ok=True)
                continue
            trash = store.to_trash(item.path)
            crash_point("gc.moved")
            remove(trash)
            crash_point("gc.deleted")
        store.forget()
        for record in _entries(store.outputs / "records"):
            if store.find(rid_of_record(record.name)) is None:
                record.unlink()
        for group in groups(store):
            refs = store.outputs / "refs" / group
            if group != PINS and not any(refs.iterdir()):
                refs.rmdir()
    return found


def _entries(folder: Path) -> list[Path]:
    return [folder / name for name in list_folder(folder)]
