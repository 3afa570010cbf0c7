"""Trains a tokenizer with rustbpe in a separate process.

rustbpe's merging holds the interpreter's lock for minutes. In a process of its own it can be killed at any moment, and
its memory is freed at its end.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import rustbpe

from mlxchat.config.schema import TokenizerConfig
from mlxchat.config.wording import format_count
from mlxchat.data.sources import LISTING, Corpus
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN
from mlxchat.errors import DataError, StepFailed
from mlxchat.hub.cache import read_json
from mlxchat.runner.context import Context
from mlxchat.runner.process import SIGNALS

_PART_CHARS = 1 << 18
_WAITING_PARTS = 64
_LOOK_SECONDS = 0.1


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on texts, most frequent pair first, until the vocabulary (special tokens included) is full."""
    return _tokenizer_of(_learn(texts, vocab_size - len(SPECIAL_TOKENS)), vocab_size)


def train_on_corpus(ctx: Context, corpus: Path, config: TokenizerConfig) -> Tokenizer:
    """Return a tokenizer trained on the first `max_chars` of a corpus; numbers go to the step's metrics."""
    began = time.monotonic()
    chars = 0

    def check() -> None:
        if ctx.should_stop():
            raise ctx.stop(f"its beginning: {chars:,} characters are read again")

    known_chars = (read_json(corpus / LISTING) or {}).get("train_chars")
    total = min(config.max_chars, int(known_chars or config.max_chars))
    num_tokens = config.vocab_size - len(SPECIAL_TOKENS)
    with TrainingProcess(num_tokens, check) as training:
        with ctx.progress(total, "chars") as bar:
            for chars in training.read(_first_documents(ctx, corpus, config)):
                speed = chars / max(1e-9, time.monotonic() - began)
                bar.update(min(chars, total), speed=f"{format_count(speed)} chars/s")
        with ctx.progress(num_tokens, "merges"):
            ranks = training.ranks()
    ctx.metrics["trained_chars"] = chars
    ctx.metrics["chars_per_second"] = chars / max(1e-9, time.monotonic() - began)
    return _tokenizer_of(ranks, config.vocab_size)


def _first_documents(ctx: Context, corpus: Path, config: TokenizerConfig) -> Iterator[str]:
    """Yield the beginnings of documents until they have more than `max_chars` characters together."""
    chars = 0
    for document in Corpus.open(corpus).documents("train", ctx.hints.get("train_chars")):
        text = document[: config.document_chars]
        chars += len(text)
        yield text
        if chars > config.max_chars:
            return


def _tokenizer_of(ranks: dict[bytes, int], vocab_size: int) -> Tokenizer:
    found = len(ranks) + len(SPECIAL_TOKENS)
    if found < vocab_size:
        raise DataError(
            f"tokenizer.vocab_size is {vocab_size}, but the corpus yields only {found} tokens. Lower it, or give more "
            "text."
        )
    return Tokenizer(ranks)


def _learn(texts: Iterable[str], num_tokens: int) -> dict[bytes, int]:
    """Return token → id of at most `num_tokens` tokens, the 256 bytes included."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), num_tokens, pattern=SPLIT_PATTERN)
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


class TrainingProcess:
    """A process that trains on the texts that it is sent; a context manager that kills it."""

    def __init__(self, num_tokens: int, check: Callable[[], None] = lambda: None) -> None:
        """Start it; `check` is called during each wait, and may raise."""
        context = multiprocessing.get_context("spawn")
        self._check = check
        self._parts: Any = context.Queue(_WAITING_PARTS)
        self._ranks: Any = context.Queue()
        self._process = context.Process(target=_train, args=(num_tokens, self._parts, self._ranks), daemon=True)
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.join()
        self._parts.cancel_join_thread()

    def read(self, texts: Iterable[str]) -> Iterator[int]:
        """Send all texts, a few at a time; yield the number of characters sent so far."""
        part: list[str] = []
        chars = sent = 0
        for text in texts:
            part.append(text)
            chars += len(text)
            if chars - sent >= _PART_CHARS:
                self._send(part)
                part = []
                sent = chars
                yield sent
        self._send(part)
        self._send(None)
        yield chars

    def _send(self, part: list[str] | None) -> None:
        self._repeat(lambda: self._parts.put(part, timeout=_LOOK_SECONDS))

    def ranks(self) -> dict[bytes, int]:
        """Return token → id, once all texts are sent."""
        found: dict[bytes, int] = self._repeat(lambda: self._ranks.get(timeout=_LOOK_SECONDS))
        return found

    def _repeat(self, action: Callable[[], Any]) -> Any:
        """Return what an action on a queue returns, once the queue allows it."""
        while True:
            self._check()
            is_alive = self._process.is_alive()
            try:
                return action()
            except (queue.Full, queue.Empty):
                if not is_alive:
                    how = f"with exit code {self._process.exitcode} (negative: by that signal)"
                    raise StepFailed(f"the tokenizer's training process ended {how}; its output is above") from None


def _train(num_tokens: int, parts: Any, ranks: Any) -> None:
    """Train on the parts up to None, and send the ranks: the work of the separate process."""
    for number in SIGNALS:  # Ctrl-C reaches all processes of a terminal; the parent kills this one
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ranks.put(_learn((text for part in iter(parts.get, None) for text in part), num_tokens))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a child process"
    parent.join()
    os._exit(1)
