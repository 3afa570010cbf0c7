"""Garbage collection, as in git: refs are roots, and what no root leads to may be removed.

Roots are the refs of runs, pins and imports, and the artifacts of runs in progress. Whatever a kept artifact was made
from is kept, too. `--keep-last N` releases the refs of ended runs, except those of the latest one and to the newest N
artifacts of each step.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

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
_RUN = re.compile(r"\d{8}-\d{6}-")


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can be removed."""

    path: Path
    kind: str
    """artifact, work, run, trash or ref."""
    bytes: int
    reason: str


@dataclass
class Collection:
    """What can be removed, and why the rest is kept."""

    garbage: list[Garbage] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Artifact's folder → reason."""
    kept_bytes: int = 0


def find_garbage(store: Store, keep_last: int | None = None) -> Collection:
    """Return what can be removed; nothing is changed.

    Args:
        store: the outputs folder.
        keep_last: artifacts to keep of each step of ended runs, the newest; intermediate models do not count. None:
            everything that their refs lead to.
    """
    summaries = read_catalog(store)
    known = by_rid(summaries)
    stays = _with_inputs(known, _roots(store, known, keep_last))
    for rid, summary in known.items():  # encoded text is no step's input: it is kept with the text that it is made of
        if summary["kind"] == SHARED_KIND and all(source in stays for source in references(summary)):
            stays[rid] = "encoded text of artifacts that are kept"
    found = _collection(store, known, stays, lambda summary: _why(summary, keep_last))
    for summary in summaries:
        if "damaged" in summary:
            path = store.outputs / "store" / summary["folder"]
            found.garbage.append(Garbage(path, "artifact", size_of(path), "its manifest is damaged"))
    found.garbage += [*_left_overs(store), *_dangling(store, stays)]
    return found


def collect(store: Store, keep_last: int | None = None) -> Collection:
    """Remove garbage and return it. No step can start meanwhile.

    Raises:
        ConfigError: a step is running.
    """
    return _delete(store, "gc", lambda: find_garbage(store, keep_last))


def find_removal(store: Store, meant: Sequence[Found | Run], *, force: bool) -> Collection:
    """Return what is removed with these runs and artifacts; nothing is changed.

    A run is removed with its refs, events and those of its artifacts that no other ref leads to and no other artifact
    was made from. An artifact is removed with the refs that lead to it.

    Args:
        store: the outputs folder.
        meant: the runs and artifacts.
        force: also remove pinned artifacts, inputs of others, and runs that may be in progress.

    Raises:
        ConfigError: every reason against the removal, unless `force` is True.
    """
    known = by_rid(read_catalog(store))
    at = {summary["folder"]: rid for rid, summary in known.items()}
    runs = {each.name for each in meant if isinstance(each, Run)}
    places = [each.place for each in meant if isinstance(each, Found)]
    chosen = {at[place.name] for place in places if place.name in at}
    reasons = [] if force else list(_reasons_against(store, known, runs, chosen))
    if reasons:
        raise ConfigError("\n".join([*sorted(set(reasons)), "To remove it anyway: --force"]))
    own = {at[place.name] for run in runs for place in links(store, run).values() if place.name in at}
    roots = {rid: "" for rid, each in known.items() if rid not in own and each["kind"] != SHARED_KIND}
    for group in [group for group in groups(store) if group not in runs]:
        roots |= {at[each.name]: f"{group}/{name}" for name, each in links(store, group).items() if each.name in at}
    for run, rids in runs_in_progress(store).items():
        roots |= {rid: f"run {run} is in progress" for rid in rids if run not in runs}
    stays = _with_inputs(known, {rid: reason for rid, reason in roots.items() if rid not in chosen}, without=chosen)
    going = known.keys() - stays.keys()
    for rid, summary in known.items():
        if summary["kind"] == SHARED_KIND and not going & {*references(summary)}:
            stays[rid] = ""
    found = _collection(store, known, stays, lambda summary: str(summary["step"]))
    found.kept = {folder: reason for folder, reason in found.kept.items() if reason and at[folder] in own}
    for place in places:
        if place.name not in at:
            found.garbage.append(Garbage(place, "artifact", size_of(place), "its manifest is damaged"))
    found.garbage += _names_of(store, runs, {item.path.name for item in found.garbage})
    for run in sorted(runs):
        for folder, what in (("refs", "names of its artifacts"), ("runs", "plan, events, report")):
            if (path := store.outputs / folder / run).is_dir():
                found.garbage.append(Garbage(path, "run", size_of(path), what))
    return found


