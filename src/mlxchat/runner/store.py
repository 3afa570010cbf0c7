"""The outputs folder: immutable artifacts, their names, and the one way in.

    store/<stage>-<label>-<rid16>/   an artifact; complete if and only if manifest.json is there
    work/<rid>/                      out/ (the artifact in the making), ckpt/, attempts.jsonl; survives crashes
    locks/<rid>.lock                 flock files; one-host.json, hosts.json: runner/mounts.py
    refs/<run>/<step>, refs/latest -> <run>   relative symlinks: names for people (runner/naming.py)
    runs/<timestamp-pid-name>/       plan.json, events.jsonl, config.yaml, report

No other file decides anything: a step is done if its manifest is there, running if its lock is held.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from mlxchat.errors import StoreError
from mlxchat.runner import attempts, locks
from mlxchat.runner.crash import crash_point
from mlxchat.runner.fingerprint import canonical_json, hash_file
from mlxchat.runner.mounts import check_links, claim
from mlxchat.runner.sealed import seal, settle, sync, unseal
from mlxchat.runner.secrets import redact
from mlxchat.runner.shape import find_misshapen
from mlxchat.visible import visible

Manifest = dict[str, Any]

MANIFEST = "manifest.json"
# Of manifests: from 2 on they have a digest.
SCHEMA = 2
_MOST_MANIFEST_BYTES = 64 << 20  # of ten thousand files it is a few MB
# The kind of artifacts that steps make together: text as token ids.
SHARED_KIND = "tokens"
# Records of the execution, not of the result: they hold times, so two equal artifacts differ in them.
OBSERVATIONS = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl")
# What only a continuation of a training reads. A person may do without it, and has the same artifact then.
CONTINUATION = ("training_state.safetensors", "training_state.json")
# Numbers that stages record of the execution, not of the result: manifests keep them apart from the metrics.
MEASURED = ("tokens_per_second", "data_wait_frac")
_SHORT = 16
_MOST_TOLD = 5  # values that a message names


class Store:
    """The artifacts under one outputs folder."""

    def __init__(self, outputs: Path) -> None:
        """Remember the folder; nothing is read or written yet."""
        self.outputs = outputs
        self._folders: dict[str, str] | None = None
        self._newest: list[str] | None = None
        self._read: dict[Path, tuple[tuple[int, int], Manifest]] = {}

    def prepare(self) -> None:
        """Make the folders.

        Raises:
            StoreError: the outputs folder cannot be written, its file system has no locks, hides them from another
                host that uses it, or has no links.
        """
        try:
            for name in ("store", "work", "locks", "refs", "runs"):
                (self.outputs / name).mkdir(parents=True, exist_ok=True)
            probe = self.outputs / "work" / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
            self.check()
            sweep(self.outputs)
        except OSError as error:
            raise StoreError(
                f"outputs folder {self.outputs} cannot be written ({error.strerror}). "
                "Choose another with outputs=PATH, or mend its permissions."
            ) from None

    def check(self) -> None:
        """Make sure that locks and names can be relied on here.

        Raises:
            StoreError: they cannot: see `locks.check_locks`, `mounts.claim`, `mounts.check_links`.
        """
        locks.check_locks(self.outputs / "locks")
        claim(self.outputs / "locks")
        check_links(self.outputs / "refs")

    def find(self, rid: str) -> Path | None:
        """Return the folder with the files of the complete artifact with this rid, or None.

        An alias has no files of its own: the folder is that of the artifact it stands for, as long as that one still
        has the contents that the alias was made for.

        Raises:
            StoreError: the manifest is damaged.
        """
        folder = self.own_folder(rid)
        if folder is None:
            return None
        manifest = self.manifest_of(folder)
        original = manifest.get("alias_of")
        if original is None:
            return folder
        place = self.own_folder(original)
        made = self.manifest_of(place) if place is not None else {}
        return place if made.get("tree") == manifest["tree"] and made.get("alias_of") is None else None

    def own_folder(self, rid: str) -> Path | None:
        """Return the folder that bears this rid, if it is complete: of an alias, the one without files."""
        if self._folders is None:
            try:
                with os.scandir(self.outputs / "store") as entries:
                    self._folders = {entry.name[-_SHORT:]: entry.name for entry in entries}
            except OSError:
                self._folders = {}
        name = self._folders.get(rid[:_SHORT])
        folder = self.outputs / "store" / name if name is not None else None
        return folder if folder is not None and (folder / MANIFEST).exists() else None

    def forget(self) -> None:
        """Look at the disk again at the next `find`: another process may have published."""
        self._folders = self._newest = None

    def read(self, rid: str) -> Manifest | None:
        """Return the manifest of the complete artifact with this rid (of an alias: its own), or None."""
        folder = self.own_folder(rid) if self.find(rid) is not None else None
        return self.manifest_of(folder) if folder is not None else None

    def manifest_of(self, folder: Path) -> Manifest:
        """Return the manifest of an artifact's folder, read once as long as the file is the same."""
        try:
            status = (folder / MANIFEST).stat()
        except OSError:
            return read_manifest(folder)
        seen, known = (status.st_mtime_ns, status.st_ino), self._read.get(folder)
        if known is None or known[0] != seen:
            known = self._read[folder] = (seen, read_manifest(folder))
        return known[1]

    def manifests(self) -> Iterator[Manifest]:
        """Yield the manifests of all complete artifacts."""
        for folder in self._list():
            if (folder / MANIFEST).exists():
                yield read_manifest(folder)

    def newest(self, stage: str) -> list[str]:
        """Return the folders' names of a stage's artifacts, the newest first; whether they are whole is not seen."""
        if self._newest is None:
            times = []
            with suppress(OSError), os.scandir(self.outputs / "store") as entries:
                for entry in entries:
                    with suppress(OSError):
                        times.append((entry.stat().st_mtime_ns, entry.name))
            self._newest = [name for _, name in sorted(times, reverse=True)]
        return [name for name in self._newest if name.startswith(f"{stage}-")]

    def work(self, rid: str) -> Path:
        """Return the folder of the resumable work of a step."""
        return self.outputs / "work" / rid

    def lock(self, rid: str) -> Path:
        """Return the step's lock file."""
        return self.outputs / "locks" / f"{rid}.lock"

    def publish(self, out: Path, name: str, manifest: Manifest) -> Path:
        """Make the folder `out` an artifact in one rename; return its new place.

        Everything is on disk before the rename. An artifact of the same name (a forced rebuild) is moved aside
        first and removed afterwards.

        Raises:
            StoreError: the manifest holds what its readers would refuse, such as a metric that is text.
        """
        if wrong := list(islice(find_misshapen(manifest), _MOST_TOLD)):
            raise StoreError(f"{name} cannot be published: in its manifest {visible('; '.join(wrong))}")
        crash_point("publish.described")
        write_manifest(out, manifest)
        crash_point("publish.written")
        settle(out)
        crash_point("publish.synced")
        place = self.outputs / "store" / name
        trash = self.outputs / "work" / f".trash-{uuid.uuid4().hex}"
        self.forget()
        former = self.own_folder(name[-_SHORT:]) or place  # it may bear another label
        if former.exists():
            former.rename(trash)
            crash_point("publish.aside")
        out.rename(place)
        crash_point("publish.renamed")
        sync(place.parent)
        shutil.rmtree(trash, ignore_errors=True)
        self.forget()
        crash_point("publish.done")
        return place

    def set_ref(self, group: str, step: str, artifact: Path) -> None:
        """Point refs/<group>/<step> at an artifact, atomically.

        Raises:
            StoreError: the step's name is a path, which could replace any folder.
        """
        if "/" in step or step in ("", ".", ".."):
            raise StoreError(f"a step cannot be called {step!r}: expected a name without slashes")
        link = self.outputs / "refs" / group / step
        self._swap_link(link, os.path.relpath(artifact, link.parent))

    def link_group(self, name: str, group: str) -> None:
        """Let refs/<name> lead to refs/<group>, atomically."""
        link = self.outputs / "refs" / name
        if not link.is_symlink() or os.readlink(link) != group:  # noqa: PTH115
            self._swap_link(link, group)

    def _swap_link(self, link: Path, target: str) -> None:
        temporary = self.outputs / "refs" / ".new"
        # One at a time, so that a temporary name can only be a dead process's.
        with locks.hold(self.outputs / "locks" / "refs.lock", {"step": "refs"}, lambda owner: None):
            link.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            crash_point("ref.made")
            if link.is_dir() and not link.is_symlink():
                link.rename(self.outputs / "work" / f".trash-{uuid.uuid4().hex}")  # removed by the next run
            temporary.replace(link)
            crash_point("ref.swapped")

    def refs(self, group: str = "") -> dict[str, Path]:
        """Return step → artifact folder of a group of refs, those that still lead somewhere; "": the latest run's."""
        from mlxchat.runner.naming import latest, links

        return {step: place.resolve() for step, place in links(self, group or latest(self)).items()}

    def resolve(self, name: str) -> Path:
        """Return the artifact that a person means: see runner/naming.py.

        Raises:
            StoreError: nothing or more than one thing has this name.
        """
        from mlxchat.runner.naming import resolve

        return resolve(self, name)

    def _list(self) -> list[Path]:
        folder = self.outputs / "store"
        return sorted(folder.iterdir()) if folder.is_dir() else []


