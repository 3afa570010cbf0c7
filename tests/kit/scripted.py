"""A model without weights, whose answers are given."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np


class Tokens(int):
    """A past of which nothing is known but its length."""

    def begun(self, tokens: int) -> "Tokens":
        return Tokens(tokens)


class Scripted:
    """A `Forward` whose most likely token after t tokens of an answer is scripts[p][t]; the last one repeats.

    p is the number of the prompt's tokens before its last one, at most that of the last script. A step takes `seconds`.
    """

    def __init__(self, scripts: Sequence[Sequence[int]], vocab_size: int, seconds: float = 0.0) -> None:
        self.scripts, self.vocab_size, self.seconds = scripts, vocab_size, seconds
        self.given: list[list[int]] = []
        self.lengths: list[int] = []

    def read(self, ids: list[int], past: Any, last: int | None) -> "Tokens":
        return Tokens((past or 0) + len(ids))

    def reserve(self, rows: int, tokens: int) -> None:
        self.lengths += [0] * (rows - len(self.lengths))

    def keep(self, kept: list[int], tokens: int) -> None:
        self.lengths = [self.lengths[row] for row in kept]

    def clear(self) -> None:
        self.lengths = []

    def fill(self, row: int, past: Any) -> None:
        self.lengths[row] = past or 0

    def past_of(self, row: int, tokens: int) -> None:
        return None

    def step(self, ids: list[int], previous: list[int], positions: list[int]) -> np.ndarray[Any, Any]:
        time.sleep(self.seconds)
        self.given.append(ids)
        logits = np.zeros((len(ids), self.vocab_size), dtype=np.float32)
        for row, (position, past) in enumerate(zip(positions, self.lengths, strict=False)):
            script = self.scripts[min(past, len(self.scripts) - 1)]
            logits[row, script[min(max(position - past, 0), len(script) - 1)]] = 1000.0
        return logits
