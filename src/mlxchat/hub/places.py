"""Remote stores of artifacts and models: fsspec URLs (s3://, gs://, hf://, memory://), folders, and the Hub.

A place has the layout of an exported folder, `store/<artifact>/…`. An artifact is complete if and only if its manifest
exists; it is written last, and inputs come before what was made from them. So an interrupted transfer leaves no broken
artifact, and the same command continues with the artifacts that are missing. A repository of the Hub is written in one
commit.
"""

import hashlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.config.wording import format_bytes
from mlxchat.errors import ConfigError, MlxchatError, PassingError, StoreError, redact
from mlxchat.hub.client import endpoint, hub_client
from mlxchat.store import locks
from mlxchat.store.catalog import references, take_in
from mlxchat.store.files import crash_point, sync, write_whole
from mlxchat.store.manifest import MANIFEST, Manifest, check_manifest, find_damage, is_plain, parse_manifest
from mlxchat.store.store import Store

# The commit deletes older weights of these names, because loaders would read them as part of the model.
_FORMER = ["model*.safetensors", "model*.safetensors.index.json", "model_*.pt", "meta_*.json"]
_FORMER += ["adapter*.safetensors", "adapter_config.json"]


@dataclass(frozen=True)
class Place:
    """A remote store and its file system."""

    url: str
    files: Any
    """An fsspec file system."""
    root: str

    def path(self, *parts: str) -> str:
        """Return a path in the store."""
        return "/".join((self.root.rstrip("/"), "store", *parts))

    def names(self) -> list[str]:
        """Return the names of all complete artifacts."""
        self.files.invalidate_cache()
        found = (path.split("/")[-2] for path in self.files.glob(self.path("*", MANIFEST)))
        return sorted(name for name in found if is_plain(name))

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of an artifact; StoreError if it is damaged."""
        try:
            manifest = parse_manifest(self.files.cat_file(self.path(name, MANIFEST)))
            faults = [*check_manifest(name, manifest)]
        except ValueError as error:
            faults = [str(error)]
        if faults:
            raise StoreError(f"{self.url}: the manifest of {name} is damaged ({'; '.join(faults)})")
        return manifest


def open_place(url: str) -> Place:
    """Return the place of a URL, or of the path of a folder; ConfigError if fsspec does not support it."""
    url = url if "://" in url else f"file://{Path(url).resolve()}"
    from fsspec.core import url_to_fs

    with _place_errors(url):
        options = {"endpoint": endpoint()} if url.startswith("hf://") else {}
        files, root = url_to_fs(url, skip_instance_cache=True, **options)
        return Place(redact(url), files, str(root))


@contextmanager
def _place_errors(url: str) -> Iterator[None]:
    """Turn exceptions of file systems and of the Hub's client into errors of one line."""
    place = redact(url)
    try:
        yield
    except MlxchatError:
        raise
    except Exception as error:  # each file system has its own types
        reason = redact(" ".join(str(error.__cause__ or error).split())[:300]) or type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, ImportError):
            hint = "'mlxchat[s3]'" if "s3fs" in reason else error.name or "its package"
            raise ConfigError(f"{place}: {reason} (pip install {hint})") from None
        is_refused = isinstance(error, PermissionError) or "Credential" in type(error).__name__
        if is_refused or status in (401, 403, 404):
            raise ConfigError(f"{place} refuses access ({reason}). Check the credentials (HF_TOKEN)") from None
        if isinstance(error, (FileNotFoundError, ValueError)) and status is None:
            raise ConfigError(f"{place} does not exist or cannot be opened ({reason})") from None
        raise PassingError(f"{place}: {reason}. The same command resumes the transfer") from None


def export_to(place: Place, folders: Sequence[Path]) -> int:
    """Copy artifacts to a place, inputs first; return the number of copied ones."""
    with _place_errors(place.url):
        there = set(place.names())
        missing = [folder for folder in folders if folder.name not in there]
        for folder in missing:
            if place.files.exists(place.path(folder.name)):  # of an interrupted transfer
                place.files.rm(place.path(folder.name), recursive=True)
            for path in sorted(folder.rglob("*")):
                if path.is_file() and path != folder / MANIFEST:
                    _send(place, folder, path)
            crash_point("send.described")
            _send(place, folder, folder / MANIFEST)
    return len(missing)


def _send(place: Place, folder: Path, path: Path) -> None:
    """Copy a file of an artifact to a place."""
    target = place.path(folder.name, path.relative_to(folder).as_posix())
    place.files.makedirs(target.rpartition("/")[0], exist_ok=True)
    place.files.put_file(str(path), target, callback=_progress(path.name))
    crash_point("send.file")


def _progress(name: str) -> Any:
    """Return fsspec's callback with a progress bar, shown on a terminal after a second."""
    from fsspec.callbacks import TqdmCallback

    bar = {"desc": name, "unit": "B", "unit_scale": True, "delay": 1, "disable": None, "leave": False}
    return TqdmCallback(tqdm_kwargs=bar)


