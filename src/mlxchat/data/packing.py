"""Best-fit packing of documents and conversations into rows of one length.

Documents (pretraining): the largest waiting document that still fits is placed; if none fits, the shortest is
cropped to fill the row, so rows are always full and begin with <|bos|>. Conversations: none is cropped to fit, the
rest of a row is padding that no loss counts. Counterparts: nanochat's best-fit loaders of 2026.

Streams yield rows one at a time, so that what a micro-batch holds never changes the order of the data, and their
state says exactly which documents wait in the buffer, so that a resumed training sees the same rows.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxchat.data.conversation import Conversation, render_conversation
from mlxchat.data.shards import DocumentCursor
from mlxchat.data.tokenizer import Tokenizer

IGNORED = -1
_ENCODE_DOCUMENTS = 128

Ints = np.ndarray[Any, np.dtype[np.int32]]
Row = tuple[Ints, Ints]


class RowStream(Protocol):
    """An endless source of rows: inputs (T,) and targets (T,), −1 where no loss is taken."""

    def next_row(self) -> Row:
        """Return the next row."""

    def state(self) -> dict[str, Any]:
        """Return the position, as JSON data."""

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""


class BestFitBuffer:
    """Waiting token sequences, found by length in logarithmic time. Among equals the first to arrive comes first."""

    def __init__(self) -> None:
        """Begin empty."""
        self._keys: list[tuple[int, int]] = []  # (length, arrival), sorted
        self._items: dict[int, tuple[Any, list[int], list[int]]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        """Number of waiting sequences."""
        return len(self._keys)

    def add(self, address: Any, ids: list[int], mask: list[int]) -> None:
        """Let a sequence wait; `address` is what its saved state will be."""
        bisect.insort(self._keys, (len(ids), self._arrivals))
        self._items[self._arrivals] = (address, ids, mask)
        self._arrivals += 1

    def take_largest(self, space: int) -> tuple[list[int], list[int]] | None:
        """Remove and return the longest sequence of at most `space` tokens, or None if none fits."""
        end = bisect.bisect_right(self._keys, (space, self._arrivals))
        if end == 0:
            return None
        longest = self._keys[end - 1][0]
        return self._remove(bisect.bisect_left(self._keys, (longest, -1)))

    def take_shortest(self) -> tuple[list[int], list[int]]:
        """Remove and return the shortest sequence."""
        return self._remove(0)

    def addresses(self) -> list[Any]:
        """Return the addresses of what waits, in order of arrival."""
        return [address for _, (address, _, _) in sorted(self._items.items())]

    def _remove(self, index: int) -> tuple[list[int], list[int]]:
        _, arrival = self._keys.pop(index)
        _, ids, mask = self._items.pop(arrival)
        return ids, mask


class DocumentRows:
    """Rows of a corpus, best fit with cropping; every token but the row's first is a target."""

    def __init__(self, corpus: Path, split: str, tokenizer: Tokenizer, row_tokens: int, buffer_documents: int) -> None:
        """Start at the split's first document."""
        self._cursor = DocumentCursor(corpus, split)
        self._tokenizer, self._row_tokens, self._wanted = tokenizer, row_tokens, buffer_documents
        self._buffer = BestFitBuffer()
        self.documents = 0
        self.cropped_tokens = 0

    @property
    def epoch(self) -> int:
        """Passes over the corpus that are behind us."""
        return self._cursor.epoch

    def next_row(self) -> Row:
        """Return the next row."""
        capacity = self._row_tokens + 1
        ids: list[int] = []
        while len(ids) < capacity:
            self._fill()
            found = self._buffer.take_largest(capacity - len(ids))
            if found is None:
                found = self._buffer.take_shortest()
                self.cropped_tokens += len(found[0]) - (capacity - len(ids))
            ids += found[0][: capacity - len(ids)]
        row = np.array(ids, dtype=np.int32)
        return row[:-1], row[1:]

    def state(self) -> dict[str, Any]:
        """Return the cursor and the addresses of the waiting documents."""
        return {
            "cursor": self._cursor.state(),
            "waiting": self._buffer.addresses(),
            "documents": self.documents,
            "cropped_tokens": self.cropped_tokens,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position; waiting documents are read and encoded again."""
        self._buffer = BestFitBuffer()
        self._add([(address, self._cursor.fetch(address)) for address in state["waiting"]])
        self._cursor.restore(state["cursor"])
        self.documents, self.cropped_tokens = state["documents"], state["cropped_tokens"]

    def _fill(self) -> None:
        while len(self._buffer) < self._wanted:
            found = self._cursor.next(_ENCODE_DOCUMENTS)
            self._add(found)
            self.documents += len(found)

    def _add(self, documents: Sequence[tuple[Any, str]]) -> None:
        encoded = self._tokenizer.encode_documents([text for _, text in documents]) if documents else []
        for (address, _), ids in zip(documents, encoded, strict=True):
            self._buffer.add(list(address), ids, [])


class ConversationRows:
    """Rows of conversations, best fit with padding, shuffled anew in every epoch."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokenizer: Tokenizer,
        *,
        row_tokens: int,
        buffer_conversations: int,
        train_on: str,
        seed: int,
    ) -> None:
        """Start the first epoch.

        Args:
            conversations: the mixture.
            tokenizer: of the model.
            row_tokens: T; a longer conversation is cut at T + 1 and counted in `truncated`.
            buffer_conversations: how many best fit chooses from.
            train_on: 'assistant' or 'all'.
            seed: of the order.
        """
        self._conversations, self._tokenizer = conversations, tokenizer
        self._row_tokens, self._wanted = row_tokens, buffer_conversations
        self._train_on, self._seed = train_on, seed
        self._buffer = BestFitBuffer()
        self.epoch, self._next = 0, 0
        self._order = self._shuffle()
        self.truncated = 0

    def next_row(self) -> Row:
        """Return the next row. Conversations keep to themselves: padding follows what does not fit."""
        capacity = self._row_tokens + 1
        ids: list[int] = []
        mask: list[int] = []
        while len(ids) < capacity:
            self._fill()
            found = self._buffer.take_largest(capacity - len(ids))
            if found is None:
                break
            ids += found[0]
            mask += found[1]
        if not self._buffer and self._next == len(self._order):
            self.epoch, self._next = self.epoch + 1, 0
            self._order = self._shuffle()
        padding = capacity - len(ids)
        row = np.array(ids + [self._tokenizer.bos] * padding, dtype=np.int32)
        trained = np.array(mask + [0] * padding, dtype=bool)
        return row[:-1], np.where(trained[1:], row[1:], IGNORED).astype(np.int32)

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

    def _fill(self) -> None:
        while len(self._buffer) < self._wanted and self._next < len(self._order):
            self._add(self._order[self._next])
            self._next += 1

    def _add(self, index: int) -> None:
        ids, mask = render_conversation(self._tokenizer, self._conversations[index], max_tokens=None)
        if len(ids) > self._row_tokens + 1:
            self.truncated += 1
            ids, mask = ids[: self._row_tokens + 1], mask[: self._row_tokens + 1]
        if self._train_on == "all":
            mask = [0, *[1] * (len(ids) - 1)]
        self._buffer.add(index, ids, mask)

    def _shuffle(self) -> list[int]:
        order = list(range(len(self._conversations)))
        random.Random(f"{self._seed}/{self.epoch}").shuffle(order)
        return order


def count_rows(make_rows: Callable[[], ConversationRows]) -> int:
    """Return how many rows the first epoch of conversations fills, by packing it."""
    rows = make_rows()
    count = 0
    while rows.epoch == 0:
        rows.next_row()
        count += 1
    return count
