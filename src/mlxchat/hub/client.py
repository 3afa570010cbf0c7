"""Files of the Hugging Face Hub and plain downloads, each fetched once, verified, and shared by everybody.

The Hub's files lie in its own cache (HF_HOME), laid out as the official client does, so that other programs find them
and we find theirs. Listings are remembered in `cache_folder()`: with HF_HUB_OFFLINE, or when there is no network, what
an earlier call recorded is used. huggingface_hub and its HTTP library are imported when something is to be fetched.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from mlxchat.errors import DataError, MlxchatError, PassingError
from mlxchat.hub.cache import (
    cache_folder,
    check_space,
    is_offline,
    is_verified,
    missing_bytes,
    note_verified,
    read_json,
    write_json,
)
from mlxchat.hub.downloads import Check, Wanted, fetch_into, nothing
from mlxchat.hub.files import HUB, HubFile, endpoint, hub_cache, is_right, link, settle
from mlxchat.hub.listings import list_files, tell_command
from mlxchat.hub.progress import TransferProgress
from mlxchat.runner.fingerprint import hash_file
from mlxchat.runner.progress import format_bytes, plural
from mlxchat.visible import visible

__all__ = ["HubFile", "fetch_file", "fetch_files", "fetch_url", "list_files", "record"]

_POLL_SECONDS = 0.1

OnProgress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes that are wanted."""


def fetch_files(
    files: Iterable[HubFile], *, workers: int = 4, on_progress: OnProgress | None = None, check: Check = nothing
) -> list[Path]:
    """Return where the files lie, each whole and verified; what is not there is fetched. Nothing is hashed twice.

    Args:
        files: of `list_files`.
        workers: how many to fetch at a time.
        on_progress: takes bytes done and wanted; None: a display on the terminal.
        check: called again and again; it may raise, to end the work. What arrived is kept.

    Raises:
        DataError: the disk has no room, the network may not be used, or what arrives is wrong again and again.
        PassingError: the Hub does not answer.
    """
    files = list(files)
    missing = list({file.etag: file for file in files if not settle(file)}.values())
    if missing:
        if is_offline():
            raise DataError(_tell_missing(missing))
        left = missing_bytes((file.blob, file.bytes) for file in missing)
        check_space(hub_cache(), left, _name_of(missing))
        total = sum(file.bytes for file in missing)
        title = f"{missing[0].repository}: {plural(len(missing), 'file')}"
        with TransferProgress(title, total, on_progress, start=total - left) as progress:
            _fetch_all(missing, workers, progress.add, check)
        for file in files:
            settle(file)
    return [file.place for file in files]


def fetch_url(url: str, *, sha256: str | None = None, check: Check = nothing) -> Path:
    """Return where the file of a plain address lies; it is fetched once.

    Args:
        url: http or https.
        sha256: what it must be, in hex; None: what an address of the Hub says of it, or only its size.
        check: may raise, to end the work.

    Raises:
        DataError: it cannot be had, is not what it should be, or the network may not be used.
        PassingError: the server does not answer.
    """
    place = url_place(url)
    name, folder = place.name, place.parent
    note = folder / "source.json"

    def is_there() -> bool:
        known = read_json(note) or {}
        if not place.exists() or not known or sha256 not in (None, known.get("sha256")):
            return False
        return place.stat().st_size == known.get("bytes") and _is_unchanged(known["sha256"], place)

    if is_there():
        return place
    if is_offline():
        raise DataError(f"{url} is not on this machine, and HF_HUB_OFFLINE is set. {tell_command()}")
    trusted = urlsplit(url).netloc in (urlsplit(endpoint()).netloc, urlsplit(HUB).netloc)
    wanted = Wanted(url=url, name=url, sha256=sha256, trusts_etag=trusted)
    with TransferProgress(name, 0, None) as progress:
        arrived = fetch_into(
            place, wanted, folder / "fetch.lock", on_bytes=progress.add, check=check, is_there=is_there
        )
        if arrived is not None:
            note_verified(arrived.sha256, place)
            write_json(note, {"url": url, "revision": None, "sha256": arrived.sha256, "bytes": arrived.bytes})
    return place


def url_place(url: str) -> Path:
    """Return where `fetch_url` puts the file of an address."""
    folder = cache_folder() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16]
    return folder / (Path(urlsplit(url).path).name or "index")


