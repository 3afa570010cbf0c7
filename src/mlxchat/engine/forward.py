"""What a scheduler needs of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np


class Forward(Protocol):
    """The model as the scheduler needs it: `slots.Slots`."""

    def read(self, ids: list[int], past: Any, last: int | None) -> Any:
        """Return the past of a row after `ids`, which follow `past`, whose last token is `last`."""

    def score(self, ids: list[int]) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the logits (V,) after each of `ids`, which begin a row."""

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for rows of so many tokens."""

    def keep(self, kept: list[int], tokens: int) -> None:
        """Go on with these rows, numbered anew."""

    def fill(self, row: int, past: Any) -> None:
        """Give a row its past; None: it has none."""

    def clear(self) -> None:
        """Forget all rows."""

    def past_of(self, row: int, tokens: int) -> Any:
        """Return the past of a row's first tokens, or None."""

    def step(self, ids: list[int], previous: list[int], positions: list[int]) -> np.ndarray[Any, Any]:
        """Return logits (≥ B, V) after one more token of each row."""