def clean_label(label: str) -> str:
    """Return a label as it stands in folder names."""
    return "".join(char if char.isalnum() or char in "._" else "_" for char in redact(label))


def artifact_name(stage: str, label: str, rid: str) -> str:
    """Return the folder name of an artifact: what it is for people, then 80 bits of its id."""
    clean = clean_label(label)
    return f"{stage}-{clean}-{rid[:_SHORT]}" if clean else f"{stage}-{rid[:_SHORT]}"


def read_manifest(folder: Path) -> Manifest:
    """Return an artifact's manifest.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return load_manifest(folder)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{folder / MANIFEST} is damaged ({error}). Remove the folder; the next run makes it again."
        ) from None


def load_manifest(folder: Path) -> Manifest:
    """Return an artifact's manifest.

    Raises:
        OSError: it is not there.
        ValueError: it is damaged.
    """
    with (folder / MANIFEST).open("rb") as file:
        data = file.read(_MOST_MANIFEST_BYTES + 1)
    if len(data) > _MOST_MANIFEST_BYTES:
        raise ValueError(f"it is larger than {_MOST_MANIFEST_BYTES >> 20} MB")
    return parse_manifest(data)


def parse_manifest(data: bytes) -> Manifest:
    """Return a manifest from the bytes of its file.

    Raises:
        ValueError: they were cut or altered, or hold values of other types than manifests have.
    """
    try:
        manifest, sealed = unseal(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not sealed and manifest.get("schema", 1) != 1:
        raise ValueError("it lacks its digest")
    if wrong := list(islice(find_misshapen(manifest), _MOST_TOLD)):
        raise ValueError(visible("; ".join(wrong)))
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write an artifact's manifest, with its digest and without the environment's secrets."""
    (folder / MANIFEST).write_bytes(seal({**redact(manifest), "schema": SCHEMA}))