def remove(store: Store, meant: Sequence[Found | Run], *, force: bool) -> Collection:
    """Remove what `find_removal` returns, and return it.

    Raises:
        ConfigError: a step is running, or there are reasons against the removal.
    """
    return _delete(store, "rm", lambda: find_removal(store, meant, force=force))


def runs_in_progress(store: Store) -> dict[str, list[str]]:
    """Return run → ids of its artifacts, of runs that hold a lock, or began within a day and have no recorded end."""
    busy = {run for run, _ in running_steps(store)}
    found: dict[str, list[str]] = {}
    for folder in _entries(store.outputs / "runs"):
        try:
            record = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            events = folder / "events.jsonl"
            last = events.read_bytes().rstrip().rpartition(b"\n")[2] if events.exists() else b""
            has_ended = b'"run_done"' in last or b'"run_failed"' in last
            is_young = time.time() - _seconds(str(record["started"])) < DAY_SECONDS
            if folder.name in busy or (is_young and not has_ended):
                made = (step.get("rid") or _given(store, step) for step in record["steps"])
                found[folder.name] = [str(rid) for rid in made if rid]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def _roots(store: Store, known: Mapping[str, Summary], keep_last: int | None) -> dict[str, str]:
    """Return id → reason of the artifacts that are kept for themselves."""
    at = {summary["folder"]: rid for rid, summary in known.items()}
    roots: dict[str, str] = {}
    current = latest(store)
    for group in dict.fromkeys([current, *groups(store)]):
        if keep_last is not None and _RUN.match(group) and group != current:
            continue
        for name, place in links(store, group).items():
            why = {PINS: f"pinned as {name}", IMPORTS: f"import:{name}", current: f"latest run: {current}/{name}"}
            if place.name in at:
                roots.setdefault(at[place.name], why.get(group, f"{group}/{name}"))
    busy = runs_in_progress(store)
    for run, rids in busy.items():
        roots |= {rid: f"run {run} is in progress" for rid in rids if rid not in roots}
    made: dict[str, list[Summary]] = {}
    for summary in known.values():
        if busy and summary.get("run") in busy:
            roots.setdefault(summary["rid"], f"run {summary['run']} is in progress")
        if SAVED not in str(summary["step"]) and summary["kind"] != SHARED_KIND:
            made.setdefault(str(summary["step"]), []).append(summary)
    for step, summaries in made.items() if keep_last else ():
        newest = sorted(summaries, key=lambda each: str(each["published"]))[-keep_last:] if keep_last else []
        for summary in newest:
            roots.setdefault(summary["rid"], f"one of the last {keep_last} of {step}")
    return roots


def _with_inputs(
    known: Mapping[str, Summary], roots: Mapping[str, str], without: Set[str] = frozenset()
) -> dict[str, str]:
    """Return id → reason of the roots that are known, and of everything that they were made from."""
    stays = {rid: reason for rid, reason in roots.items() if rid in known}
    queue = list(stays)
    while queue:
        summary = known[queue.pop()]
        for rid in references(summary):
            if rid in known and rid not in without and rid not in stays:
                stays[rid] = f"{summary['folder']} was made from it"
                queue.append(rid)
    return stays


def _collection(
    store: Store, known: Mapping[str, Summary], stays: Mapping[str, str], why: Callable[[Summary], str]
) -> Collection:
    """Return the artifacts as kept or garbage, encoded text first and users before what they were made from."""
    found = Collection(kept={known[rid]["folder"]: reason for rid, reason in stays.items()})
    found.kept_bytes = sum(known[rid]["bytes"] for rid in stays)
    going = sorted((each for rid, each in known.items() if rid not in stays), key=lambda each: str(each["published"]))
    going = [each for each in reversed(going) if each["kind"] == SHARED_KIND] + [
        each for each in reversed(going) if each["kind"] != SHARED_KIND
    ]
    for summary in going:
        path = store.outputs / "store" / summary["folder"]
        reason = "encoded text: made again on demand" if summary["kind"] == SHARED_KIND else why(summary)
        found.garbage.append(Garbage(path, "artifact", summary["bytes"], reason))
    return found


