"""Mixtures of conversations, token files, and the documents of a corpus, whose shards are encoded on demand.

A mixture has the conversations of several tasks in one deterministic order, shuffled or task by task. Text and
conversations are encoded once per content and tokenizer into artifacts (`tokens-…`) that all runs share. Each has
memory-mapped arrays:
- offsets.npy (n + 1,) int64: the start of each sequence, and the end of the last;
- ids.npy (tokens,) uint16, or uint32 for vocabularies above 65,536;
- trained.npy (tokens,) bool, for conversations: the loss mask.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.config.schema import TaskItem
from mlxchat.data.sources import Check, Corpus, Shard
from mlxchat.data.tokenizer import Tokenizer, render_conversation
from mlxchat.errors import ConfigError, DataError
from mlxchat.ops.machine import available_cores
from mlxchat.runner.context import Context
from mlxchat.store.fingerprint import canonical_json
from mlxchat.tasks import Task, load_item
from mlxchat.tasks.base import Conversation

FORMAT = 2
"""Part of the keys of token files, which else depend on texts and tokenizer only: raise it when rendering changes."""

# Documents that one thread encodes between two checks for a stop: a fraction of a second.
_PART_DOCUMENTS = 128
_MOST_OPEN_SHARDS = 16

Array = np.ndarray[Any, np.dtype[Any]]
Address = tuple[int, int]  # shard and document in it, both from 0


def open_item(ctx: Context, item: TaskItem) -> Task:
    """Return the task of an item, after its downloads, which are recorded in `ctx.externals`."""
    task = load_item(item)
    task.check()

    def check() -> None:
        if ctx.should_stop():
            raise ctx.stop(f"the download for task {item.task}")

    task.fetch(check)
    ctx.externals += [source for source in task.sources() if source not in ctx.externals]
    return task


def shuffled_places(count: int, seed: int) -> array[int]:
    """Return 0 … count − 1 shuffled; with seed 42 this is the order of nanochat's TaskMixture."""
    places = array("Q", range(count))
    random.Random(seed).shuffle(places)
    return places


class Mixture:
    """The conversations of all tasks, repeated by their epochs or weights, shuffled or task by task."""

    def __init__(
        self,
        items: Mapping[str, TaskItem],
        *,
        seed: int,
        order: Sequence[str] | None = None,
        load: Callable[[TaskItem], Task] = load_item,
    ) -> None:
        """Load the tasks of items by name; `order` has all names, for conversations task by task (None: shuffled)."""
        # By name, since the order of tasks in a file is not part of the key.
        ordered = {name: items[name] for name in (sorted(items) if order is None else order)}
        self._tasks = [load(item) for item in ordered.values()]
        self._names = list(ordered)
        self._sizes = [len(task) for task in self._tasks]
        if empty := [name for name, size in zip(ordered, self._sizes, strict=True) if not size]:
            raise ConfigError(f"no conversation of {', '.join(empty)} is left: start is beyond the split's last one")
        self._counts = _count(list(ordered.values()), self._sizes)
        self._ends = list(accumulate(self._counts))
        count = self._ends[-1]
        self._order = shuffled_places(count, seed) if order is None else array("Q", range(count))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Conversation:
        task, place = self._find(index)
        return self._tasks[task][place]

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def name(self, index: int) -> str:
        """Return a conversation's name for messages: its item and its number in the task, from 0."""
        task, place = self._find(index)
        return f"{self._names[task]} conversation {place}"

    def task_of(self, index: int) -> str:
        """Return the name of a conversation's item."""
        return self._names[self._find(index)[0]]

    def counts(self) -> dict[str, int]:
        """Return the number of conversations of each item, including repetitions."""
        return dict(zip(self._names, self._counts, strict=True))

    def tasks(self) -> dict[str, Task]:
        """Return item name → task."""
        return dict(zip(self._names, self._tasks, strict=True))

    def _find(self, index: int) -> tuple[int, int]:
        place = self._order[index]
        task = bisect_right(self._ends, place)
        return task, (place - self._ends[task] + self._counts[task]) % self._sizes[task]


