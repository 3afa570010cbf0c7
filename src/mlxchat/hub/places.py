"""Remote stores of artifacts and models: fsspec URLs (s3://, gs://, hf://, memory://) and the Hub.

A place has the layout of an exported folder, `store/<artifact>/…`. An artifact is complete if and only if its manifest
exists; it is written last, and inputs come before what was made from them. So an interrupted transfer leaves no broken
artifact, and the same command continues with the artifacts that are missing. A repository of the Hub is written in one
commit.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxchat.config.secrets import redact
from mlxchat.config.wording import format_bytes
from mlxchat.errors import ConfigError, MlxchatError, PassingError, StoreError
from mlxchat.hub.cache import check_space, checksum_of
from mlxchat.hub.downloads import TransferProgress, endpoint, prepare_client
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
from mlxchat.store.transfer import take_in

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# The commit deletes older weights of these names, because loaders would read them as part of the model.
_FORMER = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "model_*.pt",
    "meta_*.json",
    "adapters.safetensors",
    "adapter_config.json",
)


@dataclass(frozen=True)
class Place:
    """A remote store and its file system."""

    url: str
    files: Any
    """An fsspec file system."""
    root: str
    folder: str = "store"
    """Folder of the artifacts; "": the root itself, as in a copy of a store."""

    def path(self, *parts: str) -> str:
        """Return a path in the store."""
        return "/".join((self.root.rstrip("/"), *filter(None, (self.folder, *parts))))

    def manifest(self, name: str) -> Manifest | None:
        """Return the manifest of an artifact, or None if there is none; StoreError if it is damaged."""
        try:
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
        """Return the names of all artifact folders, complete or not."""
        self.files.invalidate_cache()
        try:
            found = self.files.ls(self.path(), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory")


def open_place(url: str) -> Place:
    """Return the place of a URL, or of the path of a folder, without accessing it.

    Raises:
        ConfigError: fsspec does not support the scheme, or its package is not installed.
    """
    if "://" not in url:
        url = f"file://{Path(url).resolve()}"
    scheme = url.partition("://")[0]
    if not url.partition("://")[2].strip("/"):
        raise ConfigError(f"{url} names no folder: expected, for instance, {scheme}://BUCKET/PATH")
    from fsspec.core import url_to_fs

    with _place_errors(url):
        options = {"endpoint": endpoint()} if scheme == "hf" else {}
        files, root = url_to_fs(url, skip_instance_cache=True, **options)
        return Place(redact(url), files, str(root))


@contextmanager
def _place_errors(url: str) -> Iterator[None]:
    """Turn exceptions of file systems into one-line errors: package, credentials, missing place or transient fault."""
    try:
        yield
    except MlxchatError:
        raise
    except ImportError as error:
        hint = "'mlxchat[s3]'" if "s3fs" in str(error) else error.name or "its package"
        raise ConfigError(f"{redact(url)}: {_short_of(error)} (pip install {hint})") from None
    except FileNotFoundError as error:
        raise ConfigError(f"{redact(url)} does not exist ({_short_of(error)})") from None
    except ValueError as error:
        raise ConfigError(f"{redact(url)} cannot be opened: {_short_of(error)}") from None
    except PermissionError as error:
        raise ConfigError(f"{redact(url)} refuses access ({_short_of(error)}). Check the credentials") from None
    except Exception as error:  # each file system has its own types
        if "credential" in f"{type(error).__name__} {error}".lower():
            raise ConfigError(f"{redact(url)} refuses access ({_short_of(error)}). Check the credentials") from None
        raise PassingError(f"{redact(url)}: {_short_of(error)}. The same command resumes the transfer") from None


def _short_of(error: BaseException) -> str:
    """Return an error's message in one line, without secrets."""
    return redact(" ".join(str(error).split())[:300]) or type(error).__name__


def export_to(place: Place, folders: Sequence[Path]) -> int:
    """Copy artifacts to a place, inputs first; return the number of copied ones.

    Raises:
        StoreError: a local artifact is damaged.
        ConfigError: the place does not exist or refuses access.
        PassingError: a transient fault; the next call resumes.
    """
    with _place_errors(place.url):
        missing = [folder for folder in folders if not _is_there(place, folder.name)]
        _check_whole(missing)
        total = sum(path.stat().st_size for folder in missing for path in _files(folder))
        with TransferProgress(place.url, total, verb="send") as progress:
            for folder in missing:
                _send(place, folder, progress)
    return len(missing)


def _check_whole(folders: Sequence[Path]) -> None:
    for folder in folders:
        if damage := list(find_damage(folder, read_manifest(folder))):
            raise StoreError(f"{folder.name} is damaged: {damage[0]}. Nothing of it was sent")


def _is_there(place: Place, name: str) -> bool:
    try:
        return place.manifest(name) is not None
    except StoreError:  # damaged: `_send` rewrites it
        return False


