"""Batches made ahead: the same as made on demand, with the position of what was consumed, and no thread left behind."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.text import write_sequences
from mlxchat.data.packing import ConversationRows, RowStream, ShuffledConversations
from mlxchat.data.tokens import Tokens, read_tokens
from mlxchat.training.batches import RowBatches
from mlxchat.training.step import Batch


class Numbers(RowStream):
    """Rows that hold their own number; each takes `seconds`, and row `fails_at` raises."""

    def __init__(self, *, seconds: float = 0.0, fails_at: int | None = None) -> None:
        self.number, self.seconds, self.fails_at, self.closed = 0, seconds, fails_at, 0

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(self.seconds)
        if self.number == self.fails_at:
            raise RuntimeError(f"row {self.number} cannot be read")
        row = np.full(5, self.number, dtype=np.int32)
        self.number += 1
        return row[:-1], row[1:]

    def placed(self) -> list[Any]:
        return [self.number - 1]

    def name(self, address: Any) -> str:
        return f"row {address}"

    def counts(self) -> dict[str, int]:
        return {"rows": self.number}

    def state(self) -> dict[str, Any]:
        return {"number": self.number}

    def restore(self, state: dict[str, Any]) -> None:
        self.number = state["number"]

    def close(self) -> None:
        self.closed += 1


def firsts(batch: Batch) -> list[int]:
    return batch.ids[:, 0].tolist()


def wait_until_full(batches: RowBatches, ahead: int) -> None:
    """Return when the thread has made all that it may."""
    while not batches._queue.full():
        time.sleep(0.001)
    assert batches._queue.qsize() == ahead


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_hold_the_streams_rows_in_order(ahead: int) -> None:
    with RowBatches(Numbers(), 2, ahead=ahead) as batches:
        assert [firsts(batches.next_batch(i)) for i in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_state_counts_and_documents_are_those_of_the_last_batch_returned(ahead: int) -> None:
    with RowBatches(Numbers(), 2, ahead=ahead) as batches:
        assert (batches.state(), batches.counts(), batches.documents()) == ({"number": 0}, {"rows": 0}, [])
        for iteration in range(3):
            batches.next_batch(iteration)
            if ahead:
                wait_until_full(batches, ahead)
            assert batches.state() == {"number": 2 * iteration + 2}
            assert batches.counts() == {"rows": 2 * iteration + 2}
            assert batches.documents() == [f"row {2 * iteration}", f"row {2 * iteration + 1}"]


def test_no_more_is_made_than_is_allowed() -> None:
    rows = Numbers()
    with RowBatches(rows, 2, ahead=3) as batches:
        wait_until_full(batches, 3)
        time.sleep(0.02)
        assert rows.number == 2 * (3 + 1), "three wait, and one is in the thread's hands"


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_a_restored_position_drops_what_was_made_ahead(ahead: int) -> None:
    with RowBatches(Numbers(), 2, ahead=ahead) as batches:
        batches.next_batch(0)
        position = batches.state()
        later = [firsts(batches.next_batch(i)) for i in range(1, 4)]
        batches.restore(position)
        assert (batches.state(), batches.documents()) == (position, [])
        assert [firsts(batches.next_batch(i)) for i in range(1, 4)] == later


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_what_fails_while_rows_are_made_is_raised_after_the_batches_before_it(ahead: int) -> None:
    with RowBatches(Numbers(fails_at=5), 2, ahead=ahead) as batches:
        assert [firsts(batches.next_batch(i)) for i in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(RuntimeError, match="row 5 cannot be read"):
            batches.next_batch(2)
        assert batches.state() == {"number": 4}


@pytest.mark.parametrize("leave", ["end", "exception", "interrupt", "failing rows"])
def test_the_thread_ends_with_the_training_however_it_ends(leave: str) -> None:
    before, rows = threading.active_count(), Numbers(fails_at=3 if leave == "failing rows" else None)
    error = KeyboardInterrupt if leave == "interrupt" else RuntimeError
    try:
        with RowBatches(rows, 2, ahead=2) as batches:
            batches.next_batch(0)
            assert threading.active_count() <= before + 1
            if leave == "failing rows":
                batches.next_batch(1)
            if leave != "end":
                raise error("stop")
    except error:
        pass
    assert threading.active_count() == before
    assert rows.closed > 0


def test_a_step_that_is_slower_than_its_batch_does_not_wait() -> None:
    """A batch takes 20 ms, a step 60: without the thread the waiting would be 100 ms."""
    with RowBatches(Numbers(seconds=0.01), 2, ahead=2) as batches:
        batches.next_batch(0)
        first = batches.waited_seconds
        for iteration in range(1, 6):
            time.sleep(0.06)
            batches.next_batch(iteration)
    assert first > 0.01
    assert batches.waited_seconds - first < 0.05


def test_the_time_of_waiting_is_counted() -> None:
    with RowBatches(Numbers(seconds=0.01), 2, ahead=1) as batches:
        for iteration in range(3):
            batches.next_batch(iteration)
    assert 0.05 < batches.waited_seconds < 1.0


def conversations(count: int) -> Tokens:
    sizes = random.Random(count)
    rows = [[0, *[number] * sizes.randint(1, 8)] for number in range(count)]
    return read_tokens(write_sequences((ids, [place > 1 for place in range(len(ids))]) for ids in rows))


@settings(max_examples=40)
@given(
    stops=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    ahead=st.integers(0, 5),
    num_rows=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_an_interrupted_stream_of_batches_goes_on_with_the_same_bits(
    stops: list[int], ahead: int, num_rows: int, seed: int
) -> None:
    """Stopped after so many batches each time, in a new process as it were, with any number of batches made ahead."""
    tokens = conversations(40)

    def start() -> RowBatches:
        rows = ConversationRows(
            ShuffledConversations(tokens, seed), padding=0, row_tokens=16, buffer_conversations=7, train_on="assistant"
        )
        return RowBatches(rows, num_rows, ahead=ahead)

    with start() as straight:
        expected = [straight.next_batch(i) for i in range(sum(stops))]
    got, position = [], None
    for stop in stops:
        with start() as batches:
            if position is not None:
                batches.restore(position)
            got += [batches.next_batch(i) for i in range(stop)]
            position = batches.state()
    for one, other in zip(got, expected, strict=True):
        assert one.ids.tobytes() == other.ids.tobytes()
        assert one.targets.tobytes() == other.targets.tobytes()
        assert one.weights.tobytes() == other.weights.tobytes()
    assert position == straight.state()
