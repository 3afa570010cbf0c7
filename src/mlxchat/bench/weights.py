"""Random weights without zeros."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxchat.model.parameters import flatten_parameters, set_parameters


def fill_zero_weights(model: nn.Module, seed: int) -> None:
    """Replace weights that start at zero by N(0, 1/columns), so that no product is trivial."""
    parameters = flatten_parameters(model)
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    drawn = {
        name: mx.random.normal(value.shape, key=keys[index]) / value.shape[-1] ** 0.5
        for index, (name, value) in enumerate(parameters.items())
        if not mx.any(value != 0).item()
    }
    set_parameters(model, drawn)