def _files(folder: Path) -> list[Path]:
    """Return an artifact's files, the manifest last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return [*files, folder / MANIFEST]


def _send(place: Place, folder: Path, progress: TransferProgress) -> None:
    """Copy one artifact, the manifest last, after removing what an interrupted transfer left of it."""
    place.files.invalidate_cache()
    if place.files.exists(place.path(folder.name)):
        place.files.rm(place.path(folder.name), recursive=True)
    for path in _files(folder):
        target = place.path(folder.name, path.relative_to(folder).as_posix())
        size = path.stat().st_size
        if path == folder / MANIFEST:
            crash_point("send.described")
        place.files.makedirs(target.rpartition("/")[0], exist_ok=True)
        with _counted(progress, size) as callback:
            place.files.put_file(str(path), target, callback=callback)
        if (arrived := place.files.info(target)["size"]) != size:
            raise PassingError(f"{place.url}: {target} has {arrived} bytes after {size} were sent; try again")
        crash_point("send.file")


@contextmanager
def _counted(progress: TransferProgress, size: int) -> Iterator[Any]:
    """Yield fsspec's callback of the transfer of one file; at the end the progress has grown by `size`."""
    from fsspec.callbacks import Callback

    class Counted(Callback):  # type: ignore[misc]  # fsspec has no types
        """Adds bytes to the progress."""

        def relative_update(self, inc: int = 1) -> None:
            progress.add(inc)

    before = progress.done
    yield Counted()
    progress.add(size - (progress.done - before))  # some file systems count differently, or not at all


