"""Batches of rows, and the position after the last whole one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mlxchat.data.packing import Batch, RowBatches, RowStream


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