def _count(items: Sequence[TaskItem], sizes: Sequence[int]) -> list[int]:
    """Return the number of conversations of each task in one pass; weights divide the total size of all tasks.

    Tasks with fewer conversations than their share repeat; of others only the first are taken.
    """
    weights = [item.weight for item in items]
    if all(weight is None for weight in weights):
        return [size * item.epochs for item, size in zip(items, sizes, strict=True)]
    shares = [weight or 0.0 for weight in weights]
    return [max(1, round(sum(sizes) * share / sum(shares))) if share else 0 for share in shares]


@dataclass(frozen=True)
class Tokens:
    """Sequences of token ids."""

    offsets: Array  # (n + 1,)
    flat: Array  # (tokens,): the concatenated ids of all sequences
    flat_trained: Array | None  # (tokens,): the loss mask; None: documents

    @classmethod
    def of(cls, sequences: Iterable[tuple[Any, Any | None]], vocab_size: int) -> Tokens:
        """Return sequences of ids with loss masks; either all or no masks are None."""
        width = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        ends = [0]
        parts = [np.zeros(0, width)]
        masks: list[Array] = []
        for ids, trained in sequences:
            ends.append(ends[-1] + len(ids))
            parts.append(np.asarray(ids).astype(width))
            if trained is not None:
                masks.append(np.asarray(trained, np.bool_))
        return cls(np.array(ends, np.int64), np.concatenate(parts), np.concatenate(masks) if masks else None)

    def save(self, folder: Path) -> None:
        """Write the arrays."""
        np.save(folder / "offsets.npy", self.offsets)
        np.save(folder / "ids.npy", self.flat)
        if self.flat_trained is not None:
            np.save(folder / "trained.npy", self.flat_trained)

    @classmethod
    def open(cls, folder: Path) -> Tokens:
        """Return the memory-mapped sequences of a folder; raises DataError if a file is missing or damaged."""
        try:
            # As plain arrays, whose slices are made faster.
            found = {path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in folder.glob("*.npy")}
            return cls(found["offsets"], found["ids"], found.get("trained"))
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise DataError(f"{folder} is damaged ({error}). Remove it; the next run recreates it.") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, start: int, stop: int) -> list[int]:
        """Return the lengths in tokens of sequences start … stop − 1."""
        return list(np.diff(self.offsets[start : stop + 1]).tolist())

    def ids(self, index: int) -> Array:
        """Return the ids of a sequence, as a view of the file."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def trained(self, index: int) -> Array:
        """Return the loss mask of a sequence, as a view of the file."""
        assert self.flat_trained is not None, "documents have no loss mask"
        return self.flat_trained[self.offsets[index] : self.offsets[index + 1]]


Obtain = Callable[[Shard, bool, Check], Path]
"""(shard, whether a caller waits for it, check) → folder with the shard's tokens."""


class Documents:
    """The tokenized documents of a split in order, endless or once; a thread encodes the next shard ahead."""

    def __init__(self, shards: Sequence[Shard], obtain: Obtain, *, once: bool = False) -> None:
        """Start at the first document; nothing is read yet. `once`: end after the last one instead of starting over."""
        self.epoch = 0
        self._shards = list(shards)
        self._obtain = obtain
        self._once = once
        self._position: Address = (0, 0)
        self._is_empty = True
        # Few are open, since each takes file handles; buffered documents come from few shards.
        self.tokens = lru_cache(_MOST_OPEN_SHARDS)(self._open)
        self._closing = threading.Event()
        self._worker = threading.Thread()
        self._prepared: int | None = None  # the shard that the thread encodes or has encoded

    def next(self, count: int) -> list[tuple[Address, int]]:
        """Return addresses and lengths in tokens of the next `count` documents; fewer at the end if read `once`."""
        found: list[tuple[Address, int]] = []
        while len(found) < count:
            shard, start = self._position
            if shard == len(self._shards):
                if self._is_empty:
                    raise DataError(f"the corpus has no documents in {self._shards[0].name} and what follows")
                if self._once:
                    break
                self.epoch, self._position = self.epoch + 1, (0, 0)
                continue
            tokens = self.tokens(shard)
            self.prepare((shard + 1) % len(self._shards))
            self._is_empty = self._is_empty and not len(tokens)
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
        self._is_empty = False

    def _open(self, index: int) -> Tokens:
        if self._prepared == index:
            self._worker.join()  # checks for stops, too
        return Tokens.open(self._obtain(self._shards[index], True, lambda: None))

    def prepare(self, index: int) -> None:
        """Start encoding a shard in the background, unless it was started or the thread is busy."""
        if self._prepared == index or self._worker.is_alive():
            return
        self._closing.clear()
        self._prepared = index
        self._worker = threading.Thread(target=self._encode_ahead, args=(index,), daemon=True)
        self._worker.start()

    def _encode_ahead(self, index: int) -> None:
        def check() -> None:
            if self._closing.is_set():
                raise InterruptedError

        with suppress(Exception):  # fails again, with a message, when the shard is needed
            self._obtain(self._shards[index], False, check)

    def close(self) -> None:
        """End the background work until the next `restore`."""
        self._closing.set()
        if self._prepared is not None:
            self._worker.join()
            self._prepared = None


