"""Files of the Hugging Face Hub and plain downloads: each is fetched once, verified, and shared by all runs.

The Hub's files are fetched by huggingface_hub into its own cache (HF_HOME) and hashed afterwards. Listings are recorded
in `cache_folder()`: with HF_HUB_OFFLINE, or without a network, the recorded listing is used.
"""

import fnmatch
import hashlib
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from filelock import FileLock

from mlxchat.config.wording import format_bytes
from mlxchat.errors import DataError, MlxchatError, PassingError
from mlxchat.hub.cache import (
    HubFile,
    cache_folder,
    check_space,
    checksum_of,
    folder_name,
    has_content,
    hub_cache,
    is_offline,
    missing_bytes,
    note_verified,
)
from mlxchat.store.files import read_json, write_json

TRIES = 5  # with pauses of 0.5, 1, 2, 4 s between them; huggingface_hub retries inside each of them, too
FIRST_PAUSE_SECONDS = 0.5
_PASSING_STATUS = (408, 425, 429)
_WORKERS = 4
_POLL_SECONDS = 0.1
_COMMIT = re.compile(r"[0-9a-f]{40}")

Check = Callable[[], None]
"""Called repeatedly during a transfer; it may raise to stop it."""
_T = TypeVar("_T")

# (Hub, repository, revision, kind) → commit: a run uses one commit even if a new one is uploaded meanwhile.
_commits: dict[tuple[str, str, str, str], str] = {}


# Requests and their faults


def endpoint() -> str:
    """Return the Hub's address: HF_ENDPOINT, or the real one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_client(token: str | None = None) -> Any:
    """Return huggingface_hub's client of the current endpoint, which transfers over plain HTTP.

    hf_xet retries silently for minutes where a Hub has no Xet storage or it does not answer, and cannot be stopped.
    """
    from huggingface_hub import HfApi, constants

    constants.HF_HUB_DISABLE_XET = True
    return HfApi(endpoint=endpoint(), token=token, library_name="mlxchat")


def fetch_command() -> str:
    """Return a sentence with the command that fetches everything, with the settings of this command line."""
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    return f"On a machine with network access, run: mlxchat data fetch {shlex.join(words)}".rstrip()


def _offline(problem: str) -> DataError:
    return DataError(f"{problem}, and HF_HUB_OFFLINE is set. {fetch_command()}")


class _WrongContent(Exception):
    """A complete download has another checksum than it must have."""


def _retried(request: Callable[[], _T], name: str, thing: str, *, tries: int = TRIES) -> _T:
    """Return what a request returns; transient faults are retried with growing pauses, wrong content once.

    `name` is what is requested and `thing` what a server that refuses does not have, for messages. What remains is a
    DataError (absent, refused, wrong content, full disk) or a PassingError (the server does not answer).
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP library

    for number in range(tries):
        fault: MlxchatError
        try:
            return request()
        except _WrongContent as error:
            fault = DataError(f"{name} is corrupt: {error}. Nothing was kept. The server or a proxy damages it")
            is_last = number > 0
        except (HTTPError, OSError, ValueError) as error:
            fault = _fault_of(error, name, thing)
            is_last = not isinstance(fault, PassingError)
        if is_last or number + 1 == tries:
            break
        time.sleep(FIRST_PAUSE_SECONDS * 2**number)
    # Outside the handler: raised inside, it would be classified by its cause as transient.
    raise fault


def _fault_of(error: Exception, name: str, thing: str) -> MlxchatError:
    """Return an exception of a request as an error of one line."""
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of the request for the file's headers
    is_remote = isinstance(error, (HTTPError, ConnectionError, TimeoutError))
    if isinstance(error, OSError) and not is_remote and error.errno is not None:
        return DataError(f"{name} cannot be written: {error.strerror} ({error.filename or 'HF_HOME or MLXCHAT_CACHE'})")
    server = "its server" if "://" in name else f"the Hub at {endpoint()}"
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", 500)
    if isinstance(error, HFValidationError) or (status < 500 and status not in _PASSING_STATUS):
        hint = " If it is not public, set HF_TOKEN to a token that may read it." if status in (401, 403) else ""
        return DataError(f"{name}: {server} has no such {thing} ({reason}).{hint}")
    return PassingError(f"{name}: {server} does not answer ({reason}). The same command continues.")


# Listings


