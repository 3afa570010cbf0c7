"""Training of tokenizers: nanochat's ranks, and the end of the separate process."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import rustbpe

from kit.training import make_context
from mlxchat.config.schema import TokenizerConfig
from mlxchat.data.bpe import train_on_corpus, train_tokenizer
from mlxchat.data.sources import write_shards
from mlxchat.data.vocabulary import SPLIT_PATTERN
from mlxchat.errors import DataError, Interrupted
from mlxchat.runner.context import Context

TEXTS = [
    f"the weather of day {number}, and another: don't gather under thunder {number * 7}!\n" for number in range(300)
]


def nanochats_ranks(texts: list[str], num_tokens: int) -> dict[bytes, int]:
    """Return what nanochat's RustBPETokenizer.train_from_iterator gets."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), num_tokens, pattern=SPLIT_PATTERN)
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_shards(tmp_path, ["held out", *TEXTS], validation_documents=1, shard_documents=100, row_group_documents=7)
    return tmp_path


def train(folder: Path, *, stop: int | None = None, **changes: Any) -> tuple[Any, Context]:
    """Train as the step does."""
    values = {"source": "train", "vocab_size": 320, "max_chars": 10**9, "document_chars": 10_000}
    ctx = make_context(folder, stop_signal=lambda: stop)
    return train_on_corpus(ctx, folder, TokenizerConfig(**(values | changes))), ctx


def test_step_trains_on_the_first_characters(corpus):
    tokenizer, ctx = train(corpus, max_chars=9000, document_chars=60)
    cropped = [text[:60] for text in TEXTS][:151]
    assert tokenizer.ranks == nanochats_ranks(cropped, 311)
    assert ctx.metrics["trained_chars"] == sum(map(len, cropped))


def test_stops_and_errors_of_the_process_are_raised_and_end_it(corpus):
    with pytest.raises(Interrupted, match="stopped at its beginning"):
        train(corpus, stop=15)
    (corpus / "shard_00000.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="shard_00000"):
        train(corpus)
    assert multiprocessing.active_children() == []


def test_too_little_text_is_refused():
    assert train_tokenizer([], 265).ranks == {bytes([byte]): byte for byte in range(256)}
    with pytest.raises(DataError, match="yields only 267 tokens"):
        train_tokenizer(["aaa"], 300)
