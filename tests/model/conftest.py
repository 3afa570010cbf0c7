"""A small model whose weights are all random, and a small tokenizer."""

from __future__ import annotations

import mlxchat  # isort: split

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.compose import compose_config
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


@cache
def features_of(architecture: str) -> dict[str, Any]:
    """Return what conf/architecture says, as fields of GPTSizes."""
    config = vars(compose_config([f"architecture={architecture}"]).config.architecture)
    fields = {key: value for key, value in config.items() if key not in ("name", "whole_heads", "dropout")}
    return {"architecture": config["name"], **fields}


@pytest.fixture
def make_model() -> Callable[..., GPT]:
    def make(
        num_heads: int = 4, num_kv_heads: int = 2, vocab_size: int = 280, *, architecture: str = "oct2025", **sizes: Any
    ) -> GPT:
        """Return a model none of whose projections and scalars is zero, as some of nanochat's initial ones are."""
        model = GPT(
            GPTSizes(
                **{
                    "vocab_size": vocab_size, "num_layers": 3, "num_heads": num_heads, "num_kv_heads": num_kv_heads,
                    "width": 32, "context_tokens": 64, **features_of(architecture), **sizes,
                }
            )
        )  # fmt: skip
        rng = np.random.default_rng(7)
        weights = {
            name: rng.normal(scale=1.0 if "wte" in name else 0.3, size=value.shape) + (name == "resid_lambdas")
            for name, value in flatten_parameters(model).items()
        }
        set_parameters(model, {name: mx.array(value.astype(np.float32)) for name, value in weights.items()})
        return model

    return make
