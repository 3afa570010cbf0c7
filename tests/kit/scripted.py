"""A model without weights, whose answers are given."""

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.engine.decode import Decoder, LastEmbedding, Past, tokens_of


class ScriptedDecoder(Decoder):
    """Its most likely token after t tokens of an answer is scripts[p][t]; the last one repeats.

    p is the number of the prompt's tokens before its last one, less `shortest`, at most that of the last script. A step
    takes `seconds`.
    """

    def __init__(
        self, scripts: Sequence[Sequence[int]], vocab_size: int, seconds: float = 0.0, shortest: int = 0
    ) -> None:
        self.scripts, self.vocab_size, self.seconds, self.shortest = scripts, vocab_size, seconds, shortest
        self.model: Any = SimpleNamespace(sizes=None)
        self.given: list[list[int]] = []
        self.lengths = np.zeros(0, dtype=np.int64)
        self.starts = np.zeros(0, dtype=np.int64)
        self.room, self.last = 1 << 20, LastEmbedding([None])

    def __call__(self, model: Any) -> "ScriptedDecoder":
        """Begin again; an engine creates a decoder of its model."""
        self.resize([], 0, 1)
        return self

    def read(self, prompts: Sequence[Sequence[int]], past: Past | None = None, last: int | None = None) -> list[Past]:
        return [past_of_zeros(tokens_of(past) + len(prompt)) for prompt in prompts]

    def resize(self, kept: Sequence[int], rows: int, tokens: int) -> None:
        for name in ("lengths", "starts"):
            before, after = getattr(self, name), np.zeros(rows, dtype=np.int64)
            after[: len(kept)] = before[list(kept)]
            setattr(self, name, after)

    def fill(self, first: int, pasts: Sequence[Past | None], last: Sequence[int]) -> None:
        rows = slice(first, first + len(pasts))
        self.lengths[rows] = self.starts[rows] = [tokens_of(past) for past in pasts]

    def past_of(self, row: int, tokens: int) -> Past:
        return past_of_zeros(tokens)

    def step(self, tokens: mx.array, advances: Sequence[bool]) -> mx.array:
        time.sleep(self.seconds)
        self.given.append(np.asarray(tokens).tolist())
        logits = np.zeros((len(advances), self.vocab_size), dtype=np.float32)
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            script = self.scripts[min(max(start - self.shortest, 0), len(self.scripts) - 1)]
            logits[row, script[min(length - start, len(script) - 1)]] = 1000.0
        self.lengths = self.lengths + np.array(advances)
        return mx.array(logits)


def past_of_zeros(tokens: int) -> Past:
    return [(mx.zeros((1, 1, tokens, 1)),) * 2]
