"""Lists of a Hub repository's files: requested once per process, and recorded for offline use."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from mlxchat.errors import DataError, PassingError
from mlxchat.hub.cache import (
    HubFile,
    cache_folder,
    check_commit,
    endpoint,
    folder_name,
    is_offline,
    read_json,
    write_json,
)
from mlxchat.hub.downloads import Check, read_answer, retry_after, within

# With pauses of 0.5, 1, 2, 4, 8 s between them; fewer tries where a recorded answer exists.
_TRIES, _TRIES_WITH_RECORD = 6, 2
FIRST_PAUSE_SECONDS = 0.5
_PLAN_SECONDS, ANSWER_SECONDS = 10.0, 120.0
# Limits of a list of files; the Hub's pages have 1,000 files each.
_MOST_PAGES, _MOST_FILES = 1000, 1_000_000
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
            check_commit(repository, commit)
            for name in {quote(revision, safe=""), commit}:
                write_json(known.with_name(name), {"commit": commit, "endpoint": endpoint()})
    _commits[key] = str(commit)
    return _commits[key]


def _request_commit(repository: str, revision: str, kind: str, *, is_plan: bool, is_recorded: bool) -> str:
    """Return the commit by the Hub; for a plan with one try, and none if this Hub did not answer before."""
    look = within(_PLAN_SECONDS) if is_plan else None
    hub = endpoint()
    if is_plan and hub in _silent:
        raise PassingError(f"{repository}: the Hub at {hub} did not answer before.")
    tries = 1 if is_plan else _TRIES_WITH_RECORD if is_recorded else _TRIES
    try:
        return str(_request(repository, kind, tries, lambda: _commit_of(repository, revision, kind, look)))
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
            tries = _TRIES if files is None else _TRIES_WITH_RECORD
            files = _request(repository, kind, tries, lambda: _files_of(repository, commit, kind))
        except PassingError:
            if files is None:
                raise
        else:
            rows = [[file.path, file.bytes, file.sha256, file.git_sha1] for file in files]
            facts = {"repository": repository, "kind": kind, "commit": commit, "endpoint": endpoint()}
            write_json(path, {**facts, "files": rows})
    return files


def _commit_of(repository: str, revision: str, kind: str, look: Check | None) -> str:
    answer, _ = _get_json(f"{_api(repository, kind)}/revision/{quote(revision, safe='')}", look)
    if not isinstance(answer, dict):
        raise ValueError("its answer is not a JSON object")
    return str(answer.get("sha"))


def _files_of(repository: str, commit: str, kind: str) -> list[HubFile]:
    """Return every file of a commit, sorted by path.

    The official client is not used: it follows circular pages, sends the token to any host that a page links to, and
    obeys any Retry-After.
    """
    page: str | None = f"{_api(repository, kind)}/tree/{quote(commit, safe='')}?recursive=true"
    seen: set[str] = set()
    files: list[HubFile] = []
    while page is not None:
        if page in seen or len(seen) == _MOST_PAGES or len(files) > _MOST_FILES:
            fault = "repeats a page" if page in seen else f"has over {_MOST_PAGES:,} pages or {_MOST_FILES:,} files"
            raise DataError(f"{repository}: its list of files {fault} ({page[:200]}). Try again, or use another copy")
        seen.add(page)
        entries, page = _get_json(page)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("its list of files is not a JSON list of objects")
        for entry in entries:
            if entry.get("type") == "file":
                lfs = entry.get("lfs")
                sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
                git_id = None if lfs else entry.get("oid")
                where = (repository, kind, commit, str(entry.get("path", "")))
                files.append(HubFile(*where, entry.get("size"), sha256, git_id))
    return sorted(files, key=lambda file: file.path)


def _api(repository: str, kind: str) -> str:
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily

    validate_repo_id(repository)
    return f"{endpoint()}/api/{kind}s/{repository}"


def _get_json(url: str, look: Check | None = None) -> tuple[Any, str | None]:
    """Return the JSON at a URL of the Hub, and the URL of the next page if there is one.

    Raises:
        HTTPError: an error status or a network failure.
        OSError: the answer took too long.
        ValueError: it is too long, or not JSON.
    """
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # exported lazily

    headers = build_hf_headers(library_name="mlxchat")
    answer, body = read_answer(url, headers, look or within(ANSWER_SECONDS))
    hf_raise_for_status(answer)
    after = answer.links.get("next", {}).get("url")
    if after is not None and not after.startswith(f"{endpoint()}/"):  # another host must not get the token
        after = endpoint() + urlunsplit(urlsplit(after)._replace(scheme="", netloc=""))
    try:
        return json.loads(body), after
    except RecursionError:
        raise ValueError("its answer is nested too deeply") from None


def _request(repository: str, kind: str, tries: int, request: Callable[[], Any]) -> Any:
    """Return the Hub's answer; transient faults are retried with growing pauses."""
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # of its HTTP library

    for number in range(tries):
        try:
            return request()
        except (HTTPError, OSError, ValueError) as error:
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            status = 400 if isinstance(error, HFValidationError) else status
            reason = " ".join(str(error).split())[:300]
            asked_pause = 0.0 if response is None else retry_after(response.headers)
        # Outside the handler: raised inside, the error would be classified by its cause as transient.
        if status is not None and status < 500 and status not in (408, 425, 429):
            hint = " If it is not public, set HF_TOKEN." if status in (401, 403) else ""
            raise DataError(f"{repository}: the Hub at {endpoint()} has no such {kind} or revision ({reason}).{hint}")
        if number + 1 < tries:
            time.sleep(max(asked_pause, FIRST_PAUSE_SECONDS * 2**number))
    raise PassingError(f"{repository}: the Hub at {endpoint()} does not answer ({reason}).")


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
