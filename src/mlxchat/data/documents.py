"""Documents as token ids, in order, forever: a split's shards, each encoded when it is needed, the next one ahead."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from mlxchat.data.shards import Shard
from mlxchat.data.tokens import Array, Tokens, open_tokens
from mlxchat.errors import DataError

Address = tuple[int, int]
"""Shard and document in it, both from 0."""

Obtain = Callable[[Shard, bool, Callable[[], None]], Path]
"""Takes a text shard, whether somebody waits for it, and what to call now and then (it may raise, to end the work);
returns the folder with its tokens."""

_MOST_OPEN_SHARDS = 16
_POLL_SECONDS = 0.1


class Closed(Exception):
    """The work is not wanted any more."""


class DocumentSource(Protocol):
    """Where packing takes documents from: it needs their lengths at once, and their ids when a row is made."""

    epoch: int

    def next(self, count: int) -> list[tuple[Address, int]]:
        """Return addresses and lengths in tokens of the next `count` documents."""

    def length(self, address: Address) -> int:
        """Return the length in tokens of a document."""

    def ids(self, address: Address) -> Array:
        """Return the ids of a document, <|bos|> first."""

    def name(self, address: Address) -> str:
        """Return what people call a document."""

    def state(self) -> dict[str, Any]:
        """Return the position, as JSON data."""

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""

    def close(self) -> None:
        """End what goes on in the background; any thread may call."""


class EncodedShards:
    """The shards of a split as token ids. `obtain` makes them; while one is read, the next is made in a thread."""

    def __init__(
        self, shards: Sequence[Shard], obtain: Obtain, on_open: Callable[[int], object] = lambda index: None
    ) -> None:
        """Take the text shards in order; nothing is read yet. `on_open` is called with the number of one to be read."""
        self.shards, self._obtain, self._on_open = list(shards), obtain, on_open
        # Few at a time: every open file takes a handle, and documents that wait for a row come from few shards.
        self._open: OrderedDict[int, Tokens] = OrderedDict()
        self._closing = threading.Event()
        self._worker: tuple[int, threading.Thread] | None = None

    def open(self, index: int) -> Tokens:
        """Return a shard's tokens, encoding it first if nobody has."""
        found = self._open.get(index)
        if found is None:
            self._on_open(index)
            if self._worker is not None and self._worker[0] == index:
                while self._worker[1].is_alive():
                    self._check()
                    self._worker[1].join(_POLL_SECONDS)
            found = open_tokens(self._obtain(self.shards[index], True, self._check))
            self._open[index] = found
            while len(self._open) > _MOST_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return found

    def prepare(self, index: int) -> None:
        """Begin to encode a shard in the background, unless another one still is."""
        if index in self._open or (self._worker is not None and self._worker[1].is_alive()):
            return

        def work() -> None:
            # Whatever fails here fails again, and is told, once somebody needs the shard.
            with suppress(Exception):
                self._obtain(self.shards[index], False, self._check)

        worker = threading.Thread(target=work, name=f"encode {self.shards[index].name}", daemon=True)
        worker.start()
        self._worker = index, worker  # not before it runs: another thread that closes meanwhile would join it

    def close(self) -> None:
        """End the background work, and any `open` that encodes in another thread (it raises Closed)."""
        self._closing.set()
        if self._worker is not None:
            self._worker[1].join()
            self._worker = None

    def reopen(self) -> None:
        """Allow work again."""
        self._closing.clear()

    def _check(self) -> None:
        if self._closing.is_set():
            raise Closed


class DocumentCursor:
    """Documents of a split in order, forever or once, with a position that can be saved and returned to."""

    def __init__(self, shards: EncodedShards, *, once: bool = False) -> None:
        """Start at the first document; `once`: after the last one there are no more."""
        self._shards, self._once = shards, once
        self.epoch = 0
        self._position: Address = (0, 0)
        self._empty = 0  # shards without a document, one after the other

    def next(self, count: int) -> list[tuple[Address, int]]:
        """Return addresses and lengths in tokens of the next `count` documents; fewer at the end, if it has one.

        Raises:
            DataError: the corpus has none.
        """
        found: list[tuple[Address, int]] = []
        while len(found) < count:
            shard, start = self._position
            if shard == len(self._shards.shards):
                if self._once and self._empty < len(self._shards.shards):
                    break
                self.epoch, self._position = self.epoch + 1, (0, 0)
                continue
            tokens = self._shards.open(shard)
            self._shards.prepare((shard + 1) % len(self._shards.shards))
            self._empty = 0 if len(tokens) else self._empty + 1
            if self._empty > len(self._shards.shards):
                names = [shard.name for shard in self._shards.shards]
                raise DataError(f"the corpus holds no document in {', '.join(names[:5])}{' …' * (len(names) > 5)}")
            stop = min(len(tokens), start + count - len(found))
            found += (((shard, start + i), length) for i, length in enumerate(tokens.lengths(start, stop)))
            self._position = (shard, stop) if stop < len(tokens) else (shard + 1, 0)
        return found

    def length(self, address: Address) -> int:
        """Return the length in tokens of a document."""
        shard, document = address
        return self._shards.open(shard).lengths(document, document + 1)[0]

    def ids(self, address: Address) -> Array:
        """Return the ids of a document, <|bos|> first."""
        shard, document = address
        return self._shards.open(shard).ids(document)

    def name(self, address: Address) -> str:
        """Return the shard's file and the document's number in it, from 0."""
        shard, document = address
        return f"{self._shards.shards[shard].name} document {document}"

    def state(self) -> dict[str, Any]:
        """Return the position as plain numbers."""
        return {"epoch": self.epoch, "position": list(self._position)}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position; a closed cursor works again."""
        self._shards.reopen()
        self.epoch = state["epoch"]
        shard, document = state["position"]
        self._position = (shard, document)

    def close(self) -> None:
        """End what goes on in the background; any thread may call."""
        self._shards.close()