def record(source: HubFile | Path) -> dict[str, Any]:
    """Return what manifests say of a fetched file: url, revision, sha256, bytes.

    Args:
        source: a file of the Hub, or what `fetch_url` returned.
    """
    if isinstance(source, HubFile):
        sha256 = source.sha256 or (hash_file(source.place) if source.place.exists() else None)
        url = f"hf://{source.kind}s/{source.repository}/{source.path}"
        return {"url": url, "revision": source.revision, "sha256": sha256, "bytes": source.bytes}
    known = read_json(source.parent / "source.json")
    if isinstance(known, dict):
        return known
    return {
        "url": str(source), "revision": None, "sha256": hash_file(source), "bytes": source.stat().st_size
    }  # fmt: skip


def _fetch_all(files: Sequence[HubFile], workers: int, on_bytes: Callable[[int], None], check: Check) -> None:
    """Fetch files side by side; one that fails leaves the others to be finished."""
    ended = threading.Event()

    def look() -> None:
        if ended.is_set():
            raise _Ended

    told = threading.Lock()

    def tell(owner: dict[str, Any]) -> None:
        if told.acquire(blocking=False):  # the first one will do
            who = (
                "this one"
                if owner.get("pid") == os.getpid()
                else f"{owner.get('pid', '?')} on {owner.get('host', '?')}"
            )
            said = f"  waits for {owner.get('fetches', 'a file')}, which process {who} is fetching"
            print(visible(said), file=sys.stderr)

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="fetch") as pool:
        running: set[Future[None]] = {pool.submit(fetch_file, file, on_bytes, look, tell) for file in files}
        faults: list[BaseException] = []
        try:
            while running:
                done, running = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
                faults += [fault for future in done if (fault := future.exception()) is not None]
                check()
        except BaseException:
            ended.set()
            for future in running:
                future.cancel()
            raise
    wrong = [fault for fault in faults if not isinstance(fault, PassingError)]
    for fault in wrong or faults:
        if not isinstance(fault, MlxchatError):
            raise fault
        more = f"\nAnd {len(faults) - 1} more files." if len(faults) > 1 else ""
        raise type(fault)(f"{fault}{more}")


def fetch_file(
    file: HubFile,
    on_bytes: Callable[[int], None] = lambda count: None,
    check: Check = nothing,
    on_wait: Callable[[dict[str, Any]], None] = lambda owner: None,
) -> None:
    """Fetch one file of the Hub into its cache, unless it is there; see `fetch_files` for what is raised."""
    if settle(file):
        return

    def headers() -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

        return dict(build_hf_headers(library_name="mlxchat"))

    path = "/".join(quote(part, safe="") for part in file.path.split("/"))
    prefix = "datasets/" if file.kind == "dataset" else ""
    wanted = Wanted(
        url=f"{endpoint()}/{prefix}{file.repository}/resolve/{file.revision}/{path}",
        name=f"{file.repository}/{file.path}", bytes=file.bytes, sha256=file.sha256, git_sha1=file.git_sha1,
        headers=headers,
    )  # fmt: skip
    # The official client's own lock: the two never fetch the same content at the same time.
    lock = hub_cache() / ".locks" / file.folder.name / f"{file.etag}.lock"
    arrived = fetch_into(
        file.blob, wanted, lock, on_bytes=on_bytes, check=check, on_wait=on_wait,
        is_there=lambda: is_right(file, file.blob),
    )  # fmt: skip
    if arrived is not None:
        note_verified(file.etag, file.blob)
    link(file)


def _is_unchanged(sha256: str, path: Path) -> bool:
    if is_verified(sha256, path):
        return True
    if hash_file(path) != sha256:
        return False
    note_verified(sha256, path)
    return True


def _name_of(files: Sequence[HubFile]) -> str:
    names = sorted({file.repository for file in files})
    return f"{', '.join(names)} ({len(files)} files to fetch)"


def _tell_missing(files: Sequence[HubFile]) -> str:
    size = format_bytes(sum(file.bytes for file in files))
    names = ", ".join(file.path for file in files[:3]) + (" …" if len(files) > 3 else "")
    return f"{_name_of(files)}: {size} are not on this machine ({names}), and HF_HUB_OFFLINE is set. {tell_command()}"


class _Ended(Exception):
    """The work is not wanted any more."""
