"""Packs documents and conversations into rows of equal length.

Documents:
- best_fit (nanochat's pretraining of 2026): rows begin with <|bos|> and are full. The longest buffered document that
  fits is placed; if none fits, the shortest is cropped, and its rest is dropped.
- stream (nanochat's pretraining of 2025): slices of one stream of tokens.

Conversations:
- best_fit (nanochat's SFT of 2026): whole conversations, then padding without loss.
- alone (its SFT of 2025): one conversation per row.
- stream (its midtraining of 2025).

Rows are produced one at a time, so the micro-batch size does not affect the data order. The state contains the buffered
sequences, so a resumed training gets the same rows. The buffer holds addresses and lengths; tokens are copied from
their file when a row is built.
"""

from __future__ import annotations

import bisect
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from operator import itemgetter
from typing import Any

import numpy as np

from mlxchat.data.tokens import Array, Documents, Tokens

IGNORED = -1
_REFILL_DOCUMENTS = 128
_WIDTH_STEP = 128

Ints = np.ndarray[Any, np.dtype[np.int32]]
Row = tuple[Ints, Ints]
"""Inputs (T,) and targets (T,), which are IGNORED where there is no loss."""


class EndOfText(Exception):
    """A source that is read once has no further tokens."""


class ShuffledConversations:
    """Conversations in an order that depends on seed and epoch only (seed None: unshuffled); endless unless `once`."""

    def __init__(
        self,
        conversations: Tokens,
        seed: int | None,
        name_of: Callable[[int], str] = "conversation {}".format,
        *,
        once: bool = False,
    ) -> None:
        self.name = name_of
        self.epoch = 0
        self.ids = conversations.ids
        self.trained = conversations.trained
        self._lengths = conversations.lengths(0, len(conversations))
        self._seed = seed
        self._once = once
        self._next = 0
        self._order = self._shuffle()

    @property
    def left(self) -> int:
        """Conversations left in this epoch."""
        return len(self._order) - self._next

    def next(self, count: int) -> list[tuple[int, int]]:
        """Return the indices and lengths of at most `count` conversations of one epoch; none at the end."""
        if not self.left and not self._once:
            self.epoch += 1
            self._next = 0
            self._order = self._shuffle()
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
        """Restore a position."""
        self.epoch = state["epoch"]
        self._next = state["next"]
        self._order = self._shuffle()

    def close(self) -> None:
        """Do nothing: there is no background work."""

    def _shuffle(self) -> list[int]:
        order = list(range(len(self._lengths)))
        if self._seed is not None:
            random.Random(f"{self._seed}/{self.epoch}").shuffle(order)
        return order


class RowStream(ABC):
    """Rows of a source; endless unless the source is read once."""

    def __init__(
        self, source: Any, row_tokens: int, *, padding: int | None = None, train_on: str | None = None
    ) -> None:
        """Start at the source's position.

        Args:
            source: `Documents` or `ShuffledConversations`.
            row_tokens: T.
            padding: id that fills the end of a row; None: the row's first id.
            train_on: for conversations 'assistant' or 'all'; None: documents.
        """
        self.placed: list[Any] = []
        """The addresses in the last row."""
        self._source = source
        self._row_tokens = row_tokens
        self._padding: Any = padding
        self._train_on = train_on
        self._alone = False

    @property
    def epoch(self) -> int:
        """Completed passes over the source."""
        return int(self._source.epoch)

    def next_row(self) -> Row:
        """Return the next row; raises EndOfText if the source has ended."""
        row = np.empty(self._row_tokens + 1, dtype=np.int32)
        trained = np.zeros(self._row_tokens + 1, dtype=np.bool_)
        filled = 0
        self.placed = []
        for address, start, stop in self._pieces(len(row)):
            end = filled + stop - start
            row[filled:end] = self._source.ids(address)[start:stop]
            trained[filled:end] = self._trained(address, start, stop)
            filled = end
            self.placed.append(address)
        if filled < 2:  # no target
            raise EndOfText
        row[filled:] = row[0] if self._padding is None else self._padding
        targets = np.where(trained[1:], row[1:], np.int32(IGNORED))
        if self._alone:
            row[filled - 1 :] = self._padding
        return row[:-1], targets

    @abstractmethod
    def _pieces(self, space: int) -> Iterator[tuple[Any, int, int]]:
        """Yield the pieces of the next row: address, start and stop in its ids; at most `space` ids together."""

    def _trained(self, address: Any, start: int, stop: int) -> Array | bool:
        """Return which ids of a piece are targets."""
        return bool(self._train_on != "assistant") or self._source.trained(address)[start:stop]

    def name(self, address: Any) -> str:
        """Return an address's name for messages."""
        return str(self._source.name(address))

    @abstractmethod
    def counts(self) -> dict[str, float]:
        """Return counts up to the last row: epochs, cropped tokens, truncated conversations."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the position, as JSON data."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Restore a position."""

    def close(self) -> None:
        """End the source's background work, until the next `restore`."""
        self._source.close()


