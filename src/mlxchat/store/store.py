"""The outputs folder: immutable artifacts, those that steps share, records of executions, and names.

    store/<stage>-<label>-<rid16>/   an artifact; complete if and only if manifest.json exists
    records/<stage>-<key>-<time>-<rid16>.json   one per execution: the manifest of its result
    work/<key>/                      out/ (the unfinished artifact), ckpt/, attempts.jsonl; survives crashes
    locks/<key>.lock                 flock files
    refs/<run>/<step>, refs/latest -> <run>   relative symlinks: readable names (store/naming.py);
                                     <step>@<iteration>: intermediate models of a training
    runs/<timestamp-pid-name>/       plan.json, events.jsonl, config.yaml, report

A key identifies what a step computes, an id (rid) also the result, so an artifact is never replaced by another one. A
step is done if a record of its key leads to an artifact, and running if its lock is held; no other file matters.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mlxchat.errors import StoreError, redact
from mlxchat.store import locks
from mlxchat.store.files import crash_point, list_folder, now, remove, settle, sync
from mlxchat.store.fingerprint import compute_key
from mlxchat.store.manifest import (
    MANIFEST,
    SCHEMA,
    SHARED_KIND,
    Manifest,
    check_metrics,
    describe,
    describe_outputs,
    find_damage,
    identify,
    read_manifest,
    read_record,
    write_manifest,
)

# Executions of a stage that planning compares with a step; more would be slow.
MOST_RECENT = 200
SAVED = "@"
"""Between step and iteration in the name of an intermediate model: pretrain@500."""
_SHORT = 16
_TRASH = ".trash-"


class Store:
    """The artifacts under one outputs folder."""

    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs
        self.jobs = outputs / "jobs"  # records of jobs in queues and on clusters
        self._folders: dict[str, str] | None = None
        self._records: list[str] | None = None
        self._read: dict[Path, Manifest] = {}

    def prepare(self) -> None:
        """Create the folders, and remove leftovers of killed processes."""
        try:
            for name in ("store", "records", "work", "locks", "refs", "runs"):
                (self.outputs / name).mkdir(parents=True, exist_ok=True)
            with locks.hold(self.outputs / "locks" / "sweep.lock", {"step": "sweep"}):
                sweep(self)
            self.forget()
        except OSError as error:
            text = f"outputs folder {self.outputs} cannot be written ({error.strerror})"
            raise StoreError(f"{text}. Choose another with outputs=PATH, or fix its permissions.") from None

    def find(self, rid: str) -> Path | None:
        """Return the folder of the complete artifact with this id, or None."""
        if self._folders is None:
            try:
                with os.scandir(self.outputs / "store") as entries:
                    self._folders = {entry.name[-_SHORT:]: entry.name for entry in entries}
            except OSError:
                self._folders = {}
        folder = self.outputs / "store" / self._folders.get(rid[:_SHORT], "")
        return folder if (folder / MANIFEST).exists() else None

    def forget(self) -> None:
        """Drop what is cached, so that the next `find` sees what other processes published."""
        self._folders = self._records = None
        self._read = {}

    def made(self, key: str, rid: str = "") -> Manifest | None:
        """Return the record of the newest execution of a key whose artifact exists (`rid`: only this one), or None.

        Its `rid` and `name` are those of the artifact, its settings and times those of the execution.
        """
        for name in reversed(self._names_of_records()):
            made = rid_of_record(name)
            if f"-{key}-" in name and made.startswith(rid[:_SHORT]) and (place := self.find(made)) is not None:
                self.manifest_of(place)  # raises if it is damaged
                return {**self._read_once(self.outputs / "records" / name), "name": place.name}
        return None

    def find_made(self, key: str) -> Path | None:
        """Return the artifact that the newest execution of a key gave, or None."""
        made = self.made(key)
        return self.find(made["rid"]) if made is not None else None

    def record(self, manifest: Manifest) -> None:
        """Record an execution: from now on its key leads to the artifact, if that exists."""
        moment = time.time_ns()  # this machine's clock, because an imported manifest may be from the future
        # The mark keeps intermediate models out of `recent`, so that plans do not compare steps with them.
        stage = manifest["stage"] + (SAVED if SAVED in str(manifest.get("step")) else "")
        name = f"{stage}-{manifest['key']}-{moment}-{manifest['rid'][:_SHORT]}.json"
        draft = self.work(manifest["key"]) / f"record-{os.getpid()}.json"
        draft.parent.mkdir(exist_ok=True)
        draft.write_bytes(describe(manifest))
        sync(draft)
        draft.replace(self.outputs / "records" / name)
        sync(self.outputs / "records")

    def learn(self, manifest: Manifest) -> None:
        """Record an imported execution, unless its key has a result here, which takes precedence."""
        if self.made(manifest["key"]) is None:
            self.record(manifest)
            with suppress(OSError):
                self.work(manifest["key"]).rmdir()  # fails if the step has work there

    def manifest_of(self, folder: Path) -> Manifest:
        """Return the manifest of an artifact's folder, cached until `forget`."""
        return self._read_once(folder / MANIFEST)

    def _read_once(self, path: Path) -> Manifest:
        if path not in self._read:
            self._read[path] = read_record(path)
        return self._read[path]

    def manifests(self) -> Iterator[Manifest]:
        """Yield the manifests of all complete artifacts."""
        for name in list_folder(self.outputs / "store"):
            if (folder := self.outputs / "store" / name).joinpath(MANIFEST).exists():
                yield read_manifest(folder)

    def recent(self, stage: str) -> Iterator[Manifest]:
        """Yield the records of the newest executions of a stage whose artifacts exist, at most MOST_RECENT.

        Damaged ones are skipped; `made` raises for them.
        """
        names = (name for name in reversed(self._names_of_records()) if name.rsplit("-", 3)[0] == stage)
        for name in islice(names, MOST_RECENT):
            if (place := self.find(rid_of_record(name))) is not None:
                with suppress(StoreError):
                    yield {**self._read_once(self.outputs / "records" / name), "name": place.name}

    def _names_of_records(self) -> list[str]:
        """Return the names of all records in order of time."""
        if self._records is None:
            self._records = sorted(list_folder(self.outputs / "records"), key=lambda name: name.split("-")[-2:])
        return self._records

    def work(self, key: str) -> Path:
        """Return the folder of a step's resumable work."""
        return self.outputs / "work" / key

    def lacking(self, what: str) -> str:
        """Return the message that the folder holds no `what`, such as "model"."""
        return f"{self.outputs.resolve()} holds no {what} yet: `mlxchat` makes some; outputs=PATH reads another folder"

    def lock(self, key: str) -> Path:
        """Return the step's lock file."""
        return self.outputs / "locks" / f"{key}.lock"

    def publish(self, out: Path, label: str, manifest: Manifest) -> Path:
        """Publish the folder `out` as an artifact by one atomic rename, record the execution, and return the folder.

        Everything is on disk before the rename. If an artifact with this id exists, it is kept; if files of it are
        missing or altered, it is replaced.

        Args:
            out: the step's outputs.
            label: readable part of the artifact's name.
            manifest: of the execution; `outputs`, `tree`, `rid` and `name` are added.
        """
        outputs, tree = describe_outputs(out)
        rid = identify({**manifest, "outputs": outputs})
        self.forget()
        here = self.find(rid)
        name = f"{artifact_title(manifest['stage'], label)}-{rid[:_SHORT]}"
        name = name if here is None else here.name  # maybe with another label
        manifest = {"rid": rid, "name": name, **manifest, "outputs": outputs, "tree": tree}
        crash_point("publish.described")
        try:
            if wrong := list(check_metrics({"metrics": {}, **manifest})):
                raise ValueError("; ".join(wrong))
            write_manifest(out, manifest)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{name} cannot be published: {error}") from None
        crash_point("publish.written")
        settle(out)
        crash_point("publish.synced")
        with locks.hold(self.outputs / "locks" / "publish.lock", {"step": "publish"}):
            self.forget()
            here = self.find(rid)
            is_new = here is None or not _is_whole(here)
            place = here or self.outputs / "store" / name
            described = outputs if is_new else read_manifest(place)["outputs"]
            self.record({**manifest, "name": place.name, "outputs": described})  # first, or a kill would recompute it
            crash_point("publish.recorded")
            if is_new:
                damaged = self.to_trash(place) if place.exists() else None
                out.rename(place)
                crash_point("publish.renamed")
                sync(place.parent)
                if damaged is not None:
                    remove(damaged)
        self.forget()
        crash_point("publish.done")
        return place

    def to_trash(self, path: Path) -> Path:
        """Rename a file or folder so that `sweep` removes it if the caller does not; return its new path."""
        trash = self.outputs / "work" / f"{_TRASH}{uuid.uuid4().hex}"
        trash.parent.mkdir(exist_ok=True)
        return path.rename(trash)

    def set_ref(self, group: str, step: str, artifact: Path) -> None:
        """Point refs/<group>/<step> at an artifact, atomically."""
        if "/" in step or step in ("", ".", ".."):
            raise StoreError(f"a step cannot be called {step!r}: expected a name without slashes")
        link = self.outputs / "refs" / group / step
        self._swap_link(link, os.path.relpath(artifact, link.parent))

    def link_group(self, name: str, group: str) -> None:
        """Point refs/<name> at refs/<group>, atomically."""
        link = self.outputs / "refs" / name
        if not link.is_symlink() or str(link.readlink()) != group:
            self._swap_link(link, group)

    def _swap_link(self, link: Path, target: str) -> None:
        temporary = self.outputs / "refs" / ".new"
        # One at a time, so that an existing temporary name was left by a killed process.
        with locks.hold(self.outputs / "locks" / "refs.lock", {"step": "refs"}):
            link.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            crash_point("ref.made")
            temporary.replace(link)
            crash_point("ref.swapped")


