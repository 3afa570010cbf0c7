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
from mlxchat.hub.cache import (
    HubFile,
    cache_folder,
    folder_name,
    is_offline,
    read_json,
    write_json,
)
from mlxchat.hub.downloads import endpoint, prepare_client, retried

# Requests for a commit; fewer where a recorded answer exists.
_TRIES, _TRIES_WITH_RECORD = 6, 2
_PLAN_SECONDS, _ANSWER_SECONDS = 10.0, 60.0
_COMMIT = re.compile(r"[0-9a-f]{40}")

# (Hub, repository, revision, kind) → commit: a run uses one commit even if a new one is uploaded meanwhile.
_commits: dict[tuple[str, str, str, str], str] = {}
# Hubs that did not answer in this process; plans do not try them again.
_silent: set[str] = set()


def list_files(repository: str, *, revision: str = "main", pattern: str = "*", kind: str = "dataset") -> list[HubFile]:
    """Return the files of a repository whose path matches, sorted by path, all at the current commit of `revision`.

    Args:
        repository: <organisation>/<name>.
        revision: commit, tag or branch.
        pattern: shell pattern of the path; * also matches slashes.
        kind: dataset or model.

    Raises:
        DataError: there is no such repository or revision, or HF_HUB_OFFLINE is set and no listing is recorded.
        PassingError: the Hub does not answer and no listing is recorded.
    """
    commit = _resolve(repository, revision, kind)
    files = _list_commit(repository, commit, kind)
    return [file for file in files if fnmatch.fnmatchcase(file.path, pattern)]


def find_commit(repository: str, revision: str) -> str | None:
    """Return the commit of a data set's revision, for a key; None if neither the Hub nor a record has it.

    For a tag or a branch one request is made per process, for at most 10 seconds.

    Raises:
        DataError: there is no such repository or revision.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    is_unknown = read_json(_ref(repository, revision, "dataset")) is None
    if is_unknown and (is_offline() or endpoint() in _silent):
        return None
    try:
        return _resolve(repository, revision, "dataset", is_plan=True)
    except PassingError:
        return None


def recorded_files(repository: str, revision: str) -> list[HubFile] | None:
    """Return the files of a data set's recorded listing, or None; the network is not used."""
    known = read_json(_ref(repository, revision, "dataset")) or {}
    return read_listing(listing_folder(repository, "dataset") / f"{known.get('commit')}.json")


def read_listing(path: Path) -> list[HubFile] | None:
    """Return the files of a recorded listing, sorted by path; None if there is no valid record."""
    recorded = read_json(path) or {}
    if not {"repository", "kind", "commit", "files"} <= recorded.keys():
        return None
    where = (recorded["repository"], recorded["kind"], recorded["commit"])
    return sorted((HubFile(*where, *row) for row in recorded["files"]), key=lambda file: file.path)


def forget() -> None:
    """Clear the revisions resolved in this process."""
    _commits.clear()
    _silent.clear()


def listing_folder(repository: str, kind: str) -> Path:
    """Return the folder of a repository's listings."""
    return cache_folder() / "listings" / folder_name(repository, kind)


def _ref(repository: str, revision: str, kind: str) -> Path:
    """Return the file that records the commit of a revision."""
    return listing_folder(repository, kind) / "refs" / quote(revision, safe="")


def _resolve(repository: str, revision: str, kind: str, *, is_plan: bool = False) -> str:
    """Return the commit of a revision by the Hub, and record it for offline use."""
    key = (endpoint(), repository, revision, kind)
    if key in _commits:
        return _commits[key]
    known = _ref(repository, revision, kind)
    commit = (read_json(known) or {}).get("commit")
    if is_offline():
        if commit is None:
            raise DataError(_unknown_message(repository, revision, kind))
        if is_plan:
            print(f"  {repository}: offline; {revision} is commit {commit[:12]}, as recorded", file=sys.stderr)
    elif revision != commit:  # not a commit itself
        try:
            commit = _request_commit(repository, revision, kind, is_plan=is_plan, is_recorded=commit is not None)
        except PassingError as error:
            if commit is None:
                raise PassingError(f"{error} {fetch_command()}") from None
            print(f"  {repository}: the Hub does not answer; using recorded commit {commit[:12]}", file=sys.stderr)
        else:
            for name in {quote(revision, safe=""), commit}:
                write_json(known.with_name(name), {"commit": commit, "endpoint": endpoint()})
    _commits[key] = str(commit)
    return _commits[key]


def _request_commit(repository: str, revision: str, kind: str, *, is_plan: bool, is_recorded: bool) -> str:
    """Return the commit by the Hub; for a plan with one try, and none if this Hub did not answer before."""
    hub = endpoint()
    if is_plan and hub in _silent:
        raise PassingError(f"{repository}: the Hub at {hub} did not answer before.")
    tries = 1 if is_plan else _TRIES_WITH_RECORD if is_recorded else _TRIES
    seconds = _PLAN_SECONDS if is_plan else _ANSWER_SECONDS

    def request() -> str:
        return str(_api().repo_info(repository, revision=revision, repo_type=kind, timeout=seconds).sha)

    try:
        return retried(request, repository, f"{kind} or revision", tries=tries)
    except PassingError:
        _silent.add(hub)
        raise


def _list_commit(repository: str, commit: str, kind: str) -> list[HubFile]:
    """Return all files of a commit; they never change, so each commit is listed once per machine."""
    path = listing_folder(repository, kind) / f"{commit}.json"
    files = read_listing(path)
    if is_offline():
        if files is None:
            raise DataError(_unknown_message(repository, commit, kind))
    elif files is None or read_json(path).get("endpoint") != endpoint():
        try:
            files = retried(lambda: _files_of(repository, commit, kind), repository, f"{kind} or revision")
        except PassingError:
            if files is None:
                raise
        else:
            rows = [[file.path, file.bytes, file.sha256, file.git_sha1] for file in files]
            facts = {"repository": repository, "kind": kind, "commit": commit, "endpoint": endpoint()}
            write_json(path, {**facts, "files": rows})
    return files


def _files_of(repository: str, commit: str, kind: str) -> list[HubFile]:
    """Return every file of a commit by the Hub, sorted by path."""
    from huggingface_hub.hf_api import RepoFile

    files: list[HubFile] = []
    for entry in _api().list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind):
        if isinstance(entry, RepoFile):
            sha256 = entry.lfs.sha256 if entry.lfs else None
            git_id = None if entry.lfs else entry.blob_id
            files.append(HubFile(repository, kind, commit, entry.path, entry.size, sha256, git_id))
    return sorted(files, key=lambda file: file.path)


def _api() -> Any:
    from huggingface_hub import HfApi

    prepare_client()
    return HfApi(endpoint=endpoint(), library_name="mlxchat")


def _unknown_message(repository: str, revision: str, kind: str) -> str:
    return (
        f"{repository}: this {kind} at revision {revision} is not on this machine, and HF_HUB_OFFLINE is set. "
        f"{fetch_command()}"
    )


def fetch_command() -> str:
    """Return a sentence with the command that fetches everything, with the settings of this command line."""
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    # `data show` takes mixture=NAME, other commands mixture@sft.mixture=NAME.
    words = [f"mixture@sft.{word}" if word.startswith("mixture=") else word for word in words]
    settings = f" {shlex.join(words)}" if words else ""
    return f"On a machine with network access, run: mlxchat data fetch{settings}"
