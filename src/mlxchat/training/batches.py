"""Batches of rows and their sources."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxchat.data.packing import Ints, RowStream, trim_rows


@dataclass(frozen=True)
class Batch:
    """Rows of one iteration: ids (B, T), targets (B, T) with −1 where no loss is taken, weights (B, T).

    The loss is Σ weight × cross-entropy. With weights 1 / number of targets it is the mean over the iteration's
    tokens, whatever the micro-batches; in RL the weights are advantages.
    """

    ids: Ints
    targets: Ints
    weights: np.ndarray[Any, np.dtype[np.float32]]
    offset: float = 0.0
    """Added to the reported loss, where the weights express the gradient of another loss."""


def mean_batch(rows: Sequence[tuple[Ints, Ints]], *, trimmed: bool = False) -> Batch:
    """Return rows as a batch whose loss is the mean over all targets; `trimmed` removes their common padding."""
    ids = np.stack([row[0] for row in rows])
    targets = np.stack([row[1] for row in rows])
    if trimmed:
        ids, targets = trim_rows(ids, targets)
    counted = targets >= 0
    return Batch(ids, targets, (counted / max(1, int(counted.sum()))).astype(np.float32))


class BatchSource:
    """A source of one batch for each iteration; here one without a position."""

    waited_seconds = 0.0
    """Seconds spent waiting for data so far."""

    def next_batch(self, iteration: int) -> Batch:
        """Return the batch of an iteration."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Prepare the next batch while the device computes; position and documents stay those of the last one."""

    def documents(self) -> list[str]:
        """Return the names of the documents of the last batch, for warnings."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch, as JSON data."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""


class RowBatches(BatchSource):
    """`num_rows` rows of a stream for each iteration."""

    def __init__(self, rows: RowStream, num_rows: int, *, trimmed: bool = False) -> None:
        """Start at the stream's position; `trimmed` removes the padding that all rows of a batch end with."""
        self._rows, self._num_rows, self._trimmed = rows, num_rows, trimmed
        # After the last whole batch: the next one may be interrupted.
        self._state, self._counts = rows.state(), rows.counts()
        self._addresses: list[Any] = []
        self._ahead: Future[tuple[Batch, dict[str, Any], dict[str, float], list[Any]]] = Future()

    def next_batch(self, iteration: int) -> Batch:
        """Return the next rows; their loss is the mean over all targets of the iteration."""
        began = time.perf_counter()
        self.prepare()
        self.waited_seconds += time.perf_counter() - began
        ahead = self._ahead
        self._ahead = Future()
        batch, self._state, self._counts, self._addresses = ahead.result()
        return batch

    def prepare(self) -> None:
        """Read the next rows; if that fails, `next_batch` raises the error."""
        if self._ahead.done():
            return
        try:
            rows, addresses = [], list[Any]()
            for _ in range(self._num_rows):
                rows.append(self._rows.next_row())
                addresses += self._rows.placed
            batch = mean_batch(rows, trimmed=self._trimmed)
            self._ahead.set_result((batch, self._rows.state(), self._rows.counts(), addresses))
        except Exception as error:  # raised again where the batch is taken
            self._ahead.set_exception(error)

    def documents(self) -> list[str]:
        """Return the names of the documents of the last batch."""
        return [self._rows.name(address) for address in self._addresses]

    def counts(self) -> dict[str, float]:
        """Return what the stream counted up to the last batch."""
        return self._counts

    def state(self) -> dict[str, Any]:
        """Return the stream's position after the last batch."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position of the stream."""
        self._rows.restore(state)
        self._state, self._counts = state, self._rows.counts()
        self._addresses = []
        self._ahead = Future()