def open_documents(ctx: Context, split: str, tokenizer: Any, *, once: bool = False) -> Documents:
    """Return the documents of a split ('train' or 'validation') of the step's corpus, endless or `once`.

    The tokenizer is ours or a third-party model's. Shards are encoded on demand with all cores, the next one in the
    background with a quarter of them. The files that the run will need are downloaded ahead.
    """
    corpus = Corpus.open(ctx.inputs["corpus"])
    if split == "train":
        corpus.fetch_ahead(1, ctx.hints.get("train_chars"))

    def obtain(shard: Shard, is_awaited: bool, check: Check) -> Path:
        def look() -> None:
            check()
            if ctx.should_stop():
                raise ctx.stop(f"the encoding of {shard.name}")

        threads = available_cores() if is_awaited else max(1, available_cores() // 4)
        return ctx.encoded(
            version=FORMAT,
            label=Path(shard.name).stem,
            identity={**shard.identity(), "tokenizer": tokenizer.digest},
            make=partial(encode_shard, shard, tokenizer, threads=threads, check=look),
            check=look,
        )

    return Documents(corpus.shards(split), obtain, once=once)


def encode_shard(
    shard: Shard, tokenizer: Any, folder: Path, *, threads: int, check: Check = lambda: None
) -> dict[str, float]:
    """Encode a text shard into a folder, after downloading it if necessary; return the numbers for the manifest."""

    def encoded() -> Iterator[tuple[Array, None]]:
        texts = shard.documents(check)
        with ThreadPoolExecutor(threads) as pool:
            while parts := [part for _ in range(threads) if (part := list(islice(texts, _PART_DOCUMENTS)))]:
                check()
                for documents in pool.map(tokenizer.encode_documents, parts):
                    yield from ((ids, None) for ids in documents)

    return _save(encoded(), folder, "documents", tokenizer.vocab_size)


def open_mixture(ctx: Context, name: str, mixture: Iterable[Conversation], tokenizer: Tokenizer) -> Tokens:
    """Return the tokenized conversations of a mixture or of pairs; `name` becomes part of the artifact's label."""
    digest = hashlib.sha256()
    for conversation in mixture:
        digest.update(canonical_json(conversation.get("messages")).encode() + b"\n")
    identity = {"conversations": digest.hexdigest(), "tokenizer": tokenizer.digest}

    def rendered() -> Iterator[tuple[list[int], list[int]]]:
        for conversation in mixture:
            if ctx.should_stop():
                raise ctx.stop("the encoding of its conversations")
            yield render_conversation(tokenizer, conversation, max_tokens=None)

    def make(folder: Path) -> dict[str, float]:
        return _save(rendered(), folder, "conversations", tokenizer.vocab_size)

    return Tokens.open(ctx.encoded(version=FORMAT, label=f"{ctx.step}_{name}", identity=identity, make=make))


def _save(sequences: Iterable[tuple[Any, Any]], folder: Path, kind: str, vocab_size: int) -> dict[str, float]:
    began = time.monotonic()
    tokens = Tokens.of(sequences, vocab_size)
    tokens.save(folder)
    count = len(tokens.flat)
    return {kind: len(tokens), "tokens": count, "tokens_per_second": count / max(1e-9, time.monotonic() - began)}
