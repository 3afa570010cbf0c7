"""A small random model, its optimizer, and the context that a stage gives to the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.compose import compose_config
from mlxchat.config import Config
from mlxchat.model.gpt import GPT
from mlxchat.model.sizing import GPTSizes
from mlxchat.model.weights import flatten_parameters, set_parameters
from mlxchat.optim.groups import Optimizer
from mlxchat.runner.context import Context
from mlxchat.training.step import Batch, mean_batch


@cache
def composed(*overrides: str) -> Config:
    return compose_config(list(overrides)).config


class Numbers:
    """Batches that follow from their number; after `stop_after` of them a signal arrives."""

    waited_seconds = 0.0

    def __init__(self) -> None:
        self.number = 0

    def next_batch(self, iteration: int) -> Batch:
        ids = np.random.default_rng(self.number).integers(0, 280, (3, 17)).astype(np.int32)
        self.number += 1
        return mean_batch([(row[:-1], row[1:]) for row in ids])

    def documents(self) -> list[str]:
        return []

    def state(self) -> dict[str, Any]:
        return {"number": self.number}

    def restore(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


@pytest.fixture
def make_numbers() -> Callable[[], Numbers]:
    """Return the maker of such batches."""
    return Numbers


@pytest.fixture
def make_model() -> Callable[[], GPT]:
    def make() -> GPT:
        """Return the same small model each time; none of its projections is zero, as nanochat's initial ones are."""
        model = GPT(
            GPTSizes(
                vocab_size=280, num_layers=2, num_heads=4, num_kv_heads=2, width=32, context_tokens=64, rope_theta=1e4
            )
        )
        rng = np.random.default_rng(7)
        weights = {
            name: mx.array(rng.normal(scale=1.0 if "wte" in name else 0.2, size=value.shape).astype(np.float32))
            for name, value in flatten_parameters(model).items()
        }
        set_parameters(model, weights)
        return model

    return make


@pytest.fixture
def make_optimizer() -> Callable[..., Optimizer]:
    def make(model: GPT, **changes: Any) -> Optimizer:
        config = composed("experiment=speedrun_d12").optimizer
        return Optimizer(model, replace(config, **changes), width=model.sizes.width)

    return make


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., Context]:
    def make(
        name: str = "run",
        stop_signal: Callable[[], int | None] = lambda: None,
        training: dict[str, Any] | None = None,
        **machine: Any,
    ) -> Context:
        """Return a context whose work lies in a folder of this name, so that a second attempt continues a first."""
        config = composed("machine=cpu")
        defaults = replace(config.machine, device_batch_tokens=64, checkpoint_seconds=1e9, blas_threads=1)
        work, out = tmp_path / name / "work", tmp_path / name / "out"
        for folder in (work, out):
            folder.mkdir(parents=True, exist_ok=True)
        settings: Any = SimpleNamespace(
            machine=replace(defaults, **machine), training=replace(config.training, **(training or {}))
        )
        return Context(
            step="toy", stage="toy", config=settings, inputs={}, input_steps={}, out=out, work=work, root_seed=0,
            stop_signal=stop_signal, on_metrics=lambda step, record: None,
        )  # fmt: skip

    return make
