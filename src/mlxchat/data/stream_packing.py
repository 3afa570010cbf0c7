"""Rows cut out of one stream of tokens, as nanochat's loaders of 2025 do, and the choice among all ways of packing.

A batch of B rows takes B × T + 1 tokens of the stream: each row's last target begins the next row, except for the last
one's, which is a target and never an input. Rows begin anywhere, and nothing is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from mlxchat.data.documents import DocumentSource
from mlxchat.data.packing import (
    IGNORED,
    ConversationRows,
    DocumentRows,
    EpochRows,
    Row,
    RowStream,
    order_of_epoch,
    split_row,
)
from mlxchat.data.tokens import Array, Tokens


class StreamRows:
    """Rows of one stream of tokens; every token is a target."""

    def __init__(self, source: Any, row_tokens: int, batch_rows: int) -> None:
        """Start where the source (a DocumentSource, whatever its addresses) is; `batch_rows` rows share a batch."""
        self._source, self._row_tokens, self._batch_rows = source, row_tokens, batch_rows
        # Address, length and epoch of what is not used up.
        self._waiting: deque[tuple[Any, int, int]] = deque()
        self._offset = self._available = self._rows = 0
        self._placed: list[Any] = []
        self.documents = 0

    @property
    def epoch(self) -> int:
        """Passes whose last token has been used."""
        return self._waiting[0][2] if self._waiting else int(self._source.epoch)

    def next_row(self) -> Row:
        """Return the next row."""
        needed = self._row_tokens + 1
        while self._available < needed and self._fill():
            pass
        row, filled, offset = np.empty(needed, dtype=np.int32), 0, self._offset
        self._placed = []
        for address, length, _ in self._waiting:
            used = min(length - offset, needed - filled)
            if used:
                row[filled : filled + used] = self._source.ids(address)[offset : offset + used]
                self._placed.append(address)
            filled, offset = filled + used, 0
            if filled == needed:
                break
        self._rows += 1
        self._pass(min(filled, needed if self._rows % self._batch_rows == 0 else self._row_tokens))
        return split_row(row, filled)

    def placed(self) -> list[Any]:
        """Return the addresses of what the last row holds."""
        return self._placed

    def name(self, address: Any) -> str:
        """Return what people call what lies at an address."""
        return str(self._source.name(address))

    def counts(self) -> dict[str, float]:
        """Return the passes; nothing is cropped."""
        return {"epochs": self.epoch, "cropped_tokens": 0, "cropped_frac": 0.0}

    def state(self) -> dict[str, Any]:
        """Return the source's position and what is not used up."""
        return {
            "cursor": self._source.state(),
            "stream": [[address, length, epoch] for address, length, epoch in self._waiting],
            "offset": self._offset,
            "rows": self._rows,
            "documents": self.documents,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self._source.restore(state["cursor"])
        self._waiting = deque(
            (tuple(address) if isinstance(address, list) else address, length, epoch)
            for address, length, epoch in state["stream"]
        )
        self._offset, self._rows, self.documents = state["offset"], state["rows"], state["documents"]
        self._available = sum(length for _, length, _ in self._waiting) - self._offset

    def close(self) -> None:
        """End what the source does in the background."""
        self._source.close()

    def _fill(self) -> bool:
        """Read a document; False: there is none left."""
        found = self._source.next(1)  # so that the source's epoch is that of what it gave
        self._waiting.extend((address, length, self._source.epoch) for address, length in found)
        self._available += sum(length for _, length in found)
        self.documents += len(found)
        return bool(found)

    def _pass(self, count: int) -> None:
        """Leave tokens behind."""
        self._available -= count
        self._offset += count
        while self._waiting and self._offset >= self._waiting[0][1]:
            self._offset -= self._waiting.popleft()[1]


class ShuffledConversations:
    """Conversations in an order of their own for every epoch, one after the other, as a source of tokens."""

    def __init__(self, conversations: Tokens, seed: int, name_of: Callable[[int], str]) -> None:
        """Start the first epoch."""
        self._conversations, self._seed, self.name = conversations, seed, name_of
        self._lengths = conversations.lengths(0, len(conversations))
        self.epoch = self._next = 0
        self._order = self._shuffle()

    def next(self, count: int) -> list[tuple[Any, int]]:
        """Return number and length of the next ones, of one epoch."""
        if self._next == len(self._order):
            self.epoch, self._next = self.epoch + 1, 0
            self._order = self._shuffle()
        found = self._order[self._next : self._next + count]
        self._next += len(found)
        return [(index, self._lengths[index]) for index in found]

    def length(self, address: Any) -> int:
        """Return the length of a conversation."""
        return int(self._lengths[address])

    def ids(self, address: Any) -> Array:
        """Return the ids of a conversation."""
        return self._conversations.ids(address)

    def state(self) -> dict[str, Any]:
        """Return the epoch and the place in its order."""
        return {"epoch": self.epoch, "next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self.epoch, self._next = state["epoch"], state["next"]
        self._order = self._shuffle()

    def close(self) -> None:
        """Nothing goes on in the background."""

    def _shuffle(self) -> list[int]:
        return order_of_epoch(len(self._conversations), self._seed, self.epoch)


class StreamedConversations(StreamRows):
    """Conversations as one stream. Where only the assistant's tokens are trained on, the others are no targets."""

    def __init__(
        self, conversations: Tokens, *, row_tokens: int, batch_rows: int, train_on: str, seed: int,
        name_of: Callable[[int], str] = "conversation {}".format,
    ) -> None:  # fmt: skip
        """Start the first epoch; nanochat trains on all tokens here."""
        super().__init__(ShuffledConversations(conversations, seed, name_of), row_tokens, batch_rows)
        self._targets: StreamRows | None = None
        if train_on == "assistant":
            marks = Tokens(conversations.offsets, np.asarray(conversations.flat_trained, dtype=np.int32), None)
            self._targets = StreamRows(ShuffledConversations(marks, seed, name_of), row_tokens, batch_rows)

    def next_row(self) -> Row:
        """Return the next row."""
        inputs, targets = super().next_row()
        if self._targets is None:
            return inputs, targets
        _, marks = self._targets.next_row()
        return inputs, np.where(marks != 0, targets, np.int32(IGNORED))

    def counts(self) -> dict[str, float]:
        """Return nothing: no conversation is cut."""
        return {"truncated_conversations": 0}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        super().restore(state)
        if self._targets is not None:
            self._targets.restore(state)


def pack_documents(
    packing: str, source: DocumentSource, *, row_tokens: int, buffer_documents: int, batch_rows: int, bos: int
) -> RowStream:
    """Return rows of documents.

    Args:
        packing: best_fit (nanochat since 2026: the rest of a cropped document is dropped), best_fit_whole (it waits for
            another row, behind a <|bos|> of its own) or stream (nanochat's of 2025).
        source: where documents come from.
        row_tokens: T.
        buffer_documents: how many best fit chooses from.
        batch_rows: rows of an iteration, for the stream.
        bos: the id of <|bos|>.
    """
    if packing == "stream":
        return StreamRows(source, row_tokens, batch_rows)
    return DocumentRows(source, row_tokens, buffer_documents, rest_begins=bos if packing == "best_fit_whole" else None)


def pack_conversations(
    packing: str, conversations: Tokens, *, batch_rows: int, bos: int, assistant_end: int, row_tokens: int,
    buffer_conversations: int, train_on: str, seed: int, name_of: Callable[[int], str],
) -> EpochRows:  # fmt: skip
    """Return rows of conversations.

    Args:
        packing: best_fit (nanochat since 2026), stream (nanochat's midtraining of 2025) or alone (its SFT of 2025: one
            in a row).
        conversations: encoded, with what is trained on.
        batch_rows: rows of an iteration, for the stream.
        bos: what fills a row behind several conversations.
        assistant_end: what fills a row behind one.
        row_tokens: T.
        buffer_conversations: how many best fit chooses from.
        train_on: assistant or all.
        seed: of the order.
        name_of: what people call a conversation, by its number.
    """
    if packing == "stream":
        return StreamedConversations(
            conversations, row_tokens=row_tokens, batch_rows=batch_rows, train_on=train_on, seed=seed, name_of=name_of
        )
    alone = packing == "alone"
    return ConversationRows(
        conversations, padding=assistant_end if alone else bos, row_tokens=row_tokens,
        buffer_conversations=1 if alone else buffer_conversations, train_on=train_on, seed=seed, name_of=name_of,
        alone=alone,
    )  # fmt: skip
