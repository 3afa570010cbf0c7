"""Packing against naive searches and slices: rows, epochs, targets, resuming."""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxchat.data import packing
from mlxchat.data.packing import (
    IGNORED,
    Batch,
    RowBatches,
    RowStream,
    ShuffledConversations,
    count_rows,
    take_validation,
)
from mlxchat.data.sources import Corpus
from mlxchat.data.tokenizer import Tokenizer, render_conversation
from mlxchat.data.tokens import Tokens

DOCUMENT_PACKINGS, CONVERSATION_PACKINGS = ("best_fit", "stream"), ("best_fit", "stream", "alone")


def conversation(number: int, question: int, answer: int) -> dict[str, Any]:
    """Return a conversation with so many words, unlike that of any other number."""
    return {
        "messages": [
            {"role": "user", "content": f"{number}:" + " the" * question},
            {"role": "assistant", "content": " cat" * answer},
        ]
    }


def conversations(count: int) -> list[dict[str, Any]]:
    """Return conversations of 0 to 8 words a message."""
    sizes = random.Random(count)
    return [conversation(number, sizes.randint(0, 8), sizes.randint(0, 8)) for number in range(count)]


def render(conversations: Iterable[dict[str, Any]], tokenizer: Tokenizer) -> Tokens:
    """Return the tokens of conversations, none of them cut."""
    rendered = (render_conversation(tokenizer, each, max_tokens=None) for each in conversations)
    return Tokens.of(rendered, tokenizer.vocab_size)


THIRTY = conversations(30)


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
    rows = RowStream("best_fit", read_documents(corpus), row_tokens=row_tokens, buffer_size=wanted)
    got = [rows.next_row() for _ in range(count)]
    expected, cropped = naive_document_rows(corpus, tokenizer, row_tokens, wanted, count)
    assert [[*inputs.tolist(), int(targets[-1])] for inputs, targets in got] == expected
    assert all((inputs[1:] == targets[:-1]).all() for inputs, targets in got)
    assert {array.dtype for row in got for array in row} == {np.dtype(np.int32)}
    assert rows.counts()["cropped_tokens"] == cropped
    assert rows.counts()["cropped_frac"] == cropped / (cropped + count * (row_tokens + 1))