def import_from(store: Store, place: Place, wanted: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Import artifacts and their inputs from a place; return the new ones, and those that were in the store already.

    `wanted` are names of artifacts, or prefixes of their ids; empty: everything. StoreError: contents differ from a
    manifest, or an input is missing, and nothing faulty reaches the store. ConfigError: the place does not exist or
    refuses access, or a name matches nothing. PassingError: a transient fault; the next call resumes.
    """
    store.prepare()
    base = store.outputs / "work" / f".import-{hashlib.sha256(place.url.encode()).hexdigest()[:16]}"
    with locks.hold(store.outputs / "locks" / "import.lock", {"step": "import"}):
        with locks.hold(store.outputs / "locks" / "gc.lock", {"step": "import"}):
            pass  # as for steps, gc cannot begin after this
        store.forget()
        known: list[Path] = []
        missing: dict[str, Manifest] = {}
        with _place_errors(place.url):
            for name, manifest in _choose(store, place, wanted).items():
                if (here := store.find(manifest["rid"])) is None:
                    missing[name] = manifest
                else:
                    known.append(here)
                    store.learn(manifest)
            if not missing:
                return [], known
            _fetch(place, missing, base)
        new, raced = take_in(store, base / "store")
        shutil.rmtree(base, ignore_errors=True)
        return new, [*known, *raced]


def _choose(store: Store, place: Place, wanted: Sequence[str]) -> dict[str, Manifest]:
    """Return name → manifest of the wanted artifacts and all their inputs; unfinished ones are left out."""
    names = place.names()
    by_rid = {name[-16:]: name for name in names}
    queue: list[str] = [] if wanted else list(names)
    for word in wanted:
        found = [name for name in names if word == name or name[-16:].startswith(word[:16])]
        if len(found) != 1:
            which = ", ".join(found[:8]) if found else f"it holds {', '.join(names[:8])}{' …' * (len(names) > 8)}"
            raise ConfigError(f'"{word}" matches {len(found) or "no"} artifacts of {place.url}: {which}')
        queue += found
    chosen: dict[str, Manifest] = {}
    while queue:
        name = queue.pop()
        if name not in chosen:
            chosen[name] = place.manifest(name)
            rids = references(chosen[name])
            queue += [by_rid[rid[:16]] for rid in rids if rid[:16] in by_rid and store.find(rid) is None]
    if not chosen:
        raise ConfigError(f"{place.url} holds no complete artifact: expected {place.path('ARTIFACT', MANIFEST)}")
    return chosen


def _fetch(place: Place, manifests: dict[str, Manifest], base: Path) -> None:
    """Download artifacts to base/store/ and verify each; whole ones of an interrupted transfer are kept."""
    base.mkdir(parents=True, exist_ok=True)
    for left in (base / "store").glob("*"):
        if left.name not in manifests:  # by an import with other names
            shutil.rmtree(left)
    for name, manifest in manifests.items():
        target = base / "store" / name
        if (target / MANIFEST).exists():
            continue
        shutil.rmtree(target, ignore_errors=True)
        for file in manifest["outputs"]:
            path = target / file["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            place.files.get_file(place.path(name, file["path"]), str(path), callback=_progress(file["path"]))
            sync(path)
            crash_point("fetch.file")
        if damage := list(find_damage(target, manifest)):
            shutil.rmtree(base)
            raise StoreError(f"{place.url}: {name} differs from its manifest: {damage[0]}. Nothing was imported")
        target.mkdir(parents=True, exist_ok=True)
        write_whole(target / MANIFEST, place.files.cat_file(place.path(name, MANIFEST)))
        crash_point("fetch.artifact")


# Uploads to the Hub


def check_repository(name: str, *, public: bool, kind: str = "model") -> str:
    """Return the token for an upload to a repository.

    ConfigError: the name is invalid, there is no token, or the repository is public and must not be; PassingError: the
    Hub does not answer.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if name.count("/") != 1:
        raise ConfigError(f'"{name}" is no repository: expected ORGANISATION/NAME or USER/NAME')
    if (token := get_token()) is None:
        where = "https://huggingface.co/settings/tokens"
        raise ConfigError(f"{name} needs a token with write access: set HF_TOKEN ({where})")
    with _place_errors(name):
        try:
            there = hub_client(token).repo_info(name, repo_type=kind)
        except RepositoryNotFoundError:
            return token
    if not there.private and not public:
        raise ConfigError(f"{name} is a public repository. Add --public to write to it, or name another one")
    return token


def push_folder(folder: Path, name: str, token: str, *, message: str, public: bool) -> str:
    """Upload a model's folder in one commit and return the commit's URL; a missing repository is created."""
    size = format_bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    print(f"  uploading {size} to {name}", file=sys.stderr)
    with _place_errors(name):
        client = hub_client(token)
        client.create_repo(name, private=not public, exist_ok=True)
        info = client.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=_FORMER)
        return str(info.commit_url)


def push_artifacts(place: Place, folders: Sequence[Path], *, public: bool) -> int:
    """Upload artifacts to hf://[datasets/]ORGANISATION/NAME/PATH in one commit; return the number of new ones.

    A missing repository is created. A retry does not send large files again that have arrived.
    """
    kind = "dataset" if place.root.startswith("datasets/") else "model"
    owner, name, *inside = place.root.removeprefix("datasets/").split("/")
    repository = f"{owner}/{name}"
    client = hub_client(check_repository(repository, public=public, kind=kind))
    with _place_errors(place.url):
        client.create_repo(repository, private=not public, repo_type=kind, exist_ok=True)
        there = set(place.names())
        missing = [folder.name for folder in folders if folder.name not in there]
        if missing:
            client.upload_folder(
                repo_id=repository, repo_type=kind, folder_path=folders[0].parent,
                path_in_repo="/".join([*inside, "store"]),
                allow_patterns=[f"{name}/*" for name in missing],
                commit_message=f"{missing[-1]} from mlxchat, with {len(missing) - 1} input artifacts",
            )  # fmt: skip
    return len(missing)
