"""Token files, and the documents of a corpus, whose shards are encoded on demand.

Text and conversations are encoded once per content and tokenizer into artifacts (`tokens-…`) that all runs share. Each
is a safetensors file, written as a stream and memory-mapped:
- offsets (n + 1,) int64: the start of each sequence, and the end of the last;
- ids (tokens,) uint16, or uint32 for vocabularies above 65,536;
- trained (tokens,) bool, for conversations: the loss mask.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from mlxchat.data.conversation import render_conversation
from mlxchat.data.mixture import Mixture
from mlxchat.data.sources import Check, Corpus, Shard
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import DataError
from mlxchat.ops.machine import available_cores
from mlxchat.runner.context import Context
from mlxchat.store.fingerprint import canonical_json
from mlxchat.tasks.pairs import Answers

FORMAT = 1
"""Part of the keys of token files, which else depend on texts and tokenizer only: raise it when rendering changes."""
FILE = "tokens.safetensors"

# The header is written last into reserved space; the format allows spaces after the JSON.
_HEADER_BYTES = 512
_TYPES = {"I64": np.int64, "U16": np.uint16, "U32": np.uint32, "BOOL": np.bool_}
# Documents that one thread encodes between two checks for a stop: a fraction of a second.
_PART_DOCUMENTS = 128
_MOST_OPEN_SHARDS = 16

Array = np.ndarray[Any, np.dtype[Any]]
Address = tuple[int, int]
"""Shard and document in it, both from 0."""


@dataclass(frozen=True)
class Tokens:
    """Sequences of token ids."""

    offsets: Array
    """(n + 1,)"""
    flat: Array
    """(tokens,): the concatenated ids of all sequences."""
    flat_trained: Array | None
    """(tokens,): the loss mask; None: documents."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, start: int, stop: int) -> list[int]:
        """Return the lengths in tokens of sequences start … stop − 1."""
        lengths: list[int] = np.diff(self.offsets[start : stop + 1]).tolist()
        return lengths

    def ids(self, index: int) -> Array:
        """Return the ids of a sequence, as a view of the file."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def trained(self, index: int) -> Array:
        """Return the loss mask of a sequence, as a view of the file."""
        assert self.flat_trained is not None, "documents have no loss mask"
        return self.flat_trained[self.offsets[index] : self.offsets[index + 1]]


def write_tokens(
    file: BinaryIO, sequences: Iterable[tuple[Array, Array | None]], *, count: int, vocab_size: int
) -> int:
    """Write sequences to an empty file as a stream; return their total number of tokens.

    Args:
        file: seekable.
        sequences: ids and loss masks; either all or no masks are None.
        count: number of sequences.
        vocab_size: determines the type of the ids.

    Raises:
        DataError: there are more or fewer than `count` sequences.
    """
    width = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    offsets = np.zeros(count + 1, dtype=np.int64)
    masks: list[Array] = []
    file.seek(_HEADER_BYTES + offsets.nbytes)
    found = 0
    for ids, trained in sequences:
        if found < count:
            offsets[found + 1] = offsets[found] + len(ids)
        found += 1
        file.write(ids.astype(width).tobytes())
        if trained is not None:
            masks.append(trained.astype(np.bool_))
    if found != count:
        raise DataError(f"{found} sequences were encoded, expected {count}: the text changed meanwhile")
    total = int(offsets[-1])
    for mask in masks:
        file.write(mask.tobytes())
    arrays = [("offsets", "I64", count + 1), ("ids", "U16" if width is np.uint16 else "U32", total)]
    header, end = {}, 0
    for name, dtype, length in [*arrays, *([("trained", "BOOL", total)] if masks else [])]:
        start, end = end, end + length * np.dtype(_TYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": [length], "data_offsets": [start, end]}
    file.seek(0)
    file.write((_HEADER_BYTES - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(_HEADER_BYTES - 8))
    file.write(offsets.tobytes())
    return total


def open_tokens(folder: Path) -> Tokens:
    """Return the memory-mapped sequences of a folder.

    Raises:
        DataError: the file is missing, truncated or invalid.
    """
    path = folder / FILE
    try:
        with path.open("rb") as file:
            return read_tokens(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). Remove the folder; the next run recreates it.") from None


def read_tokens(buffer: Any) -> Tokens:
    """Return the sequences of a file's bytes, as views.

    Raises:
        ValueError, KeyError, TypeError: the bytes are not in `write_tokens`'s format.
    """
    size = int.from_bytes(buffer[:8], "little")
    header = json.loads(bytes(buffer[8 : 8 + size]))

    def view(name: str) -> Array:
        start, stop = header[name]["data_offsets"]
        (count,) = header[name]["shape"]
        if 8 + size + stop > len(buffer):
            raise ValueError("it is truncated")
        dtype = _TYPES[header[name]["dtype"]]
        return np.frombuffer(buffer, dtype, count, 8 + size + start) if count else np.zeros(0, dtype)

    return Tokens(view("offsets"), view("ids"), view("trained") if "trained" in header else None)


Obtain = Callable[[Shard, bool, Check], Path]
"""(shard, whether a caller waits for it, check) → folder with the shard's tokens."""


