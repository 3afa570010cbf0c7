"""Training the tokenizer on a corpus: which text is read, what a person sees meanwhile, what is recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil

from mlxchat.config import TokenizerConfig
from mlxchat.data.bpe import Trained
from mlxchat.data.listing import LISTING
from mlxchat.data.shards import iterate_documents
from mlxchat.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from mlxchat.hub.cache import read_json
from mlxchat.runner.context import Context
from mlxchat.runner.progress import Progress, format_bytes, format_count

_MEMORY_SHARE = 0.8


def train_on_corpus(ctx: Context, corpus: Path, config: TokenizerConfig) -> Tokenizer:
    """Return a tokenizer trained on the first `max_chars` of a corpus, and record how it went in the step's metrics.

    Raises:
        DataError: the text yields too few tokens, or takes more memory than there is.
        Interrupted: a signal arrived; the same command begins anew.
    """
    began = time.monotonic()
    used_chars = 0

    def crop_documents() -> Iterator[str]:
        nonlocal used_chars
        for document in iterate_documents(corpus, "train", ctx.hints.get("train_chars")):
            text = document[: config.document_chars]
            used_chars += len(text)
            yield text
            if used_chars > config.max_chars:
                return

    def check() -> None:
        if ctx.should_stop():
            raise ctx.stop(f"its beginning: {used_chars:,} characters are read again")

    limit = ctx.config.machine.memory_limit_bytes or int(psutil.virtual_memory().total * _MEMORY_SHARE)
    total = min(config.max_chars, _known_chars(corpus) or config.max_chars)
    last = Trained()
    with ExitStack() as shown:
        display = _Display(ctx, shown, total, config.vocab_size - 256 - len(SPECIAL_TOKENS))

        def on_progress(trained: Trained) -> None:
            nonlocal last
            last = trained
            display.show(trained)

        tokenizer = train_tokenizer(
            crop_documents(), config.vocab_size, check=check, on_progress=on_progress, memory_limit_bytes=limit
        )
    ctx.metrics["trained_chars"] = used_chars
    ctx.metrics["distinct_pieces"] = last.pieces or 0
    ctx.metrics["chars_per_second"] = used_chars / max(1e-9, time.monotonic() - began)
    ctx.metrics["training_peak_bytes"] = last.peak_bytes
    return tokenizer


class _Display:
    """Two bars, one after the other: characters counted, merges made."""

    def __init__(self, ctx: Context, shown: ExitStack, total_chars: int, total_merges: int) -> None:
        self._ctx, self._shown, self._merges = ctx, shown, total_merges
        self._total, self._began = total_chars, time.monotonic()
        self._bar: Progress = shown.enter_context(ctx.progress(total_chars, "chars"))
        self._is_merging = False

    def show(self, trained: Trained) -> None:
        """Show how far it is."""
        if trained.pieces is None:
            speed = trained.chars / max(1e-9, time.monotonic() - self._began)
            self._bar.update(min(trained.chars, self._total), speed=f"{format_count(speed)} chars/s")
            return
        if not self._is_merging:
            self._is_merging = True
            self._shown.close()
            self._bar = self._shown.enter_context(self._ctx.progress(max(1, self._merges), "merges"))
        memory = format_bytes(trained.peak_bytes) if trained.peak_bytes else ""
        self._bar.update(trained.merges, speed=f"{format_count(trained.pieces)} distinct pieces", memory=memory)


def _known_chars(corpus: Path) -> int | None:
    """Return the characters that a corpus has for training, where it knows."""
    found = (read_json(corpus / LISTING) or {}).get("train_chars")
    return int(found) if found else None