def clean_label(label: str) -> str:
    """Return a label with only characters that folder names may have."""
    return "".join(char if char.isalnum() or char in "._" else "_" for char in redact(label))


def artifact_title(stage: str, label: str) -> str:
    """Return the name of an artifact without its id."""
    return f"{stage}-{clean_label(label)}" if label else stage


def rid_of_record(name: str) -> str:
    """Return the first 16 characters of the id in a record's file name."""
    return name.removesuffix(".json")[-_SHORT:]


def _is_whole(folder: Path) -> bool:
    """Return whether all files of an artifact match its manifest."""
    try:
        return not any(find_damage(folder, read_manifest(folder), again=False))
    except StoreError:
        return False


def sweep(store: Store) -> None:
    """Remove what killed processes left and nothing resumes from.

    That is what was being removed, work whose artifact is in the store, and unfinished encoded text.
    """
    for folder in (store.outputs / "work").iterdir():
        if folder.name.startswith(_TRASH):
            shutil.rmtree(folder, ignore_errors=True)
        elif _is_finished(store, folder):
            with suppress(StoreError), locks.hold(store.lock(folder.name), {"step": "sweep"}, _give_up):
                if _is_finished(store, folder):
                    shutil.rmtree(folder, ignore_errors=True)


def _is_finished(store: Store, work: Path) -> bool:
    """Return whether nothing resumes from a step's work: its artifact exists, or it is encoded text."""
    last = locks.read_attempts(work)[-1:]
    try:
        made = store.made(work.name)
    except StoreError:
        return False  # the record is damaged
    if made is None:
        return any(attempt.get("step") == SHARED_KIND for attempt in last)
    # An attempt that is not in the record belongs to a forced execution.
    recorded = {attempt.get("started") for attempt in made.get("attempts", [])}
    return all(attempt.get("started") in recorded for attempt in last)