class Documents:
    """The tokenized documents of a split in order, endless or once; the position can be saved and restored.

    Each shard is encoded on demand. While it is read, a thread encodes the next one.
    """

    def __init__(
        self, shards: Sequence[Shard], obtain: Obtain, *, once: bool = False,
        on_open: Callable[[int], object] = lambda index: None,
    ) -> None:  # fmt: skip
        """Start at the first document; nothing is read yet.

        Args:
            shards: of text, in order.
            obtain: encodes a shard, unless it is encoded already.
            once: end after the last document instead of starting over.
            on_open: called with the index of a shard before it is read.
        """
        self._shards, self._obtain, self._once, self._on_open = list(shards), obtain, once, on_open
        self.epoch = 0
        self._position: Address = (0, 0)
        self._empty = 0  # consecutive shards without a document
        # Few are open, since each takes a file handle; buffered documents come from few shards.
        self._open: OrderedDict[int, Tokens] = OrderedDict()
        self._closing = threading.Event()
        self._worker: tuple[int, threading.Thread] | None = None

    def next(self, count: int) -> list[tuple[Address, int]]:
        """Return addresses and lengths in tokens of the next `count` documents; fewer at the end if read `once`.

        Raises:
            DataError: the corpus has no documents.
        """
        found: list[tuple[Address, int]] = []
        while len(found) < count:
            shard, start = self._position
            if shard == len(self._shards):
                if self._once and self._empty < len(self._shards):
                    break
                self.epoch, self._position = self.epoch + 1, (0, 0)
                continue
            tokens = self.tokens(shard)
            self.prepare((shard + 1) % len(self._shards))
            self._empty = 0 if len(tokens) else self._empty + 1
            if self._empty > len(self._shards):
                names = [shard.name for shard in self._shards]
                raise DataError(f"the corpus has no documents in {', '.join(names[:5])}{' …' * (len(names) > 5)}")
            stop = min(len(tokens), start + count - len(found))
            found += (((shard, start + i), length) for i, length in enumerate(tokens.lengths(start, stop)))
            self._position = (shard, stop) if stop < len(tokens) else (shard + 1, 0)
        return found

    def length(self, address: Address) -> int:
        """Return the length in tokens of a document."""
        shard, document = address
        return self.tokens(shard).lengths(document, document + 1)[0]

    def ids(self, address: Address) -> Array:
        """Return the ids of a document, <|bos|> first."""
        shard, document = address
        return self.tokens(shard).ids(document)

    def name(self, address: Address) -> str:
        """Return a document's name: the shard's file and the number in it, from 0."""
        shard, document = address
        return f"{self._shards[shard].name} document {document}"

    def state(self) -> dict[str, Any]:
        """Return the position as JSON data."""
        return {"epoch": self.epoch, "position": list(self._position)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a position; also reopens closed documents."""
        self.epoch = state["epoch"]
        shard, document = state["position"]
        self._position = (shard, document)

    def tokens(self, index: int) -> Tokens:
        """Return a shard's tokens, after encoding it if necessary."""
        found = self._open.get(index)
        if found is None:
            self._on_open(index)
            if self._worker is not None and self._worker[0] == index:
                self._worker[1].join()  # checks for stops, too
            found = self._open[index] = open_tokens(self._obtain(self._shards[index], True, lambda: None))
            while len(self._open) > _MOST_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return found

    def prepare(self, index: int) -> None:
        """Start encoding a shard in the background, unless the thread is busy."""
        if index in self._open or (self._worker is not None and self._worker[1].is_alive()):
            return
        self._closing.clear()

        def check() -> None:
            if self._closing.is_set():
                raise _Closed

        def work() -> None:
            with suppress(Exception):  # fails again, with a message, when the shard is needed
                self._obtain(self._shards[index], False, check)

        worker = threading.Thread(target=work, name=f"encode {self._shards[index].name}", daemon=True)
        worker.start()
        self._worker = index, worker

    def close(self) -> None:
        """End the background work until the next `restore`."""
        self._closing.set()
        if self._worker is not None:
            self._worker[1].join()
            self._worker = None


class _Closed(Exception):
    """Ends the background work."""


class DocumentTokenizer(Protocol):
    """Encodes documents: our tokenizer or a third-party model's."""

    @property
    def digest(self) -> str:
        """A hash of everything that determines the encoding."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    def encode_documents(self, texts: list[str]) -> list[Array]:
        """Return each document's ids, with the begin token in front."""


def open_documents(ctx: Context, split: str, tokenizer: DocumentTokenizer, *, once: bool = False) -> Documents:
    """Return the documents of a split ('train' or 'validation') of the step's corpus, endless or `once`.

    Shards are encoded on demand with all cores, and the next one in the background with a quarter of them. The files
    that the run will need are downloaded ahead.
    """
    corpus = Corpus.open(ctx.inputs["corpus"])
    chars = ctx.hints.get("train_chars") if split == "train" else None

    def obtain(shard: Shard, is_awaited: bool, check: Check) -> Path:
        threads = available_cores() if is_awaited else max(1, available_cores() // 4)

        def look() -> None:
            check()
            if ctx.should_stop():
                raise ctx.stop(f"the encoding of {shard.name}")

        return ctx.encoded(
            version=FORMAT,
            label=shard.stem,
            identity={**shard.identity(), "tokenizer": tokenizer.digest},
            make=lambda folder: encode_shard(shard, tokenizer, folder, threads=threads, check=look),
            check=look,
        )

    def fetch(index: int) -> None:
        corpus.fetch_ahead(split, index + 1, chars)

    return Documents(corpus.shards(split), obtain, once=once, on_open=fetch)


def encode_shard(
    shard: Shard, tokenizer: DocumentTokenizer, folder: Path, *, threads: int, check: Check = lambda: None
) -> dict[str, float]:
    """Encode a text shard into a folder, after downloading it if necessary; return the numbers for the manifest.

    `check` is called every few hundred documents and may raise to end the work.
    """

    def encode() -> Iterator[tuple[Array, None]]:
        texts = shard.documents(check)
        with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
            while part := list(islice(texts, threads * _PART_DOCUMENTS)):
                check()
                size = -(-len(part) // threads)
                parts = [part[first : first + size] for first in range(0, len(part), size)]
                for encoded in pool.map(tokenizer.encode_documents, parts):
                    yield from ((ids, None) for ids in encoded)

    return _write(folder, encode(), "documents", shard.count(check), tokenizer.vocab_size)


def open_mixture(ctx: Context, name: str, mixture: Mixture | Answers, tokenizer: Tokenizer) -> Tokens:
    """Return the tokenized conversations of a mixture or of pairs; `name` becomes part of the artifact's label."""
    digest = hashlib.sha256()
    for conversation in mixture:
        digest.update(canonical_json(conversation.get("messages")).encode() + b"\n")

    def render() -> Iterator[tuple[Array, Array]]:
        for conversation in mixture:
            if ctx.should_stop():
                raise ctx.stop("the encoding of its conversations")
            ids, mask = render_conversation(tokenizer, conversation, max_tokens=None)
            yield np.array(ids, dtype=np.uint32), np.array(mask, dtype=np.bool_)

    def make(folder: Path) -> dict[str, float]:
        return _write(folder, render(), "conversations", len(mixture), tokenizer.vocab_size)

    identity = {"conversations": digest.hexdigest(), "tokenizer": tokenizer.digest}
    return open_tokens(ctx.encoded(version=FORMAT, label=f"{ctx.step}_{name}", identity=identity, make=make))


def _write(
    folder: Path, sequences: Iterable[tuple[Array, Array | None]], kind: str, count: int, vocab_size: int
) -> dict[str, float]:
    """Write sequences to a folder; return the numbers for the manifest."""
    began = time.monotonic()
    with (folder / FILE).open("wb") as file:
        tokens = write_tokens(file, sequences, count=count, vocab_size=vocab_size)
    return {kind: count, "tokens": tokens, "tokens_per_second": tokens / max(1e-9, time.monotonic() - began)}
