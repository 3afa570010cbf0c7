"""Batches of rows, and the position after the last whole one."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from mlxchat.data.packing import RowStream
from mlxchat.training.batches import Batch, RowBatches


class Numbers(RowStream):
    """Rows filled with their own number; each takes `seconds`, and row `fails_at` raises."""

    def __init__(self, *, seconds: float = 0.0, fails_at: int | None = None) -> None:
        super().__init__(None, row_tokens=4)
        self.number, self.seconds, self.fails_at, self.closed = 0, seconds, fails_at, 0

    def _pieces(self, space: int) -> Iterator[tuple[int, np.ndarray, bool]]:
        time.sleep(self.seconds)
        if self.number == self.fails_at:
            raise RuntimeError(f"row {self.number} cannot be read")
        self.number += 1
        yield self.number - 1, np.full(space, self.number - 1), True

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


def test_position_counts_and_documents_are_those_of_the_last_batch():
    with RowBatches(Numbers(seconds=0.002), 2) as batches:
        assert (batches.state(), batches.counts(), batches.documents()) == ({"number": 0}, {"rows": 0}, [])
        for iteration in range(3):
            first = 2 * iteration
            assert firsts(batches.next_batch(iteration)) == [first, first + 1]
            assert (batches.state(), batches.counts()) == ({"number": first + 2}, {"rows": first + 2})
            assert batches.documents() == [f"row {first}", f"row {first + 1}"]
        assert batches.waited_seconds >= 0.012
        batches.restore({"number": 2})
        assert (batches.state(), batches.documents()) == ({"number": 2}, [])
        assert firsts(batches.next_batch(1)) == [2, 3]


def test_failure_within_a_batch_leaves_the_position_before_it():
    """Bug: the position saved at a stop during encoding left out the rows drawn before it."""
    with RowBatches(Numbers(fails_at=5), 2) as batches:
        assert [firsts(batches.next_batch(i)) for i in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(RuntimeError, match="row 5 cannot be read"):
            batches.next_batch(2)
        assert (batches.state(), batches.documents()) == ({"number": 4}, ["row 2", "row 3"])


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_stream_is_closed_however_training_ends(error):
    rows = Numbers()
    with suppress(KeyboardInterrupt), RowBatches(rows, 2):
        if error is not None:
            raise error
    assert rows.closed == 1
