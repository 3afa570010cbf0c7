"""nanochat's transformers in NumPy and float64: an oracle for ours."""

import numpy as np

from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters
from mlxchat.model.published import norm as numpy_norm
from mlxchat.model.published import published_logits

__all__ = ["numpy_logits", "numpy_norm", "weights_of"]


def weights_of(model: GPT) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, dtype=np.float64) for name, value in flatten_parameters(model).items()}


def numpy_logits(model: GPT, ids: np.ndarray, weights: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Return nanochat's logits (B, T, V), in float64."""
    return published_logits((weights or weights_of(model)).__getitem__, model.sizes, ids)
