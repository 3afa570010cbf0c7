"""Trains a tokenizer with rustbpe in a separate process (`bpe_worker.py`), fed through a pipe.

The process can be killed at any moment, frees its memory at exit, and holds at most a few thousand documents.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import psutil

from mlxchat.config.schema import TokenizerConfig
from mlxchat.config.wording import format_bytes, format_count
from mlxchat.data.sources import LISTING, Corpus
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN
from mlxchat.errors import DataError, StepFailed
from mlxchat.hub.cache import read_json
from mlxchat.runner.context import Context
from mlxchat.runner.process import SIGNALS

# Documents that rustbpe counts at a time; as many more are queued. Twice as many (its default) are not faster and take
# more memory; a quarter is slower.
_BUFFER_DOCUMENTS = 4096
_PART_CHARS = 1 << 18
_READ_BYTES = 1 << 20
_LOOK_SECONDS = 0.1
_WEIGH_SECONDS = 0.5
_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Trained:
    """The progress of a training and, at the end, its result."""

    chars: int = 0
    """Characters counted."""
    pieces: int | None = None
    """Distinct pieces, known after counting; they determine the memory of the merging."""
    merges: int = 0
    """Merges made."""
    peak_bytes: int = 0
    """Peak memory of the worker process, at the end."""
    ranks: dict[bytes, int] | None = None
    """Token → id, at the end."""


def train_on_corpus(ctx: Context, corpus: Path, config: TokenizerConfig) -> Tokenizer:
    """Return a tokenizer trained on the first `max_chars` of a corpus; numbers go to the step's metrics.

    Raises:
        DataError: the text yields too few tokens, or needs more memory than allowed.
        Interrupted: a signal arrived; the same command starts from the beginning.
    """
    began = time.monotonic()
    used_chars = 0

    def crop_documents() -> Iterator[str]:
        nonlocal used_chars
        for document in Corpus.open(corpus).documents("train", ctx.hints.get("train_chars")):
            text = document[: config.document_chars]
            used_chars += len(text)
            yield text
            if used_chars > config.max_chars:
                return

    def check() -> None:
        if ctx.should_stop():
            raise ctx.stop(f"its beginning: {used_chars:,} characters are read again")

    limit = ctx.config.machine.memory_limit_bytes or int(psutil.virtual_memory().total * _MEMORY_SHARE)
    known_chars = (read_json(corpus / LISTING) or {}).get("train_chars")
    total = min(config.max_chars, int(known_chars or config.max_chars))
    merges = config.vocab_size - 256 - len(SPECIAL_TOKENS)
    last = Trained()
    with closing(train_ranks(crop_documents(), merges + 256, memory_limit_bytes=limit)) as training:
        with ctx.progress(total, "chars") as bar:
            for last in training:
                check()
                if last.pieces is not None:  # counting is finished
                    break
                speed = last.chars / max(1e-9, time.monotonic() - began)
                bar.update(min(last.chars, total), speed=f"{format_count(speed)} chars/s")
        counted = last
        with ctx.progress(max(1, merges), "merges") as bar:
            for last in chain([counted], training):
                check()
                memory = format_bytes(last.peak_bytes) if last.peak_bytes else ""
                bar.update(last.merges, speed=f"{format_count(last.pieces or 0)} distinct pieces", memory=memory)
    ctx.metrics["trained_chars"] = used_chars
    ctx.metrics["distinct_pieces"] = last.pieces or 0
    ctx.metrics["chars_per_second"] = used_chars / max(1e-9, time.monotonic() - began)
    ctx.metrics["training_peak_bytes"] = last.peak_bytes
    return _tokenizer_of(last, config.vocab_size)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on texts, most frequent pair first, until the vocabulary (special tokens included) is full.

    Raises:
        DataError: the text yields fewer tokens than `vocab_size`; or as in `train_ranks`.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise DataError(f"tokenizer.vocab_size is {vocab_size}, expected at least {256 + len(SPECIAL_TOKENS)}")
    *_, trained = train_ranks(texts, vocab_size - len(SPECIAL_TOKENS))
    return _tokenizer_of(trained, vocab_size)


def _tokenizer_of(trained: Trained, vocab_size: int) -> Tokenizer:
    assert trained.ranks is not None, "the last report has them"
    found = len(trained.ranks) + len(SPECIAL_TOKENS)
    if found < vocab_size:
        raise DataError(
            f"tokenizer.vocab_size is {vocab_size}, but the corpus yields only {found} tokens. Lower it, or give more "
            "text."
        )
    return Tokenizer(trained.ranks)


def train_ranks(
    texts: Iterable[str], num_tokens: int, *, memory_limit_bytes: int | None = None
) -> Generator[Trained, None, None]:
    """Train on texts, most frequent pair first; yield the progress several times a second, and at last the result.

    Closing the generator kills the worker process.

    Args:
        texts: read once, on demand.
        num_tokens: including the 256 bytes; the result has fewer if the text runs out of pairs.
        memory_limit_bytes: of the worker process; None: no limit.

    Raises:
        DataError: a text is not valid Unicode, or the memory limit is exceeded.
        StepFailed: the worker process was killed.
    """
    worker = _Worker(memory_limit_bytes)
    settings = {"num_tokens": num_tokens, "pattern": SPLIT_PATTERN, "buffer": _BUFFER_DOCUMENTS, "parent": os.getpid()}
    try:
        yield from worker.send(settings)
        for part in _parts(texts):
            yield from worker.send(part)
        yield from worker.send([])
        while worker.trained.ranks is None:
            worker.look()
            yield worker.trained
    finally:
        worker.kill()


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts a few at a time."""
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= _PART_CHARS:
            yield part
            part, size = [], 0
    if part:
        yield part


