"""Files of the Hugging Face Hub and plain downloads: each is fetched once, verified, and shared by all runs.

The Hub's files are fetched by huggingface_hub into its own cache (HF_HOME) and hashed afterwards. Listings are recorded
in `cache_folder()`: with HF_HUB_OFFLINE, or without a network, the recorded listing is used.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from mlxchat.config.wording import format_bytes, plural
from mlxchat.errors import DataError, MlxchatError, PassingError
from mlxchat.hub.cache import (
    HubFile,
    cache_folder,
    check_space,
    checksum_of,
    discard,
    has_content,
    hub_cache,
    is_offline,
    missing_bytes,
    note_verified,
    read_json,
    write_json,
)
from mlxchat.hub.downloads import Check, TransferProgress, WrongContent, endpoint, nothing, prepare_client, retried
from mlxchat.hub.listings import fetch_command, list_files

__all__ = ["HubFile", "fetch_ahead", "fetch_files", "fetch_url", "list_files", "record", "stop_fetching"]

OnBytes = Callable[[int], None]
"""Called with the number of bytes that arrived; negative if they were discarded."""
_WORKERS = 4
_POLL_SECONDS = 0.1
_SILENCE_SECONDS = 30.0


def fetch_files(files: Iterable[HubFile], *, workers: int = _WORKERS, check: Check = nothing) -> list[Path]:
    """Return the paths of files, complete and verified; missing ones are downloaded. Nothing is hashed twice.

    Args:
        files: from `list_files`.
        workers: number of parallel downloads.
        check: called repeatedly; it may raise to stop. Complete files are kept.

    Raises:
        DataError: the disk is full, HF_HUB_OFFLINE is set, or a file is corrupt in every download.
        PassingError: the Hub does not answer.
    """
    files = list(files)
    missing = [file for file in files if not has_content(file.place, file.etag)]
    if missing:
        if is_offline():
            raise DataError(_missing_message(missing))
        total = missing_bytes(missing)
        check_space(hub_cache(), total, _name_of(missing))
        title = f"{missing[0].repository}: {plural(len(missing), 'file')}"
        with TransferProgress(title, total) as progress:
            fetching = Fetching(workers, progress.add)
            fetching.want(missing)
            fetching.finish(check)
    return [file.place for file in files]


def fetch_ahead(files: Sequence[HubFile]) -> None:
    """Fetch files in the background in this order, unless HF_HUB_OFFLINE is set.

    Later calls append to the same queue. A reader whose file is missing fetches it or waits for its lock, so a failure
    here costs only time.
    """
    if files and not is_offline():
        _ahead.want(files)


def stop_fetching() -> None:
    """Stop the background downloads; complete files are kept."""
    global _ahead
    ended, _ahead = _ahead, Fetching()
    ended.close()


def fetch_url(url: str, *, sha256: str | None = None, check: Check = nothing) -> Path:
    """Return the path of a URL's file, which is downloaded once.

    Args:
        url: http or https.
        sha256: of the content, in hex; None: only its length is checked.
        check: may raise to stop.

    Raises:
        DataError: access is refused, the content differs from `sha256`, or HF_HUB_OFFLINE is set.
        PassingError: the server does not answer.
    """
    place = url_place(url)
    note = place.with_name("source.json")

    def is_there() -> bool:
        known = (read_json(note) or {}).get("sha256")
        return known is not None and sha256 in (None, known) and has_content(place, known)

    if is_there():
        return place
    if is_offline():
        raise DataError(f"{url} is not on this machine, and HF_HUB_OFFLINE is set. {fetch_command()}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name("fetch.lock")), TransferProgress(place.name, 0) as progress:
        if not is_there():
            part = place.with_name(f"{place.name}.part")
            arrived = retried(lambda: _receive(url, part, sha256, progress.add, check), url, "file")
            part.replace(place)
            note_verified(arrived, place)
            write_json(note, {"url": url, "revision": None, "sha256": arrived, "bytes": place.stat().st_size})
    return place


def _receive(url: str, part: Path, sha256: str | None, on_bytes: OnBytes, check: Check) -> str:
    """Download a URL to a file and return its sha256."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # exported lazily

    digest, count = hashlib.sha256(), 0
    headers = {"Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=_SILENCE_SECONDS) as answer, part.open("wb") as file:
        hf_raise_for_status(answer)
        length = answer.headers.get("Content-Length", "")
        check_space(part.parent, int(length) if length.isdecimal() else 0, url)
        try:
            for block in answer.iter_bytes():  # raises if the connection ends before Content-Length
                check()
                file.write(block)
                digest.update(block)
                count += len(block)
                on_bytes(len(block))
        except BaseException:
            on_bytes(-count)
            raise
        os.fsync(file.fileno())
    if sha256 is not None and digest.hexdigest() != sha256:
        part.unlink()
        raise WrongContent(f"its sha256 is {digest.hexdigest()[:12]}… instead of {sha256[:12]}…")
    return digest.hexdigest()


def find_content(url: str, sha256: str | None) -> str | None:
    """Return the sha256 of what `fetch_url` returns: `sha256` if given, else that of the download; None: unknown."""
    place = url_place(url)
    known = (read_json(place.with_name("source.json")) or {}).get("sha256") if place.exists() else None
    return sha256 or (str(known) if known else None)


def url_place(url: str) -> Path:
    """Return the path of a URL's file in the cache."""
    folder = cache_folder() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16]
    return folder / (Path(urlsplit(url).path).name or "index")


