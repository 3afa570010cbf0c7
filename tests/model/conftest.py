"""A small model whose weights are all random, and a small tokenizer."""

from __future__ import annotations

import mlxchat  # isort: split

from collections.abc import Callable, Iterator

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
def make_model() -> Callable[..., GPT]:
    def make(num_heads: int = 4, num_kv_heads: int = 2, vocab_size: int = 280, rope_theta: float = 10_000.0) -> GPT:
        """Return a model none of whose projections is zero, as nanochat's initial ones are."""
        model = GPT(
            GPTSizes(
                vocab_size=vocab_size, num_layers=3, num_heads=num_heads, num_kv_heads=num_kv_heads, width=32,
                context_tokens=64, rope_theta=rope_theta,
            )
        )  # fmt: skip
        rng = np.random.default_rng(7)
        weights = {
            name: mx.array(rng.normal(scale=1.0 if "wte" in name else 0.3, size=value.shape).astype(np.float32))
            for name, value in flatten_parameters(model).items()
        }
        set_parameters(model, weights)
        return model

    return make
