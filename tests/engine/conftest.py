"""A small random model, and an engine that says what it is told to."""

from __future__ import annotations

import mlxchat  # isort: split

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.data.tokenizer import Tokenizer, train_tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.model.sizes import GPTSizes
from mlxchat.ops.device import backend

assert mlxchat  # imported before MLX, so that a fast BLAS is loaded first


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    backend.cache_clear()
    yield
    mx.set_default_device(before)
    backend.cache_clear()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat and the dog sat on the log " * 5], 280)


@pytest.fixture
def model(tokenizer: Tokenizer) -> GPT:
    """Three layers with grouped heads, none of whose projections is zero, as nanochat's initial ones are."""
    model = GPT(
        GPTSizes(
            vocab_size=tokenizer.vocab_size, num_layers=3, num_heads=4, num_kv_heads=2, width=32, context_tokens=64,
            rope_theta=10_000.0,
        )
    )  # fmt: skip
    rng = np.random.default_rng(7)
    weights = {
        name: mx.array(rng.normal(scale=1.0 if "wte" in name else 0.3, size=value.shape).astype(np.float32))
        for name, value in flatten_parameters(model).items()
    }
    set_parameters(model, weights)
    return model


class Scripted:
    """A `Forward` that wants scripts[p][t] after t tokens of an answer, where p tells prompts apart by their length."""

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
        """Return an engine that follows the scripts, and as many prompts for it."""
        forward = Scripted(scripts, tokenizer.vocab_size)
        engine = Engine(SimpleNamespace(scripted=forward), tokenizer)  # type: ignore[arg-type]
        engine.forward = lambda: forward  # type: ignore[method-assign]
        return engine, [[tokenizer.bos] * (1 + row) for row in range(len(scripts))]

    return make
