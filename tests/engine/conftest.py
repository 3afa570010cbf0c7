"""A small random model, and one that says what it is told to."""

from __future__ import annotations

import mlxchat  # isort: split

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.data.tokenizer import Tokenizer, train_tokenizer
from mlxchat.model.gpt import GPT
from mlxchat.model.sizing import GPTSizes
from mlxchat.model.weights import flatten_parameters, set_parameters
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


class ScriptedModel:
    """A model that wants scripts[r][t] after t tokens in row r, whatever it is given.

    Rows are told apart by the padding in front of their prompts, so prompts have to differ in length.
    """

    def __init__(self, scripts: Sequence[Sequence[int]], padding: Sequence[int], vocab_size: int) -> None:
        self.scripts = dict(zip(padding, scripts, strict=True))
        self.sizes = SimpleNamespace(windows=lambda: [None])
        self.logits = lambda hidden: hidden
        self.vocab_size, self.step = vocab_size, 0
        self.given: list[list[int]] = []

    def hidden(self, ids: mx.array, cache: Any) -> mx.array:
        self.given.append(ids[:, -1].tolist())
        logits = np.zeros((ids.shape[0], ids.shape[1], self.vocab_size), dtype=np.float32)
        for row, padding in enumerate(cache.starts.tolist()):
            script = self.scripts[padding]
            logits[row, -1, script[self.step] if self.step < len(script) else 32] = 1000.0
        self.step += 1
        return mx.array(logits)


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> Callable[..., tuple[ScriptedModel, list[list[int]]]]:
    def make(*scripts: Sequence[int]) -> tuple[ScriptedModel, list[list[int]]]:
        """Return a model that follows the scripts, and as many prompts for it."""
        prompts = [[tokenizer.bos] * (1 + row) for row in range(len(scripts))]
        padding = [len(scripts) - len(prompt) for prompt in prompts]
        return ScriptedModel(scripts, padding, tokenizer.vocab_size), prompts

    return make