def _give_up(owner: dict[str, Any]) -> None:
    raise StoreError("another process holds the lock")


@dataclass(frozen=True, kw_only=True)
class SharedArtifacts:
    """A stage's access to shared artifacts. Thread-safe."""

    outputs: Path
    run: str  # its name, for the manifest and for waiting processes
    inputs: dict[str, Manifest]  # role → record of the step's input: lineage, not identity
    facts: Callable[[], dict[str, Any]]  # returns code, versions and machine for the manifest
    say: Callable[[str], None]  # prints a line

    def obtain(
        self,
        *,
        version: int,
        label: str,
        identity: dict[str, Any],
        make: Callable[[Path], dict[str, float]],
        check: Callable[[], None] = lambda: None,
    ) -> Path:
        """Return the folder of the artifact with this identity; one process creates it, the others wait for it.

        Args:
            version: of the format.
            label: readable part of the folder's name.
            identity: the contents that determine it, as plain data.
            make: fills the folder it is given and returns metrics.
            check: called while waiting for another process; it may raise to stop waiting.
        """
        key = compute_key(SHARED_KIND, version, identity, {}, {})
        store = Store(self.outputs)  # a new one, because stores cache their listing
        if (place := store.find_made(key)) is not None:
            return place

        def tell_waiting(owner: dict[str, Any]) -> None:
            check()
            self.say(f"{SHARED_KIND:<10} waiting: {locks.name_process(owner)} is encoding {label}")

        with locks.hold(store.lock(key), {"run": self.run, "step": SHARED_KIND}, tell_waiting, check):
            crash_point("shared.locked")
            store.forget()
            if (place := store.find_made(key)) is not None:
                return place
            work = store.work(key)
            shutil.rmtree(work / "out", ignore_errors=True)
            (work / "out").mkdir(parents=True)
            try:
                attempt = locks.start_attempt(work, self.run, SHARED_KIND)
                began = time.monotonic()
                metrics = make(work / "out")
                crash_point("shared.made")
                seconds = time.monotonic() - began
                locks.finish_attempt(work, attempt, "done", None, None)
                manifest = {
                    "schema": SCHEMA, "key": key, "version": version, "stage": SHARED_KIND,
                    "step": SHARED_KIND, "kind": SHARED_KIND, "config": identity, "excluded": {}, "overrides": [],
                    "inputs": self.inputs, "pins": {}, "externals": [],
                    "tokens_per_second": metrics.pop("tokens_per_second", None), "metrics": metrics, "derived": {},
                    "seed": None, "attempts": locks.read_attempts(work), "seconds": round(seconds, 3),
                    "peak_memory_bytes": None, "peak_array_bytes": None,
                    "code": {}, **self.facts(), "run": self.run, "published": now(),
                }  # fmt: skip
                place = store.publish(work / "out", label, manifest)
                crash_point("shared.published")
                return place
            except OSError as error:
                text = f"{label} could not be encoded ({error.strerror or error}: {error.filename or work})"
                raise StoreError(f"{text}. Fix that and run the same command again.") from error
            finally:
                shutil.rmtree(work, ignore_errors=True)
