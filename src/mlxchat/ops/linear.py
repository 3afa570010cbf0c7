"""Products with matrices (out, in): trained, frozen, packed in few bits, and frozen with an adapter beside them.

The plain forms are a line or two. On a CPU each has a gradient of its own: those of the matrices are computed before
that of the input is used (MLX would compute them last and keep every layer's activations until then), an activation is
computed again instead of being kept, no gradient of a frozen matrix is made, and a packed matrix is unpacked for each
product, because MLX's product with packed numbers takes 40 times as long there.

Shapes: x (…, F), W (C, F), A (F, R), B (R, C).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxchat.ops import formulas
from mlxchat.ops.compiled import compiled, differentiable
from mlxchat.ops.device import backend
from mlxchat.ops.dropout import dropped

Activation = Callable[[mx.array], mx.array]
"""A function of each number."""


class Packed(NamedTuple):
    """A matrix in few bits, as `mx.quantize` makes it."""

    numbers: mx.array
    scales: mx.array
    offsets: mx.array
    group_size: int
    """Numbers of a row that share a scale."""
    bits: int


class Adapter(NamedTuple):
    """What stands beside a frozen matrix: W + scale × (A B)ᵀ."""

    a: mx.array
    b: mx.array
    scale: float
    keys: mx.array | None = None
    """(batch, 2), for dropout of what A sees; None: it sees all."""
    dropout: float = 0.0


def identity(x: mx.array) -> mx.array:
    """Return x."""
    return x


def squared_relu(x: mx.array) -> mx.array:
    """Return max(x, 0)²."""
    return _squared_relu(x) if backend() == "cpu" else mx.square(nn.relu(x))


def linear(x: mx.array, weight: mx.array, activation: Activation = identity) -> mx.array:
    """Return activation(x) Wᵀ (…, C)."""
    return _linear(activation)(x, weight) if backend() == "cpu" else activation(x) @ weight.T


def frozen_linear(
    x: mx.array, matrix: mx.array | Packed, activation: Activation = identity, adapter: Adapter | None = None
) -> mx.array:
    """Return activation(x) Wᵀ, with an adapter + scale × (activation(x) A) B; no gradient of W is made."""
    if backend() == "cpu":
        return _frozen_on_cpu(x, matrix, activation, adapter)
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
    """Return a matrix (C, F) with the numbers that it stands for."""
    if not isinstance(matrix, Packed):
        return matrix
    numbers, scales, offsets, group_size, bits = matrix
    return mx.dequantize(numbers, scales, offsets, group_size=group_size, bits=bits)


def scale_columns(x: mx.array, factor: mx.array) -> mx.array:
    """Return x (…, C) times factor (C,), in the dtype of x.

    The factor stays float32 where x is bfloat16: 1.011 would become 1.008, and the sum of its gradient coarse.
    """
    return _scale_columns(x, factor) if backend() == "cpu" else (x * factor).astype(x.dtype)


# On a CPU


@cache
def _linear(activation: Activation) -> Callable[[mx.array, mx.array], mx.array]:
    @differentiable
    def forward(x: mx.array, weight: mx.array) -> mx.array:
        return activation(x) @ weight.T

    @forward.vjp
    def gradient(
        primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
    ) -> tuple[mx.array, mx.array]:
        x, weight = primals
        # Depends on the cotangent, so that mx.compile computes the activation again instead of keeping it.
        seen = x if activation is identity else activation(mx.depends([x], [cotangent])[0])
        d_weight = cotangent.reshape(-1, cotangent.shape[-1]).T @ seen.reshape(-1, x.shape[-1])
        (d_seen,) = mx.depends([cotangent @ weight], [d_weight])
        return _activation_gradient(activation, x, d_seen), d_weight.astype(weight.dtype)

    return forward


def _frozen_on_cpu(x: mx.array, matrix: mx.array | Packed, activation: Activation, adapter: Adapter | None) -> mx.array:
    packing = matrix[3:] if isinstance(matrix, Packed) else None
    frozen = matrix[:3] if isinstance(matrix, Packed) else (matrix,)
    if adapter is None:
        return _frozen_linear(activation, packing, None, None)(x, *frozen)
    keys = () if adapter.keys is None else (adapter.keys,)
    function = _frozen_linear(activation, packing, adapter.scale, adapter.dropout if keys else None)
    return function(x, *frozen, adapter.a, adapter.b, *keys)


@cache
def _frozen_linear(
    activation: Activation, packing: tuple[int, int] | None, scale: float | None, dropout: float | None
) -> Callable[..., mx.array]:
    """Return the function of (x, W or its three packed arrays, A, B, keys), as far as there are these."""
    num_frozen = 1 if packing is None else 3

    def whole(frozen: tuple[mx.array, ...]) -> mx.array:
        if packing is None:
            return frozen[0]
        numbers, scales, offsets = frozen
        return unpacked(Packed(numbers, scales, offsets, *packing))

    def shown(x: mx.array, keys: tuple[mx.array, ...]) -> mx.array:
        return x if dropout is None else dropped(x, keys[0], dropout)

    @differentiable
    def forward(x: mx.array, *arrays: mx.array) -> mx.array:
        frozen, small, keys = arrays[:num_frozen], arrays[num_frozen : num_frozen + 2], arrays[num_frozen + 2 :]
        seen = activation(x)
        out = seen @ whole(frozen).T
        if scale is None:
            return out
        # One operation adds where the small product is made.
        return mx.addmm(out, shown(seen, keys) @ small[0], small[1], alpha=scale)

    @forward.vjp
    def gradient(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> Any:
        x, *arrays = primals
        # Depends on the cotangent, so that mx.compile computes these again instead of keeping them.
        again, *frozen = mx.depends([x, *arrays[:num_frozen]], [cotangent])
        d_seen, slopes = cotangent @ whole(tuple(frozen)), list[mx.array]()
        if scale is not None:
            (a, b), keys = arrays[num_frozen : num_frozen + 2], tuple(arrays[num_frozen + 2 :])
            seen = shown(activation(again), keys)
            d_inner = scale * (cotangent @ b.T)
            d_b = scale * ((seen @ a).reshape(-1, a.shape[1]).T @ cotangent.reshape(-1, cotangent.shape[-1]))
            d_a = seen.reshape(-1, a.shape[0]).T @ d_inner.reshape(-1, a.shape[1])
            d_seen = mx.addmm(d_seen, d_inner, a.T) if dropout is None else d_seen + shown(d_inner @ a.T, keys)
            slopes = [d_a, d_b]
            (d_seen,) = mx.depends([d_seen], slopes)
            slopes += map(mx.zeros_like, keys)
        return [_activation_gradient(activation, x, d_seen), *map(mx.zeros_like, frozen), *slopes]

    return forward


def _activation_gradient(activation: Activation, x: mx.array, cotangent: mx.array) -> mx.array:
    if activation is identity:
        return cotangent.astype(x.dtype)
    gradient: mx.array = mx.vjp(activation, [x], [cotangent])[1][0]
    return gradient.astype(x.dtype)


@differentiable
def _squared_relu(x: mx.array) -> mx.array:
    return _fused_squared_relu(x)


@_squared_relu.vjp
def _squared_relu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return _squared_relu_gradient(x, cotangent)


_fused_squared_relu = compiled(formulas.squared_relu)


@compiled
def _squared_relu_gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    return (x + mx.abs(x)) * cotangent


@differentiable
def _scale_columns(x: mx.array, factor: mx.array) -> mx.array:
    return (x * factor).astype(x.dtype)


@_scale_columns.vjp
def _scale_columns_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    """Use the output, which what follows keeps anyway, so that x is not kept. A factor of 0 gets no gradient."""
    x, factor = primals
    sums = (cotangent.astype(factor.dtype) * output).reshape(-1, output.shape[-1]).sum(0)
    d_factor = mx.where(factor == 0, 0.0, sums / factor).astype(factor.dtype)
    (d_x,) = mx.depends([(cotangent * factor).astype(x.dtype)], [d_factor])
    return d_x, d_factor
