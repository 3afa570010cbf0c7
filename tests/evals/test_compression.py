"""The compression table against other tokenizers."""

import pytest
import tiktoken

from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import SPLIT_PATTERN, Vocabulary
from mlxchat.evals import compression
from mlxchat.evals.compression import compression_rows

SPLITS = {"train": ["one cat", "two cats\n"], "validation": ["naïve 你好"]}


@pytest.fixture
def rival(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """Make GPT-2 a small tokenizer, and GPT-4 missing."""
    made = train_tokenizer(["the harbour council voted on the new ferry " * 50], 280)
    monkeypatch.setattr(compression, "is_packaged", lambda source: source == "gpt2")
    monkeypatch.setattr(compression, "read_vocabulary", lambda source: Vocabulary(made.ranks, SPLIT_PATTERN))
    return made


def test_rows_are_nanochats_texts_then_splits(tokenizer):
    rows = compression_rows(tokenizer, SPLITS)
    assert [row["text"] for row in rows] == ["news", "korean", "code", "math", "science", "train", "validation"]
    assert {row["text"]: row["bytes"] for row in rows[-2:]} == {"train": 16, "validation": len("naïve 你好".encode())}
    assert rows[-2]["chars"] == 16
    assert rows[-2]["ours"] == sum(len(tokenizer.encode(text)) for text in SPLITS["train"])
    assert all(row["ratio"] == row["bytes"] / row["ours"] for row in rows)


def test_other_tokenizers_are_compared_if_installed(tokenizer, rival):
    encoding = tiktoken.Encoding("r", pat_str=SPLIT_PATTERN, mergeable_ranks=rival.ranks, special_tokens={})
    for row in compression_rows(tokenizer, SPLITS):
        assert row["gpt4"] is None
        assert row["gpt2_ratio"] == row["bytes"] / row["gpt2"]
        assert row["gpt2_difference"] == (row["gpt2"] - row["ours"]) / row["gpt2"]
    rows = compression_rows(tokenizer, SPLITS)
    assert rows[-2]["gpt2"] == sum(len(encoding.encode_ordinary(text)) for text in SPLITS["train"])
    assert compression_rows(train_tokenizer([], 265), {})[0]["gpt2_better"] == "gpt2"
    assert compression_rows(rival, {})[0]["gpt2_better"] == "tie"
