"""Garbage collection, as in git: refs are roots, and what no root leads to may be removed.

Roots are the refs of runs, pins and imports, and the artifacts of runs in progress. Whatever a kept artifact was made
from is kept, too. `--keep-last N` releases the refs of ended runs, except those of the latest one and to the newest N
artifacts of each step.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mlxchat.errors import ConfigError
from mlxchat.store import locks
from mlxchat.store.catalog import Summary, by_rid, read_catalog, references
from mlxchat.store.files import Records, crash_point, list_folder, remove
from mlxchat.store.manifest import SHARED_KIND
from mlxchat.store.naming import LATEST, groups, latest, links, running_steps
from mlxchat.store.store import SAVED, Store, rid_of_record, sweep

DAY_SECONDS = 86400.0
_LEFT_OVER_DAYS = 7
_RUN = re.compile(r"\d{8}-\d{6}-")


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can be removed."""

    path: Path
    kind: str  # artifact, work, run or ref
    bytes: int
    reason: str


@dataclass
class Collection:
    """What can be removed, and what is kept."""

    garbage: list[Garbage]
    kept: dict[str, int]  # artifact's folder → bytes


def find_garbage(store: Store, keep_last: int | None = None, *, without: Set[str] = frozenset()) -> Collection:
    """Return what can be removed; nothing is changed.

    Args:
        store: the outputs folder.
        keep_last: how many artifacts of each step of ended runs to keep, without intermediate models; None: all.
        without: runs whose refs do not count.
    """
    known = by_rid(read_catalog(store))
    kept = _roots(store, known, keep_last, without) & known.keys()
    queue = list(kept)
    while queue:
        made_from = {rid for rid in references(known[queue.pop()]) if rid in known} - kept
        kept |= made_from
        queue += made_from
    # Encoded text is no step's input: it is kept with the text that it is made of.
    texts = {rid for rid, summary in known.items() if summary["kind"] == SHARED_KIND}
    kept |= {rid for rid in texts if kept.issuperset(references(known[rid]))}
    why = "nothing needs it" if keep_last is None else f"not one of the last {keep_last} of its step"
    # Encoded text first, and users before what they were made from, so that a kill leaves no artifact without inputs.
    newest = list(reversed(known))
    garbage = [
        Garbage(store.outputs / "store" / known[rid]["folder"], "artifact", known[rid]["bytes"], why)
        for rid in sorted(newest, key=lambda rid: rid not in texts)
        if rid not in kept
    ]
    found = Collection(garbage, {known[rid]["folder"]: known[rid]["bytes"] for rid in kept})
    garbage += [*_unreadable(store, known), *_abandoned(store)]
    garbage += [
        Garbage(link, "ref", 0, "its artifact is gone")
        for group in groups(store)
        for link in (_entries(store.outputs / "refs" / group) if group not in without else ())
        if link.is_symlink() and link.readlink().name not in found.kept
    ]
    return found


def _roots(store: Store, known: Mapping[str, Summary], keep_last: int | None, without: Set[str]) -> set[str]:
    """Return the ids of the artifacts that are kept for themselves, not for runs of `without`."""
    at = {summary["folder"]: rid for rid, summary in known.items()}
    busy = runs_in_progress(store)
    roots = {rid for run in busy.keys() - without for rid in busy[run]}
    spared = {latest(store), *busy}
    for group in groups(store):
        is_released = keep_last is not None and _RUN.match(group) and group not in spared
        if group not in without and not is_released:
            roots |= {at[place.name] for place in links(store, group).values() if place.name in at}
    made: dict[str, list[str]] = {}
    for rid, summary in known.items():  # oldest first
        if SAVED not in str(summary["step"]) and summary["kind"] != SHARED_KIND:
            made.setdefault(str(summary["step"]), []).append(rid)
    return roots.union(*(rids[-keep_last:] for rids in made.values())) if keep_last else roots


def _unreadable(store: Store, known: Mapping[str, Summary]) -> Iterator[Garbage]:
    """Yield what is in store/ without a readable manifest."""
    readable = {summary["folder"] for summary in known.values()}
    for path in _entries(store.outputs / "store"):
        if path.name not in readable:
            yield Garbage(path, "artifact", _size_of(path), "its manifest is missing or damaged")


def _abandoned(store: Store) -> Iterator[Garbage]:
    """Yield saved work of steps and transfers that nobody has continued for a week."""
    work = store.outputs / "work"
    for path in [*_entries(work), *work.glob(".import-*")]:
        lock = store.lock("import" if path.name.startswith(".") else path.name)
        days = (time.time() - max(each.lstat().st_mtime for each in [path, *path.rglob("*")])) / DAY_SECONDS
        if days >= _LEFT_OVER_DAYS and not locks.is_held(lock):
            yield Garbage(path, "work", _size_of(path), f"abandoned, unchanged for {days:.0f} days")


def find_removal(store: Store, runs: Set[str]) -> Collection:
    """Return what goes with these runs (and what nothing needed before), and which of their artifacts are kept."""
    found = find_garbage(store, without=runs)
    own = {place.name for run in runs for place in links(store, run).values()}
    found.kept = {folder: size for folder, size in found.kept.items() if folder in own}
    refs = store.outputs / "refs"
    if (refs / LATEST).is_symlink() and (refs / LATEST).readlink().name in runs:
        found.garbage.append(Garbage(refs / LATEST, "ref", 0, "the latest run is removed"))
    for run in sorted(runs):
        for path, what in ((refs / run, "names"), (store.outputs / "runs" / run, "plan, events, report")):
            found.garbage += [Garbage(path, "run", _size_of(path), what)] if path.is_dir() else []
    return found


def runs_in_progress(store: Store) -> dict[str, list[str]]:
    """Return run → ids of its artifacts, of runs that hold a lock, or began within a day and have no recorded end."""
    busy = {run for run, _ in running_steps(store)}
    found: dict[str, list[str]] = {}
    for folder in _entries(store.outputs / "runs"):
        with suppress(OSError, ValueError, KeyError):  # no plan yet, or an unreadable one
            record = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            is_young = time.time() - datetime.fromisoformat(record["started"]).timestamp() < DAY_SECONDS
            has_ended = Records(folder / "events.jsonl").last().get("event") in ("run_done", "run_failed")
            if folder.name in busy or (is_young and not has_ended):
                found[folder.name] = [step["rid"] for step in record["steps"]]
    return found


def collect(store: Store, find: Callable[[], Collection]) -> Collection:
    """Remove what `find` returns, and return it. No step can start meanwhile.

    Each item is renamed and then deleted, so that a kill leaves no partial artifact.
    """

    def refuse(owner: object = None) -> None:
        running = ", ".join(sorted({run for run, _ in running_steps(store)})) or "another process"
        raise ConfigError(f"removing needs that no step is running, but {running} is. See: mlxchat status")

    folder = store.outputs / "locks"
    with locks.hold(folder / "gc.lock", {"step": "gc"}, refuse):
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
            with suppress(OSError):  # it is not empty
                (store.outputs / "refs" / group).rmdir()
    return found


def _size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    return sum(file.lstat().st_size for file in [path, *path.rglob("*")] if file.is_file() and not file.is_symlink())


def _entries(folder: Path) -> list[Path]:
    return [folder / name for name in list_folder(folder)]
