"""Files of the Hugging Face Hub and plain downloads: each is fetched once, verified, and shared by all runs.

The Hub's files are fetched by huggingface_hub into its own cache (HF_HOME) and hashed afterwards. Listings are recorded
in `cache_folder()`: with HF_HUB_OFFLINE, or without a network, the recorded listing is used.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from mlxchat.config.wording import format_bytes
from mlxchat.errors import DataError
from mlxchat.hub.cache import (
    HubFile,
    cache_folder,
    check_space,
    checksum_of,
    has_content,
    hub_cache,
    is_offline,
    missing_bytes,
    note_verified,
)
from mlxchat.hub.downloads import WrongContent, hub_client, retried
from mlxchat.hub.listings import fetch_command
from mlxchat.store.files import read_json, write_json

Check = Callable[[], None]
"""Called repeatedly during a transfer; it may raise to stop it."""
_WORKERS = 4
_POLL_SECONDS = 0.1


def fetch_files(files: Iterable[HubFile], *, check: Check = lambda: None) -> list[Path]:
    """Return the paths of files, complete and verified; missing ones are downloaded. Nothing is hashed twice.

    `check` is called repeatedly; it may raise to stop, and complete files are kept. DataError: the disk is full,
    HF_HUB_OFFLINE is set, or a file is corrupt in every download; PassingError: the Hub does not answer.
    """
    files = list(files)
    missing = [file for file in files if not has_content(file.place, file.etag)]
    if not missing:
        return [file.place for file in files]
    what = f"{', '.join(sorted({file.repository for file in missing}))} ({len(missing)} files to fetch)"
    total = missing_bytes(missing)
    if is_offline():
        first = ", ".join(file.path for file in missing[:3]) + (" …" if len(missing) > 3 else "")
        raise DataError(
            f"{what}: {format_bytes(total)} are not on this machine ({first}), and HF_HUB_OFFLINE is set. "
            f"{fetch_command()}"
        )
    check_space(hub_cache(), total, what)
    _await(_start(partial(_fetch_file, file) for file in missing), check)
    return [file.place for file in files]


def fetch_ahead(files: Sequence[HubFile]) -> None:
    """Fetch files in the background in this order, unless HF_HUB_OFFLINE is set.

    A reader whose file is missing fetches it or waits for its lock, so a failure here costs only time.
    """
    if not is_offline():
        _start(partial(_fetch_file, file, is_shown=False) for file in files)


def _start(jobs: Iterable[Callable[[], object]]) -> list[Future[object]]:
    """Call jobs in this order in some daemon threads, which end with the process."""
    waiting = deque((job, Future[object]()) for job in jobs)
    futures = [future for _, future in waiting]

    def work() -> None:
        with suppress(IndexError):  # none is left
            while True:
                job, future = waiting.popleft()
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(job())
                    except BaseException as error:
                        future.set_exception(error)

    for _ in range(min(_WORKERS, len(futures))):
        threading.Thread(target=work, name="fetch", daemon=True).start()
    return futures


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


def _bar(*, is_shown: bool = True) -> Any:
    """Return huggingface_hub's progress bar, shown after a second and removed at the end."""
    from huggingface_hub.utils.tqdm import tqdm

    return partial(tqdm, leave=False, delay=1, disable=None if is_shown else True)


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
            raise WrongContent(f"its {'sha256' if file.sha256 else 'git id'} is {found}, not {file.etag}")

    retried(request, f"{file.repository}/{file.path}", "file")


# Plain addresses


def fetch_url(url: str, *, sha256: str | None = None, check: Check = lambda: None) -> Path:
    """Return the path of a URL's file, which is downloaded once; without a `sha256` only its length is checked.

    DataError: access is refused, the content is wrong, or HF_HUB_OFFLINE is set; PassingError: no answer.
    """
    place = url_place(url)

    def is_there() -> bool:
        known = _sha256_of(place)
        return known is not None and sha256 in (None, known) and has_content(place, known)

    if is_there():
        return place
    if is_offline():
        raise DataError(f"{url} is not on this machine, and HF_HUB_OFFLINE is set. {fetch_command()}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name("fetch.lock")):
        if not is_there():
            _await(_start([lambda: retried(lambda: _receive(url, place, sha256), url, "file")]), check)
    return place


def _receive(url: str, place: Path, sha256: str | None) -> None:
    """Download a URL to a place, and record it."""
    from huggingface_hub.file_download import http_get

    part = place.with_name(f"{place.name}.part")
    with part.open("wb") as file:
        http_get(url, file, headers={"Accept-Encoding": "identity"}, tqdm_class=_bar())
        os.fsync(file.fileno())
    found = checksum_of(part)
    if sha256 not in (None, found):
        part.unlink()
        raise WrongContent(f"its sha256 is {found}, not {sha256}")
    part.replace(place)
    note_verified(found, place)
    about = {"url": url, "revision": None, "sha256": found, "bytes": place.stat().st_size}
    write_json(place.with_name("source.json"), about)


def find_content(url: str, sha256: str | None) -> str | None:
    """Return the sha256 of what `fetch_url` returns: `sha256` if given, else that of the download; None: unknown."""
    return sha256 or _sha256_of(url_place(url))


def _sha256_of(place: Path) -> str | None:
    """Return the recorded sha256 of a plain download; None: it was not completed."""
    found = read_json(place.with_name("source.json")) if place.exists() else None
    return str(found["sha256"]) if found else None


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
