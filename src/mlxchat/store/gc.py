"""Garbage collection: what may be removed from an outputs folder, why, and the removal.

Never removed: artifacts that `latest`, a pin or a user's own group of refs leads to; artifacts that a run in progress
made or needs, or that are younger than such a run; artifacts of a run younger than a day; and all inputs of these. The
refs of an ended run keep its artifacts, too, until a limit (age, number, bytes) is given.
"""

from __future__ import annotations

import heapq
import json
import math
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf
from pathlib import Path

from mlxchat.config.wording import plural
from mlxchat.errors import ConfigError, StoreError
from mlxchat.store import locks
from mlxchat.store.catalog import Summary, by_rid, read_catalog, references
from mlxchat.store.crash import crash_point
from mlxchat.store.files import list_folder
from mlxchat.store.manifest import MANIFEST, SHARED_KIND
from mlxchat.store.naming import IMPORTS, LATEST, PINS, Found, Run, groups, latest, links, running_steps
from mlxchat.store.store import SAVED, Store, rid_of_record

DAY_SECONDS = 86400.0
_LEFT_OVER_DAYS = 7


@dataclass(frozen=True)
class Limits:
    """What is kept of ended runs; without limits, everything that a run's refs lead to."""

    keep_last: int | None = None
    """Keep this many artifacts of each step, the newest; intermediate models do not count."""
    older_than_seconds: float | None = None
    """Keep artifacts younger than this; also the age at which abandoned work is removed."""
    max_bytes: float | None = None
    """Remove the oldest artifacts only until the store has this size."""

    def given(self) -> bool:
        """Return whether there is any limit."""
        return (self.keep_last, self.older_than_seconds, self.max_bytes) != (None, None, None)


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can be removed."""

    path: Path
    kind: str
    """artifact, work, run, trash or ref."""
    bytes: int
    reason: str


def parse_age(text: str) -> float:
    """Return the seconds of 90s, 30m, 12h, 7d or 2w.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if found is None:
        raise ConfigError(
            f'"{text}" is not an age: expected a number with s, m (minutes), h, d or w, such as 12h, 7d or 2w'
        )
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": DAY_SECONDS, "w": 7 * DAY_SECONDS}[found[2]]


def parse_bytes(text: str) -> float:
    """Return the bytes of 500MB, 10GB or 1.5TB (powers of 1,000).

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if found is None:
        raise ConfigError(f'"{text}" is no size: expected a number with kB, MB, GB or TB, such as 500MB or 10GB')
    return float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[found[2]]


def _left_overs(store: Store, limits: Limits) -> Iterator[Garbage]:
    """Yield abandoned work, unfinished artifacts, and the trash of an interrupted gc."""
    age = limits.older_than_seconds if limits.older_than_seconds is not None else _LEFT_OVER_DAYS * DAY_SECONDS
    work = store.outputs / "work"
    for path in [*_entries(work), *work.glob(".import-*")]:
        lock = store.lock("import" if path.name.startswith(".") else path.name)
        idle = time.time() - max(each.lstat().st_mtime for each in [path, *path.rglob("*")])
        if path.is_dir() and idle >= age and not locks.is_held(lock):
            yield Garbage(path, "work", size_of(path), f"abandoned, unchanged for {idle / DAY_SECONDS:.0f} days")
    for path in _entries(store.outputs / "store"):
        if not (path / MANIFEST).exists():
            yield Garbage(path, "artifact", size_of(path), "unfinished: it has no manifest")
    for path in _entries(store.outputs / "trash"):
        yield Garbage(path, "trash", size_of(path), "left by an interrupted gc")


def _dangling(store: Store, staying: set[str]) -> Iterator[Garbage]:
    """Yield refs that lead to none of the artifacts `staying` (ids)."""
    folders = {rid[:16] for rid in staying}
    for group in groups(store):
        for link in _entries(store.outputs / "refs" / group):
            if link.is_symlink() and link.readlink().name[-16:] not in folders:
                yield Garbage(link, "ref", 0, "its artifact is gone")


def remark_old(store: Store) -> str | None:
    """Return a note if the folder holds only artifacts of version 0.1, else None."""
    count = sum((path / MANIFEST).exists() for path in _entries(store.outputs / "store"))
    if not count or (store.outputs / "records").is_dir():
        return None
    return (
        f"{store.outputs} holds {plural(count, 'artifact')} of version 0.1: chat, show and export accept them by name, "
        "runs do not reuse them. To use another folder for new runs: outputs=PATH. To remove them once there are newer "
        "ones: mlxchat gc --keep-last 1 --apply"
    )


def _entries(folder: Path) -> list[Path]:
    return [folder / name for name in list_folder(folder)]


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


_RUN = re.compile(r"\d{8}-\d{6}-")


@dataclass
class Collection:
    """What can be removed, and why the rest is kept."""

    garbage: list[Garbage] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Artifact's folder → reason."""
    kept_bytes: int = 0


