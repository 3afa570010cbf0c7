"""Best-fit packing against a naive search: full rows, complete epochs, targets."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.text import conversation, render
from mlxchat.data import packing
from mlxchat.data.conversation import render_conversation
from mlxchat.data.packing import (
    IGNORED,
    ConversationRows,
    DocumentRows,
    ShuffledConversations,
    count_rows,
    pack_documents,
    take_validation,
    trim_rows,
)
from mlxchat.data.sources import Corpus
from mlxchat.data.tokenizer import Tokenizer


def naive_document_rows(
    corpus: Path, tokenizer: Tokenizer, row_tokens: int, wanted: int, count: int
) -> tuple[Any, int]:
    """Return rows of nanochat's best-fit loader, by searching a list, and the tokens that were cropped."""
    documents = [[tokenizer.bos, *tokenizer.encode(text)] for text in Corpus.open(corpus).documents("train")]
    waiting: list[list[int]] = []
    rows, read, cropped = [], 0, 0
    for _ in range(count):
        row: list[int] = []
        while len(row) < row_tokens + 1:
            while len(waiting) < wanted:
                for _ in range(packing._REFILL_DOCUMENTS):
                    waiting.append(documents[read % len(documents)])
                    read += 1
            space = row_tokens + 1 - len(row)
            fitting = [index for index, ids in enumerate(waiting) if len(ids) <= space]
            if fitting:
                row += waiting.pop(max(fitting, key=lambda index: (len(waiting[index]), -index)))
            else:
                shortest = waiting.pop(min(range(len(waiting)), key=lambda index: len(waiting[index])))
                cropped += len(shortest) - space
                row += shortest[:space]
        rows.append(row)
    return rows, cropped


@settings(max_examples=25)
@given(row_tokens=st.integers(3, 120), wanted=st.integers(1, 250), count=st.sampled_from([30, 30, 400]))
def test_document_rows_equal_a_naive_best_fit(corpus, read_documents, tokenizer, row_tokens, wanted, count):
    """400 rows of 120 tokens are several epochs."""
    rows = DocumentRows(read_documents(corpus), row_tokens, wanted)
    got = [rows.next_row() for _ in range(count)]
    expected, cropped = naive_document_rows(corpus, tokenizer, row_tokens, wanted, count)
    assert [[*inputs.tolist(), int(targets[-1])] for inputs, targets in got] == expected
    assert all((inputs[1:] == targets[:-1]).all() for inputs, targets in got)
    assert {array.dtype for row in got for array in row} == {np.dtype(np.int32)}
    assert rows.cropped_tokens == cropped


@pytest.mark.parametrize("packing_name", ["best_fit", "best_fit_whole", "stream"])
def test_validation_counts_every_token_once(corpus, read_documents, tokenizer, packing_name, capsys):
    """Guards against small validation sets that silently count several times."""
    texts = [[tokenizer.bos, *tokenizer.encode(text)] for text in Corpus.open(corpus).documents("validation")]
    size = sum(map(len, texts))

    def read(row_tokens: int, tokens: int) -> list[packing.Row]:
        rows = pack_documents(
            packing_name, read_documents(corpus, "validation", once=True), row_tokens=row_tokens,
            buffer_documents=1000, batch_rows=4, bos=tokenizer.bos,
        )  # fmt: skip
        return take_validation(rows, row_tokens=row_tokens, tokens=tokens, setting="eval_tokens")

    ((ids, targets),) = read(2 * size, 100 * size)
    assert capsys.readouterr().out.endswith(
        f"has only {size - 1:,} tokens in rows, fewer than eval_tokens={100 * size:,}\n"
    )
    counted = np.concatenate([ids[:1], targets[targets != IGNORED]])
    assert Counter(counted.tolist()) == Counter(token for text in texts for token in text)
    assert ids.shape == targets.shape == (2 * size,)
    rows = read(40, 100 * size)
    held = sum(int((targets != IGNORED).sum()) for _, targets in rows)
    assert 0.5 * size < held < size
    assert len(rows) <= held // 40 + 1, "only the last row is padded"
    capsys.readouterr()
    assert [len(part) for part in read(40, 80)] == [2, 2]
    assert capsys.readouterr().out == ""