def list_files(repository: str, *, revision: str = "main", pattern: str = "*", kind: str = "dataset") -> list[HubFile]:
    """Return the files of a repository at the current commit of `revision` (commit, tag or branch), sorted by path.

    `pattern` is a shell pattern of the path in which * also matches slashes. DataError: there is no such repository or
    revision, or HF_HUB_OFFLINE is set and no listing is recorded; PassingError: no answer and no record.
    """
    commit = _resolve(repository, revision, kind)
    record = _record(repository, kind, f"{commit}.json")
    if (files := _read_listing(record)) is None:  # a commit's files never change: listed once per machine
        if is_offline():
            raise _offline(f"{repository}: this {kind} at revision {revision} is not on this machine")
        from huggingface_hub.hf_api import RepoFile

        def request() -> list[RepoFile]:
            tree = hub_client().list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind)
            return [entry for entry in tree if isinstance(entry, RepoFile)]

        rows = [
            [entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, None if entry.lfs else entry.blob_id]
            for entry in _retried(request, repository, f"{kind} or revision")
        ]
        write_json(record, {"repository": repository, "kind": kind, "commit": commit, "files": rows})
        files = _read_listing(record) or []
    return [file for file in files if fnmatch.fnmatchcase(file.path, pattern)]


def find_commit(repository: str, revision: str) -> str | None:
    """Return the commit of a data set's revision, for a key; None if neither the Hub nor a record has it.

    For a tag or a branch one request is made per process, for at most 10 seconds.
    """
    if _COMMIT.fullmatch(revision):
        return revision
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


def _record(repository: str, kind: str, name: str) -> Path:
    """Return the file in our cache that records a commit's listing, or a revision's commit."""
    return cache_folder() / "listings" / folder_name(repository, kind) / name


def _ref(repository: str, revision: str, kind: str) -> Path:
    return _record(repository, kind, f"refs/{quote(revision, safe='')}")


def _resolve(repository: str, revision: str, kind: str, *, is_plan: bool = False) -> str | None:
    """Return the commit of a revision by the Hub, and record it; offline the recorded one, or None."""
    key = (endpoint(), repository, revision, kind)
    if key in _commits:
        return _commits[key]
    commit: str | None = (read_json(_ref(repository, revision, kind)) or {}).get("commit")
    if not is_offline() and revision != commit:  # not a commit itself
        try:
            info = _retried(
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
    if commit is not None:
        _commits[key] = commit
    return commit


def _read_listing(path: Path) -> list[HubFile] | None:
    """Return the files of a recorded listing, sorted by path; None if there is no record."""
    if (recorded := read_json(path)) is None:
        return None
    where = (recorded["repository"], recorded["kind"], recorded["commit"])
    return sorted((HubFile(*where, *row) for row in recorded["files"]), key=lambda file: file.path)


# Files of the Hub


def fetch_files(files: Iterable[HubFile], *, check: Check = lambda: None) -> list[Path]:
    """Return the paths of files, complete and verified; missing ones are downloaded. Nothing is hashed twice.

    `check` is called repeatedly; it may raise to stop, and complete files are kept. DataError: the disk is full,
    HF_HUB_OFFLINE is set, or a file is corrupt in every download; PassingError: the Hub does not answer.
    """
    files = list(files)
    if missing := [file for file in files if not has_content(file.place, file.etag)]:
        what = f"{', '.join(sorted({file.repository for file in missing}))} ({len(missing)} files to fetch)"
        total = missing_bytes(missing)
        if is_offline():
            first = ", ".join(file.path for file in missing[:3]) + (" …" if len(missing) > 3 else "")
            raise _offline(f"{what}: {format_bytes(total)} are not on this machine ({first})")
        check_space(hub_cache(), total, what)
        _await(_start(partial(_fetch_file, file) for file in missing), check)
    return [file.place for file in files]


def fetch_ahead(files: Sequence[HubFile]) -> None:
    """Fetch files in the background in this order, unless HF_HUB_OFFLINE is set.

    A reader whose file is missing fetches it or waits for its lock, so a failure here costs only time.
    """
    if not is_offline():
        _start(partial(_fetch_file, file, is_shown=False) for file in files)


def _fetch_file(file: HubFile, *, is_shown: bool = True) -> None:
    """Download one file of the Hub into its cache and compare its checksum; the library locks it meanwhile."""

    def request() -> None:
        if has_content(file.place, file.etag):
            return
        if file.place.exists():
            file.discard()  # its content is wrong; the library would keep it
        hub_client().hf_hub_download(
            file.repository, file.path, repo_type=file.kind, revision=file.revision, cache_dir=hub_cache(),
            tqdm_class=_bar(is_shown=is_shown),
        )  # fmt: skip
        if not has_content(file.place, file.etag):
            found = checksum_of(file.place, like=file.etag)
            file.discard()
            raise _WrongContent(f"its {'sha256' if file.sha256 else 'git id'} is {found}, not {file.etag}")

    _retried(request, f"{file.repository}/{file.path}", "file")


def _bar(*, is_shown: bool = True) -> Any:
    """Return huggingface_hub's progress bar, shown after a second and removed at the end."""
    from huggingface_hub.utils.tqdm import tqdm

    return partial(tqdm, leave=False, delay=1, disable=None if is_shown else True)


def _start(jobs: Iterable[Callable[[], object]]) -> list[Future[object]]:
    """Call jobs in this order in some daemon threads, which end with the process."""
    pairs = [(job, Future[object]()) for job in jobs]
    waiting = iter(pairs)  # shared: each thread takes the next job

    def work() -> None:
        for job, future in waiting:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)

    for _ in range(min(_WORKERS, len(pairs))):
        threading.Thread(target=work, name="fetch", daemon=True).start()
    return [future for _, future in pairs]


