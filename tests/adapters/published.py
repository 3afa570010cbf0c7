"""Adapters as stages publish them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kit.artifacts import FACTS, make_tokenizer, publish
from mlxchat.config.schema import AdapterConfig
from mlxchat.model.checkpoint import load_checkpoint, save_adapters
from mlxchat.model.sizes import GPTSizes, matrices_of, shapes_of


def adapter_sizes(model_sizes: GPTSizes, kind: str = "lora", **more: Any) -> AdapterConfig:
    """Return adapters of rank 4 on all matrices but the last layer's projections."""
    targets = list(matrices_of(model_sizes))[:-2]
    return AdapterConfig(**{"kind": kind, "rank": 4, "scale": 2.5, "targets": targets, "dropout": 0.1, **more})


def random_adapters(sizes: AdapterConfig, model_sizes: GPTSizes, *, seed: int = 5) -> dict[str, mx.array]:
    """Return adapters without a zero; DoRA's lengths are near those of their rows."""
    rng = np.random.default_rng(seed)
    return {
        name: mx.array((rng.normal(0, 0.15, shape) if len(shape) > 1 else rng.uniform(1, 3, shape)).astype(np.float32))
        for name, shape in shapes_of(sizes, model_sizes).items()
    }


def publish_adapters(
    outputs: Path, base: Path, step: str = "tuned", kind: str = "lora", *, seed: int = 5, **more: Any
) -> Path:
    sizes = load_checkpoint(base)[0].sizes
    of = adapter_sizes(sizes, kind, **more)
    arrays = random_adapters(of, sizes, seed=seed)

    def write(out: Path) -> None:
        save_adapters(out, arrays, of, base=base, sizes=sizes, tokenizer=make_tokenizer(), facts=dict(FACTS))

    return publish(outputs, step, write, inputs={"checkpoint": base})