def record(source: HubFile | Path) -> dict[str, Any]:
    """Return the record of a fetched file for manifests: url, revision, sha256, bytes.

    Args:
        source: a file of the Hub, or the path from `fetch_url`.
    """
    if isinstance(source, HubFile):
        sha256 = source.sha256 or (checksum_of(source.place) if source.place.exists() else None)
        url = f"hf://{source.kind}s/{source.repository}/{source.path}"
        return {"url": url, "revision": source.revision, "sha256": sha256, "bytes": source.bytes}
    known = read_json(source.with_name("source.json"))
    if isinstance(known, dict):
        return known
    return {"url": str(source), "revision": None, "sha256": checksum_of(source), "bytes": source.stat().st_size}


class Fetching:
    """Threads that download files of the Hub, each once, in the order in which they are wanted."""

    def __init__(self, workers: int = _WORKERS, on_bytes: OnBytes = lambda count: None) -> None:
        """`on_bytes` is called with the bytes that arrive."""
        self._on_bytes = on_bytes
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="fetch")
        self._wanted: dict[HubFile, Future[None]] = {}
        self._is_ended = threading.Event()

    def want(self, files: Iterable[HubFile]) -> None:
        """Append files to the queue; files that failed before are retried."""
        for file in files:
            done = self._wanted.get(file)
            if done is None or (done.done() and done.exception() is not None):
                self._wanted[file] = self._pool.submit(_fetch_file, file, self._on_bytes, self._look)

    def finish(self, check: Check) -> None:
        """Wait until every file has arrived or failed; then raise a failure, permanent ones before transient ones."""
        waiting = set(self._wanted.values())
        try:
            while waiting:
                waiting = wait(waiting, timeout=_POLL_SECONDS).not_done
                check()
        finally:
            self.close()
        faults = [fault for each in self._wanted.values() if (fault := each.exception()) is not None]
        for fault in sorted(faults, key=lambda each: isinstance(each, PassingError)):
            if not isinstance(fault, MlxchatError):
                raise fault
            more = f"\nAnd {len(faults) - 1} more files." if len(faults) > 1 else ""
            raise type(fault)(f"{fault}{more}")

    def close(self) -> None:
        """Stop the downloads; complete files are kept."""
        self._is_ended.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _look(self) -> None:
        if self._is_ended.is_set():
            raise _Ended


class _Ended(Exception):
    """`close` was called."""


_ahead = Fetching()


def _fetch_file(file: HubFile, on_bytes: OnBytes, check: Check) -> None:
    """Download one file of the Hub into its cache and compare its checksum; the library locks it meanwhile."""
    check()
    if not has_content(file.place, file.etag):
        retried(lambda: _fetch_once(file, on_bytes, check), f"{file.repository}/{file.path}", "file")


def _fetch_once(file: HubFile, on_bytes: OnBytes, check: Check) -> None:
    from huggingface_hub import hf_hub_download

    class Bar:
        """Counts bytes, and can stop the download; huggingface_hub calls it as it calls tqdm."""

        def __init__(self, **described: Any) -> None:
            self.count = 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
            if kind is not None:
                on_bytes(-self.count)

        def update(self, count: int) -> None:
            self.count += count
            on_bytes(count)
            check()

    prepare_client()
    if file.place.exists() and not has_content(file.place, file.etag):
        discard(file)  # the library would keep it
    hf_hub_download(
        file.repository,
        file.path,
        repo_type=file.kind,
        revision=file.revision,
        cache_dir=hub_cache(),
        endpoint=endpoint(),
        library_name="mlxchat",
        tqdm_class=Bar,
    )
    if not has_content(file.place, file.etag):
        found = checksum_of(file.place, like=file.etag)
        on_bytes(-file.place.stat().st_size)
        discard(file)
        kind = "sha256" if file.sha256 else "git id"
        raise WrongContent(f"its {kind} is {found[:12]}… instead of {file.etag[:12]}…")


def _name_of(files: Sequence[HubFile]) -> str:
    names = sorted({file.repository for file in files})
    return f"{', '.join(names)} ({len(files)} files to fetch)"


def _missing_message(files: Sequence[HubFile]) -> str:
    size = format_bytes(sum(file.bytes for file in files))
    names = ", ".join(file.path for file in files[:3]) + (" …" if len(files) > 3 else "")
    return f"{_name_of(files)}: {size} are not on this machine ({names}), and HF_HUB_OFFLINE is set. {fetch_command()}"
