"""Batches from a stream of rows, made ahead in a thread, so that the training step never waits for them."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any, Self

from mlxchat.data.packing import RowStream
from mlxchat.training.step import Batch, mean_batch


@dataclass(frozen=True)
class _Made:
    """A batch, and where its stream stood right after it."""

    batch: Batch
    addresses: list[Any]
    state: dict[str, Any]
    counts: dict[str, float]


class RowBatches:
    """As many rows per iteration as the batch has tokens for.

    What state, counts and documents say is about the last batch that was returned, however far the thread is ahead.
    Leave it as a context manager, or `close` it: then its thread has ended.
    """

    def __init__(self, rows: RowStream, num_rows: int, *, ahead: int = 0, trimmed: bool = False) -> None:
        """Take `num_rows` rows of the stream per iteration, and make up to `ahead` batches before they are wanted.

        0: no thread. Trimmed batches lack the padding that all their rows end with. From now on the stream belongs to
        this object.
        """
        self._rows, self._num_rows, self._ahead, self._trimmed = rows, num_rows, ahead, trimmed
        self._state, self._counts = rows.state(), rows.counts()
        self._addresses: list[Any] = []
        self._queue: queue.Queue[_Made | BaseException] = queue.Queue(max(1, ahead))
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.waited_seconds = 0.0
        """How long `next_batch` took so far, all calls together."""

    def __enter__(self) -> Self:
        """Begin to make batches."""
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the thread."""
        self.close()

    def next_batch(self, iteration: int) -> Batch:
        """Return the next rows; their loss is the mean over all targets of the iteration.

        Raises:
            Exception: whatever making them raised.
        """
        began = time.perf_counter()
        self._start()
        made = self._queue.get() if self._ahead else self._make()
        self.waited_seconds += time.perf_counter() - began
        if isinstance(made, BaseException):
            self.close()
            raise made
        self._state, self._counts, self._addresses = made.state, made.counts, made.addresses
        return made.batch

    def documents(self) -> list[str]:
        """Return what people call the documents of the last batch."""
        return [self._rows.name(address) for address in self._addresses]

    def counts(self) -> dict[str, float]:
        """Return what the stream counted up to the last batch."""
        return self._counts

    def state(self) -> dict[str, Any]:
        """Return the stream's position after the last batch."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position of the stream."""
        self.close()
        self._rows.restore(state)
        self._state, self._counts, self._addresses = state, self._rows.counts(), []

    def close(self) -> None:
        """End the thread, wait for its end, and drop what it made ahead; only `restore` brings the stream back."""
        self._stopping.set()
        self._rows.close()
        if self._thread is not None:
            # The thread puts one more batch at most, for which there is room once the queue is empty.
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join()
            self._thread = None
            self._queue = queue.Queue(max(1, self._ahead))

    def _start(self) -> None:
        if self._ahead and self._thread is None:
            self._stopping.clear()
            self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        made = self._queue
        while not self._stopping.is_set():
            try:
                made.put(self._make())
            except BaseException as error:
                made.put(error)
                return

    def _make(self) -> _Made:
        rows, addresses = [], []
        for _ in range(self._num_rows):
            rows.append(self._rows.next_row())
            addresses += self._rows.placed()
        return _Made(mean_batch(rows, trimmed=self._trimmed), addresses, self._rows.state(), self._rows.counts())
