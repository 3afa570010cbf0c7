"""nanochat's optimizer settings, and a small model that every group has a part of."""

from __future__ import annotations

import mlxchat  # isort: split

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.config import OptimizerConfig
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.model.sizing import GPTSizes
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


@pytest.fixture
def make_config() -> Callable[..., OptimizerConfig]:
    def make(**changes: Any) -> OptimizerConfig:
        config = OptimizerConfig(
            kind="muon", matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, reference_width=768, weight_decay=0.0,
            adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-10, momentum_start=0.85, momentum_end=0.95,
            momentum_warmup_iterations=300, newton_schulz_iterations=5, grad_clip=1.0,
        )  # fmt: skip
        return replace(config, **changes)

    return make


@pytest.fixture
def model() -> GPT:
    model = GPT(
        GPTSizes(vocab_size=50, num_layers=2, num_heads=2, num_kv_heads=1, width=16, context_tokens=8, rope_theta=1e4)
    )
    rng = np.random.default_rng(0)
    weights = {
        name: mx.array(rng.normal(size=value.shape).astype(np.float32))
        for name, value in flatten_parameters(model).items()
    }
    set_parameters(model, weights)
    return model
