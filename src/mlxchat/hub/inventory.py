"""What was fetched and is on this machine: repositories of the Hub and plain downloads; who needs them; removal."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxchat.errors import DataError
from mlxchat.hub.cache import cache_folder, read_json
from mlxchat.hub.files import HubFile, hub_cache
from mlxchat.runner import locks
from mlxchat.runner.store import MANIFEST


@dataclass(frozen=True)
class Holding:
    """A repository at one commit, or a plain download, as far as it is on this machine."""

    name: str
    """<organisation>/<name>, or the address."""
    kind: str
    """dataset, model or url."""
    revision: str | None
    """The commit."""
    files: list[HubFile] = field(default_factory=list)
    """Those that are there."""
    num_listed: int = 1
    """Files in the repository."""
    bytes: int = 0
    part_bytes: int = 0
    """Of files that have not arrived whole."""
    place: Path | None = None
    """Folder of a plain download."""
    verified: bool = True
    """Whether every file was hashed since it was written."""
    needed_by: list[str] = field(default_factory=list)
    """Artifacts that were made from it."""

    @property
    def title(self) -> str:
        """Name and short commit."""
        return f"{self.name}@{self.revision[:12]}" if self.revision else self.name


def find_holdings(outputs: Path) -> list[Holding]:
    """Return what is on this machine, sorted by name; `needed_by` looks at the artifacts of an outputs folder."""
    users = _users(outputs)
    found = [*_repositories(users), *_downloads(users)]
    return sorted(found, key=lambda holding: (holding.kind == "url", holding.name, holding.revision or ""))


def choose(holdings: Iterable[Holding], name: str) -> list[Holding]:
    """Return the holdings that a name means: a repository (with @ and the start of a commit), an address, a file name.

    Raises:
        DataError: none.
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
        from mlxchat.errors import suggest

        known = [holding.name for holding in holdings]
        raise DataError(f"nothing here is called {name}. mlxchat data ls shows what there is.{suggest(name, known)}")
    return found


def remove(holding: Holding) -> tuple[int, list[str]]:
    """Remove a holding; return the bytes that are free now, and the files that stay since somebody is fetching them.

    Content that another commit shares stays. A kill leaves files that are whole, or missing.
    """
    if holding.place is not None:
        if locks.is_held(holding.place / "fetch.lock"):
            return 0, [holding.name]
        shutil.rmtree(holding.place, ignore_errors=True)
        return holding.bytes + holding.part_bytes, []
    listing = _listing(holding)
    files = _files(listing, read_json(listing) or {})
    shared = _shared_blobs(files, holding.revision or "")
    freed, kept = 0, []
    for file in files:
        lock = hub_cache() / ".locks" / file.folder.name / f"{file.etag}.lock"
        if locks.is_held(lock):
            kept.append(file.path)
            continue
        _unlink(file.place)
        if file.etag not in shared:
            for path in (file.blob, *_parts(file.blob)):
                freed += path.stat().st_size if path.exists() else 0
                _unlink(path)
            _unlink(cache_folder() / "verified" / file.etag)
    if not kept:
        for name in (listing.parent / "refs").glob("*"):
            if (read_json(name) or {}).get("commit") == holding.revision:
                _unlink(name)
        _unlink(listing)
    _prune(holding.files[0].folder if holding.files else None)
    return freed, kept


def _repositories(users: list[tuple[str, dict[str, Any]]]) -> Iterable[Holding]:
    for listing in sorted((cache_folder() / "listings").glob("*/*.json")):
        record = read_json(listing) or {}
        if "files" not in record:
            continue
        files = _files(listing, record)
        there = [file for file in files if file.place.exists()]
        parts = sum(path.stat().st_size for file in files for path in _parts(file.blob)[:1] if path.exists())
        if there or parts:
            prefix = f"hf://{record['kind']}s/{record['repository']}"
            names = [
                name
                for name, external in users
                if external.get("revision") == record["commit"]
                and (external.get("url") == prefix or str(external.get("url")).startswith(f"{prefix}/"))
            ]
            yield Holding(
                record["repository"], record["kind"], record["commit"], there, len(files),
                sum(file.bytes for file in there), parts, None, all(file.is_there() for file in there),
                list(dict.fromkeys(names)),
            )  # fmt: skip


def _downloads(users: list[tuple[str, dict[str, Any]]]) -> Iterable[Holding]:
    for folder in sorted((cache_folder() / "downloads").glob("*")):
        record = read_json(folder / "source.json") or {}
        parts = sum(path.stat().st_size for path in folder.glob("*.part"))
        if record or parts:
            url = str(record.get("url") or folder.name)
            names = [name for name, external in users if external.get("url") == url]
            size = int(record.get("bytes") or 0)
            yield Holding(url, "url", None, [], 1, size, parts, folder, True, list(dict.fromkeys(names)))


def _users(outputs: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (artifact, external) for everything that the artifacts of a store were made from."""
    found = []
    for path in sorted((outputs / "store").glob(f"*/{MANIFEST}")):
        manifest = read_json(path)
        if isinstance(manifest, dict):
            found += [(path.parent.name, each) for each in manifest.get("externals") or () if isinstance(each, dict)]
    return found


def _listing(holding: Holding) -> Path:
    name = f"{holding.kind}s--{holding.name.replace('/', '--')}"
    return cache_folder() / "listings" / name / f"{holding.revision}.json"


def _files(listing: Path, record: dict[str, Any]) -> list[HubFile]:
    return [HubFile(record["repository"], record["kind"], record["commit"], *row) for row in record.get("files", ())]


def _parts(blob: Path) -> list[Path]:
    return [blob.with_name(f"{blob.name}.part"), blob.with_name(f"{blob.name}.part.json")]


def _shared_blobs(files: list[HubFile], commit: str) -> set[str]:
    """Return the names of contents that other commits of the repository link to."""
    if not files:
        return set()
    others = [folder for folder in (files[0].folder / "snapshots").glob("*") if folder.name != commit]
    return {path.resolve().name for folder in others for path in folder.rglob("*") if path.is_symlink()}


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _prune(folder: Path | None) -> None:
    """Remove folders that hold nothing any more."""
    if folder is None:
        return
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()
    with suppress(OSError):
        folder.rmdir()
