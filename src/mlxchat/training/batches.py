"""Batches from a stream of rows."""

from __future__ import annotations

from typing import Any

from mlxchat.data.packing import RowStream
from mlxchat.training.step import Batch, mean_batch


class RowBatches:
    """As many rows per iteration as the batch has tokens for."""

    def __init__(self, rows: RowStream, num_rows: int) -> None:
        """Take `num_rows` rows of the stream per iteration."""
        self.rows, self.num_rows = rows, num_rows

    def next_batch(self, iteration: int) -> Batch:
        """Return the next rows; their loss is the mean over all targets of the iteration."""
        return mean_batch([self.rows.next_row() for _ in range(self.num_rows)])

    def state(self) -> dict[str, Any]:
        """Return the stream's position."""
        return self.rows.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position of the stream."""
        self.rows.restore(state)
