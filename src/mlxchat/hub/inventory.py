"""Repositories of the Hub and plain downloads on this machine: sizes, artifacts made from them, removal."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxchat.errors import DataError, suggest
from mlxchat.hub.cache import HubFile, cache_folder, hub_cache, read_json
from mlxchat.hub.listings import read_listing
from mlxchat.store import locks
from mlxchat.store.manifest import MANIFEST


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A plain download, or the downloaded part of a repository at one commit."""

    name: str
    """<organisation>/<name>, or the address."""
    kind: str
    """dataset, model or url."""
    place: Path
    """The listing of a repository, or the folder of a plain download."""
    bytes: int
    part_bytes: int
    """Bytes of incomplete files."""
    needed_by: list[str]
    """Artifacts made from it."""
    revision: str | None = None
    """The commit."""
    listed: list[HubFile] = field(default_factory=list)
    """All files of the repository."""

    @property
    def files(self) -> list[HubFile]:
        """The downloaded files of the repository."""
        return [file for file in self.listed if file.place.exists()]

    @property
    def title(self) -> str:
        """Name and short commit."""
        return f"{self.name}@{self.revision[:12]}" if self.revision else self.name


def find_holdings(outputs: Path) -> list[Holding]:
    """Return all downloads on this machine, sorted by name; `needed_by` names artifacts of `outputs`."""
    users = _users(outputs)
    found = [*_repositories(users), *_downloads(users)]
    return sorted(found, key=lambda holding: (holding.kind == "url", holding.name, holding.revision or ""))


def choose(holdings: Iterable[Holding], name: str) -> list[Holding]:
    """Return the holdings of a name: a repository, also with @COMMIT or its first digits, a URL or its file name.

    Raises:
        DataError: the name matches none.
    """
    holdings = list(holdings)
    repository, _, commit = name.partition("@")
    found = [
        holding
        for holding in holdings
        if (holding.kind != "url" and holding.name == repository and (holding.revision or "").startswith(commit))
        or (holding.kind == "url" and name in (holding.name, holding.name.rpartition("/")[2]))
    ]
    if not found:
        hint = suggest(name, [holding.name for holding in holdings])
        raise DataError(f"no download is called {name}; mlxchat data ls lists them.{hint}")
    return found


def remove(holding: Holding) -> tuple[int, list[str]]:
    """Remove a holding; return the freed bytes, and the files kept because a process is fetching them.

    Content shared with another commit is kept. A kill leaves only complete files.
    """
    if holding.kind == "url":
        if locks.is_held(holding.place / "fetch.lock"):
            return 0, [holding.name]
        shutil.rmtree(holding.place, ignore_errors=True)
        return holding.bytes + holding.part_bytes, []
    folder = holding.listed[0].folder
    others = [snapshot for snapshot in (folder / "snapshots").glob("*") if snapshot.name != holding.revision]
    shared = {path.resolve().name for other in others for path in other.rglob("*") if path.is_symlink()}
    freed, kept = 0, []
    for file in holding.listed:
        if locks.is_held(hub_cache() / ".locks" / folder.name / f"{file.etag}.lock"):
            kept.append(file.path)
            continue
        _unlink(file.place)
        if file.etag not in shared:
            freed += sum(map(_unlink, (file.blob, *_parts(file.blob))))
            _unlink(cache_folder() / "verified" / file.etag)
    if not kept:
        for name in (holding.place.parent / "refs").glob("*"):
            if (read_json(name) or {}).get("commit") == holding.revision:
                _unlink(name)
        _unlink(holding.place)
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:  # empty folders
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()
    return freed, kept


def _repositories(users: list[tuple[str, dict[str, Any]]]) -> Iterator[Holding]:
    for listing in sorted((cache_folder() / "listings").glob("*/*.json")):
        files = read_listing(listing) or []
        size = sum(file.bytes for file in files if file.place.exists())
        parts = sum(path.stat().st_size for file in files for path in _parts(file.blob)[:1] if path.exists())
        if parts or any(file.place.exists() for file in files):
            name, kind, commit = files[0].repository, files[0].kind, files[0].revision
            url = f"hf://{kind}s/{name}"
            needed_by = {
                user: None
                for user, external in users
                if external.get("revision") == commit and f"{external.get('url')}/".startswith(f"{url}/")
            }
            yield Holding(
                name=name, kind=kind, revision=commit, place=listing, listed=files, bytes=size, part_bytes=parts,
                needed_by=list(needed_by),
            )  # fmt: skip


def _downloads(users: list[tuple[str, dict[str, Any]]]) -> Iterator[Holding]:
    for folder in sorted((cache_folder() / "downloads").glob("*")):
        record = read_json(folder / "source.json") or {}
        parts = sum(path.stat().st_size for path in folder.glob("*.part"))
        if record or parts:
            url = str(record.get("url") or folder.name)
            needed_by = {user: None for user, external in users if external.get("url") == url}
            yield Holding(
                name=url, kind="url", place=folder, bytes=int(record.get("bytes") or 0), part_bytes=parts,
                needed_by=list(needed_by),
            )  # fmt: skip


def _users(outputs: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (artifact, external) for each external source of a store's artifacts."""
    found = []
    for path in sorted((outputs / "store").glob(f"*/{MANIFEST}")):
        manifest = read_json(path)
        if isinstance(manifest, dict):
            found += [(path.parent.name, each) for each in manifest.get("externals") or () if isinstance(each, dict)]
    return found


def _parts(blob: Path) -> list[Path]:
    return [blob.with_name(f"{blob.name}.part"), blob.with_name(f"{blob.name}.part.json")]


def _unlink(path: Path) -> int:
    """Remove a file if it exists; return its size in bytes."""
    with suppress(OSError):
        size = path.lstat().st_size
        path.unlink()
        return size
    return 0