class BestFitRows(RowStream):
    """Rows of the longest buffered sequences that fit; the oldest among equal ones.

    Without padding, what does not fit is cropped, and every token but the row's first is a target. With padding,
    sequences stay whole, unless they are longer than a row, and no row has sequences of two epochs. `alone` puts one
    into each row, whose last id is only a target, as in nanochat.
    """

    def __init__(
        self,
        source: Documents | ShuffledConversations,
        row_tokens: int,
        buffer_size: int,
        *,
        padding: int | None = None,
        train_on: str | None = None,
        alone: bool = False,
    ) -> None:
        """Start at the source's position; `buffer_size` sequences are chosen from."""
        super().__init__(source, row_tokens, padding=padding, train_on=train_on)
        self._buffer_size = 1 if alone else buffer_size
        self._crops = padding is None
        self._alone = alone
        # Length, arrival and address, sorted, so that a length is found in logarithmic time.
        self._buffer: list[tuple[int, int, Any]] = []
        self._arrivals = 0
        self._counted = {"placed_tokens": 0, "cropped_tokens": 0, "truncated": 0}

    @property
    def epoch(self) -> int:
        """Completed passes over the source."""
        ends = not self._crops and not self._buffer and not self._source.left
        return int(self._source.epoch) + ends

    def _pieces(self, space: int) -> Iterator[tuple[Any, int, int]]:
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
            if self._alone:
                break
            row_is_begun = True

    def _find_largest(self, space: int) -> int | None:
        """Return the place of the longest buffered sequence of at most `space` tokens, or of one to crop, or None."""
        end = bisect.bisect_left(self._buffer, (space + 1,))
        if end == 0:
            return 0 if self._crops and self._buffer else None  # the shortest
        return bisect.bisect_left(self._buffer, (self._buffer[end - 1][0],), 0, end)

    def _fill(self, *, row_is_begun: bool) -> None:
        """Read sequences into the buffer; with padding, those of the next epoch only for a new row."""
        while len(self._buffer) < self._buffer_size:
            if not self._crops and not self._source.left and (row_is_begun or self._buffer):
                break
            found = self._source.next(_REFILL_DOCUMENTS if self._crops else self._buffer_size - len(self._buffer))
            if not found:
                break
            for address, length in found:
                self._add(address, length)

    def _add(self, address: Any, length: int) -> None:
        longest = self._row_tokens + 1
        if not self._crops and length > longest:
            self._counted["truncated"] += 1
            length = longest
        bisect.insort(self._buffer, (length, self._arrivals, address))
        self._arrivals += 1

    def _trained(self, address: Any, start: int, stop: int) -> Array | bool:
        if self._train_on == "all":  # but not <|bos|>
            return np.arange(start, stop) > 0
        return super()._trained(address, start, stop)

    def counts(self) -> dict[str, float]:
        """Return the epochs, the cropped tokens, and their share of all tokens read; or truncated conversations."""
        if not self._crops:
            return {"truncated_conversations": self._counted["truncated"]}
        cropped = self._counted["cropped_tokens"]
        read = cropped + self._counted["placed_tokens"]
        return {"epochs": self.epoch, "cropped_tokens": cropped, "cropped_frac": cropped / max(1, read)}

    def state(self) -> dict[str, Any]:
        """Return the source's position, the buffered addresses in order of arrival, and the counts."""
        waiting = [address for _, _, address in sorted(self._buffer, key=itemgetter(1))]
        return {"cursor": self._source.state(), "waiting": waiting, "counted": dict(self._counted)}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self._source.restore(state["cursor"])
        self._buffer = []
        for waiting in state["waiting"]:
            address = _address(waiting)
            self._add(address, self._source.length(address))
        self._counted = dict(state["counted"])