def find_garbage(store: Store, limits: Limits, *, trusted: bool = True) -> Collection:
    """Return what can be removed under these limits; nothing is changed. `trusted` as for `read_catalog`."""
    summaries = read_catalog(store, trusted=trusted)
    known = by_rid(summaries)
    kept = _keep(store, known, limits)
    removable = [summary for summary in known.values() if summary["rid"] not in kept]
    total = sum(summary["bytes"] for summary in known.values())
    removable = _oldest(removable, inf if limits.max_bytes is None else total - limits.max_bytes)
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
    found.garbage += [*_left_overs(store, limits), *_dangling(store, known.keys() - gone)]
    return found


def collect(store: Store, limits: Limits) -> Collection:
    """Remove garbage and return it. No step can start meanwhile.

    Raises:
        ConfigError: a step is running.
        StoreError: locks or symlinks do not work here, so what is needed is unknown.
    """
    return _delete(store, "gc", lambda: find_garbage(store, limits, trusted=False))


def find_removal(store: Store, meant: Sequence[Found | Run], *, force: bool, trusted: bool = True) -> Collection:
    """Return what is removed with these runs and artifacts; nothing is changed.

    A run is removed with its refs, events and those of its artifacts that no other ref leads to and no other artifact
    was made from. An artifact is removed with the refs that lead to it.

    Args:
        store: the outputs folder.
        meant: the runs and artifacts.
        force: also remove pinned artifacts, inputs of others, and runs that may be in progress.
        trusted: as for `read_catalog`.

    Raises:
        ConfigError: every reason against the removal, unless `force` is True.
    """
    known = by_rid(read_catalog(store, trusted=trusted))
    at = {summary["folder"]: rid for rid, summary in known.items()}
    runs = {each.name for each in meant if isinstance(each, Run)}
    places = [each.place for each in meant if isinstance(each, Found)]
    stays, reasons = _stays(store, known, runs, {at[place.name] for place in places if place.name in at})
    if reasons and not force:
        raise ConfigError("\n".join([*sorted(set(reasons)), "To remove it anyway: --force"]))
    going = {rid for rid, summary in known.items() if rid not in stays and summary["kind"] != SHARED_KIND}
    # Encoded text is no step's input: it is removed with the text that it was encoded from.
    going |= {
        rid for rid, summary in known.items() if summary["kind"] == SHARED_KIND and going & {*references(summary)}
    }
    found = Collection(kept={known[rid]["folder"]: reason for rid, reason in stays.items() if reason})
    found.kept_bytes = sum(summary["bytes"] for rid, summary in known.items() if rid not in going)
    for summary in _oldest([known[rid] for rid in going], math.inf):
        reason = "encoded text of removed artifacts" if summary["kind"] == SHARED_KIND else str(summary["step"])
        path = store.outputs / "store" / summary["folder"]
        found.garbage.append(Garbage(path, "artifact", summary["bytes"], reason))
    for place in places:
        if place.name not in at:
            found.garbage.append(Garbage(place, "artifact", size_of(place), "its manifest is damaged"))
    found.garbage += _names_of(store, runs, {item.path.name for item in found.garbage})
    for run in sorted(runs):
        for folder, what in (("refs", "names of its artifacts"), ("runs", "plan, events, report")):
            if (path := store.outputs / folder / run).is_dir():
                found.garbage.append(Garbage(path, "run", size_of(path), what))
    return found