def sweep(outputs: Path) -> None:
    """Remove what killed processes left for nobody.

    These are artifacts that were replaced, names that were not given yet, work whose artifact is in the store, and
    tokens that were not all there. Work of a step that was not finished stays: it is what the step continues from.
    """
    store = Store(outputs)
    for folder in (outputs / "work").iterdir():
        if folder.name.startswith(".trash-"):
            shutil.rmtree(folder, ignore_errors=True)
        elif (made := store.own_folder(folder.name)) is not None:
            with suppress(BlockingIOError, StoreError), locks.hold(store.lock(folder.name), {"step": "sweep"}, _leave):
                # What is no part of its history is of a step that was begun anew by force.
                told = {attempt.get("started") for attempt in read_manifest(made).get("attempts", [])}
                if all(attempt.get("started") in told for attempt in attempts.read(folder)[-1:]):
                    shutil.rmtree(folder, ignore_errors=True)
        elif any(attempt.get("step") == SHARED_KIND for attempt in attempts.read(folder)[-1:]):
            with suppress(BlockingIOError, StoreError), locks.hold(store.lock(folder.name), {"step": "sweep"}, _leave):
                shutil.rmtree(folder, ignore_errors=True)
    for path in (outputs / "index").glob(".*"):
        path.unlink(missing_ok=True)


def _leave(owner: Manifest) -> None:
    """Do not wait for whoever holds a lock."""
    raise BlockingIOError


def describe_outputs(out: Path) -> tuple[list[dict[str, Any]], str]:
    """Return each file's path, bytes and sha256, and the digest of the whole without observations and continuation."""
    files = [
        {"path": str(path.relative_to(out)), "bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    ]
    content = [[file["path"], file["sha256"]] for file in files if file["path"] not in OBSERVATIONS + CONTINUATION]
    return files, hashlib.sha256(canonical_json(content).encode()).hexdigest()
