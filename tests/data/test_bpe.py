"""Training of tokenizers: nanochat's ranks, and the end of the separate process."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import rustbpe
import tiktoken

from kit.training import make_context
from mlxchat.config.schema import TokenizerConfig
from mlxchat.data import bpe
from mlxchat.data.bpe import compression_rows, train_on_corpus, train_tokenizer
from mlxchat.data.sources import write_shards
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import SPLIT_PATTERN, Vocabulary
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


# The compression table against other tokenizers

SPLITS = {"train": ["one cat", "two cats\n"], "validation": ["naïve 你好"]}


@pytest.fixture
def rival(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """Make GPT-2 a small tokenizer, and GPT-4 missing."""
    made = train_tokenizer(["the harbour council voted on the new ferry " * 50], 280)

    def read(source: str) -> Vocabulary:
        if source != "gpt2":
            raise DataError("not installed")
        return Vocabulary(made.ranks, SPLIT_PATTERN)

    monkeypatch.setattr(bpe, "read_vocabulary", read)
    return made


def test_rows_compare_nanochats_texts_and_splits_with_what_is_installed(tokenizer, rival):
    encoding = tiktoken.Encoding("r", pat_str=SPLIT_PATTERN, mergeable_ranks=rival.ranks, special_tokens={})
    rows = compression_rows(tokenizer, SPLITS)
    assert [row["text"] for row in rows] == ["news", "korean", "code", "math", "science", "train", "validation"]
    assert [(row["bytes"], row["chars"]) for row in rows[-2:]] == [(16, 16), (len("naïve 你好".encode()), 8)]
    for name, tokens in (("ours", tokenizer.encode), ("gpt2", encoding.encode_ordinary)):
        assert rows[-2][name] == sum(len(tokens(text)) for text in SPLITS["train"])
    for row in rows:
        assert (row["gpt4"], row["ratio"]) == (None, row["bytes"] / row["ours"])
        assert row["gpt2_ratio"] == row["bytes"] / row["gpt2"]
        assert row["gpt2_difference"] == (row["gpt2"] - row["ours"]) / row["gpt2"]
    assert compression_rows(train_tokenizer([], 265), {})[0]["gpt2_better"] == "gpt2"
