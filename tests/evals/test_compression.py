"""The compression table against other tokenizers."""

import pytest
import tiktoken

from mlxchat.data import bpe
from mlxchat.data.bpe import compression_rows, train_tokenizer
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import SPLIT_PATTERN, Vocabulary
from mlxchat.errors import DataError

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
