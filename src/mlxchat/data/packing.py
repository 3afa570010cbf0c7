"""Best-fit packing of documents and conversations into rows of one length.

Documents (pretraining): the largest waiting document that still fits is placed; if none fits, the shortest is
cropped to fill the row, so rows are always full and begin with <|bos|>. Conversations: none is cropped to fit, the
rest of a row is padding that no loss counts. Counterparts: nanochat's best-fit loaders of 2026.

Streams yield rows one at a time, so that what a micro-batch holds never changes the order of the data, and their
state says exactly which documents wait in the buffer, so that a resumed training sees the same rows. Only addresses
and lengths wait; the tokens are copied from their file when a row is made.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from mlxchat.data.best_fit import BestFitBuffer
from mlxchat.data.documents import DocumentSource
from mlxchat.data.tokens import Tokens

IGNORED = -1
_REFILL_DOCUMENTS = 128
_WIDTH_STEP = 128

Ints = np.ndarray[Any, np.dtype[np.int32]]
Row = tuple[Ints, Ints]


class EndOfText(Exception):
    """A source that is read once holds no further token."""


class RowStream(Protocol):
    """A source of rows: inputs (T,) and targets (T,), −1 where no loss is taken. Endless unless its source ends."""

    def next_row(self) -> Row:
        """Return the next row.

        Raises:
            EndOfText: there is none.
        """

    def placed(self) -> list[Any]:
        """Return the addresses of what the last row holds."""

    def name(self, address: Any) -> str:
        """Return what people call the document at an address; any thread may ask."""

    def counts(self) -> dict[str, float]:
        """Return what was counted up to the last row: epochs, losses to cropping."""

    def state(self) -> dict[str, Any]:
        """Return the position, as JSON data."""

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""

    def close(self) -> None:
        """End what goes on in the background, until the next `restore`; any thread may call."""


class EpochRows(RowStream, Protocol):
    """Rows that know how often everything has been read."""

    @property
    def epoch(self) -> int:
        """Passes that are behind us."""


class DocumentRows:
    """Rows of a corpus, best fit with cropping; every token but the row's first is a target.

    Where the source ends, so do the rows; the last one is padded, and what pads it is no target.
    """

    def __init__(
        self, documents: DocumentSource, row_tokens: int, buffer_documents: int, *, rest_begins: int | None = None
    ) -> None:
        """Start where the source is.

        Args:
            documents: the source.
            row_tokens: T.
            buffer_documents: how many best fit chooses from.
            rest_begins: None: what is cropped off is dropped, as nanochat does; an id (<|bos|>): it waits for another
                row and begins with that. Its address is the document's with the place where it goes on.
        """
        self._source, self._row_tokens, self._wanted = documents, row_tokens, buffer_documents
        self._rest_begins = rest_begins
        self._buffer = BestFitBuffer()
        self._placed: list[Any] = []
        self.documents = 0
        self.cropped_tokens = 0
        self.placed_tokens = 0

    @property
    def epoch(self) -> int:
        """Passes over the corpus that are behind us."""
        return self._source.epoch

    def next_row(self) -> Row:
        """Return the next row."""
        capacity = self._row_tokens + 1
        row = np.empty(capacity, dtype=np.int32)
        filled, self._placed = 0, []
        while filled < capacity:
            self._fill()
            space = capacity - filled
            found = self._buffer.take_largest(space)
            if found is None and not self._buffer:
                break
            if found is None:
                found = self._buffer.take_shortest()
                self._crop(*found, space)
            address, length = found
            used = min(length, space)
            row[filled : filled + used] = self._ids(address, used)
            filled += used
            self._placed.append(address[:2])
        self.placed_tokens += filled
        return split_row(row, filled)

    def placed(self) -> list[Any]:
        """Return the addresses of the last row's documents."""
        return self._placed

    def name(self, address: Any) -> str:
        """Return a document's shard and number."""
        return self._source.name(address)

    def counts(self) -> dict[str, float]:
        """Return the passes over the corpus, the tokens lost to cropping, and their share of all that were read."""
        used = self.cropped_tokens + self.placed_tokens
        return {
            "epochs": self.epoch,
            "cropped_tokens": self.cropped_tokens,
            "cropped_frac": self.cropped_tokens / used if used else 0.0,
        }

    def state(self) -> dict[str, Any]:
        """Return the source's position and the addresses of the waiting documents."""
        return {
            "cursor": self._source.state(),
            "waiting": self._buffer.addresses(),
            "documents": self.documents,
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
        self.documents, self.cropped_tokens = state["documents"], state["cropped_tokens"]
        self.placed_tokens = state.get("placed_tokens", 0)

    def close(self) -> None:
        """End what the source does in the background."""
        self._source.close()

    def _fill(self) -> None:
        while len(self._buffer) < self._wanted:
            found = self._source.next(_REFILL_DOCUMENTS)
            if not found:
                break
            for address, length in found:
                self._buffer.add(address, length)
            self.documents += len(found)

    def _crop(self, address: Any, length: int, space: int) -> None:
        """Drop what `space` tokens do not hold of a document, or let it wait."""
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


class ConversationRows:
    """Rows of conversations, best fit with padding, shuffled anew in every epoch."""

    def __init__(
        self,
        conversations: Tokens,
        *,
        padding: int,
        row_tokens: int,
        buffer_conversations: int,
        train_on: str,
        seed: int,
        name_of: Callable[[int], str] = "conversation {}".format,
        alone: bool = False,
    ) -> None:
        """Start the first epoch.

        Args:
            conversations: the mixture, encoded.
            padding: the id that follows what does not fill a row.
            row_tokens: T; a longer conversation is cut at T + 1 and counted in `truncated`.
            buffer_conversations: how many best fit chooses from.
            train_on: 'assistant' or 'all'.
            seed: of the order.
            name_of: what people call a conversation, by its number.
            alone: whether a row holds one conversation, and is padded however short that is.
        """
        self._alone = alone
        self._conversations, self._padding = conversations, padding
        self._row_tokens, self._wanted = row_tokens, buffer_conversations
        self._train_on, self._seed, self.name = train_on, seed, name_of
        self._lengths = conversations.lengths(0, len(conversations))
        self._buffer = BestFitBuffer()
        self._placed: list[int] = []
        self.epoch, self._next = 0, 0
        self._order = self._shuffle()
        self.truncated = 0

    def next_row(self) -> Row:
        """Return the next row. Conversations keep to themselves: padding follows what does not fit."""
        capacity = self._row_tokens + 1
        row = np.full(capacity, self._padding, dtype=np.int32)
        trained = np.zeros(capacity, dtype=np.bool_)
        filled, self._placed = 0, []
        while filled < capacity:
            self._fill()
            found = self._buffer.take_largest(capacity - filled)
            if found is None:
                break
            index, length = found
            row[filled : filled + length] = self._conversations.ids(index)[:length]
            trained[filled : filled + length] = self._mask(index)[:length]
            filled += length
            self._placed.append(index)
            if self._alone:
                break
        if not self._buffer and self._next == len(self._order):
            self.epoch, self._next = self.epoch + 1, 0
            self._order = self._shuffle()
        targets = np.where(trained[1:], row[1:], np.int32(IGNORED))
        if self._alone and filled < capacity:
            row[filled - 1] = self._padding  # nothing follows the last id: it is a target only
        return row[:-1], targets

    def placed(self) -> list[Any]:
        """Return the numbers of the last row's conversations."""
        return self._placed

    def counts(self) -> dict[str, float]:
        """Return how many conversations were cut."""
        return {"truncated_conversations": self.truncated}

    def state(self) -> dict[str, Any]:
        """Return the epoch, the place in its order and the waiting conversations."""
        return {
            "epoch": self.epoch,
            "next": self._next,
            "waiting": self._buffer.addresses(),
            "truncated": self.truncated,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self.epoch, self._next = state["epoch"], state["next"]
        self._order = self._shuffle()
        self._buffer = BestFitBuffer()
        for index in state["waiting"]:
            self._add(index)
        self.truncated = state["truncated"]

    def close(self) -> None:
        """Nothing goes on in the background."""

    def _fill(self) -> None:
        while len(self._buffer) < self._wanted and self._next < len(self._order):
            self._add(self._order[self._next])
            self._next += 1

    def _add(self, index: int) -> None:
        length = self._lengths[index]
        if length > self._row_tokens + 1:
            self.truncated += 1
            length = self._row_tokens + 1
        self._buffer.add(index, length)

    def _mask(self, index: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        if self._train_on == "all":
            return np.arange(self._lengths[index]) > 0
        return self._conversations.trained(index)

    def _shuffle(self) -> list[int]:
        return order_of_epoch(len(self._conversations), self._seed, self.epoch)


def order_of_epoch(count: int, seed: int, epoch: int) -> list[int]:
    """Return the numbers 0 … count − 1 in the order of an epoch, which follows from seed and epoch alone."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def trim_rows(ids: Ints, targets: Ints) -> tuple[Ints, Ints]:
    """Return ids and targets (B, T) without the columns at the end in which no row has a target.

    What comes after its last target has no part in a row's loss. Widths are multiples of 128, so that few are compiled.
    """
    used = np.flatnonzero((targets >= 0).any(axis=0))
    width = min(ids.shape[1], -(-(used[-1] + 1 if len(used) else 1) // _WIDTH_STEP) * _WIDTH_STEP)
    return ids[:, :width], targets[:, :width]


def split_row(row: Ints, filled: int) -> Row:
    """Return inputs and targets of a row (T + 1,) of which only the first `filled` tokens are text.

    Raises:
        EndOfText: these are too few to predict one.
    """
    if filled == len(row):
        return row[:-1], row[1:]
    if filled < 2:
        raise EndOfText
    row[filled:] = row[0]
    targets = row[1:].copy()
    targets[filled - 1 :] = IGNORED
    return row[:-1], targets


def take_rows(rows: RowStream, count: int) -> list[Row]:
    """Return the first `count` rows of a stream that nobody else reads, fewer where it ends, and close it."""
    found: list[Row] = []
    try:
        while len(found) < count:
            found.append(rows.next_row())
    except EndOfText:
        pass
    finally:
        rows.close()
    return found


def count_rows(make_rows: Callable[[], EpochRows]) -> int:
    """Return how many rows the first epoch of conversations fills, by packing it."""
    rows = make_rows()
    count = 0
    while rows.epoch == 0:
        rows.next_row()
        count += 1
    return count