def _why(summary: Summary, keep_last: int | None) -> str:
    if keep_last is None:
        return "not referenced"
    step, intermediate, _ = str(summary["step"]).partition(SAVED)
    return f"an intermediate model of {step}" if intermediate else f"not one of the last {keep_last} of {step}"


def _reasons_against(store: Store, known: Mapping[str, Summary], runs: Set[str], chosen: Set[str]) -> Iterator[str]:
    """Yield a line for everything that speaks against removing these runs and the artifacts `chosen` (ids)."""
    for run, rids in runs_in_progress(store).items():
        if run in runs:
            yield f"run {run} began less than a day ago and has no recorded end"
        for rid in chosen & {*rids} if run not in runs else ():
            yield f"{known[rid]['folder']}: run {run}, which is in progress, uses it"
    folders = {known[rid]["folder"] for rid in chosen}
    for group, how in ((PINS, "pinned as "), (IMPORTS, "import:")):
        for name, place in links(store, group).items():
            if place.name in folders:
                yield f"{place.name}: it is {how}{name}"
    own = {place.name for run in runs for place in links(store, run).values()}
    for rid, summary in known.items():
        if summary["kind"] != SHARED_KIND and rid not in chosen and summary["folder"] not in own:
            for source in chosen & {*references(summary)}:
                yield f"{known[source]['folder']}: {summary['folder']} was made from it"


def _left_overs(store: Store) -> Iterator[Garbage]:
    """Yield abandoned work, unfinished artifacts, and the trash of an interrupted gc."""
    work = store.outputs / "work"
    for path in [*_entries(work), *work.glob(".import-*")]:
        lock = store.lock("import" if path.name.startswith(".") else path.name)
        idle = time.time() - max(each.lstat().st_mtime for each in [path, *path.rglob("*")])
        if path.is_dir() and idle >= _LEFT_OVER_DAYS * DAY_SECONDS and not locks.is_held(lock):
            yield Garbage(path, "work", size_of(path), f"abandoned, unchanged for {idle / DAY_SECONDS:.0f} days")
    for path in _entries(store.outputs / "store"):
        if not (path / MANIFEST).exists():
            yield Garbage(path, "artifact", size_of(path), "unfinished: it has no manifest")
    for path in _entries(store.outputs / "trash"):
        yield Garbage(path, "trash", size_of(path), "left by an interrupted gc")


def _dangling(store: Store, staying: Mapping[str, str]) -> Iterator[Garbage]:
    """Yield refs that lead to none of the artifacts `staying` (ids)."""
    folders = {rid[:16] for rid in staying}
    for group in groups(store):
        for link in _entries(store.outputs / "refs" / group):
            if link.is_symlink() and link.readlink().name[-16:] not in folders:
                yield Garbage(link, "ref", 0, "its artifact is gone")


def _names_of(store: Store, runs: Set[str], folders: Set[str]) -> Iterator[Garbage]:
    """Yield the refs of other runs that lead to these artifacts, and `latest` if it is one of the runs."""
    refs = store.outputs / "refs"
    if (refs / LATEST).is_symlink() and (refs / LATEST).readlink().name in runs:
        yield Garbage(refs / LATEST, "ref", 0, "the latest run is removed")
    for group in groups(store):
        for name, place in links(store, group).items():
            if group not in runs and place.name in folders:
                yield Garbage(refs / group / name, "ref", 0, "its artifact is removed")


def _delete(store: Store, verb: str, find: Callable[[], Collection]) -> Collection:
    """Remove what `find` returns, while no step runs.

    Each item is renamed into trash/ and then deleted, so that a kill leaves no partial artifact.
    """

    def refuse(owner: object) -> None:
        running = ", ".join(sorted({run for run, _ in running_steps(store)})) or "another process"
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


def _entries(folder: Path) -> list[Path]:
    return [folder / name for name in list_folder(folder)]


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
