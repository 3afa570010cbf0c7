"""nanochat's optimizer settings, and a small model that every group has a part of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.compose import compose_config
from mlxchat.config import ModelConfig, OptimizerConfig
from mlxchat.model.gpt import GPT
from mlxchat.model.sizing import GPTSizes, sizes_of
from mlxchat.model.weights import flatten_parameters, set_parameters


@pytest.fixture(scope="session")
def make_config() -> Callable[..., OptimizerConfig]:
    @cache
    def composed(option: str) -> OptimizerConfig:
        return compose_config(["experiment=speedrun_d12", f"optimizer={option}"]).config.optimizer

    def make(option: str = "muon_oct2025", **changes: Any) -> OptimizerConfig:
        """Return what conf/optimizer/<option>.yaml holds, with changes."""
        return replace(composed(option), **changes)

    return make


@pytest.fixture
def make_model() -> Callable[[str], GPT]:
    def make(architecture: str) -> GPT:
        """Return a small model whose parameters are all of order one."""
        features = compose_config([f"architecture={architecture}"]).config.architecture
        dials = ModelConfig(name="", depth=2, aspect_ratio=16, head_width=8, num_kv_heads=2, context_tokens=8)
        return randomised(GPT(sizes_of(dials, features, 50)))

    return make


@pytest.fixture
def model() -> GPT:
    return randomised(
        GPT(
            GPTSizes(
                vocab_size=50, num_layers=2, num_heads=2, num_kv_heads=1, width=16, context_tokens=8, rope_theta=1e4
            )
        )
    )


def randomised(model: GPT) -> GPT:
    rng = np.random.default_rng(0)
    weights = {
        name: mx.array(rng.normal(size=value.shape).astype(np.float32))
        for name, value in flatten_parameters(model).items()
    }
    set_parameters(model, weights)
    return model
