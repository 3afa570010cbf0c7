"""Products with weights, the MLP's activation with its second one, and the gates."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxchat.ops import formulas
from mlxchat.ops.compiled import compiled, differentiable
from mlxchat.ops.device import backend


def product(x: mx.array, weight: mx.array) -> mx.array:
    """Return x Wᵀ for x (…, F) and weight W (C, F).

    On a CPU the gradient of the weight comes before that of x is used: left to itself MLX makes the weights' gradients
    when all others are done, and keeps every layer's activations until then.
    """
    return _product(x, weight) if backend() == "cpu" else x @ weight.T


def squared_relu_product(x: mx.array, weight: mx.array) -> mx.array:
    """Return max(x, 0)² Wᵀ for x (…, F) and weight W (C, F).

    On a CPU the gradient keeps x alone and squares it again, which costs less than the memory for both.
    """
    if backend() == "cpu":
        return _squared_relu_product(x, weight)
    return mx.square(nn.relu(x)) @ weight.T


def gated_sum(x: mx.array, gate: mx.array, y: mx.array, *, scale: float) -> mx.array:
    """Return x + scale × sigmoid(gate) × y."""
    return x + scale * mx.sigmoid(gate) * y


_squared_relu = compiled(formulas.squared_relu)


@differentiable
def _product(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.T


@_product.vjp
def _product_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    x, weight = primals
    d_weight = cotangent.reshape(-1, cotangent.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    (d_x,) = mx.depends([cotangent @ weight], [d_weight])
    return d_x, d_weight


@differentiable
def _squared_relu_product(x: mx.array, weight: mx.array) -> mx.array:
    return _squared_relu(x) @ weight.T


@_squared_relu_product.vjp
def _squared_relu_product_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    x, weight = primals
    # Only once the cotangent is there: else compilation would keep what the forward pass computed.
    (again,) = mx.depends([x], [cotangent])
    flat = cotangent.reshape(-1, cotangent.shape[-1])
    d_weight = flat.T @ _squared_relu(again).reshape(-1, x.shape[-1])
    (d_activation,) = mx.depends([cotangent @ weight], [d_weight])
    return _squared_relu_gradient(x, d_activation).astype(x.dtype), d_weight.astype(weight.dtype)


@compiled
def _squared_relu_gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    return (x + mx.abs(x)) * cotangent