class _Worker:
    """The worker process. No wait for its pipes exceeds _LOOK_SECONDS."""

    def __init__(self, memory_limit_bytes: int | None) -> None:
        self._limit = memory_limit_bytes
        command = [sys.executable, "-P", str(Path(__file__).with_name("bpe_worker.py"))]
        # The child inherits blocked signals: Ctrl-C in a terminal, or SIGTERM to all processes of a job, stops only
        # this process, which then kills the child.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self.trained, self._received, self._weighed = Trained(), b"", 0.0

    def send(self, value: Any) -> Iterator[Trained]:
        """Write a line of JSON; yield the progress after each attempt."""
        try:
            rest = memoryview((json.dumps(value, ensure_ascii=False) + "\n").encode())
        except UnicodeEncodeError as error:
            raise DataError(f"a document is not valid Unicode ({error})") from None
        while rest:
            if self.look(wants_to_send=True):
                try:
                    rest = rest[os.write(self._in, rest) :]
                except BlockingIOError:
                    pass
                except BrokenPipeError:
                    self._fail()
            yield self.trained

    def look(self, *, wants_to_send: bool = False) -> bool:
        """Read reports, for at most _LOOK_SECONDS; return whether data can be sent."""
        readable, writable, _ = select.select([self._out], [self._in] if wants_to_send else [], [], _LOOK_SECONDS)
        if readable:
            data = os.read(self._out, _READ_BYTES)
            if not data:
                self._fail()
            *lines, self._received = (self._received + data).split(b"\n")
            for line in lines:
                facts = json.loads(line)
                if "ranks" in facts:
                    facts["ranks"] = {bytes.fromhex(token): rank for rank, token in enumerate(facts["ranks"])}
                self.trained = replace(self.trained, **facts)
        self._weigh()
        return bool(writable)

    def kill(self) -> None:
        """Kill the process and wait for it."""
        self._process.kill()
        self._process.communicate()

    def _weigh(self) -> None:
        now = time.monotonic()
        if self._limit is None or now - self._weighed < _WEIGH_SECONDS:
            return
        self._weighed = now
        try:
            used = psutil.Process(self._process.pid).memory_info().rss
        except psutil.Error:
            return
        if used > self._limit:
            raise DataError(
                f"training the tokenizer took {format_bytes(used)} after {self.trained.chars:,} characters, more than "
                f"its limit of {format_bytes(self._limit)}. Lower tokenizer.max_chars, or raise "
                "machine.memory_limit_bytes."
            )

    def _fail(self) -> NoReturn:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        raise StepFailed(f"the tokenizer's training process ended {how}; its output is above")
