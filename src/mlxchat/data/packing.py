"""Packs documents and conversations into rows of equal length, and rows into batches.

- best_fit: the longest buffered sequence that fits is placed, the oldest among equal ones. Documents fill rows: if none
  fits, the shortest is cropped and its rest dropped (nanochat's pretraining of 2026). Conversations stay whole, and
  padding without loss fills the rest (its SFT of 2026).
- alone: one conversation per row, then padding (its SFT of 2025).
- stream: slices of one stream of tokens; nothing is dropped (its pretraining and midtraining of 2025).

Rows are produced one at a time, so the micro-batch size does not affect the data order. The state contains the buffered
sequences, so a resumed training gets the same rows. The buffer holds addresses and lengths; tokens are copied from
their file when a row is built.
"""

import bisect
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from mlxchat.data.tokens import Array, Documents, Tokens

IGNORED = -1
_REFILL_DOCUMENTS = 128
_WIDTH_STEP = 128

Ints = np.ndarray[Any, np.dtype[np.int32]]
Row = tuple[Ints, Ints]  # inputs (T,) and targets (T,), which are IGNORED where there is no loss


class EndOfText(Exception):
    """A source that is read once has no further tokens."""


class ShuffledConversations:
    """Conversations in an order that depends on seed and epoch only (seed None: unshuffled); endless unless `once`."""

    def __init__(
        self, conversations: Tokens, seed: int | None, name: Callable[[int], str] = str, *, once: bool = False
    ) -> None:
        self.name = name
        self.ids = conversations.ids
        self.trained = conversations.trained
        self._lengths = conversations.lengths(0, len(conversations))
        self._seed = seed
        self._once = once
        self.restore({"epoch": 0, "next": 0})

    @property
    def left(self) -> int:
        """Conversations left in this epoch."""
        return len(self._order) - self._next

    def next(self, count: int) -> list[tuple[int, int]]:
        """Return the indices and lengths of at most `count` conversations of one epoch; none at the end."""
        if not self.left and not self._once:
            self.restore({"epoch": self.epoch + 1, "next": 0})
        found = self._order[self._next : self._next + count]
        self._next += len(found)
        return [(index, self._lengths[index]) for index in found]

    def length(self, index: int) -> int:
        """Return the length of a conversation in tokens."""
        return self._lengths[index]

    def state(self) -> dict[str, Any]:
        """Return the epoch and the position in it."""
        return {"epoch": self.epoch, "next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self.epoch: int = state["epoch"]
        self._next: int = state["next"]
        self._order = list(range(len(self._lengths)))
        if self._seed is not None:
            random.Random(f"{self._seed}/{self.epoch}").shuffle(self._order)

    def close(self) -> None:
        """Do nothing: there is no background work."""


class RowStream:
    """Rows of a source; endless unless the source is read once.

    With padding, no best-fit row has sequences of two epochs, and longer sequences than a row are truncated. A batch of
    B streamed rows takes B × T + 1 tokens: each row's last target is the next row's first input, except in the batch's
    last row, whose last target is never an input.
    """

    def __init__(
        self,
        packing: str,
        source: Documents | ShuffledConversations,
        *,
        row_tokens: int,
        buffer_size: int = 1,
        batch_rows: int = 1,
        padding: int | None = None,
        train_on: str | None = None,
    ) -> None:
        """Start at the source's position.

        `packing` is best_fit, which chooses from `buffer_size` sequences, stream, with B = `batch_rows`, or, for
        conversations, alone; T is `row_tokens`. For conversations, `padding` is the id that fills a row (<|bos|>, or
        <|assistant_end|> if they are alone) and `train_on` 'assistant' or 'all'; None: each token is a target.
        """
        self.placed: list[Any] = []  # the addresses in the last row
        self._source: Any = source
        self.row_tokens = row_tokens
        self._packing = packing
        self._buffer_size = buffer_size if packing == "best_fit" else 1
        self._batch_rows = batch_rows
        self._padding: Any = None if packing == "stream" else padding
        self._train_on = train_on
        self._forget()

    def _forget(self) -> None:
        # Length, arrival and address, sorted, so that a length is found in logarithmic time.
        self._buffer: list[tuple[int, int, Any]] = []
        self._arrivals = 0
        # Of a stream: the used tokens of the buffered sequence, and the rows so far.
        self._used = self._rows = 0
        self._counted = {"placed_tokens": 0, "cropped_tokens": 0, "truncated": 0}

    @property
    def epoch(self) -> int:
        """Completed passes over the source, whose last token was used."""
        ends = self._padding is not None and not self._buffer and not self._source.left
        return int(self._source.epoch) + ends

    def next_row(self) -> Row:
        """Return the next row; raises EndOfText if the source has ended."""
        row = np.empty(self.row_tokens + 1, dtype=np.int32)
        trained = np.zeros(self.row_tokens + 1, dtype=np.bool_)
        filled = 0
        self.placed = []
        pieces = self._next_slices if self._packing == "stream" else self._best_fitting
        for address, start, stop in pieces(len(row)):
            end = filled + stop - start
            row[filled:end] = self._source.ids(address)[start:stop]
            trained[filled:end] = self._trained(address, start, stop)
            filled = end
            self.placed.append(address)
        if filled < 2:  # no target
            raise EndOfText
        row[filled:] = row[0] if self._padding is None else self._padding
        targets = np.where(trained[1:], row[1:], np.int32(IGNORED))
        if self._packing == "alone":  # as in nanochat, where the last id is only a target
            row[filled - 1 :] = self._padding
        return row[:-1], targets

    def _trained(self, address: Any, start: int, stop: int) -> Array | bool:
        if self._train_on == "assistant":
            mask: Array = self._source.trained(address)[start:stop]
            return mask
        if self._train_on == "all" and self._padding is not None:  # but not <|bos|>
            return np.arange(start, stop) > 0
        return True

    def _best_fitting(self, space: int) -> Iterator[tuple[Any, int, int]]:
        """Yield the pieces of the next row: address, start and stop in its ids."""
        row_is_begun = False
        while space:
            self._fill(row_is_begun=row_is_begun)
            place = self._find_largest(space)
            if place is None:
                break
            length, _, address = self._buffer.pop(place)
            used = min(length, space)
            yield address, 0, used
            space -= used
            self._counted["placed_tokens"] += used
            self._counted["cropped_tokens"] += length - used
            if self._packing == "alone":
                break
            row_is_begun = True

    def _find_largest(self, space: int) -> int | None:
        """Return the place of the longest buffered sequence of at most `space` tokens, or of one to crop, or None."""
        end = bisect.bisect_left(self._buffer, (space + 1,))
        if end == 0:
            return 0 if self._padding is None and self._buffer else None  # the shortest
        return bisect.bisect_left(self._buffer, (self._buffer[end - 1][0],), 0, end)

    def _fill(self, *, row_is_begun: bool) -> None:
        """Read sequences into the buffer; with padding, those of the next epoch only for a new row."""
        while (wanted := self._buffer_size - len(self._buffer)) > 0:
            if self._padding is not None and not self._source.left and (row_is_begun or self._buffer):
                break
            found = self._source.next(_REFILL_DOCUMENTS if self._padding is None else wanted)
            if not found:
                break
            for address, length in found:
                self._add(address, length)

    def _add(self, address: Any, length: int) -> None:
        longest = self.row_tokens + 1
        if self._padding is not None and length > longest:
            self._counted["truncated"] += 1
            length = longest
        bisect.insort(self._buffer, (length, self._arrivals, address))
        self._arrivals += 1

    def _next_slices(self, space: int) -> Iterator[tuple[Any, int, int]]:
        while space:
            if not self._buffer or self._used == self._buffer[0][0]:
                # One at a time, so that the source's epoch is the sequence's.
                self._buffer = [(length, 0, address) for address, length in self._source.next(1)]
                self._used = 0
            if not self._buffer:
                break
            length, _, address = self._buffer[0]
            start = self._used
            self._used = min(length, start + space)
            space -= self._used - start
            yield address, start, self._used
        self._rows += 1
        if not space and self._rows % self._batch_rows:
            self._used -= 1

    def name(self, address: Any) -> str:
        """Return an address's name for messages."""
        return str(self._source.name(address))

    def counts(self) -> dict[str, float]:
        """Return counts up to the last row: truncated conversations; or epochs, cropped tokens and their share."""
        if self._train_on is not None:
            return {"truncated_conversations": self._counted["truncated"]}
        cropped = self._counted["cropped_tokens"]
        read = cropped + self._counted["placed_tokens"]
        return {"epochs": self.epoch, "cropped_tokens": cropped, "cropped_frac": cropped / max(1, read)}

    def state(self) -> dict[str, Any]:
        """Return the position as JSON data: the source's, the buffered addresses in order of arrival, and counts."""
        waiting = [address for _, _, address in sorted(self._buffer, key=itemgetter(1))]
        position = {"cursor": self._source.state(), "waiting": waiting, "counted": dict(self._counted)}
        return position | {"used": self._used, "rows": self._rows}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self._source.restore(state["cursor"])
        self._forget()
        for waiting in state["waiting"]:
            address = tuple(waiting) if isinstance(waiting, list) else waiting  # JSON has no tuples
            self._add(address, self._source.length(address))
        self._counted = dict(state["counted"])
        self._used, self._rows = state["used"], state["rows"]

    def close(self) -> None:
        """End the source's background work, until the next `restore`."""
        self._source.close()


def trim_rows(ids: Ints, targets: Ints) -> tuple[Ints, Ints]:
    """Return ids and targets (B, T) without trailing columns that have no targets; widths are multiples of 128."""
    used = np.flatnonzero((targets >= 0).any(axis=0))
    width = min(ids.shape[1], -(-(used[-1] + 1 if len(used) else 1) // _WIDTH_STEP) * _WIDTH_STEP)
    return ids[:, :width], targets[:, :width]


def take_validation(rows: RowStream, tokens: int, setting: str) -> list[Row]:
    """Return validation rows with `tokens` tokens together, at least one row; print a line if there are fewer.

    The source must be read once, so that no token counts twice. `setting` is the key that `tokens` comes from.
    """
    count = max(1, tokens // rows.row_tokens)
    found: list[Row] = []
    with closing(rows), suppress(EndOfText):
        while len(found) < count:
            found.append(rows.next_row())
    if len(found) < count:
        held = sum(int((targets >= 0).sum()) for _, targets in found)
        print(f"  the validation text has only {held:,} tokens in rows, fewer than {setting}={tokens:,}", flush=True)
    return found


def count_rows(rows: RowStream) -> int:
    """Return the number of rows in the first epoch of a new stream, by packing it."""
    count = 0
    while rows.epoch == 0:
        rows.next_row()
        count += 1
    return count


@dataclass(frozen=True)
class Batch:
    """Rows of one iteration: ids (B, T), targets (B, T) with −1 where no loss is taken, weights (B, T).

    The loss is Σ weight × cross-entropy. With weights 1 / number of targets it is the mean over the iteration's
    tokens, whatever the micro-batches; in RL the weights are advantages.
    """

    ids: Ints
    targets: Ints
    weights: np.ndarray[Any, np.dtype[np.float32]]
    offset: float = 0.0  # added to the reported loss, where the weights express the gradient of another loss


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

    waited_seconds = 0.0  # seconds spent waiting for data so far

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