def _stays(
    store: Store, known: Mapping[str, Summary], runs: Set[str], chosen: Set[str]
) -> tuple[dict[str, str], list[str]]:
    """Return what is kept when these runs and the artifacts `chosen` (ids) are removed, and lines against the removal.

    The first is id → the reason if the artifact is of these runs, else "".
    """
    at = {summary["folder"]: rid for rid, summary in known.items()}
    names = [
        (group, name, at[place.name])
        for group in groups(store)
        for name, place in links(store, group).items()
        if place.name in at
    ]
    in_runs = {rid for group, _, rid in names if group in runs} - chosen
    stays = {
        rid: "" for rid, summary in known.items() if rid not in chosen | in_runs and summary["kind"] != SHARED_KIND
    }
    reasons = []
    for run, started, ended, rids in _runs(store):
        if ended or time.time() - _seconds(started) > DAY_SECONDS:
            continue
        if run in runs:
            reasons.append(f"run {run} began less than a day ago and has no recorded end")
            continue
        stays |= {rid: f"run {run} is in progress" for rid in rids if rid in in_runs}
        reasons += [f"{known[rid]['folder']}: run {run}, which is in progress, uses it" for rid in chosen & {*rids}]
    for group, name, rid in names:
        if rid in in_runs and group not in runs:
            stays[rid] = f"{group}/{name}"
        elif rid in chosen and group in (PINS, IMPORTS):
            reasons.append(f"{known[rid]['folder']}: it is {'pinned as ' if group == PINS else 'import:'}{name}")
    queue = list(stays)
    while queue:
        summary = known[queue.pop()]
        for rid in references(summary):
            if rid in chosen:
                reasons.append(f"{known[rid]['folder']}: {summary['folder']} was made from it")
            elif rid in in_runs and rid not in stays:
                stays[rid] = f"{summary['folder']} was made from it"
                queue.append(rid)
    return stays, reasons


def _names_of(store: Store, runs: Set[str], folders: Set[str]) -> Iterator[Garbage]:
    """Yield the refs of other runs that lead to these artifacts, and `latest` if it is one of the runs."""
    refs = store.outputs / "refs"
    if (refs / LATEST).is_symlink() and (refs / LATEST).readlink().name in runs:
        yield Garbage(refs / LATEST, "ref", 0, "the latest run is removed")
    for group in groups(store):
        for name, place in links(store, group).items():
            if group not in runs and place.name in folders:
                yield Garbage(refs / group / name, "ref", 0, "its artifact is removed")


def remove(store: Store, meant: Sequence[Found | Run], *, force: bool) -> Collection:
    """Remove what `find_removal` returns, and return it.

    Raises:
        ConfigError: a step is running, or there are reasons against the removal.
        StoreError: locks or symlinks do not work here, so what is needed is unknown.
    """
    return _delete(store, "rm", lambda: find_removal(store, meant, force=force, trusted=False))


def _delete(store: Store, verb: str, find: Callable[[], Collection]) -> Collection:
    """Remove what `find` returns, while no step runs.

    Each item is renamed into trash/ and then deleted, so that a kill leaves no partial artifact.
    """

    def refuse(owner: object) -> None:
        running = ", ".join(sorted(running_runs(store))) or "another process"
        raise ConfigError(f"{verb} needs that no step is running, but {running} is. See: mlxchat status")

    with locks.hold(store.outputs / "locks" / "gc.lock", {"step": verb}, refuse):
        found = find()
        crash_point("gc.planned")
        trash = store.outputs / "trash"
        for item in found.garbage:
            if item.kind == "ref":
                item.path.unlink(missing_ok=True)
                continue
            if item.kind == "work" and locks.is_held(store.lock(item.path.name)):
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
        for record in _entries(store.outputs / "records"):
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
    """Return the names of the runs that hold a step's lock."""
    return {run for run, _ in running_steps(store)}


