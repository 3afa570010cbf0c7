"""Nanochat's initial weights; what reads and sets weights by name, `parameters.py`, is found here too."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxchat.model.gpt import BACKOUT_INIT, GPT
from mlxchat.model.parameters import flatten_parameters as flatten_parameters
from mlxchat.model.parameters import set_parameters as set_parameters


def init_weights(model: GPT, seed: int) -> None:
    """Draw nanochat's initial weights from `seed`, the same on every backend.

    October 2025: embedding N(0, 1); linear layers N(0, s²) with s = min(1, sqrt(out/in)) / sqrt(in) (arXiv
    2310.17813); the projections back into the stream and the head start at zero. July 2026: embedding N(0, 0.8²),
    head N(0, 0.001²), queries, keys, values and value embeddings U(±b) with b = sqrt(3/width), c_fc U(±0.4 b), gates
    U(0, 0.02), residual scalars falling with the layer, the projections back into the stream zero.
    """
    parameters = flatten_parameters(model)
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    draw = {"oct2025": _draw_oct2025, "jul2026": _draw_jul2026}[model.sizes.architecture]
    for index, (name, value) in enumerate(parameters.items()):
        if name.endswith("c_proj.weight"):
            parameters[name] = mx.zeros_like(value)
        else:
            parameters[name] = draw(name, value.shape, model.sizes.width, keys[index])
    set_parameters(model, parameters)


def _draw_oct2025(name: str, shape: tuple[int, ...], width: int, key: mx.array) -> mx.array:
    if name == "lm_head.weight":
        return mx.zeros(shape)
    if len(shape) == 1 or "gate" in name or "value_embeds" in name:  # a feature of the later architecture
        return _draw_jul2026(name, shape, width, key)
    rows, columns = shape
    deviation = 1.0 if "wte" in name else min(1.0, (rows / columns) ** 0.5) / columns**0.5
    return deviation * mx.random.normal(shape, key=key)


def _draw_jul2026(name: str, shape: tuple[int, ...], width: int, key: mx.array) -> mx.array:
    bound = (3.0 / width) ** 0.5
    if name == "transformer.wte.weight":
        return 0.8 * mx.random.normal(shape, key=key)
    if name == "lm_head.weight":
        return 0.001 * mx.random.normal(shape, key=key)
    if name == "resid_lambdas":
        return mx.array(1.15 - 0.10 * _depth_fractions(shape[0]))
    if name == "x0_lambdas":
        return mx.array(0.20 - 0.15 * _depth_fractions(shape[0]))
    if name == "smear_lambda":
        return mx.zeros(shape)
    if name == "backout_lambda":
        return mx.full(shape, BACKOUT_INIT)
    if "gate" in name:
        return mx.random.uniform(0.0, 0.02, shape, key=key)
    if "c_fc" in name:
        bound *= 0.4
    return mx.random.uniform(-bound, bound, shape, key=key)


def _depth_fractions(num_layers: int) -> np.ndarray:
    """Return 0 for the first layer to 1 for the last."""
    return (np.arange(num_layers) / max(num_layers - 1, 1)).astype(np.float32)
