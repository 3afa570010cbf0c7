"""Lists of a Hub repository's files: requested once per process, and recorded for offline use."""

from __future__ import annotations

import fnmatch
import re
import shlex
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlxchat.errors import DataError, PassingError
from mlxchat.hub.cache import HubFile, cache_folder, folder_name, is_offline
from mlxchat.hub.downloads import TRIES, endpoint, hub_client, retried
from mlxchat.store.files import read_json, write_json

_COMMIT = re.compile(r"[0-9a-f]{40}")

# (Hub, repository, revision, kind) → commit: a run uses one commit even if a new one is uploaded meanwhile.
_commits: dict[tuple[str, str, str, str], str] = {}


def list_files(repository: str, *, revision: str = "main", pattern: str = "*", kind: str = "dataset") -> list[HubFile]:
    """Return the files of a repository at the current commit of `revision` (commit, tag or branch), sorted by path.

    `pattern` is a shell pattern of the path in which * also matches slashes. DataError: there is no such repository or
    revision, or HF_HUB_OFFLINE is set and no listing is recorded; PassingError: no answer and no record.
    """
    files = _list_commit(repository, _resolve(repository, revision, kind), kind)
    return [file for file in files if fnmatch.fnmatchcase(file.path, pattern)]


def find_commit(repository: str, revision: str) -> str | None:
    """Return the commit of a data set's revision, for a key; None if neither the Hub nor a record has it.

    For a tag or a branch one request is made per process, for at most 10 seconds.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    if is_offline() and not _ref(repository, revision, "dataset").exists():
        return None
    try:
        return _resolve(repository, revision, "dataset", is_plan=True)
    except PassingError:
        return None


def recorded_files(repository: str, revision: str) -> list[HubFile] | None:
    """Return the files of a data set's recorded listing, or None; the network is not used."""
    known = read_json(_ref(repository, revision, "dataset")) or {}
    return _read_listing(_record(repository, "dataset", f"{known.get('commit')}.json"))


def forget() -> None:
    """Clear the revisions resolved in this process."""
    _commits.clear()


def fetch_command() -> str:
    """Return a sentence with the command that fetches everything, with the settings of this command line."""
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    return f"On a machine with network access, run: mlxchat data fetch {shlex.join(words)}".rstrip()


def _record(repository: str, kind: str, name: str) -> Path:
    """Return the file in our cache that records a commit's listing, or a revision's commit."""
    return cache_folder() / "listings" / folder_name(repository, kind) / name


def _ref(repository: str, revision: str, kind: str) -> Path:
    return _record(repository, kind, f"refs/{quote(revision, safe='')}")


def _resolve(repository: str, revision: str, kind: str, *, is_plan: bool = False) -> str:
    """Return the commit of a revision by the Hub, and record it for offline use."""
    key = (endpoint(), repository, revision, kind)
    if key in _commits:
        return _commits[key]
    commit = (read_json(_ref(repository, revision, kind)) or {}).get("commit")
    if is_offline() and commit is None:
        raise DataError(_unknown_message(repository, revision, kind))
    if not is_offline() and revision != commit:  # not a commit itself
        try:
            info = retried(
                lambda: hub_client().repo_info(repository, revision=revision, repo_type=kind, timeout=10),
                repository, f"{kind} or revision", tries=1 if is_plan or commit else TRIES,
            )  # fmt: skip
            commit = info.sha
            for name in (revision, commit):
                write_json(_ref(repository, name, kind), {"commit": commit})
        except PassingError as error:
            if commit is None:
                raise PassingError(f"{error} {fetch_command()}") from None
            print(f"  {repository}: the Hub does not answer; using recorded commit {commit[:12]}", file=sys.stderr)
    _commits[key] = str(commit)
    return _commits[key]


def _list_commit(repository: str, commit: str, kind: str) -> list[HubFile]:
    """Return all files of a commit, sorted by path; they never change, so each commit is listed once per machine."""
    path = _record(repository, kind, f"{commit}.json")
    if (files := _read_listing(path)) is not None:
        return files
    if is_offline():
        raise DataError(_unknown_message(repository, commit, kind))
    from huggingface_hub.hf_api import RepoFile

    def request() -> list[RepoFile]:
        tree = hub_client().list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind)
        return [entry for entry in tree if isinstance(entry, RepoFile)]

    rows: list[list[Any]] = [
        [entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, None if entry.lfs else entry.blob_id]
        for entry in retried(request, repository, f"{kind} or revision")
    ]
    write_json(path, {"repository": repository, "kind": kind, "commit": commit, "files": rows})
    return _read_listing(path) or []


def _read_listing(path: Path) -> list[HubFile] | None:
    """Return the files of a recorded listing, sorted by path; None if there is no record."""
    if (recorded := read_json(path)) is None:
        return None
    where = (recorded["repository"], recorded["kind"], recorded["commit"])
    return sorted((HubFile(*where, *row) for row in recorded["files"]), key=lambda file: file.path)


def _unknown_message(repository: str, revision: str, kind: str) -> str:
    return (
        f"{repository}: this {kind} at revision {revision} is not on this machine, and HF_HUB_OFFLINE is set. "
        f"{fetch_command()}"
    )
