"""The MLP's activation and the gates, with gradients of few passes on a CPU."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxchat.ops import formulas
from mlxchat.ops.compiled import compiled, differentiable
from mlxchat.ops.device import backend


def squared_relu(x: mx.array) -> mx.array:
    """Return max(x, 0)²."""
    if backend() == "cpu":
        return _compiled_squared_relu(x)
    return mx.square(nn.relu(x))


def gated_sum(x: mx.array, gate: mx.array, y: mx.array, *, scale: float) -> mx.array:
    """Return x + scale × sigmoid(gate) × y."""
    return x + scale * mx.sigmoid(gate) * y


_squared_relu = compiled(formulas.squared_relu)


@differentiable
def _compiled_squared_relu(x: mx.array) -> mx.array:
    return _squared_relu(x)


@_compiled_squared_relu.vjp
def _squared_relu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return _squared_relu_gradient(x, cotangent)


@compiled
def _squared_relu_gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    return (x + mx.abs(x)) * cotangent
