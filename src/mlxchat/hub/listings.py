"""What is in a repository of the Hub: asked once in a process, recorded on disk for when nobody can be asked."""

from __future__ import annotations

import fnmatch
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlxchat.errors import DataError, PassingError
from mlxchat.hub.cache import cache_folder, is_offline, read_json, write_json
from mlxchat.hub.files import HubFile, check_commit, endpoint, folder_name

# With pauses of 0.5, 1, 2, 4, 8 s between them; fewer where an earlier answer can serve.
_TRIES, _TRIES_WITH_RECORD = 6, 2
FIRST_PAUSE_SECONDS = 0.5
_SILENCE_SECONDS = 20.0

# Asked once in a process: a run works with one commit, whatever is uploaded meanwhile.
_resolved: dict[tuple[str, str, str, str], str] = {}
_listed: dict[Path, list[HubFile]] = {}


def list_files(repository: str, *, revision: str = "main", pattern: str = "*", kind: str = "dataset") -> list[HubFile]:
    """Return the files of a repository whose path matches, sorted by path, all at the commit that `revision` means now.

    Args:
        repository: <organisation>/<name>.
        revision: commit, tag or branch.
        pattern: shell pattern of the path; * also matches slashes.
        kind: dataset or model.

    Raises:
        DataError: there is no such repository or revision, or the network may not be used and nothing is recorded.
        PassingError: the Hub does not answer and nothing is recorded.
    """
    commit = _resolve(repository, revision, kind)
    files = _list_commit(repository, commit, kind)
    return [file for file in files if fnmatch.fnmatchcase(file.path, pattern)]


def recorded_files(repository: str, revision: str, kind: str = "dataset") -> list[HubFile] | None:
    """Return the files that an earlier listing found; None: there was none. Nobody is asked."""
    folder = listing_folder(repository, kind)
    known = read_json(folder / "refs" / quote(revision, safe="")) or {}
    recorded = read_json(folder / f"{known.get('commit')}.json") or {}
    if "files" not in recorded:
        return None
    return _files(repository, kind, known["commit"], recorded["files"])


def forget() -> None:
    """Forget what revisions mean and what was listed, as a new process would."""
    _resolved.clear()
    _listed.clear()


def listing_folder(repository: str, kind: str) -> Path:
    """Return where the listings of a repository are."""
    return cache_folder() / "listings" / folder_name(repository, kind)


def _resolve(repository: str, revision: str, kind: str) -> str:
    """Return the commit that a revision means: asked once in a process, recorded for when nobody can be asked."""
    key = (endpoint(), repository, revision, kind)
    if key in _resolved:
        return _resolved[key]
    known = listing_folder(repository, kind) / "refs" / quote(revision, safe="")
    recorded = read_json(known) or {}
    commit = recorded.get("commit")
    if is_offline():
        if commit is None:
            raise DataError(_tell_unknown(repository, revision, kind))
    elif revision != commit:  # a commit means itself
        try:
            tries = _TRIES if commit is None else _TRIES_WITH_RECORD
            commit = _ask(repository, kind, tries, lambda hub: _commit_of(hub, repository, revision, kind))
        except PassingError as error:
            if commit is None:
                raise PassingError(f"{error} {tell_command()}") from None
            print(f"  {repository}: the Hub does not answer; commit {commit[:12]} is used, as before", file=sys.stderr)
        else:
            check_commit(repository, commit)
            for name in {quote(revision, safe=""), commit}:
                write_json(known.with_name(name), {"commit": commit, "endpoint": endpoint()})
    _resolved[key] = commit
    return str(commit)


def _list_commit(repository: str, commit: str, kind: str) -> list[HubFile]:
    """Return all files of a commit; a commit never changes, so it is listed once on a machine."""
    path = listing_folder(repository, kind) / f"{commit}.json"
    if path in _listed:
        return _listed[path]
    recorded = read_json(path) or {}
    usable = "files" in recorded and (is_offline() or recorded.get("endpoint") == endpoint())
    if not usable:
        if is_offline():
            raise DataError(_tell_unknown(repository, commit, kind))

        def ask(hub: Any) -> list[list[Any]]:
            rows = []
            for entry in hub.list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind):
                lfs = getattr(entry, "lfs", None)
                if hasattr(entry, "size"):  # a folder has none
                    rows.append([entry.path, entry.size, lfs.sha256 if lfs else None, None if lfs else entry.blob_id])
            return rows

        try:
            rows = _ask(repository, kind, _TRIES if "files" not in recorded else _TRIES_WITH_RECORD, ask)
        except PassingError:
            if "files" not in recorded:
                raise
        else:
            _files(repository, kind, commit, rows)  # refuses what must not be recorded
            recorded = {"repository": repository, "kind": kind, "commit": commit, "endpoint": endpoint(), "files": rows}
            write_json(path, recorded)
    files = _files(repository, kind, commit, recorded["files"])
    _listed[path] = files
    return files


def _files(repository: str, kind: str, commit: str, rows: Iterable[Sequence[Any]]) -> list[HubFile]:
    return sorted((HubFile(repository, kind, commit, *row) for row in rows), key=lambda file: file.path)


def _commit_of(hub: Any, repository: str, revision: str, kind: str) -> str:
    return str(hub.repo_info(repository, revision=revision, repo_type=kind, timeout=_SILENCE_SECONDS).sha)


def _ask(repository: str, kind: str, tries: int, question: Callable[[Any], Any]) -> Any:
    """Return the Hub's answer; a fault that may pass is tried again with growing pauses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # of its HTTP library

    for number in range(tries):
        try:
            return question(HfApi(endpoint=endpoint(), library_name="mlxchat"))
        except (HTTPError, OSError, ValueError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            status = 400 if isinstance(error, HFValidationError) else status
            reason = " ".join(str(error).split())[:300]
        # Outside of the handler: an error that is raised in there would count as one that may pass, as its cause is.
        if status is not None and status < 500 and status not in (408, 425, 429):
            hint = " If it is not public, set HF_TOKEN." if status in (401, 403) else ""
            raise DataError(f"{repository}: the Hub at {endpoint()} has no such {kind} or revision ({reason}).{hint}")
        if number + 1 < tries:
            time.sleep(FIRST_PAUSE_SECONDS * 2**number)
    raise PassingError(f"{repository}: the Hub at {endpoint()} cannot be asked now ({reason}).")


def _tell_unknown(repository: str, revision: str, kind: str) -> str:
    return (
        f"{repository}: nothing of this {kind} at revision {revision} is on this machine, and HF_HUB_OFFLINE is set. "
        f"{tell_command()}"
    )


def tell_command() -> str:
    """Return what to type where there is a network, with the settings of this command line."""
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    # What `data show` calls a mixture is one of sft to everybody else.
    words = [f"mixture@sft.{word}" if word.startswith("mixture=") else word for word in words]
    settings = f" {shlex.join(words)}" if words else ""
    return f"Where there is a network, run: mlxchat data fetch{settings}"
