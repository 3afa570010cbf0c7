"""A small random model, and an engine with scripted answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kit.models import make_model
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.model.gpt import GPT


@pytest.fixture
def model() -> GPT:
    """Three layers with grouped heads."""
    return make_model(num_layers=3, scale=0.3)


class Scripted:
    """A `Forward` whose most likely token after t tokens of an answer is scripts[p][t]; p counts prompts."""

    def __init__(self, scripts: Sequence[Sequence[int]], vocab_size: int) -> None:
        self.scripts, self.vocab_size = scripts, vocab_size
        self.given: list[list[int]] = []
        self.lengths: list[int] = []

    def read(self, ids: list[int], past: Any, last: int | None) -> int:
        return (past or 0) + len(ids)

    def reserve(self, rows: int, tokens: int) -> None:
        self.lengths += [1] * (rows - len(self.lengths))

    def keep(self, kept: list[int], tokens: int) -> None:
        self.lengths = [self.lengths[row] for row in kept]

    def clear(self) -> None:
        self.lengths = []

    def fill(self, row: int, past: int | None) -> None:
        self.lengths[row] = (past or 0) + 1

    def past_of(self, row: int, tokens: int) -> None:
        return None

    def step(self, ids: list[int], previous: list[int], positions: list[int]) -> np.ndarray[Any, Any]:
        self.given.append(ids)
        logits = np.zeros((len(ids), self.vocab_size), dtype=np.float32)
        for row, position in enumerate(positions):
            script, done = self.scripts[self.lengths[row] - 1], position + 1 - self.lengths[row]
            logits[row, script[done] if 0 <= done < len(script) else 32] = 1000.0
        return logits


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> Callable[..., tuple[Engine, list[list[int]]]]:
    def make(*scripts: Sequence[int]) -> tuple[Engine, list[list[int]]]:
        """Return an engine that follows the scripts, and a prompt for each."""
        forward = Scripted(scripts, tokenizer.vocab_size)
        engine = Engine(SimpleNamespace(scripted=forward), tokenizer)
        engine.forward = lambda: forward
        return engine, [[tokenizer.bos] * (1 + row) for row in range(len(scripts))]

    return make