def import_from(store: Store, place: Place, wanted: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Import artifacts and their inputs from a place; return the new ones, and those that were in the store already.

    Args:
        store: the target.
        place: the source.
        wanted: names of artifacts, or prefixes of names or ids; empty: everything.

    Raises:
        StoreError: contents differ from a manifest, an input is missing, or the disk is full.
            Nothing faulty reaches the store.
        ConfigError: the place does not exist or refuses access, or a name matches nothing.
        PassingError: a transient fault; the next call resumes.
    """
    store.prepare()
    base = store.outputs / "work" / f".import-{hashlib.sha256(place.url.encode()).hexdigest()[:16]}"

    def tell_waiting(owner: dict[str, Any]) -> None:
        print(f"waiting for {owner.get('step')} of {locks.name_process(owner)}", file=sys.stderr, flush=True)

    folder = store.outputs / "locks"
    with locks.hold(folder / "import.lock", {"step": "import"}, tell_waiting):
        with locks.hold(folder / "gc.lock", {"step": "import"}, tell_waiting):
            pass  # as for steps, gc cannot begin after this
        store.forget()
        with _place_errors(place.url):
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
        try:
            with _place_errors(place.url):
                _fetch(place, missing, base)
            new, raced = take_in(store, base / "store")
        except OSError as error:
            raise StoreError(f"{place.url} cannot be imported ({error.strerror or error})") from error
        except StoreError:
            shutil.rmtree(base, ignore_errors=True)  # a resumed transfer would have the same fault
            raise
        shutil.rmtree(base, ignore_errors=True)
        return new, [*known, *raced]


def _choose(store: Store, place: Place, wanted: Sequence[str]) -> dict[str, Manifest]:
    """Return name → manifest of the wanted artifacts and all their inputs."""
    names = place.names()
    by_rid = {name[-16:]: name for name in names}
    if not names:
        raise ConfigError(f"{place.url} holds no artifacts: expected {place.path('ARTIFACT', MANIFEST)}")
    queue: list[str] = []
    for word in wanted:
        found = [name for name in names if word == name or name[-16:].startswith(word[:16])]
        if len(found) != 1:
            which = ", ".join(found[:8]) if found else f"it holds {', '.join(names[:8])}{' …' * (len(names) > 8)}"
            raise ConfigError(f'"{word}" matches {len(found) or "no"} artifacts of {place.url}: {which}')
        queue += found
    chosen: dict[str, Manifest] = {}
    named = set(queue)
    queue = queue or names
    while queue:
        name = queue.pop()
        if name in chosen:
            continue
        manifest = place.manifest(name) if is_plain(name) else None
        if manifest is None:
            if name in named:
                raise ConfigError(f"{name} is incomplete at {place.url}: its export has not finished")
            continue  # incomplete, or not an artifact
        chosen[name] = manifest
        rids = references(manifest)
        queue += [by_rid[rid[:16]] for rid in rids if rid[:16] in by_rid and store.find(rid) is None]
    if not chosen:
        raise ConfigError(f"{place.url} holds no complete artifact: its export has not finished")
    return chosen


def _fetch(place: Place, manifests: dict[str, Manifest], base: Path) -> None:
    """Download artifacts to base/store/ and hash each file; complete files are kept."""
    total = sum(file["bytes"] for manifest in manifests.values() for file in manifest["outputs"])
    base.mkdir(parents=True, exist_ok=True)
    here = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
    check_space(base, max(0, total - here), f"The import from {place.url}")
    with TransferProgress(place.url, total) as progress:
        for name, manifest in manifests.items():
            for file in manifest["outputs"]:
                try:
                    _fetch_file(place, name, file, base / "store" / name / file["path"], progress)
                except FileNotFoundError:
                    raise StoreError(f"{place.url}: {name} lacks {file['path']}. Nothing was imported") from None
            target = base / "store" / name / MANIFEST
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(place.files.cat_file(place.path(name, MANIFEST)))
            sync(target)
            crash_point("fetch.artifact")
    for folder in (base / "store").iterdir():  # left by an import with other names
        if folder.name not in manifests:
            shutil.rmtree(folder)


def _fetch_file(place: Place, name: str, file: dict[str, Any], target: Path, progress: TransferProgress) -> None:
    """Download one file, unless an earlier attempt did; StoreError if its contents differ from the manifest."""
    if target.exists() and checksum_of(target) == file["sha256"]:
        progress.add(file["bytes"])
        return
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _counted(progress, file["bytes"]) as callback:
        place.files.get_file(place.path(name, file["path"]), str(part), callback=callback)
    if checksum_of(part) != file["sha256"]:
        raise StoreError(f"{place.url}: {file['path']} of {name} differs from its manifest. Nothing was imported")
    sync(part)
    part.rename(target)
    crash_point("fetch.file")


def check_repository(name: str, *, public: bool, kind: str = "model", option: str = "--hub ") -> str:
    """Return the token for an upload to a repository.

    Raises:
        ConfigError: the name is invalid, the environment holds no token, or the repository is public and must not be.
        PassingError: the Hub does not answer, or with an error.
    """
    if not _REPOSITORY.fullmatch(name):
        raise ConfigError(f'{option}"{name}" is no repository: expected ORGANISATION/NAME or USER/NAME')
    token = next((value for key in _TOKENS if (value := os.environ.get(key, "").strip())), None)
    if token is None:
        raise ConfigError(
            f"{option.strip() or name} needs a token with write access: set HF_TOKEN (https://huggingface.co/settings/tokens)"
        )
    from huggingface_hub.errors import RepositoryNotFoundError

    with _hub_errors(name):
        api = _api(token)
        try:
            there = api.repo_info(name, repo_type=kind)
        except RepositoryNotFoundError:
            return token
    if not there.private and not public:
        raise ConfigError(f"{name} is a public repository. Add --public to write to it, or name another one")
    return token


def push_folder(folder: Path, name: str, token: str, *, message: str, public: bool) -> str:
    """Upload a folder in one commit and return the commit's URL.

    A missing repository is created. A failed upload leaves its contents unchanged.

    Raises:
        ConfigError: the token may not write there.
        PassingError: the Hub does not answer, or with an error.
    """
    with _hub_errors(name):
        api = _api(token)
        api.create_repo(name, private=not public, repo_type="model", exist_ok=True)
        _announce(name, [path for path in folder.rglob("*") if path.is_file()])
        info = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            repo_type="model",
            commit_message=message,
            delete_patterns=list(_FORMER),
        )
        return str(info.commit_url)


def push_artifacts(place: Place, folders: Sequence[Path], *, public: bool) -> int:
    """Upload artifacts to hf://[datasets/]ORGANISATION/NAME/PATH in one commit; return the number of new ones.

    A missing repository is created. A retry does not send large files again that have arrived.

    Raises:
        ConfigError: the name is invalid, or the token may not write there.
        PassingError: the Hub does not answer, or with an error.
        StoreError: a local artifact is damaged.
    """
    from huggingface_hub import CommitOperationAdd

    parts = place.root.strip("/").split("/")
    kind = {"datasets": "dataset", "models": "model"}.get(parts[0])
    name, rest = "/".join(parts[1:3] if kind else parts[:2]), parts[3:] if kind else parts[2:]
    kind = kind or "model"
    token = check_repository(name, public=public, kind=kind, option="hf://")
    with _hub_errors(name):
        api = _api(token)
        api.create_repo(name, private=not public, repo_type=kind, exist_ok=True)
        there = set(api.list_repo_files(name, repo_type=kind))
        missing = [folder for folder in folders if "/".join((*rest, "store", folder.name, MANIFEST)) not in there]
    operations = []
    _check_whole(missing)
    for folder in missing:
        for path in _files(folder):
            where = "/".join((*rest, "store", folder.name, path.relative_to(folder).as_posix()))
            operations.append(CommitOperationAdd(where, str(path)))
    if operations:
        with _hub_errors(name):
            message = f"{missing[-1].name} from mlxchat, with {len(missing) - 1} input artifacts"
            _announce(name, [path for folder in missing for path in _files(folder)])
            api.create_commit(name, operations, commit_message=message, repo_type=kind)
    return len(missing)


def _api(token: str) -> Any:
    from huggingface_hub import HfApi

    prepare_client()
    return HfApi(endpoint=endpoint(), token=token)


def _announce(name: str, files: Sequence[Path]) -> None:
    size = format_bytes(sum(file.stat().st_size for file in files))
    print(f"  uploading {size} to {name}", file=sys.stderr)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn exceptions of the client into one-line errors."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # includes those of the client's HTTP library
        status = getattr(error.response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403, 404):
            raise ConfigError(
                f"{name} was not written: the Hub answers {status}. Check that the token in HF_TOKEN may write there"
            ) from None
        cause = _short_of(error.__cause__ or error)
        raise PassingError(f"{name} was not written: {cause}. Nothing was committed; try again") from None
