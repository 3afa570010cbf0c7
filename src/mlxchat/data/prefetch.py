"""Files of the Hub fetched in the background, in the order in which they will be read, while something else computes.

One fetcher for each corpus and process: what the tokenizer's training started goes on while the model trains. Whoever
needs a file that is not there yet fetches it, or waits for the thread that is at it (a lock decides); so the
background may fail, or be far behind, without anybody noticing more than time.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from mlxchat.data.listing import count_files
from mlxchat.errors import DataError, PassingError
from mlxchat.hub.cache import check_space, is_offline, missing_bytes
from mlxchat.hub.files import HubFile, hub_cache

if TYPE_CHECKING:
    from mlxchat.data.shards import Shard

WORKERS = 4
# Without a horizon: so many files are fetched beyond the one that is read.
AHEAD_FILES = 1
_RETRY_SECONDS = 20.0
_END_SECONDS = 2.0


class Fetcher:
    """Threads that fetch the next of a list of files."""

    def __init__(self, files: Sequence[HubFile], *, workers: int = WORKERS) -> None:
        """Fetch nothing yet."""
        self.files = list(files)
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._wish = threading.Condition()
        self._start = self._stop = 0
        self._taken: set[int] = set()
        self._ended = threading.Event()

    def want(self, start: int, stop: int) -> None:
        """Let files start … stop − 1 be fetched, in this order, after what is on its way."""
        with self._wish:
            self._start, self._stop = start, min(len(self.files), max(stop, self._stop))
            if self._ended.is_set() or not self._open():
                return
            while len(self._threads) < self._workers:
                thread = threading.Thread(target=self._work, name=f"fetch {len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._wish.notify_all()

    def close(self) -> None:
        """End the threads; what arrived is kept."""
        self._ended.set()
        with self._wish:
            self._wish.notify_all()
        until = time.monotonic() + _END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _open(self) -> list[int]:
        return [index for index in range(self._start, self._stop) if index not in self._taken]

    def _next(self) -> int | None:
        with self._wish:
            while not self._ended.is_set():
                if found := self._open():
                    self._taken.add(found[0])
                    return found[0]
                self._wish.wait()
        return None

    def _work(self) -> None:
        from mlxchat.hub.client import fetch_file

        while (index := self._next()) is not None:
            file = self.files[index]
            try:
                if not file.is_there():
                    check_space(hub_cache(), missing_bytes([(file.blob, file.bytes)]), file.path)
                    fetch_file(file, check=self._check)
            except _Ended:
                return
            except PassingError:
                with self._wish:
                    self._taken.discard(index)
                self._ended.wait(_RETRY_SECONDS)
            except DataError:
                pass  # it fails again, and is told, once somebody needs the file
            except Exception:  # a thread of ours must not spoil what others compute
                self._ended.wait(_RETRY_SECONDS)

    def _check(self) -> None:
        if self._ended.is_set():
            raise _Ended


class _Ended(Exception):
    """The work is not wanted any more."""


_fetchers: dict[tuple[HubFile, ...], Fetcher] = {}
_registry = threading.Lock()


def fetch_ahead(shards: Sequence[Shard], start: int, chars: float | None = None, density: float | None = None) -> int:
    """Fetch shards from `start` on in the background, unless they are local or the network may not be used.

    Args:
        shards: of a split, in the order in which they are read.
        start: the first one that is not read yet.
        chars: characters that will be read from the beginning; None: only a few files ahead.
        density: characters in a byte of a file, with `chars`.

    Returns:
        The number of shards, from the first, that the wish covers.
    """
    files = tuple(shard.file for shard in shards if shard.file is not None)
    stop = start + AHEAD_FILES
    if chars is not None and density:
        stop = count_files([file.bytes for file in files], chars / density)
    if files and start < len(files) and not is_offline():
        with _registry:
            fetcher = _fetchers.get(files)
            if fetcher is None:
                fetcher = _fetchers[files] = Fetcher(files)
        fetcher.want(start, stop)
    return min(stop, len(files))


def stop_fetching() -> None:
    """End what is fetched in the background."""
    with _registry:
        fetchers = list(_fetchers.values())
        _fetchers.clear()
    for fetcher in fetchers:
        with suppress(RuntimeError):  # of a thread that never started
            fetcher.close()


atexit.register(stop_fetching)
