"""A small random model and its tokenizer."""

from __future__ import annotations

import mlxchat  # isort: split

import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.data.tokenizer import Tokenizer, train_tokenizer
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.model.sizes import GPTSizes
from mlxchat.ops.device import backend

assert mlxchat  # imported before MLX, so that a fast BLAS is loaded first

sys.path.append(str(Path(__file__).parents[1]))  # for gpt_in_numpy


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
