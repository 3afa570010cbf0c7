"""Small GPTs none of whose weights is zero, and the tokenizer of 280 ids that goes with them."""

import mlxchat  # isort: split

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import Config
from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.interop.names import architecture_values
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.model.sizes import GPTSizes

assert mlxchat  # imported before MLX, so that a fast BLAS is loaded first

VOCABULARY = 280
features_of = cache(architecture_values)


@contextmanager
def computing_on_cpu() -> Iterator[None]:
    """Compute on the CPU, then on what was chosen before."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@cache
def composed(*overrides: str) -> Config:
    """Return a composed configuration, which the caller must not change."""
    return compose_config(list(overrides)).config


@cache
def make_tokenizer() -> Tokenizer:
    """Return the tokenizer of VOCABULARY ids."""
    return train_tokenizer(["the cat sat on the mat and the dog sat on the log " * 5], VOCABULARY)


def make_model(
    architecture: str = "oct2025", *, seed: int = 7, scale: float = 0.2, head_scale: float | None = None, **sizes: Any
) -> GPT:
    """Return a model with grouped heads, the same each time; no weight starts at zero as nanochat's projections do.

    Args:
        architecture: a name of conf/architecture.
        seed: of the weights.
        scale: deviation of the weights; embeddings have 1.
        head_scale: deviation of the head's weights where it is another one.
        sizes: fields of GPTSizes that differ.
    """
    small = {"vocab_size": VOCABULARY, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "width": 32,
             "context_tokens": 64}  # fmt: skip
    model = GPT(GPTSizes(**{**small, **features_of(architecture), **sizes}))
    rng = np.random.default_rng(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> mx.array:
        deviation = 1.0 if "wte" in name else head_scale if head_scale and "lm_head" in name else scale
        return mx.array((rng.normal(scale=deviation, size=shape) + (name == "resid_lambdas")).astype(np.float32))

    set_parameters(model, {name: drawn(name, value.shape) for name, value in flatten_parameters(model).items()})
    return model


def arrays_of(model: GPT) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.array(value) for name, value in flatten_parameters(model).items()}
