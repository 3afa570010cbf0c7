"""What may go from an outputs folder, and why; and removing it, one rename at a time.

Never removed: what `latest`, a pin or another group of people's own leads to; what a run in progress made or needs, or
that is younger than such a run; what belongs to a run younger than a day; and what any of these were made from. The
refs of an ended run keep its artifacts too, until a limit (age, number, bytes) is given.
"""

from __future__ import annotations

import heapq
import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from mlxchat.errors import ConfigError, StoreError
from mlxchat.store import locks
from mlxchat.store.catalog import Summary, by_rid, read_catalog, references
from mlxchat.store.crash import crash_point
from mlxchat.store.leftovers import DAY_SECONDS, Garbage, Limits, entries, left_overs, orphans, size_of
from mlxchat.store.naming import IMPORTS, LATEST, PINS, groups, latest, links
from mlxchat.store.store import Store, rid_of_record

_RUN = re.compile(r"\d{8}-\d{6}-")


@dataclass
class Collection:
    """What may go, and what stays why."""

    garbage: list[Garbage] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Artifact's folder → reason."""
    kept_bytes: int = 0


def find_garbage(store: Store, limits: Limits, *, trusted: bool = True) -> Collection:
    """Return what may go under these limits; nothing is changed.

    Args:
        store: the outputs folder.
        limits: what is kept of ended runs.
        trusted: whether the catalog may be used; False reads every manifest.
    """
    summaries = read_catalog(store, trusted=trusted)
    known = by_rid(summaries)
    kept = _keep(store, known, limits)
    removable = [summary for summary in known.values() if summary["rid"] not in kept]
    sizes = {summary["rid"]: summary["bytes"] for summary in known.values()}
    removable = _until_small_enough(
        removable, sum(sizes.values()), -1 if limits.max_bytes is None else limits.max_bytes
    )
    gone = {summary["rid"] for summary in removable}
    found = Collection()
    for summary in removable:
        path = store.outputs / "store" / summary["folder"]
        found.garbage.append(Garbage(path, "artifact", summary["bytes"], _why(summary, limits)))
    for summary in summaries:
        if "damaged" in summary:
            path = store.outputs / "store" / summary["folder"]
            found.garbage.append(Garbage(path, "artifact", size_of(path), "its manifest is damaged"))
    for rid, summary in known.items():
        if rid not in gone:
            found.kept[summary["folder"]] = kept.get(rid, "the store is small enough")
            found.kept_bytes += summary["bytes"]
    found.garbage += left_overs(store, limits)
    found.garbage += orphans(store, {rid for rid in known if rid not in gone})
    return found


def collect(store: Store, limits: Limits) -> Collection:
    """Remove what may go and return it. Every run stops this, and this stops every run from beginning a step.

    Raises:
        ConfigError: a step is running.
        StoreError: locks or names cannot be relied on here, so nobody can tell what is needed.
    """

    def refuse(owner: object) -> None:
        running = ", ".join(sorted(running_runs(store))) or "another process"
        raise ConfigError(f"gc has to wait until no step is running: {running}. See: mlxchat status")

    with locks.hold(store.outputs / "locks" / "gc.lock", {"step": "gc"}, refuse):
        if (store.outputs / "refs").is_dir():
            store.check()
        found = find_garbage(store, limits, trusted=False)
        crash_point("gc.planned")
        trash = store.outputs / "trash"
        for item in found.garbage:
            if item.kind in ("index", "ref"):
                item.path.unlink(missing_ok=True)
                continue
            if item.kind == "work":
                lock = store.lock(item.path.name)
                if locks.is_held(lock):
                    continue
            moved = item.path
            if item.kind != "trash":
                trash.mkdir(exist_ok=True)
                moved = trash / f"{item.path.name}-{uuid.uuid4().hex[:8]}"
                item.path.rename(moved)
                crash_point("gc.moved")
            _remove(moved)
            crash_point("gc.deleted")
        store.forget()
        for record in entries(store.outputs / "records"):
            if store.find(rid_of_record(record.name)) is None:
                record.unlink()
        for group in groups(store):
            folder = store.outputs / "refs" / group
            if group not in (LATEST, PINS) and not any(folder.iterdir()):
                folder.rmdir()
        if trash.is_dir() and not any(trash.iterdir()):
            trash.rmdir()
    return found


def running_runs(store: Store) -> set[str]:
    """Return the names of the runs that hold a step's lock now."""
    found = set()
    for path in entries(store.outputs / "work"):
        lock = store.lock(path.name)
        if lock.exists() and locks.is_held(lock):
            found.add(str(locks.read_owner(lock).get("run") or path.name[:16]))
    return found


