"""Training of a tokenizer: byte-pair encoding by rustbpe in a process of its own (`bpe_worker.py`), fed through a pipe.

It can be stopped at any moment, gives its memory back when it ends, and never holds more than a few thousand documents.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import psutil

from mlxchat.config import TokenizerConfig
from mlxchat.data.sources import LISTING, Corpus
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN
from mlxchat.errors import DataError, StepFailed
from mlxchat.hub.cache import read_json
from mlxchat.runner.context import Context
from mlxchat.runner.progress import format_bytes, format_count

# Documents that rustbpe counts at a time, and as many that wait. Twice as many (its own default) are no faster and take
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
    """Distinct pieces, known once everything is counted; they decide how much memory the merging takes."""
    merges: int = 0
    """Merges made."""
    peak_bytes: int = 0
    """Peak memory of the process that trained, at the end."""
    ranks: dict[bytes, int] | None = None
    """Token → id, at the end."""


def train_on_corpus(ctx: Context, corpus: Path, config: TokenizerConfig) -> Tokenizer:
    """Return a tokenizer trained on the first `max_chars` of a corpus, and record how it went in the step's metrics.

    Raises:
        DataError: the text yields too few tokens, or takes more memory than there is.
        Interrupted: a signal arrived; the same command starts over.
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
    merges = max(1, config.vocab_size - 256 - len(SPECIAL_TOKENS))
    last = Trained()
    with ExitStack() as shown:  # one bar for the characters counted, then one for the merges made
        bar, is_merging = shown.enter_context(ctx.progress(total, "chars")), False

        def on_progress(trained: Trained) -> None:
            nonlocal bar, is_merging, last
            last = trained
            if trained.pieces is None:
                speed = trained.chars / max(1e-9, time.monotonic() - began)
                bar.update(min(trained.chars, total), speed=f"{format_count(speed)} chars/s")
                return
            if not is_merging:
                shown.close()
                bar, is_merging = shown.enter_context(ctx.progress(merges, "merges")), True
            memory = format_bytes(trained.peak_bytes) if trained.peak_bytes else ""
            bar.update(trained.merges, speed=f"{format_count(trained.pieces)} distinct pieces", memory=memory)

        tokenizer = train_tokenizer(
            crop_documents(), config.vocab_size, check=check, on_progress=on_progress, memory_limit_bytes=limit
        )
    ctx.metrics["trained_chars"] = used_chars
    ctx.metrics["distinct_pieces"] = last.pieces or 0
    ctx.metrics["chars_per_second"] = used_chars / max(1e-9, time.monotonic() - began)
    ctx.metrics["training_peak_bytes"] = last.peak_bytes
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, **options: Any) -> Tokenizer:
    """Train on texts, most frequent pair first, until the vocabulary (special tokens included) is full.

    `options` are check, on_progress and memory_limit_bytes of `train_ranks`.

    Raises:
        DataError: the text is too small for the vocabulary, or what `train_ranks` refuses.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise DataError(f"tokenizer.vocab_size is {vocab_size}, expected at least {256 + len(SPECIAL_TOKENS)}")
    ranks = train_ranks(texts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN, **options).ranks
    assert ranks is not None, "a training that ends has them"
    if len(ranks) + len(SPECIAL_TOKENS) < vocab_size:
        raise DataError(
            f"tokenizer.vocab_size is {vocab_size}, but the corpus yields only {len(ranks) + len(SPECIAL_TOKENS)} "
            "tokens. Lower it, or give more text."
        )
    return Tokenizer(ranks)


def train_ranks(
    texts: Iterable[str],
    num_tokens: int,
    *,
    pattern: str,
    check: Callable[[], None] = lambda: None,
    on_progress: Callable[[Trained], None] = lambda trained: None,
    memory_limit_bytes: int | None = None,
) -> Trained:
    """Train on texts, most frequent pair first; returns fewer than `num_tokens` where the text runs out of pairs.

    Args:
        texts: read once, as they are needed.
        num_tokens: the 256 bytes included.
        pattern: of the pieces within which pairs are merged.
        check: called several times a second; it may raise, to end the work at once.
        on_progress: called as often.
        memory_limit_bytes: of the process that trains; None: no limit.

    Raises:
        DataError: a text is not valid Unicode, or more memory is needed than the limit.
        StepFailed: the process was ended from outside.
    """
    worker = _Worker(check, on_progress, memory_limit_bytes)
    try:
        worker.send({"num_tokens": num_tokens, "pattern": pattern, "buffer": _BUFFER_DOCUMENTS, "parent": os.getpid()})
        for part in _parts(texts):
            worker.send(part)
        worker.send([])
        while worker.trained.ranks is None:
            worker.look()
        return worker.trained
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
    """The process that trains. No wait for its pipes exceeds _LOOK_SECONDS, so that `check` is called."""

    def __init__(
        self, check: Callable[[], None], on_progress: Callable[[Trained], None], memory_limit_bytes: int | None
    ) -> None:
        self._check, self._on_progress, self._limit = check, on_progress, memory_limit_bytes
        command = [sys.executable, "-P", str(Path(__file__).with_name("bpe_worker.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self.trained, self._received, self._weighed = Trained(), b"", 0.0

    def send(self, value: Any) -> None:
        """Write a line of JSON."""
        try:
            rest = memoryview((json.dumps(value, ensure_ascii=False) + "\n").encode())
        except UnicodeEncodeError as error:
            raise DataError(f"a document is not valid Unicode ({error})") from None
        while rest:
            if self.look(wants_to_send=True):
                try:
                    rest = rest[os.write(self._in, rest) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    self._fail()

    def look(self, *, wants_to_send: bool = False) -> bool:
        """Read reports, for at most _LOOK_SECONDS; return whether data can be sent."""
        self._check()
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
            self._on_progress(self.trained)
        self._weigh()
        return bool(writable)

    def kill(self) -> None:
        """End the process, whatever it does."""
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
                f"the {format_bytes(self._limit)} it may have: every distinct piece of text is kept. Lower "
                "tokenizer.max_chars, or raise machine.memory_limit_bytes."
            )

    def _fail(self) -> NoReturn:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        raise StepFailed(f"the process that trains the tokenizer ended {how}; its output is above")
