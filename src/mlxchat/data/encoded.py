"""Text and conversations as artifacts of token ids: encoded once per content and tokenizer, whoever asks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from mlxchat.data.conversation import render_conversation
from mlxchat.data.documents import DocumentCursor, EncodedShards
from mlxchat.data.mixture import Mixture
from mlxchat.data.prefetch import fetch_ahead
from mlxchat.data.shards import Shard, chars_per_byte, open_shards
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import FILE, FORMAT, Array, Tokens, open_tokens, write_tokens
from mlxchat.ops.cores import available_cores
from mlxchat.runner.context import Context
from mlxchat.runner.fingerprint import canonical_json

# Documents that one thread encodes at a time: a fraction of a second, after which a stop is noticed.
_PART_DOCUMENTS = 128


class DocumentTokenizer(Protocol):
    """What makes documents into tokens: ours, or that of a model of another make."""

    @property
    def digest(self) -> str:
        """A hash of everything that decides how a text is encoded."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    def encode_documents(self, texts: list[str]) -> list[Array]:
        """Return each document's ids, with the token that begins it in front."""


def open_documents(ctx: Context, split: str, tokenizer: DocumentTokenizer, *, once: bool = False) -> DocumentCursor:
    """Return the documents of a split ('train' or 'validation') of the step's corpus, again and again or `once`.

    Each shard is encoded when it is needed, on all cores; the one after it meanwhile, on a quarter of them. Files of
    the Hub are fetched ahead of that, as many as the run is known to need.
    """
    corpus = ctx.inputs["corpus"]
    shards, density = open_shards(corpus, split), chars_per_byte(corpus)
    chars = ctx.hints.get("train_chars") if split == "train" else None

    def obtain(shard: Shard, is_awaited: bool, check: Callable[[], None]) -> Path:
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
        fetch_ahead(shards, index + 1, chars, density)

    return DocumentCursor(EncodedShards(shards, obtain, fetch), once=once)


def encode_shard(
    shard: Shard, tokenizer: DocumentTokenizer, folder: Path, *, threads: int, check: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Encode a text shard into a folder; return the numbers for its manifest.

    Args:
        shard: it is fetched first if it is not on this machine.
        tokenizer: puts <|bos|> before each document.
        folder: exists.
        threads: how many encode at once.
        check: called every few hundred documents; it may raise, to end the work.
    """
    count = shard.count(check)
    began = time.monotonic()

    def encode() -> Iterator[tuple[Array, None]]:
        texts = shard.documents(check)
        with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
            while part := list(islice(texts, threads * _PART_DOCUMENTS)):
                check()
                size = -(-len(part) // threads)
                parts = [part[first : first + size] for first in range(0, len(part), size)]
                for encoded in pool.map(tokenizer.encode_documents, parts):
                    yield from ((ids, None) for ids in encoded)

    with (folder / FILE).open("wb") as file:
        tokens = write_tokens(file, encode(), count=count, vocab_size=tokenizer.vocab_size)
    seconds = max(1e-9, time.monotonic() - began)
    return {"documents": count, "tokens": tokens, "tokens_per_second": tokens / seconds}


def open_mixture(ctx: Context, name: str, mixture: Mixture, tokenizer: Tokenizer) -> Tokens:
    """Return the conversations of a mixture, each with what is trained on in it; `name` is for people."""
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
        began = time.monotonic()
        with (folder / FILE).open("wb") as file:
            tokens = write_tokens(file, render(), count=len(mixture), vocab_size=tokenizer.vocab_size)
        seconds = max(1e-9, time.monotonic() - began)
        return {"conversations": len(mixture), "tokens": tokens, "tokens_per_second": tokens / seconds}

    identity = {"conversations": digest.hexdigest(), "tokenizer": tokenizer.digest}
    return open_tokens(ctx.encoded(version=FORMAT, label=f"{ctx.step}_{name}", identity=identity, make=make))