@pytest.mark.parametrize("packing_name", DOCUMENT_PACKINGS)
def test_validation_counts_every_token_once(corpus, read_documents, tokenizer, packing_name, capsys):
    """Guards against small validation sets that silently count several times."""
    texts = [[tokenizer.bos, *tokenizer.encode(text)] for text in Corpus.open(corpus).documents("validation")]
    size = sum(map(len, texts))

    def read(row_tokens: int, tokens: int) -> list[packing.Row]:
        source = read_documents(corpus, "validation", once=True)
        rows = RowStream(packing_name, source, row_tokens=row_tokens, buffer_size=1000, batch_rows=4)
        return take_validation(rows, tokens, "eval_tokens")

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
    packing_name: str, tokenizer: Tokenizer, conversations: list[dict[str, Any]] | None = None, *, row_tokens: int = 50,
    wanted: int = 10, train_on: str = "assistant", once: bool = False, seed: int | None = 1,
) -> RowStream:  # fmt: skip
    tokens = render(THIRTY if conversations is None else conversations, tokenizer)
    source = ShuffledConversations(tokens, seed, once=once)
    padding = tokenizer.assistant_end if packing_name == "alone" else tokenizer.bos
    return RowStream(
        packing_name, source, row_tokens=row_tokens, buffer_size=wanted, batch_rows=3, padding=padding,
        train_on=train_on,
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
    rows = chat_rows("best_fit", tokenizer, [long], row_tokens=20, wanted=1)
    inputs, targets = rows.next_row()
    ids, mask = render_conversation(tokenizer, long)
    assert inputs.tolist() == ids[:20]
    assert targets.tolist() == [token if bit else IGNORED for token, bit in zip(ids[1:21], mask[1:21], strict=True)]
    assert rows.counts() == {"truncated_conversations": 1}


@settings(max_examples=40)
@given(conversations=CONVERSATIONS, row_tokens=st.integers(30, 100), wanted=st.integers(1, 40), seed=st.integers(0, 9))
def test_epoch_has_every_conversation_once_with_its_targets(tokenizer, conversations, row_tokens, wanted, seed):
    masks = {tuple(ids): mask for ids, mask in (render_conversation(tokenizer, each) for each in conversations)}
    rows, counted = (
        chat_rows("best_fit", tokenizer, conversations, row_tokens=row_tokens, wanted=wanted, seed=seed)
        for _ in range(2)
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
    assert rows.counts() == {"truncated_conversations": 0}


def document_rows(packing_name: str, documents: Any, *, row_tokens: int = 40, batch_rows: int = 4) -> RowStream:
    return RowStream(packing_name, documents, row_tokens=row_tokens, buffer_size=30, batch_rows=batch_rows)


@settings(max_examples=25)
@given(row_tokens=st.integers(1, 90), batch_rows=st.integers(1, 7), count=st.integers(1, 60))
def test_stream_batches_are_slices_of_all_tokens(corpus, read_documents, tokenizer, row_tokens, batch_rows, count):
    rows = document_rows("stream", read_documents(corpus), row_tokens=row_tokens, batch_rows=batch_rows)
    everything = [
        id_ for ids in tokenizer.encode_documents(list(Corpus.open(corpus).documents("train"))) for id_ in ids
    ]
    batch_tokens = row_tokens * batch_rows + 1
    for number in range(count):
        inputs, targets = rows.next_row()
        start = number // batch_rows * batch_tokens + number % batch_rows * row_tokens
        expected = [everything[(start + step) % len(everything)] for step in range(row_tokens + 1)]
        assert [*inputs.tolist(), int(targets[-1])] == expected
        assert inputs[1:].tolist() == targets[:-1].tolist()
    assert rows.counts()["cropped_frac"] == 0


@pytest.mark.parametrize("seed", [1, None])
def test_alone_rows_have_one_conversation_and_padding(tokenizer, seed):
    rows = chat_rows("alone", tokenizer, conversations(12), seed=seed)
    order = []
    for _ in range(24):
        inputs, targets = rows.next_row()
        (number,) = rows.placed
        order.append(number)
        ids, mask = render_conversation(tokenizer, conversations(12)[number])
        assert inputs.tolist() == ids[:-1] + [tokenizer.assistant_end] * (50 - len(ids) + 1)
        wanted = [id_ if bit else IGNORED for id_, bit in zip(ids[1:], mask[1:], strict=True)]
        assert targets.tolist() == wanted + [IGNORED] * (50 - len(wanted))
    first, second = order[:12], order[12:]
    given_order = list(range(12))
    assert sorted(first) == sorted(second) == given_order
    assert (first == second == given_order) if seed is None else len({*map(tuple, (first, second, given_order))}) == 3


@settings(max_examples=40)
@given(
    stops=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    packing_name=st.sampled_from([*DOCUMENT_PACKINGS, *(f"chat {name}" for name in CONVERSATION_PACKINGS)]),
    row_tokens=st.integers(30, 70),
)
def test_resumed_rows_are_equal(corpus, read_documents, tokenizer, stops, packing_name, row_tokens):
    def start() -> RowStream:
        if packing_name.startswith("chat "):
            return chat_rows(packing_name[5:], tokenizer, row_tokens=row_tokens)
        return document_rows(packing_name, read_documents(corpus), row_tokens=row_tokens)

    straight, stopped = start(), start()
    for stop in stops:
        for _ in range(stop):
            for one, other in zip(straight.next_row(), stopped.next_row(), strict=True):
                assert one.tobytes() == other.tobytes()
            assert straight.placed == stopped.placed
        position = json.loads(json.dumps(stopped.state()))
        stopped.close()
        stopped = start()
        stopped.next_row()  # restore works from any position
        stopped.restore(position)
    for _ in range(10):
        for one, other in zip(straight.next_row(), stopped.next_row(), strict=True):
            assert one.tobytes() == other.tobytes()
    assert (straight.counts(), straight.state()) == (stopped.counts(), stopped.state())


# Batches of rows, and the position after the last whole one


class Numbers(RowStream):
    """Rows filled with their own number; row `fails_at` raises."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__("best_fit", self, row_tokens=4)
        self.number, self.fails_at = 0, fails_at

    def ids(self, address: int) -> np.ndarray:
        return np.full(5, address)

    def _best_fitting(self, space: int) -> Iterator[tuple[int, int, int]]:
        if self.number == self.fails_at:
            raise RuntimeError(f"row {self.number} cannot be read")
        self.number += 1
        yield self.number - 1, 0, space

    def name(self, address: Any) -> str:
        return f"row {address}"

    def counts(self) -> dict[str, int]:
        return {"rows": self.number}

    def state(self) -> dict[str, Any]:
        return {"number": self.number}

    def restore(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def firsts(batch: Batch) -> list[int]:
    return batch.ids[:, 0].tolist()


def after(batches: RowBatches) -> tuple[Any, ...]:
    return batches.state(), batches.counts(), batches.documents()


def test_position_is_that_after_the_last_batch():
    """Also where the next batch is prepared, once or twice."""
    batches = RowBatches(Numbers(), 2)
    assert after(batches) == ({"number": 0}, {"rows": 0}, [])
    for iteration in range(3):
        first = 2 * iteration
        assert firsts(batches.next_batch(iteration)) == [first, first + 1]
        for _ in range(iteration):
            batches.prepare()
        assert after(batches) == ({"number": first + 2}, {"rows": first + 2}, [f"row {first}", f"row {first + 1}"])
    batches.restore({"number": 2})
    assert after(batches) == ({"number": 2}, {"rows": 2}, [])
    assert firsts(batches.next_batch(1)) == [2, 3]


def test_failure_within_a_batch_leaves_the_position_before_it():
    """Bug: the position saved at a stop during encoding left out the rows drawn before it."""
    batches = RowBatches(Numbers(fails_at=5), 2)
    assert [firsts(batches.next_batch(i)) for i in range(2)] == [[0, 1], [2, 3]]
    batches.prepare()  # while the device computes, where nothing may fail
    with pytest.raises(RuntimeError, match="row 5 cannot be read"):
        batches.next_batch(2)
    assert (batches.state(), batches.documents()) == ({"number": 4}, ["row 2", "row 3"])
