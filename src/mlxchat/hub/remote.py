"""Artifacts in places that fsspec opens: s3://bucket/path, gs://, hf://, memory:// and whatever else is installed.

A place has `store/<artifact>/…` as an exported folder has. An artifact is there if and only if its manifest is, which
is written last, and after all it was made from: a transfer that ends anywhere leaves whole artifacts, or parts that
nobody takes for one. The same command goes on with them, and hashes what it finds before it counts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxchat.config.secrets import redact
from mlxchat.errors import ConfigError, MlxchatError, PassingError, StoreError
from mlxchat.hub.cache import check_space, checksum_of
from mlxchat.hub.progress import TransferProgress
from mlxchat.store import locks
from mlxchat.store.catalog import references
from mlxchat.store.crash import crash_point
from mlxchat.store.files import sync
from mlxchat.store.manifest import (
    MANIFEST,
    Manifest,
    check_manifest,
    find_damage,
    is_plain,
    parse_manifest,
    read_manifest,
)
from mlxchat.store.store import Store
from mlxchat.store.transfer import take_in, tell_waiting

_PIECE_BYTES = 1 << 22
_MANIFEST_BYTES = 1 << 26
# Scheme → what brings it and what it asks of the environment.
_NEEDS = {
    "s3": ("s3fs", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or AWS_ENDPOINT_URL of another server"),
    "s3a": ("s3fs", "as s3://"),
    "gs": ("gcsfs", "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login"),
    "gcs": ("gcsfs", "as gs://"),
    "az": ("adlfs", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
    "abfs": ("adlfs", "as az://"),
    "sftp": ("paramiko", "a key that ssh uses without asking"),
    "ssh": ("paramiko", "as sftp://"),
    "hf": ("huggingface_hub", "HF_TOKEN"),
}


@dataclass(frozen=True)
class Place:
    """Where artifacts lie, and how it is reached."""

    url: str
    files: Any
    """The file system of fsspec's."""
    root: str
    folder: str = "store"
    """Of its artifacts; "": they lie in the root itself, as in a copy of a store."""

    def path(self, *parts: str) -> str:
        """Return the path of something in its store."""
        return "/".join((self.root.rstrip("/"), *filter(None, (self.folder, *parts))))

    def manifest(self, name: str) -> Manifest | None:
        """Return the manifest of an artifact, or None if there is none or one that was cut.

        Raises:
            StoreError: there is one that was altered.
        """
        try:
            if self.files.info(self.path(name, MANIFEST))["size"] > _MANIFEST_BYTES:
                raise StoreError(f"{self.url}: the manifest of {name} is too large for one")
            data = self.files.cat_file(self.path(name, MANIFEST))
        except FileNotFoundError:
            return None
        try:
            manifest = parse_manifest(data)
            faults = [*check_manifest(name, manifest)]
        except ValueError as error:
            faults = [str(error)]
        if faults:
            raise StoreError(f"{self.url}: the manifest of {name} is damaged ({'; '.join(faults)})")
        return manifest

    def names(self) -> list[str]:
        """Return the folders that are there, whether they are whole or not."""
        self.files.invalidate_cache()
        try:
            found = self.files.ls(self.path(), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory")


def open_place(url: str) -> Place:
    """Return the place of a URL; nothing of it is looked at yet.

    Raises:
        ConfigError: no file system of fsspec's has this scheme, or its package is not installed.
    """
    scheme = url.partition("://")[0]
    if not url.partition("://")[2].strip("/"):
        raise ConfigError(f"{url} names no folder: expected for instance {scheme}://BUCKET/PATH")
    from fsspec.core import url_to_fs
    from fsspec.registry import available_protocols

    if scheme not in available_protocols():
        raise ConfigError(f"{url}: fsspec knows no {scheme}://. Those for transfers: {', '.join(_NEEDS)}, file, memory")
    with told(url):
        options = {"endpoint": os.environ.get("HF_ENDPOINT") or None} if scheme == "hf" else {}
        files, root = url_to_fs(url, skip_instance_cache=True, **options)
        return Place(redact(url), files, str(root))


@contextmanager
def told(url: str) -> Iterator[None]:
    """Turn what file systems raise into one message each: package, credentials, no such place, or something passing."""
    scheme = url.partition("://")[0]
    package, variables = _NEEDS.get(scheme, (scheme, "its documentation"))
    try:
        yield
    except MlxchatError:
        raise
    except ImportError as error:
        hint = "'mlxchat[s3]'" if package == "s3fs" else package
        raise ConfigError(f"{scheme}:// needs a package that is not installed ({error.name or package}): "
                          f"pip install {hint}") from None  # fmt: skip
    except FileNotFoundError as error:
        raise ConfigError(f"{redact(url)}: there is no such place ({short_of(error)})") from None
    except Exception as error:  # each file system has its own
        kinds = {kind.__name__ for each in _causes(error) for kind in type(each).__mro__}
        text = short_of(error)
        if isinstance(error, PermissionError) or any("Credential" in kind or "Auth" in kind for kind in kinds):
            raise ConfigError(f"{redact(url)} refuses access ({text}). Credentials are read from {variables}") from None
        if isinstance(error, ValueError):
            raise ConfigError(f"{redact(url)} cannot be opened: {text}") from None
        raise PassingError(f"{redact(url)}: {text}. The same command goes on from what is there") from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__


def short_of(error: BaseException) -> str:
    """Return an error in one line, without secrets."""
    return redact(" ".join(str(error).split())[:300]) or type(error).__name__


def export_to(place: Place, folders: Sequence[Path]) -> int:
    """Copy artifacts to a place, inputs first; return how many were not there yet.

    Args:
        place: where to.
        folders: the closure of what is to be exported, as `transfer.closure` orders it.

    Raises:
        StoreError: an artifact here is not what was published.
        ConfigError: the place cannot be written by us.
        PassingError: it does not answer as it should; what was sent is found again.
    """
    with told(place.url):
        missing = [folder for folder in folders if not _is_there(place, folder.name)]
        for folder in missing:
            if damage := list(find_damage(folder, read_manifest(folder))):
                raise StoreError(f"{folder.name} is not what was published: {damage[0]}. Nothing of it was sent")
        total = sum(path.stat().st_size for folder in missing for path in _files(folder))
        with TransferProgress(place.url, total, verb="send") as progress:
            for folder in missing:
                _send(place, folder, progress)
    return len(missing)


def _is_there(place: Place, name: str) -> bool:
    try:
        return place.manifest(name) is not None
    except StoreError:  # it is written anew, after its files were hashed
        return False


def _files(folder: Path) -> list[Path]:
    """Return an artifact's files, the manifest last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return [*files, folder / MANIFEST]


def _send(place: Place, folder: Path, progress: TransferProgress) -> None:
    """Copy one artifact; what an earlier try left is kept if it has the same contents."""
    from fsspec.callbacks import Callback

    class Counted(Callback):  # type: ignore[misc]
        """Hands on how many bytes have left."""

        def relative_update(self, inc: int = 1) -> None:
            progress.add(inc)
            super().relative_update(inc)

    base = place.path(folder.name)
    place.files.invalidate_cache()
    sizes = {str(path): entry["size"] for path, entry in place.files.find(base, detail=True).items()}
    for path in _files(folder):
        target, size = place.path(folder.name, path.relative_to(folder).as_posix()), path.stat().st_size
        known = sizes.pop(target, sizes.pop(target.lstrip("/"), None))
        if path.name == MANIFEST and path.parent == folder:
            crash_point("send.described")
            for stray in sizes:  # of another build that was never finished
                place.files.rm_file(stray)
        elif known == size and _digest(place, target) == checksum_of(path):
            progress.add(size)
            continue
        place.files.makedirs(target.rpartition("/")[0], exist_ok=True)
        counted, before = Counted(), progress.done
        place.files.put_file(str(path), target, callback=counted)
        progress.add(size - (progress.done - before))  # those that count otherwise, or not at all
        if (arrived := place.files.info(target)["size"]) != size:
            raise PassingError(f"{place.url}: {target} has {arrived} bytes after {size} were sent; try again")
        crash_point("send.file")


def _digest(place: Place, path: str) -> str:
    digest = hashlib.sha256()
    with place.files.open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def import_from(store: Store, place: Place, wanted: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Take in artifacts of a place with all they were made from; return the new ones, and those that were here already.

    Args:
        store: where to.
        place: where from.
        wanted: names of artifacts there, the start of one or of an id; none: everything.

    Raises:
        StoreError: what is there is not what its manifest says, or lacks what it was made from; or there is no room.
            Nothing that is faulty reaches the store.
        ConfigError: the place cannot be read by us, or has nothing of a name.
        PassingError: it does not answer as it should; what arrived is found again.
    """
    store.prepare()
    base = store.outputs / "work" / f".import-{hashlib.sha256(place.url.encode()).hexdigest()[:16]}"
    with locks.hold(store.outputs / "locks" / "import.lock", {"step": "import"}, tell_waiting):
        with told(place.url):
            bare = replace(place, folder="")
            if not place.names() and any(bare.files.exists(bare.path(name, MANIFEST)) for name in bare.names()):
                place = bare
            chosen = _choose(store, place, wanted)
            known = [here for manifest in chosen.values() if (here := store.find(manifest["rid"])) is not None]
            missing = {name: each for name, each in chosen.items() if store.find(each["rid"]) is None}
            for name in chosen.keys() - missing.keys():
                store.learn(chosen[name])
            if not missing:
                return [], known
            _fetch(place, missing, base)
        try:
            new, raced = take_in(store, base / "store")
        except OSError as error:
            raise StoreError(f"{place.url} cannot be imported ({error.strerror or error})") from error
        except StoreError:
            shutil.rmtree(base, ignore_errors=True)  # what is wrong there is wrong here
            raise
        shutil.rmtree(base, ignore_errors=True)
        return new, [*known, *raced]


def _choose(store: Store, place: Place, wanted: Sequence[str]) -> dict[str, Manifest]:
    """Return name → manifest of what is wanted and of everything that it was made from."""
    names = place.names()
    by_rid = {name[-16:]: name for name in names}
    if not names:
        raise ConfigError(f"{place.url} holds no artifacts: expected {place.path('ARTIFACT', MANIFEST)}")
    queue: list[str] = []
    for word in wanted:
        found = [word] if word in names else [n for n in names if n.startswith(word) or n[-16:].startswith(word[:16])]
        if len(found) != 1:
            which = ", ".join(found[:8]) if found else f"it holds {', '.join(names[:8])}{' …' * (len(names) > 8)}"
            raise ConfigError(f'"{word}" is {len(found) or "no"} artifacts of {place.url}: {which}')
        queue += found
    chosen: dict[str, Manifest] = {}
    asked = set(queue)
    queue = queue or names
    while queue:
        name = queue.pop()
        if name in chosen:
            continue
        manifest = place.manifest(name) if is_plain(name) else None
        if manifest is None:
            if name in asked:
                raise ConfigError(f"{name} is not whole at {place.url}: its export has not ended")
            continue  # in the making, or no artifact
        chosen[name] = manifest
        rids = references(manifest)
        queue += [by_rid[rid[:16]] for rid in rids if rid[:16] in by_rid and store.find(rid) is None]
    if not chosen:
        raise ConfigError(f"{place.url} holds no whole artifact: its export has not ended")
    return chosen


def _fetch(place: Place, manifests: dict[str, Manifest], base: Path) -> None:
    """Bring artifacts to base/store/, each file hashed; what is whole there already is kept."""
    total = sum(file["bytes"] for manifest in manifests.values() for file in manifest["outputs"])
    base.mkdir(parents=True, exist_ok=True)
    here = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
    check_space(base, max(0, total - here), f"The import from {place.url}")
    with TransferProgress(place.url, total) as progress:
        for name, manifest in manifests.items():
            for file in manifest["outputs"]:
                _fetch_file(place, name, file, base / "store" / name / file["path"], progress)
            target = base / "store" / name / MANIFEST
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(place.files.cat_file(place.path(name, MANIFEST)))
            sync(target)
            crash_point("fetch.artifact")
    for folder in (base / "store").iterdir():  # of another choice
        if folder.name not in manifests:
            shutil.rmtree(folder)


def _fetch_file(place: Place, name: str, file: dict[str, Any], target: Path, progress: TransferProgress) -> None:
    """Bring one file, from where an earlier try was cut.

    Raises:
        StoreError: it is not what the manifest says.
    """
    if target.exists() and checksum_of(target) == file["sha256"]:
        progress.add(file["bytes"])
        return
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    resumed = True
    while resumed:  # whether the part had other contents shows only at the end: then once more from the beginning
        done = part.stat().st_size if part.exists() else 0
        resumed = done > 0
        progress.add(done)
        with place.files.open(place.path(name, file["path"]), "rb") as source, part.open("ab") as out:
            source.seek(done)
            while done <= file["bytes"] and (piece := source.read(_PIECE_BYTES)):
                out.write(piece)
                done += len(piece)
                progress.add(len(piece))
                crash_point("fetch.piece")
        if done == file["bytes"] and checksum_of(part) == file["sha256"]:
            sync(part)
            part.rename(target)
            return
        progress.add(-done)
        part.unlink()
    raise StoreError(f"{place.url}: {file['path']} of {name} is not what its manifest says. Nothing was imported")
