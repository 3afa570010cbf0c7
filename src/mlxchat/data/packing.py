"""Packs documents and conversations into rows of equal length.

Documents:
- best_fit (nanochat's pretraining of 2026): rows begin with <|bos|> and are full. The longest buffered document that
  fits is placed; if none fits, the shortest is cropped, and its rest is dropped.
- best_fit_whole: the rest goes back to the buffer with its own <|bos|>.
- stream (nanochat's pretraining of 2025): slices of one stream of tokens.

Conversations:
- best_fit (nanochat's SFT of 2026): whole conversations, then padding without loss.
- alone (its SFT of 2025): one conversation per row.
- stream (its midtraining of 2025).

Rows are produced one at a time, so the micro-batch size does not affect the data order. The state contains the buffered
documents, so a resumed training gets the same rows. The buffer holds addresses and lengths; tokens are copied from
their file when a row is built.
"""

from __future__ import annotations

import bisect
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
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
        self, conversations: Tokens, seed: int | None, name_of: Callable[[int], str] = "conversation {}".format, *,
        once: bool = False,
    ) -> None:  # fmt: skip
        self._conversations, self._seed, self.name, self._once = conversations, seed, name_of, once
        self._lengths = conversations.lengths(0, len(conversations))
        self.epoch = self._next = 0
        self._order = self._shuffle()

    @property
    def left(self) -> int:
        """Conversations left in this epoch."""
        return len(self._order) - self._next

    def begin_epoch(self) -> None:
        """Begin the next epoch; a source that is read once stays at its end."""
        self.epoch += 1
        if not self._once:
            self._next, self._order = 0, self._shuffle()

    def next(self, count: int) -> list[tuple[int, int]]:
        """Return the indices and lengths of the next conversations of one epoch."""
        if not self.left:
            self.begin_epoch()
        found = self._order[self._next : self._next + count]
        self._next += len(found)
        return [(index, self._lengths[index]) for index in found]

    def length(self, address: int) -> int:
        """Return the length of a conversation."""
        return self._lengths[address]

    def ids(self, address: int) -> Array:
        """Return the ids of a conversation."""
        return self._conversations.ids(address)

    def trained(self, address: int) -> Array:
        """Return the loss mask of a conversation."""
        return self._conversations.trained(address)

    def state(self) -> dict[str, Any]:
        """Return the epoch and the position in it."""
        return {"epoch": self.epoch, "next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a position."""
        self.epoch, self._next = state["epoch"], state["next"]
        self._order = self._shuffle()

    def close(self) -> None:
        """Do nothing: there is no background work."""

    def _shuffle(self) -> list[int]:
        order = list(range(len(self._conversations)))
        if self._seed is not None:
            random.Random(f"{self._seed}/{self.epoch}").shuffle(order)
        return order


class BestFitBuffer:
    """A buffer of sequences, searched by length in logarithmic time; first in, first out among equal lengths."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, Any]] = []  # sorted by length and arrival
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, address: Any, length: int) -> None:
        """Add a sequence."""
        bisect.insort(self._waiting, (length, self._arrivals, address))
        self._arrivals += 1

    def take_largest(self, space: int) -> tuple[Any, int] | None:
        """Remove the longest sequence of at most `space` tokens; return its address and length, or None."""
        end = bisect.bisect_left(self._waiting, (space + 1,))
        if end == 0:
            return None
        longest = self._waiting[end - 1][0]
        return self._remove(bisect.bisect_left(self._waiting, (longest,), 0, end))

    def take_shortest(self) -> tuple[Any, int]:
        """Remove the shortest sequence; return its address and length."""
        return self._remove(0)

    def addresses(self) -> list[Any]:
        """Return the buffered addresses in order of arrival."""
        return [address for _, _, address in sorted(self._waiting, key=itemgetter(1))]

    def _remove(self, index: int) -> tuple[Any, int]:
        length, _, address = self._waiting.pop(index)
        return address, length


class RowStream(ABC):
    """Rows of a source; endless unless the source is read once."""

    def __init__(self, source: Any, row_tokens: int, padding: int | None = None) -> None:
        """Start at the source's position.

        Args:
            source: `Documents` or `ShuffledConversations`.
            row_tokens: T.
            padding: id that fills the end of a row; None: the row's first id.
        """
        self._source, self._row_tokens = source, row_tokens
        self._padding: Any = padding
        self.placed: list[Any] = []
        """The addresses in the last row."""

    @property
    def epoch(self) -> int:
        """Completed passes over the source."""
        return int(self._source.epoch)

    def next_row(self) -> Row:
        """Return the next row.

        Raises:
            EndOfText: the source has ended.
        """
        row, trained = np.empty(self._row_tokens + 1, dtype=np.int32), np.zeros(self._row_tokens + 1, dtype=np.bool_)
        filled, self.placed = 0, []
        for address, ids, is_trained in self._pieces(len(row)):
            end = filled + len(ids)
            row[filled:end], trained[filled:end] = ids, is_trained
            filled = end
            self.placed.append(address)
        if filled < 2 and self._padding is None:  # no target
            raise EndOfText
        row[filled:] = row[0] if self._padding is None else self._padding
        return row[:-1], np.where(trained[1:], row[1:], np.int32(IGNORED))

    @abstractmethod
    def _pieces(self, space: int) -> Iterator[tuple[Any, Array, Array | bool]]:
        """Yield the pieces of the next row: address, ids and loss mask; at most `space` ids together."""

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


class DocumentRows(RowStream):
    """Rows of documents, best fit with cropping; every token but the row's first is a target.

    If the source ends, the last row is padded without targets.
    """

    def __init__(
        self, documents: Documents, row_tokens: int, buffer_documents: int, *, rest_begins: int | None = None
    ) -> None:
        """Start at the source's position.

        Args:
            documents: the source, whose addresses are pairs.
            row_tokens: T.
            buffer_documents: size of the best-fit buffer.
            rest_begins: None: cropped tokens are dropped, as in nanochat; an id (<|bos|>): they return to the buffer
                behind this id, with the document's address and the offset of the rest as the address.
        """
        super().__init__(documents, row_tokens)
        self._wanted, self._rest_begins = buffer_documents, rest_begins
        self._buffer = BestFitBuffer()
        self.cropped_tokens = self.placed_tokens = 0

    def _pieces(self, space: int) -> Iterator[tuple[Any, Array, bool]]:
        while space:
            self._fill()
            if not self._buffer:
                break
            found = self._buffer.take_largest(space)
            if found is None:
                found = self._buffer.take_shortest()
                self._crop(*found, space)
            address, length = found
            used = min(length, space)
            yield address[:2], self._ids(address, used), True
            space -= used
            self.placed_tokens += used

    def counts(self) -> dict[str, float]:
        """Return the epochs, the cropped tokens, and their share of all tokens read."""
        used = self.cropped_tokens + self.placed_tokens
        return {
            "epochs": self.epoch,
            "cropped_tokens": self.cropped_tokens,
            "cropped_frac": self.cropped_tokens / used if used else 0.0,
        }

    def state(self) -> dict[str, Any]:
        """Return the source's position and the buffered addresses."""
        return {
            "cursor": self._source.state(),
            "waiting": self._buffer.addresses(),
            "cropped_tokens": self.cropped_tokens,
            "placed_tokens": self.placed_tokens,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self._source.restore(state["cursor"])
        self._buffer = BestFitBuffer()
        for address in map(tuple, state["waiting"]):
            length = self._source.length(address[:2])
            self._buffer.add(address, length - address[2] + 1 if len(address) > 2 else length)
        self.cropped_tokens = state["cropped_tokens"]
        self.placed_tokens = state.get("placed_tokens", 0)

    def _fill(self) -> None:
        while len(self._buffer) < self._wanted:
            found = self._source.next(_REFILL_DOCUMENTS)
            if not found:
                break
            for address, length in found:
                self._buffer.add(address, length)

    def _crop(self, address: Any, length: int, space: int) -> None:
        """Drop a document's tokens beyond `space`, or return them to the buffer."""
        if self._rest_begins is None:
            self.cropped_tokens += length - space
        else:
            begins = address[2] - 1 if len(address) > 2 else 0
            self._buffer.add((*address[:2], begins + space), length - space + 1)

    def _ids(self, address: Any, used: int) -> Any:
        if len(address) == 2:
            return self._source.ids(address)[:used]
        rest = self._source.ids(address[:2])[address[2] : address[2] + used - 1]
        return np.concatenate((np.array([self._rest_begins], dtype=rest.dtype), rest))


class ConversationRows(RowStream):
    """Rows of conversations, best fit with padding; no row has conversations of two epochs."""

    def __init__(
        self, conversations: ShuffledConversations, *, padding: int, row_tokens: int, buffer_conversations: int,
        train_on: str, alone: bool = False,
    ) -> None:  # fmt: skip
        """Start the first epoch.

        Args:
            conversations: the mixture, encoded.
            padding: id that fills the end of a row.
            row_tokens: T; longer conversations are truncated to T + 1 and counted in `truncated`.
            buffer_conversations: size of the best-fit buffer.
            train_on: 'assistant' or 'all'.
            alone: one conversation per row.
        """
        super().__init__(conversations, row_tokens, padding)
        self._wanted, self._train_on, self._alone = buffer_conversations, train_on, alone
        self._buffer = BestFitBuffer()
        self.truncated = 0

    def next_row(self) -> Row:
        """Return the next row."""
        inputs, targets = super().next_row()
        if self._alone:  # the last id is only a target
            inputs[self._source.length(self.placed[0]) - 1 :] = self._padding
        return inputs, targets

    def _pieces(self, space: int) -> Iterator[tuple[int, Array, Array]]:
        row_space = space
        while space:
            self._fill()
            found = self._buffer.take_largest(space)
            if found is None:
                break
            index, length = found
            yield index, self._source.ids(index)[:length], self._mask(index)[:length]
            space -= length
            if self._alone:
                break
        if not self._buffer and not self._source.left:
            if space == row_space:
                raise EndOfText
            self._source.begin_epoch()

    def counts(self) -> dict[str, float]:
        """Return the number of truncated conversations."""
        return {"truncated_conversations": self.truncated}

    def state(self) -> dict[str, Any]:
        """Return the source's position and the buffered conversations."""
        return {**self._source.state(), "waiting": self._buffer.addresses(), "truncated": self.truncated}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self._source.restore(state)
        self._buffer = BestFitBuffer()
        for index in state["waiting"]:
            self._add(index, self._source.length(index))
        self.truncated = state["truncated"]

    def _fill(self) -> None:
        missing = min(self._wanted - len(self._buffer), self._source.left)
        for index, length in self._source.next(missing) if missing > 0 else ():
            self._add(index, length)

    def _add(self, index: int, length: int) -> None:
        self.truncated += length > self._row_tokens + 1
        self._buffer.add(index, min(length, self._row_tokens + 1))

    def _mask(self, index: int) -> Array:
        if self._train_on == "all":
            return np.arange(self._source.length(index)) > 0
        trained: Array = self._source.trained(index)
        return trained


class StreamRows(RowStream):
    """Slices of one stream of tokens; rows begin anywhere, and no token is dropped.

    A batch of B rows takes B × T + 1 tokens: each row's last target is the next row's first input, except in the
    batch's last row, whose last target is never an input.
    """

    def __init__(self, source: Any, row_tokens: int, batch_rows: int, *, train_on: str | None = None) -> None:
        """Start at the source's position.

        Args:
            source: of documents or conversations.
            row_tokens: T.
            batch_rows: rows per batch.
            train_on: for conversations 'assistant' or 'all' (nanochat's choice); None: documents.
        """
        super().__init__(source, row_tokens)
        self._batch_rows, self._train_on = batch_rows, train_on
        # Address, length and epoch of sequences that are not used up.
        self._waiting: deque[tuple[Any, int, int]] = deque()
        self._offset = self._available = self._rows = 0

    @property
    def epoch(self) -> int:
        """Completed passes, whose last token was used."""
        return self._waiting[0][2] if self._waiting else int(self._source.epoch)

    def _pieces(self, space: int) -> Iterator[tuple[Any, Array, Array | bool]]:
        needed = space
        while self._available < needed:
            if not (found := self._source.next(1)):  # one at a time, so that the source's epoch is the sequence's
                break
            self._waiting += ((address, length, self._source.epoch) for address, length in found)
            self._available += sum(length for _, length in found)
        offset = self._offset
        for address, length, _ in self._waiting:
            part = slice(offset, offset + min(length - offset, space))
            if part.stop > offset:
                trained = self._source.trained(address)[part] if self._train_on == "assistant" else True
                yield address, self._source.ids(address)[part], trained
            space, offset = space - (part.stop - offset), 0
            if not space:
                break
        self._rows += 1
        passed = min(needed - space, needed if self._rows % self._batch_rows == 0 else self._row_tokens)
        self._available -= passed
        self._offset += passed
        while self._waiting and self._offset >= self._waiting[0][1]:
            self._offset -= self._waiting.popleft()[1]

    def counts(self) -> dict[str, float]:
        """Return the epochs; nothing is cropped or truncated."""
        if self._train_on is not None:
            return {"truncated_conversations": 0}
        return {"epochs": self.epoch, "cropped_tokens": 0, "cropped_frac": 0.0}

    def state(self) -> dict[str, Any]:
        """Return the source's position and the sequences that are not used up."""
        return {
            "cursor": self._source.state(),
            "stream": [list(waiting) for waiting in self._waiting],
            "offset": self._offset,
            "rows": self._rows,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self._source.restore(state["cursor"])
        self._waiting = deque(
            (tuple(address) if isinstance(address, list) else address, length, epoch)
            for address, length, epoch in state["stream"]
        )
        self._offset, self._rows = state["offset"], state["rows"]
        self._available = sum(length for _, length, _ in self._waiting) - self._offset


def pack_documents(
    packing: str, source: Documents, *, row_tokens: int, buffer_documents: int, batch_rows: int, bos: int
) -> RowStream:
    """Return rows of documents.

    Args:
        packing: best_fit, best_fit_whole or stream.
        source: of documents.
        row_tokens: T.
        buffer_documents: size of the best-fit buffer.
        batch_rows: rows per batch, for stream.
        bos: id of <|bos|>.
    """
    if packing == "stream":
        return StreamRows(source, row_tokens, batch_rows)
    return DocumentRows(source, row_tokens, buffer_documents, rest_begins=bos if packing == "best_fit_whole" else None)


def pack_conversations(
    packing: str, conversations: ShuffledConversations, *, row_tokens: int, buffer_conversations: int, batch_rows: int,
    train_on: str, bos: int, assistant_end: int,
) -> RowStream:  # fmt: skip
    """Return rows of conversations: best_fit (padded with <|bos|>), alone (padded with <|assistant_end|>) or stream.

    The other arguments are those of `pack_documents` and `ConversationRows`.
    """
    if packing == "stream":
        return StreamRows(conversations, row_tokens, batch_rows, train_on=train_on)
    alone = packing == "alone"
    return ConversationRows(
        conversations, padding=assistant_end if alone else bos, row_tokens=row_tokens,
        buffer_conversations=1 if alone else buffer_conversations, train_on=train_on, alone=alone,
    )  # fmt: skip


def trim_rows(ids: Ints, targets: Ints) -> tuple[Ints, Ints]:
    """Return ids and targets (B, T) without the trailing columns that have no targets, which do not affect the loss.

    Widths are multiples of 128, so that few are compiled.
    """
    used = np.flatnonzero((targets >= 0).any(axis=0))
    width = min(ids.shape[1], -(-(used[-1] + 1 if len(used) else 1) // _WIDTH_STEP) * _WIDTH_STEP)
    return ids[:, :width], targets[:, :width]


def take_rows(rows: RowStream, count: int) -> list[Row]:
    """Return the first `count` rows of a stream, or fewer if it ends, and close it."""
    found: list[Row] = []
    try:
        while len(found) < count:
            found.append(rows.next_row())
    except EndOfText:
        pass
    finally:
        rows.close()
    return found


def take_validation(rows: RowStream, *, row_tokens: int, tokens: int, setting: str) -> list[Row]:
    """Return validation rows with `tokens` tokens together, at least one row; print a line if there are fewer.

    The source must be read once, so that no token counts twice. `setting` is the key that `tokens` comes from.
    """
    count = max(1, tokens // row_tokens)
    found = take_rows(rows, count)
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