def _keep(store: Store, known: Mapping[str, Summary], limits: Limits) -> dict[str, str]:
    """Return id → why it is kept, of what is kept for itself and of what that was made from."""
    at = {summary["folder"]: rid for rid, summary in known.items()}
    reasons: dict[str, str] = {}

    def keep(rid: str, reason: str) -> None:
        if rid in known:
            reasons.setdefault(rid, reason)

    current = latest(store)
    for name in dict.fromkeys([current, *groups(store)]):
        if limits.given() and _RUN.match(name) and name != current:
            continue
        for step, place in links(store, name).items():
            told = {PINS: f"pinned as {step}", IMPORTS: f"import:{step}", current: f"latest run: {current}/{step}"}
            if place.name in at:
                keep(at[place.name], told.get(name, f"{name}/{step}"))
    now = time.time()
    busy = running_runs(store)
    young = DAY_SECONDS if limits.older_than_seconds is None else limits.older_than_seconds
    oldest_running = ""
    for run, started, ended, rids in _runs(store):
        if not ended and now - _seconds(started) < DAY_SECONDS:
            busy.add(run)  # between two steps it holds no lock
        if run in busy or (now - _seconds(started) < young and (limits.keep_last, limits.max_bytes) == (None, None)):
            reason = f"run {run} is in progress" if run in busy else f"run {run} is young"
            for rid in rids:
                keep(rid, reason)
        if run in busy:
            oldest_running = min(oldest_running or started, started)
    by_step: dict[str, list[Summary]] = {}
    for rid, summary in known.items():
        if oldest_running and summary["published"] >= oldest_running:
            keep(rid, "younger than a run in progress")
        if limits.older_than_seconds is not None and now - _seconds(summary["published"]) < limits.older_than_seconds:
            keep(rid, "young")
        by_step.setdefault(str(summary["step"]), []).append(summary)
    if limits.keep_last is not None:
        for step, made in by_step.items():
            newest = sorted(made, key=lambda summary: summary["published"])[
                len(made) - min(limits.keep_last, len(made)) :
            ]
            for summary in newest:
                if summary["kind"] != "tokens":
                    keep(summary["rid"], f"one of the last {limits.keep_last} of {step}")
    queue = list(reasons)
    while queue:
        summary = known[queue.pop()]
        for rid in references(summary):
            if rid in known and rid not in reasons:
                reasons[rid] = f"{summary['folder']} was made from it"
                queue.append(rid)
    # Encoded text is nobody's input. It stays as long as what it was encoded from.
    for rid, summary in known.items():
        if summary["kind"] == "tokens" and all(source in reasons for source in references(summary)):
            keep(rid, "encoded text of artifacts that are kept")
    return reasons


def _until_small_enough(removable: list[Summary], total: float, most: float) -> list[Summary]:
    """Return the oldest of what may go, encoded text first, until the rest fits; users go before what they use.

    So a gc that is killed leaves no artifact without what it was made from.
    """
    rids = {summary["rid"]: summary for summary in removable}
    users = dict.fromkeys(rids, 0)
    for summary in removable:
        for rid in references(summary):
            if rid in users and summary["kind"] != "tokens":
                users[rid] += 1

    def rank(summary: Summary) -> tuple[bool, str, str]:
        return (summary["kind"] != "tokens", summary["published"], summary["rid"])

    free = [rank(summary) for summary in removable if not users[summary["rid"]]]
    heapq.heapify(free)
    chosen: list[Summary] = []
    while free and total > most:
        summary = rids[heapq.heappop(free)[2]]
        chosen.append(summary)
        total -= summary["bytes"]
        for rid in references(summary) if summary["kind"] != "tokens" else ():
            if rid in users:
                users[rid] -= 1
                if not users[rid]:
                    heapq.heappush(free, rank(rids[rid]))
    return chosen


def _why(summary: Summary, limits: Limits) -> str:
    if summary["kind"] == "tokens":
        return "encoded text: made again when needed"
    if not limits.given():
        return "nothing refers to it"
    reasons = []
    if limits.keep_last is not None:
        reasons.append(f"not one of the last {limits.keep_last} of {summary['step']}")
    if limits.older_than_seconds is not None:
        reasons.append(f"{(time.time() - _seconds(summary['published'])) / DAY_SECONDS:.0f} days old")
    if limits.max_bytes is not None:
        reasons.append("among the oldest")
    return ", ".join(reasons)


def _runs(store: Store) -> Iterator[tuple[str, str, bool, list[str]]]:
    """Yield name, start, whether it said that it ended, and the ids of the steps of every run."""
    for folder in entries(store.outputs / "runs"):
        try:
            record = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            events = folder / "events.jsonl"
            last = events.read_bytes().rstrip().rpartition(b"\n")[2] if events.exists() else b""
            ended = b'"run_done"' in last or b'"run_failed"' in last
            made = (step.get("rid") or _given(store, step) for step in record["steps"])
            yield folder.name, str(record["started"]), ended, [str(rid) for rid in made if rid]
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _given(store: Store, step: Mapping[str, str]) -> str | None:
    """Return the id of what a step's key gave, which the run may have been killed before it noted."""
    with suppress(StoreError):
        made = store.made(step["key"])
        return made["rid"] if made is not None else None
    return None


def _seconds(moment: str) -> float:
    """Return a time as seconds since 1970; what cannot be read is now, and so young."""
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError:
        return time.time()
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
