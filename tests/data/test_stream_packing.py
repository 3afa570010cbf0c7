"""Stream packing, one conversation per row, best fit without loss, and resuming of all packings."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.text import conversations, render
from mlxchat.data.conversation import render_conversation
from mlxchat.data.packing import (
    IGNORED,
    RowStream,
    ShuffledConversations,
    pack_conversations,
    pack_documents,
    take_rows,
)
from mlxchat.data.sources import Corpus
from mlxchat.data.tokenizer import Tokenizer

DOCUMENT_PACKINGS, CONVERSATION_PACKINGS = ("best_fit", "best_fit_whole", "stream"), ("best_fit", "stream", "alone")


def document_rows(
    packing: str, documents: Any, tokenizer: Tokenizer, *, row_tokens: int = 40, batch_rows: int = 4, wanted: int = 30
) -> RowStream:
    return pack_documents(
        packing, documents, row_tokens=row_tokens, buffer_documents=wanted, batch_rows=batch_rows, bos=tokenizer.bos
    )


def encode_all(corpus: Path, tokenizer: Tokenizer) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_documents(list(Corpus.open(corpus).documents("train")))]


@settings(max_examples=25)
@given(row_tokens=st.integers(1, 90), batch_rows=st.integers(1, 7), count=st.integers(1, 60))
def test_stream_batches_are_slices_of_all_tokens(corpus, read_documents, tokenizer, row_tokens, batch_rows, count):
    rows = document_rows("stream", read_documents(corpus), tokenizer, row_tokens=row_tokens, batch_rows=batch_rows)
    everything = [id_ for ids in encode_all(corpus, tokenizer) for id_ in ids]
    batch_tokens = row_tokens * batch_rows + 1
    for number in range(count):
        inputs, targets = rows.next_row()
        start = number // batch_rows * batch_tokens + number % batch_rows * row_tokens
        expected = [everything[(start + step) % len(everything)] for step in range(row_tokens + 1)]
        assert [*inputs.tolist(), int(targets[-1])] == expected
        assert inputs[1:].tolist() == targets[:-1].tolist()
    assert rows.counts()["cropped_frac"] == 0


@settings(max_examples=25)
@given(row_tokens=st.integers(2, 90), wanted=st.integers(1, 20))
def test_best_fit_whole_places_every_token_once(corpus, read_documents, tokenizer, row_tokens, wanted):
    """Pieces of one document follow each other, whatever rows they are in."""
    rows = document_rows("best_fit_whole", read_documents(corpus), tokenizer, row_tokens=row_tokens, wanted=wanted)
    pieces: dict[Any, list[int]] = {}
    for _ in range(3000):
        inputs, targets = rows.next_row()
        if rows.counts()["epochs"]:
            break
        row = [*inputs.tolist(), int(targets[-1])]
        assert row[0] == tokenizer.bos
        starts = [*(place for place, id_ in enumerate(row) if id_ == tokenizer.bos), len(row)]
        parts = [row[start + 1 : stop] for start, stop in pairwise(starts)]
        for address, part in zip(rows.placed, parts, strict=True):
            pieces.setdefault(address, []).extend(part)
    addresses = [(shard, index) for shard in range(5) for index in range(40)]
    documents = dict(zip(addresses, encode_all(corpus, tokenizer), strict=False))
    for address, found in pieces.items():
        assert found == documents[address][1 : 1 + len(found)]
    assert rows.counts()["cropped_tokens"] == 0


def test_cropped_share_is_of_all_tokens_read(corpus, read_documents, tokenizer):
    rows = document_rows("best_fit", read_documents(corpus), tokenizer, row_tokens=20)
    for _ in range(50):
        rows.next_row()
    cropped = rows.counts()["cropped_tokens"]
    assert rows.counts()["cropped_frac"] == cropped / (cropped + 50 * 21) > 0


def chat_rows(
    packing: str, tokenizer: Tokenizer, *, count: int = 30, row_tokens: int = 50, train_on: str = "assistant",
    once: bool = False, seed: int | None = 1,
) -> RowStream:  # fmt: skip
    return pack_conversations(
        packing, ShuffledConversations(render(conversations(count), tokenizer), seed, once=once), batch_rows=3,
        bos=tokenizer.bos, assistant_end=tokenizer.assistant_end, row_tokens=row_tokens, buffer_conversations=10,
        train_on=train_on,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [1, None])
def test_alone_rows_have_one_conversation_and_padding(tokenizer, seed):
    rows = chat_rows("alone", tokenizer, count=12, row_tokens=50, seed=seed)
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


@pytest.mark.parametrize("packing", CONVERSATION_PACKINGS)
@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_conversations_read_once_are_targets_once(tokenizer, packing, train_on):
    """Guards against validation rows that run on into the conversations of a second epoch."""
    rows = take_rows(chat_rows(packing, tokenizer, row_tokens=70, train_on=train_on, once=True), 1000)
    counted = Counter(int(id_) for _, targets in rows for id_ in targets[targets != IGNORED])
    rendered = [render_conversation(tokenizer, each) for each in conversations(30)]
    expected = Counter(
        id_ for ids, mask in rendered for id_, bit in zip(ids, mask, strict=True) if bit or train_on == "all"
    )
    if packing == "stream":  # a batch's first token is only an input
        assert counted <= expected
        assert counted.total() >= expected.total() - len(rows)
        return
    if train_on == "all":
        del expected[tokenizer.bos]
    assert counted == expected


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_conversation_stream_has_the_epochs_order(tokenizer, train_on):
    order = list(range(30))
    random.Random("1/0").shuffle(order)
    rendered = [render_conversation(tokenizer, conversations(30)[number]) for number in order]
    ids = [id_ for each, _ in rendered for id_ in each]
    bits = [bit or train_on == "all" for _, mask in rendered for bit in mask]
    rows = chat_rows("stream", tokenizer, row_tokens=20, train_on=train_on)
    for number in range((len(ids) - 21) // 20 - 3):
        inputs, targets = rows.next_row()
        start = number // 3 * 61 + number % 3 * 20
        assert inputs.tolist() == ids[start : start + 20]
        following = zip(ids[start + 1 : start + 21], bits[start + 1 : start + 21], strict=True)
        assert targets.tolist() == [id_ if bit else IGNORED for id_, bit in following]


@settings(max_examples=40)
@given(
    stops=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    packing=st.sampled_from([*DOCUMENT_PACKINGS, *(f"chat {name}" for name in CONVERSATION_PACKINGS)]),
    row_tokens=st.integers(30, 70),
)
def test_resumed_rows_are_equal(corpus, read_documents, tokenizer, stops, packing, row_tokens):
    def start() -> RowStream:
        if packing.startswith("chat "):
            return chat_rows(packing[5:], tokenizer, row_tokens=row_tokens)
        return document_rows(packing, read_documents(corpus), tokenizer, row_tokens=row_tokens)

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
