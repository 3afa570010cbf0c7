"""Small conversations and documents, as tokens and as parquet files."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlxchat.data.conversation import render_conversation
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import Tokens, read_tokens, write_tokens
from mlxchat.tasks import load_task

Conversation = dict[str, Any]
DOCUMENTS = [f"document {number}" for number in range(100)]


def conversation(number: int, question: int, answer: int) -> Conversation:
    """Return a conversation with so many words, unlike that of any other number."""
    return {
        "messages": [
            {"role": "user", "content": f"{number}:" + " the" * question},
            {"role": "assistant", "content": " cat" * answer},
        ]
    }


def conversations(count: int) -> list[Conversation]:
    """Return conversations of 0 to 8 words a message."""
    sizes = random.Random(count)
    return [conversation(number, sizes.randint(0, 8), sizes.randint(0, 8)) for number in range(count)]


@cache
def conversations_of(task: str, split: str) -> list[Conversation]:
    """Return all conversations of a task."""
    loaded = load_task(task, split)
    return [loaded[index] for index in range(len(loaded))]


def write_sequences(sequences: Iterable[tuple[Sequence[int], Sequence[int] | None]], *, vocab_size: int = 300) -> bytes:
    """Return the file of token ids and masks, where there are masks."""
    pairs = [
        (np.array(ids, np.uint32), None if mask is None else np.array(mask, dtype=bool)) for ids, mask in sequences
    ]
    file = io.BytesIO()
    write_tokens(file, iter(pairs), count=len(pairs), vocab_size=vocab_size)
    return file.getvalue()


def render(conversations: Iterable[Conversation], tokenizer: Tokenizer) -> Tokens:
    """Return the tokens of conversations, none of them cut."""
    rendered = (render_conversation(tokenizer, each, max_tokens=None) for each in conversations)
    return read_tokens(write_sequences(rendered, vocab_size=tokenizer.vocab_size))


def parquet(texts: Sequence[str | None], column: str = "text", **options: Any) -> bytes:
    """Return a parquet file with a column of ids and one of texts; options are those of write_table."""
    file = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), file, **options)
    return file.getvalue()


def tool_call(tokenizer: Tokenizer, code: str) -> list[int]:
    """Return the tokens of a call."""
    special = tokenizer.special_ids
    return [special["<|python_start|>"], *tokenizer.encode(code), special["<|python_end|>"]]


def tool_output(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a call's answer."""
    special = tokenizer.special_ids
    return [special["<|output_start|>"], *tokenizer.encode(text), special["<|output_end|>"]]


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Return a token for each byte."""
    single = {tokenizer.decode_bytes([token]): token for token in range(256)}
    return [single[bytes([byte])] for byte in data]