def chat_rows(
    conversations: list[dict[str, Any]], tokenizer: Tokenizer, *, row_tokens: int = 60, wanted: int = 10,
    seed: int = 0,
) -> ConversationRows:  # fmt: skip
    return ConversationRows(
        ShuffledConversations(render(conversations, tokenizer), seed), padding=tokenizer.bos, row_tokens=row_tokens,
        buffer_conversations=wanted, train_on="assistant",
    )  # fmt: skip


def placed(row: packing.Row, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Return the conversations of a row. Padding is <|bos|> that no user follows."""
    ids = row[0].tolist() + ([int(row[1][-1])] if row[1][-1] >= 0 else [])
    begins = [i for i in range(len(ids) - 1) if ids[i] == tokenizer.bos and ids[i + 1] != tokenizer.bos]
    found = []
    for start, stop in zip(begins, [*begins[1:], len(ids)], strict=True):
        piece = ids[start:stop]
        while piece[-1] == tokenizer.bos:
            piece.pop()
        found.append(tuple(piece))
    return found


CONVERSATIONS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30).map(
    lambda sizes: [conversation(number, *size) for number, size in enumerate(sizes)]
)


def test_long_conversation_is_truncated_and_counted(tokenizer):
    """nanochat's loader of 2026 never places such a conversation, and its buffer fills up with them."""
    long = conversation(0, 0, 50)
    rows = chat_rows([long], tokenizer, row_tokens=20, wanted=1)
    inputs, targets = rows.next_row()
    ids, mask = render_conversation(tokenizer, long)
    assert inputs.tolist() == ids[:20]
    assert targets.tolist() == [token if bit else IGNORED for token, bit in zip(ids[1:21], mask[1:21], strict=True)]
    assert rows.truncated == 1


@settings(max_examples=40)
@given(conversations=CONVERSATIONS, row_tokens=st.integers(30, 100), wanted=st.integers(1, 40), seed=st.integers(0, 9))
def test_epoch_has_every_conversation_once_with_its_targets(tokenizer, conversations, row_tokens, wanted, seed):
    masks = {tuple(ids): mask for ids, mask in (render_conversation(tokenizer, each) for each in conversations)}
    rows, counted = (
        chat_rows(conversations, tokenizer, row_tokens=row_tokens, wanted=wanted, seed=seed) for _ in range(2)
    )
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(count_rows(counted)):
        inputs, targets = rows.next_row()
        found = placed((inputs, targets), tokenizer)
        seen.update(found)
        padding = row_tokens + 1 - sum(map(len, found))
        ids = [token for each in found for token in each] + [tokenizer.bos] * padding
        mask = [bit for each in found for bit in masks[each]] + [0] * padding
        assert inputs.tolist() == ids[:-1]
        assert targets.tolist() == [token if bit else IGNORED for token, bit in zip(ids[1:], mask[1:], strict=True)]
    assert seen == Counter(tuple(render_conversation(tokenizer, each)[0]) for each in conversations)
    assert rows.truncated == 0


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=4), st.sampled_from([1, 127, 128, 129, 300]), st.integers(0, 9)
)
def test_trimming_removes_only_padding(used, width, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 50, (len(used), width)).astype(np.int32)
    targets = np.full_like(ids, IGNORED)
    for row, length in enumerate(used):
        targets[row, :length] = 7
    got_ids, got_targets = trim_rows(ids, targets)
    kept = got_ids.shape[1]
    assert np.array_equal(got_ids, ids[:, :kept])
    assert np.array_equal(got_targets, targets[:, :kept])
    assert (targets[:, kept:] == IGNORED).all()
    assert kept == min(width, max(1, -(-min(max(used), width) // 128)) * 128)