class StreamRows(RowStream):
    """Slices of one stream of tokens; rows begin anywhere, and no token is dropped.

    A batch of B rows takes B × T + 1 tokens: each row's last target is the next row's first input, except in the
    batch's last row, whose last target is never an input.
    """

    def __init__(
        self,
        source: Documents | ShuffledConversations,
        row_tokens: int,
        batch_rows: int,
        *,
        train_on: str | None = None,
    ) -> None:
        """Start at the source's position; `batch_rows` is B."""
        super().__init__(source, row_tokens, train_on=train_on)
        self._batch_rows = batch_rows
        self._rows = 0
        # Address, length and epoch of the sequence that is being read, and its used tokens.
        self._current: tuple[Any, int, int] | None = None
        self._used = 0

    @property
    def epoch(self) -> int:
        """Completed passes, whose last token was used."""
        return int(self._source.epoch) if self._current is None else self._current[2]

    def _pieces(self, space: int) -> Iterator[tuple[Any, int, int]]:
        while space:
            if self._current is None or self._used == self._current[1]:
                found = self._source.next(1)  # one at a time, so that the source's epoch is the sequence's
                if not found:
                    self._current = None
                    break
                self._current = (*found[0], self._source.epoch)
                self._used = 0
            address, length, _ = self._current
            start = self._used
            self._used = min(length, start + space)
            space -= self._used - start
            yield address, start, self._used
        self._rows += 1
        if not space and self._rows % self._batch_rows:
            self._used -= 1

    def counts(self) -> dict[str, float]:
        """Return the epochs; nothing is cropped or truncated."""
        if self._train_on is not None:
            return {"truncated_conversations": 0}
        return {"epochs": self.epoch, "cropped_tokens": 0, "cropped_frac": 0.0}

    def state(self) -> dict[str, Any]:
        """Return the source's position and that in the current sequence."""
        current = [] if self._current is None else [list(self._current)]
        return {"cursor": self._source.state(), "stream": current, "used": self._used, "rows": self._rows}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self._source.restore(state["cursor"])
        self._current = None
        for address, length, epoch in state["stream"]:
            self._current = (_address(address), length, epoch)
        self._used = state["used"]
        self._rows = state["rows"]


def _address(saved: Any) -> Any:
    """Return an address from JSON data, where tuples are lists."""
    return tuple(saved) if isinstance(saved, list) else saved


def pack(
    packing: str,
    source: Documents | ShuffledConversations,
    *,
    row_tokens: int,
    buffer_size: int,
    batch_rows: int,
    padding: int | None = None,
    train_on: str | None = None,
) -> RowStream:
    """Return rows of documents or, with `padding` and `train_on`, of conversations.

    Args:
        packing: best_fit, stream or, for conversations, alone.
        source: of the sequences.
        row_tokens: T.
        buffer_size: sequences that best_fit chooses from.
        batch_rows: rows per batch, for stream.
        padding: id that fills rows of conversations: <|bos|>, or <|assistant_end|> if they are alone.
        train_on: 'assistant' or 'all' for conversations.
    """
    if packing == "stream":
        return StreamRows(source, row_tokens, batch_rows, train_on=train_on)
    alone = packing == "alone"
    return BestFitRows(source, row_tokens, buffer_size, padding=padding, train_on=train_on, alone=alone)


def trim_rows(ids: Ints, targets: Ints) -> tuple[Ints, Ints]:
    """Return ids and targets (B, T) without the trailing columns that have no targets, which do not affect the loss.

    Widths are multiples of 128, so that few are compiled.
    """
    used = np.flatnonzero((targets >= 0).any(axis=0))
    width = min(ids.shape[1], -(-(used[-1] + 1 if len(used) else 1) // _WIDTH_STEP) * _WIDTH_STEP)
    return ids[:, :width], targets[:, :width]


def take_validation(rows: RowStream, *, row_tokens: int, tokens: int, setting: str) -> list[Row]:
    """Return validation rows with `tokens` tokens together, at least one row; print a line if there are fewer.

    The source must be read once, so that no token counts twice. `setting` is the key that `tokens` comes from.
    """
    count = max(1, tokens // row_tokens)
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