def _await(futures: list[Future[object]], check: Check) -> None:
    """Wait for jobs and raise their first error; where `check` raises, those that have not begun never will."""
    try:
        while wait(futures, timeout=_POLL_SECONDS).not_done:
            check()
    finally:
        for future in futures:
            future.cancel()
    for future in futures:
        future.result()


# Plain addresses


def fetch_url(url: str, *, sha256: str | None = None, check: Check = lambda: None) -> Path:
    """Return the path of a URL's file, which is downloaded once; without a `sha256` only its length is checked.

    DataError: access is refused, the content is wrong, or HF_HUB_OFFLINE is set; PassingError: no answer.
    """
    place = url_place(url)

    def is_there() -> bool:
        known = find_content(url, None)
        return known is not None and sha256 in (None, known) and has_content(place, known)

    def fetch() -> None:
        from huggingface_hub.file_download import http_get

        with FileLock(place.with_name("fetch.lock")):
            if is_there():
                return
            part = place.with_name(f"{place.name}.part")
            with part.open("wb") as file:
                http_get(url, file, headers={"Accept-Encoding": "identity"}, tqdm_class=_bar())
                os.fsync(file.fileno())
            found = checksum_of(part)
            if sha256 not in (None, found):
                part.unlink()
                raise _WrongContent(f"its sha256 is {found}, not {sha256}")
            part.replace(place)
            note_verified(found, place)
            about = {"url": url, "revision": None, "sha256": found, "bytes": place.stat().st_size}
            write_json(place.with_name("source.json"), about)

    if not is_there():
        if is_offline():
            raise _offline(f"{url} is not on this machine")
        place.parent.mkdir(parents=True, exist_ok=True)
        _await(_start([partial(_retried, fetch, url, "file")]), check)
    return place


def find_content(url: str, sha256: str | None) -> str | None:
    """Return the sha256 of what `fetch_url` returns: `sha256` if given, else that of the download; None: unknown."""
    place = url_place(url)
    known = read_json(place.with_name("source.json")) if sha256 is None and place.exists() else None
    return str(known["sha256"]) if known else sha256


def url_place(url: str) -> Path:
    """Return the path of a URL's file in the cache."""
    folder = cache_folder() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16]
    return folder / (Path(urlsplit(url).path).name or "index")


def record(source: HubFile | Path) -> dict[str, Any]:
    """Return the record of a file of the Hub, or of the path from `fetch_url`: url, revision, sha256, bytes."""
    if isinstance(source, HubFile):
        sha256 = source.sha256 or (checksum_of(source.place) if source.place.exists() else None)
        url = f"hf://{source.kind}s/{source.repository}/{source.path}"
        return {"url": url, "revision": source.revision, "sha256": sha256, "bytes": source.bytes}
    known: dict[str, Any] = read_json(source.with_name("source.json"))
    return known
