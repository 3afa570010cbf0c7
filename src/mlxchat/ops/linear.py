"""Products with matrices (out, in): trained, frozen, quantised, and frozen with an adapter.

Shapes: x (…, F), W (C, F), A (F, R), B (R, C).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxchat.ops.device import accelerated
from mlxchat.ops.dropout import dropped

Activation = Callable[[mx.array], mx.array]
"""A function of each number."""


class Packed(NamedTuple):
    """A matrix quantised by `mx.quantize`."""

    numbers: mx.array
    scales: mx.array
    offsets: mx.array
    group_size: int
    """Numbers of a row that share a scale."""
    bits: int


class Adapter(NamedTuple):
    """An adapter of a frozen matrix: W + scale × (A B)ᵀ."""

    a: mx.array
    b: mx.array
    scale: float
    keys: mx.array | None = None
    """(batch, 2), keys of the dropout applied to A's input; None disables it."""
    dropout: float = 0.0


def identity(x: mx.array) -> mx.array:
    """Return x."""
    return x


@accelerated
def squared_relu(x: mx.array) -> mx.array:
    """Return max(x, 0)²."""
    return mx.square(nn.relu(x))


@accelerated
def linear(x: mx.array, weight: mx.array, activation: Activation = identity) -> mx.array:
    """Return activation(x) Wᵀ (…, C)."""
    return activation(x) @ weight.T


@accelerated
def frozen_linear(
    x: mx.array, matrix: mx.array | Packed, activation: Activation = identity, adapter: Adapter | None = None
) -> mx.array:
    """Return activation(x) Wᵀ, plus scale × (activation(x) A) B with an adapter; W has no gradient."""
    seen = activation(x)
    if isinstance(matrix, Packed):
        numbers, scales, offsets, group_size, bits = matrix
        out = mx.quantized_matmul(seen, numbers, scales, offsets, transpose=True, group_size=group_size, bits=bits)
    else:
        out = seen @ matrix.T
    if adapter is None:
        return out
    seen = seen if adapter.keys is None else dropped(seen, adapter.keys, adapter.dropout)
    return out + (adapter.scale * ((seen @ adapter.a) @ adapter.b)).astype(out.dtype)


def unpacked(matrix: mx.array | Packed) -> mx.array:
    """Return a matrix (C, F), dequantised if it is packed."""
    if not isinstance(matrix, Packed):
        return matrix
    numbers, scales, offsets, group_size, bits = matrix
    return mx.dequantize(numbers, scales, offsets, group_size=group_size, bits=bits)


@accelerated
def scale_columns(x: mx.array, factor: mx.array) -> mx.array:
    """Return x (…, C) times factor (C,), in the dtype of x.

    The factor stays float32 if x is bfloat16: otherwise 1.011 would become 1.008, and its gradient's sum coarse.
    """
    return (x * factor).astype(x.dtype)
