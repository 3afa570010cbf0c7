"""A model's weights by name, and nanochat's initial ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxchat.model.gpt import BACKOUT_INIT, GPT


def flatten_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return a model's parameters by dotted name."""
    parameters: Any = model.parameters()  # type: ignore[no-untyped-call]
    return cast(dict[str, mx.array], tree_flatten(parameters, destination={}))


def set_parameters(model: nn.Module, parameters: Mapping[str, mx.array]) -> None:
    """Replace a model's parameters by dotted name; what is not named stays.

    Raises:
        KeyError: the model has no such parameter.
    """
    for name, value in parameters.items():
        *path, last = name.split(".")
        place: Any = model
        for key in path:
            place = place[int(key)] if isinstance(place, list) else place[key]
        if last not in place:
            raise KeyError(name)
        place[last] = value


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
