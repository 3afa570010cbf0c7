"""The compression table: nanochat's kinds of text, counted right, compared where there is somebody to compare with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import tiktoken

from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import SPLIT_PATTERN, Vocabulary
from mlxchat.errors import DataError
from mlxchat.evals import compression
from mlxchat.evals.compression import KINDS, compression_rows, print_compression

SPLITS = {"train": ["one cat", "two cats\n"], "validation": ["naïve 你好"]}


@pytest.fixture
def rival(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """Have GPT-2 be a small tokenizer, and GPT-4 be missing."""
    made = train_tokenizer(["the harbour council voted on the new ferry " * 50], 280)
    monkeypatch.setattr(compression, "is_packaged", lambda source: source == "gpt2")
    monkeypatch.setattr(compression, "read_vocabulary", lambda source: Vocabulary(made.ranks, SPLIT_PATTERN))
    return made


def test_the_rows_are_nanochats_kinds_of_text_then_the_splits(tokenizer: Tokenizer) -> None:
    rows = compression_rows(tokenizer, SPLITS)
    assert [row["text"] for row in rows] == ["news", "korean", "code", "math", "science", "train", "validation"]
    assert {row["text"]: row["bytes"] for row in rows[-2:]} == {"train": 16, "validation": len("naïve 你好".encode())}
    assert rows[-2]["chars"] == 16
    assert rows[-2]["ours"] == sum(len(tokenizer.encode(text)) for text in SPLITS["train"])
    assert all(row["ratio"] == row["bytes"] / row["ours"] for row in rows)


def test_each_kind_is_a_text_of_its_kind_and_of_a_page() -> None:
    rows = {row["text"]: row for row in compression_rows(train_tokenizer([], 265), {})}
    assert list(rows) == list(KINDS)
    assert all(1000 < row["bytes"] < 4000 for row in rows.values())
    assert rows["korean"]["bytes"] > 2 * rows["korean"]["chars"]  # three bytes a syllable


def test_a_rival_is_compared_and_a_missing_one_is_none(tokenizer: Tokenizer, rival: Tokenizer) -> None:
    encoding = tiktoken.Encoding("r", pat_str=SPLIT_PATTERN, mergeable_ranks=rival.ranks, special_tokens={})
    for row in compression_rows(tokenizer, SPLITS):
        assert row["gpt4"] is None
        assert row["gpt2_ratio"] == row["bytes"] / row["gpt2"]
        assert row["gpt2_difference"] == (row["gpt2"] - row["ours"]) / row["gpt2"]
        better = "ours" if row["ours"] < row["gpt2"] else "gpt2" if row["ours"] > row["gpt2"] else "tie"
        assert row["gpt2_better"] == better
    rows = compression_rows(tokenizer, SPLITS)
    assert rows[-2]["gpt2"] == sum(len(encoding.encode_ordinary(text)) for text in SPLITS["train"])
    assert compression_rows(train_tokenizer([], 265), {})[0]["gpt2_better"] == "gpt2"
    assert compression_rows(rival, {})[0]["gpt2_better"] == "tie"


def test_what_is_printed_shows_a_rival_that_is_there(
    tokenizer: Tokenizer, rival: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = compression_rows(tokenizer, SPLITS)
    print_compression(rows)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["text", "bytes", "tokens", "ratio", "gpt2"]
    assert [line.split()[0] for line in lines] == [row["text"] for row in rows]
    assert f"{rows[0]['gpt2_difference']:+.1%}" in lines[0]


def test_of_a_large_corpus_only_the_beginning_is_read(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_SPLIT_CHARS", 1000)
    asked = 0

    def endless() -> Iterator[str]:
        nonlocal asked
        for _ in itertools.count():
            asked += 1
            yield "the cat " * 10

    assert compression_rows(tokenizer, {"train": endless()})[-1]["chars"] == 1040
    assert asked == 13


def test_a_text_that_does_not_come_back_is_a_bug_that_is_told(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "other")
    with pytest.raises(DataError, match="does not return what it encoded"):
        compression_rows(tokenizer, {})