def _keep(store: Store, known: Mapping[str, Summary], limits: Limits) -> dict[str, str]:
    """Return id → reason of every artifact that is kept, including inputs of kept ones."""
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
            why = {PINS: f"pinned as {step}", IMPORTS: f"import:{step}", current: f"latest run: {current}/{step}"}
            if place.name in at:
                keep(at[place.name], why.get(name, f"{name}/{step}"))
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
        if SAVED not in str(summary["step"]):
            by_step.setdefault(str(summary["step"]), []).append(summary)
    if limits.keep_last is not None:
        for step, made in by_step.items():
            newest = sorted(made, key=lambda summary: summary["published"], reverse=True)[: limits.keep_last]
            for summary in newest:
                if summary["kind"] != SHARED_KIND:
                    keep(summary["rid"], f"one of the last {limits.keep_last} of {step}")
    queue = list(reasons)
    while queue:
        summary = known[queue.pop()]
        for rid in references(summary):
            if rid in known and rid not in reasons:
                reasons[rid] = f"{summary['folder']} was made from it"
                queue.append(rid)
    # Encoded text is no step's input: it is kept with the text that it was encoded from.
    for rid, summary in known.items():
        if summary["kind"] == SHARED_KIND and all(source in reasons for source in references(summary)):
            keep(rid, "encoded text of artifacts that are kept")
    return reasons


def _oldest(removable: list[Summary], excess: float) -> list[Summary]:
    """Return the oldest removable artifacts up to `excess` bytes; encoded text comes first, users before their inputs.

    In this order a killed gc leaves no artifact without its inputs.
    """
    rids = {summary["rid"]: summary for summary in removable}
    users = Counter(rid for each in removable if each["kind"] != SHARED_KIND for rid in references(each) if rid in rids)

    def rank(summary: Summary) -> tuple[bool, str, str]:
        return (summary["kind"] != SHARED_KIND, summary["published"], summary["rid"])

    free = [rank(summary) for summary in removable if not users[summary["rid"]]]
    heapq.heapify(free)
    chosen: list[Summary] = []
    while free and excess > 0:
        summary = rids[heapq.heappop(free)[2]]
        chosen.append(summary)
        excess -= summary["bytes"]
        for rid in references(summary) if summary["kind"] != SHARED_KIND else ():
            users[rid] -= 1
            if rid in rids and not users[rid]:
                heapq.heappush(free, rank(rids[rid]))
    return chosen


def _why(summary: Summary, limits: Limits) -> str:
    if summary["kind"] == SHARED_KIND:
        return "encoded text: recomputed when needed"
    if not limits.given():
        return "not referenced"
    reasons = []
    if limits.keep_last is not None:
        step, intermediate, _ = str(summary["step"]).partition(SAVED)
        which = "an intermediate model of" if intermediate else f"not one of the last {limits.keep_last} of"
        reasons.append(f"{which} {step}")
    if limits.older_than_seconds is not None:
        reasons.append(f"{(time.time() - _seconds(summary['published'])) / DAY_SECONDS:.0f} days old")
    if limits.max_bytes is not None:
        reasons.append("among the oldest")
    return ", ".join(reasons)


def _runs(store: Store) -> Iterator[tuple[str, str, bool, list[str]]]:
    """Yield name, start, whether an end is recorded, and the ids of the steps of every run."""
    for folder in _entries(store.outputs / "runs"):
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
    """Return the id of the artifact that a step's key gave; the run may have been killed before it recorded it."""
    with suppress(StoreError):
        made = store.made(step["key"])
        return made["rid"] if made is not None else None
    return None


def _seconds(moment: str) -> float:
    """Return an ISO time as seconds since 1970; an unreadable one is now, so that it counts as young."""
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
